"""What the backends share: the contract of their training steps, and sums over all weights.

They differentiate and carry state; what is computed is the model's, in keras.ops:

    unpack(data)               -> the batch, a dict
    loss_of(batch)             -> float32 scalar; draws its own randomness
    test_loss_of(batch)        -> the same for evaluation
    gradient_norm(gradients)   -> float32 scalar
    after_step(ok, before)     -> counters and moving average; `before`: optimizer.iterations before
    report(loss, norm)         -> the logs
    test_report(batch, loss)   -> the logs of evaluation

A step whose loss or gradient norm is not finite changes no weight and no optimizer slot.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit.types import Tensor

AdamW = keras.optimizers.AdamW


def is_ok(loss: Tensor, norm: Tensor) -> Tensor:
    return ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))


def guards_itself(optimizer: keras.optimizers.Optimizer) -> bool:
    """A loss-scale optimizer skips by itself, and must see such a step, to lower its scale."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def constant(array: np.ndarray) -> Tensor:
    return array  # a tensor would belong to the program that is being written


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.dot_product_attention(query, key, value)


def image_by_image(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return attend(query, key, value)


def images_at_once(size: int) -> int:
    return 64


def holding(network: keras.Model, weights: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Within it the network's variables have these values."""
    return keras.StatelessScope(state_mapping=list(zip(network.variables, weights)))


def compile_blocks(network: keras.Model, wanted: bool) -> None:
    """Nothing to do: XLA compiles whole steps."""


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all numbers in them, float32."""
    return ops.sqrt(sum(ops.sum(ops.square(ops.cast(t, "float32"))) for t in tensors))


def blend(
    averages: Sequence[keras.Variable], weights: Sequence[keras.Variable], decay: Tensor
) -> None:
    """average <- decay average + (1 - decay) weight, pair by pair of variables.

    Written as a step towards the weight, which rounds numbers of the weight's size once.
    """
    for average, weight in zip(averages, weights, strict=True):
        average.assign(average.value + (1.0 - decay) * (weight.value - average.value))
