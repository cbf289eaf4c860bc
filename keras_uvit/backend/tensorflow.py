"""TensorFlow: variables that change in place; many devices of one machine by MirroredStrategy."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_uvit.backend.steps import AdamW as AdamW
from keras_uvit.backend.steps import blend as blend
from keras_uvit.backend.steps import compile_blocks as compile_blocks
from keras_uvit.backend.steps import constant as constant
from keras_uvit.backend.steps import fused_attention as fused_attention
from keras_uvit.backend.steps import guards_itself, is_ok
from keras_uvit.backend.steps import holding as holding
from keras_uvit.backend.steps import image_by_image as image_by_image
from keras_uvit.backend.steps import images_at_once as images_at_once
from keras_uvit.backend.steps import norm as norm
from keras_uvit.types import Array, Tensor


def has_accelerator() -> bool:
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


fuses_attention = has_accelerator


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return tf.function(function, jit_compile=True)


def normal_per_image(seeds: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tf.map_fn(
        lambda seed: tf.random.stateless_normal(shape, tf.stack([seed, tf.cast(step, "int32")])),
        seeds,
        fn_output_signature=tf.TensorSpec(shape, "float32"),
    )


def project(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    y = ops.matmul(x, kernel)
    return y if bias is None else y + bias


# Training -----------------------------------------------------------------------------------------


def train_step(model: Any, data: Any) -> dict[str, Tensor]:
    batch, optimizer, weights = model.unpack(data), model.optimizer, model.trainable_variables
    with tf.GradientTape() as tape:
        loss = model.loss_of(batch)
        scaled = optimizer.scale_loss(loss)
    # A label table's gradient comes as sparse slices, for which Keras' Adam takes another path,
    # off by 4e-3 of the largest weight after eight steps; dense ones agree with other backends.
    gradients = [
        g if g is None else tf.convert_to_tensor(g) for g in tape.gradient(scaled, weights)
    ]
    loss, gradients = _mean_over_replicas((loss, gradients))
    norm = model.gradient_norm(gradients)
    ok = is_ok(loss, norm)
    before = optimizer.iterations + 0
    if guards_itself(optimizer):
        optimizer.apply(_first_replica_only(gradients), weights)
    elif not tf.distribute.has_strategy():
        # The branch returns nothing: `apply` returns a variable, which no branch may.
        ops.cond(ok, lambda: (optimizer.apply(gradients, weights), None)[1], lambda: None)
    else:
        _apply_and_undo(optimizer, gradients, weights, ok)
    model.after_step(ok, before)
    return model.report(loss, norm)


def test_step(model: Any, data: Any) -> dict[str, Tensor]:
    batch = model.unpack(data)
    return model.test_report(batch, _mean_over_replicas(model.test_loss_of(batch)))


def _apply_and_undo(optimizer, gradients, weights, ok):
    """Under a strategy, even of one device, no update may stand in a branch: it is taken back."""
    variables = [*weights, *optimizer.variables]
    before = [tf.identity(v.value) for v in variables]
    optimizer.apply(_first_replica_only(gradients), weights)
    for variable, old in zip(variables, before):
        variable.assign(tf.where(ok, variable.value, old))


def _mean_over_replicas(tensors):
    if replicas() == 1:
        return tensors
    return tf.distribute.get_replica_context().all_reduce("MEAN", tensors)


def _first_replica_only(gradients):
    """Keras sums the replicas' gradients once more, after clipping; a product keeps NaN in all."""
    if replicas() == 1:
        return gradients
    index = tf.distribute.get_replica_context().replica_id_in_sync_group
    return [g if g is None else g * tf.cast(index == 0, g.dtype) for g in gradients]


# Many devices -------------------------------------------------------------------------------------


def initialize(
    address: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    raise NotImplementedError(
        "Several processes need JAX or PyTorch; TensorFlow trains on the devices of one machine: "
        "distribution.data_parallel()."
    )


def use_devices(devices: Sequence[str] | None = None) -> Any:
    strategy = tf.distribute.MirroredStrategy(devices)
    tf.distribute.experimental_set_strategy(strategy)
    return strategy


def replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    if replicas() == 1:
        return draw(shape)
    count, *rest = shape
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * count
    return draw((count * replicas(), *rest))[first : first + count]


def process() -> tuple[int, int]:
    return 0, 1


def data_shard() -> tuple[int, int]:
    return 0, 1


def synchronize(model: keras.Model) -> None:
    """Nothing to do: a mirrored variable is made equal on all devices."""


def pieces(variable: keras.Variable) -> list[tuple[list[int], np.ndarray]]:
    value = ops.convert_to_numpy(variable)
    return [([0] * value.ndim, value if _parts(variable) == 1 else value / _parts(variable))]


def assign(variable: keras.Variable, read: Callable[..., Array]) -> None:
    value = read((slice(None),) * len(variable.shape))
    variable.assign(value if _parts(variable) == 1 else value * _parts(variable))


def _parts(variable):
    """How many replicas a variable is the sum of: those of metrics; what is saved is the mean."""
    return replicas() if variable.aggregation == "sum" else 1


def barrier(name: str) -> None:
    """Nothing to do in one process."""


def any_process(flag: bool, step: int) -> bool:
    return flag


def catches_sigterm() -> bool:
    return False


def from_first(number: int) -> int:
    return number


def spread(array: Array, axis: int | None = 0, together: bool = True) -> Tensor:
    return ops.convert_to_tensor(array)


def whole(tensor: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor)


def alone(tensor: Tensor) -> Tensor:
    return tensor
