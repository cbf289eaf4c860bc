"""A sampler written by JAX: StableHLO by `jax.export`, a SavedModel of TensorFlow by `jax2tf`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

NEEDS: dict[str, dict[str, str]] = {"stablehlo": {}, "tf_saved_model": {"tensorflow": "tensorflow"}}
PLATFORMS = ("cpu", "cuda", "tpu")  # the file runs on each


def stablehlo(program: Any, path: Path) -> None:
    """What `jax.export.deserialize` reads; its `call` takes the inputs by their names."""
    from jax import export

    values = [[w.value for w in network.variables] for network in program.networks]
    specs = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in program.inputs.items()}
    function = jax.jit(lambda **inputs: program(values, **inputs))
    path.write_bytes(export.export(function, platforms=PLATFORMS)(**specs).serialize())


def tf_saved_model(program: Any, path: Path) -> None:
    """The weights are variables of the SavedModel, its program StableHLO."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    names, module = list(program.inputs), tf.Module()
    module.values = [
        [tf.Variable(np.asarray(w.value)) for w in network.variables]
        for network in program.networks
    ]
    converted = jax2tf.convert(
        lambda values, *inputs: program(values, **dict(zip(names, inputs))),
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    specs = [tf.TensorSpec(v.shape, v.dtype, name=k) for k, v in program.inputs.items()]
    module.sample = tf.function(
        lambda *inputs: {"images": converted([list(part) for part in module.values], *inputs)},
        autograph=False,
        input_signature=specs,
    )
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.sample})


WRITERS = {"stablehlo": stablehlo, "tf_saved_model": tf_saved_model}
