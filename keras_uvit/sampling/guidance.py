"""Classifier-free guidance: how the loop of a sampler asks the network."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_uvit import backend
from keras_uvit.types import Tensor


def denoiser(
    model: Any,
    network: keras.Model,
    weights: Sequence[Tensor],
    condition: dict[str, Tensor],
    unconditional: dict[str, Tensor],
    scale: Tensor,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function `(x, t, span) -> x0` of guided sampling: D_u + w (D_c - D_u).

    D_c is the network's estimate of x0 with the condition and D_u the one without, both from one
    batch of double size (Ho and Salimans 2022, arXiv 2207.12598, Eq. 6, of x0).

    Args:
        model: `DiffusionModel`, whose `objective` says what an output means.
        network: the model's `network` or `ema_network`.
        weights: values of the network's variables, which may be traced.
        condition: dict of the network's conditions, one row for each image.
        unconditional: the same for D_u; empty where this part of the loop is not guided.
        scale: w, a float32 scalar, which may be traced.

    Returns:
        A function of x `(B, H, W, C)` and scalars t and span, which returns x0 like x.
    """
    sides = [condition, unconditional] if unconditional else [condition]
    conditions = {key: ops.concatenate([side[key] for side in sides]) for key in condition}

    def denoise(x, t, span):
        x = ops.concatenate([x] * len(sides))
        times, spans, scales = (ops.repeat(value, x.shape[0]) for value in (t, span, scale))
        inputs = {**model.inputs(x, times, spans, scales), **conditions}
        with backend.holding(network, weights):
            output = ops.cast(network(inputs, training=False), "float32")
        x0 = model.objective.denoised(x, times, output)
        if not unconditional:
            return x0
        with_condition, without = ops.split(x0, 2)
        return without + scale * (with_condition - without)

    return denoise
