"""The recipe's optimizer."""

import keras
import numpy as np
from keras import ops

from keras_uvit import backend


@keras.saving.register_keras_serializable("keras_uvit")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """rate min(k / warmup_steps, 1), then maybe half a cosine to 0; k counts optimizer steps.

    Keras' own `CosineDecay` is a branch, which TensorFlow traces again for each weight, a fifth
    of the time before the first step; and it counts the batches that are accumulated. Optimizer
    step k is made at batch (k + 1) n - 1 (from 0), not at batch k n: a schedule stretched n times
    would run ahead by up to one step.

    Args:
        learning_rate: float, after the warm-up.
        warmup_steps: int >= 0.
        decay_steps: int or None. Steps from there to 0.
        batches: int n, batches per optimizer step.
    """

    def __init__(self, learning_rate, warmup_steps=0, decay_steps=None, batches=1):
        super().__init__()
        self.config = dict(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            batches=batches,
        )

    def __call__(self, step):
        rate, warmup_steps, decay_steps, batches = self.config.values()
        k = ops.cast(ops.convert_to_tensor(step) // batches, "float32")
        if warmup_steps:
            rate = rate * ops.minimum(k / warmup_steps, 1.0)
        if decay_steps:
            done = ops.clip((k - warmup_steps) / decay_steps, 0.0, 1.0)
            rate = rate * 0.5 * (1.0 + ops.cos(np.pi * done))
        return rate

    def get_config(self):
        return dict(self.config)


@keras.saving.register_keras_serializable("keras_uvit")
class AdamW(backend.AdamW):
    """`keras.optimizers.AdamW`, under one name in files of all backends."""


def adamw(
    learning_rate=2e-4,
    beta_1=0.99,
    beta_2=0.999,
    weight_decay=0.03,
    warmup_steps=2500,
    decay_steps=None,
    gradient_accumulation_steps=None,
    clipnorm=None,
):
    """AdamW as in the published recipes: decay on every weight, linear warm-up from 0.

    Keras adds epsilon to sqrt(v), PyTorch (there the update is its own, fused) to the
    bias-corrected sqrt(v / (1 - beta_2^k)); at step k Keras' 1e-8 acts like PyTorch's 1e-8 /
    sqrt(1 - beta_2^k): 1e-7 at the first step for beta_2 = 0.99, equal later. Both are far below
    any gradient that matters, so 1e-8 it is.

    Args:
        learning_rate: float, after the warm-up.
        beta_1, beta_2: floats in [0, 1).
        weight_decay: float, decoupled: each step also subtracts learning_rate * weight_decay * w.
        warmup_steps: int. Optimizer step k (from 0) has learning_rate * min(k / warmup_steps, 1).
        decay_steps: int or None. Cosine decay to 0 over so many steps after the warm-up; None
            keeps the rate constant, as published.
        gradient_accumulation_steps: int or None. Batches per optimizer step; all counts of steps
            here are optimizer steps.
        clipnorm: float or None. Largest norm of each weight's gradient.

    Returns:
        `AdamW`.
    """
    schedule = learning_rate
    if warmup_steps or decay_steps:
        batches = gradient_accumulation_steps or 1
        schedule = WarmUp(learning_rate, warmup_steps, decay_steps, batches)
    return AdamW(
        schedule,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=1e-8,
        weight_decay=weight_decay,
        gradient_accumulation_steps=gradient_accumulation_steps,
        clipnorm=clipnorm,
    )
