"""Gradients on each backend, and what the backward pass keeps, as the benchmark counts it."""

import os
from pathlib import Path

import keras

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def gradients(loss, variables):
    """Of `loss()` by variables; one program where there is XLA."""
    if keras.config.backend() == "jax":
        import jax

        def of(values):
            with keras.StatelessScope(zip(variables, values)):
                return loss()

        return jax.jit(jax.grad(of))([variable.value for variable in variables])
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def differentiate():
            with tf.GradientTape() as tape:
                value = loss()
            return tape.gradient(value, [variable.value for variable in variables])

        return differentiate()
    for variable in variables:
        variable.value.grad = None
    loss().backward()
    return [variable.value.grad for variable in variables]


def kept_bytes(network, batch, monkeypatch):
    """Bytes that the backward pass keeps beside the weights."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the benchmark adds one
    import memory

    return getattr(memory, f"kept_by_{keras.config.backend()}")(network, batch)
