"""Where a patch is: vectors added to the tokens, or a rotation of queries and keys."""

from typing import Any

import numpy as np
from keras import layers, ops

from keras_uvit import backend
from keras_uvit.networks.basics import Shape, normal_init, serializable
from keras_uvit.types import Tensor


@serializable
class PositionEmbedding(layers.Layer):
    """Adds a learned vector to every token: N(0, 0.02^2), 1-D over all tokens, extras first.

    Call arguments:
        tokens: `(B, L, D)`.

    Returns:
        `(B, L, D)`.
    """

    def build(self, input_shape: Shape) -> None:
        self.embeddings = self.add_weight(
            shape=input_shape[1:], initializer=normal_init(), name="embeddings"
        )

    def call(self, tokens: Tensor) -> Tensor:
        return tokens + ops.cast(self.embeddings, tokens.dtype)


@serializable
class SinusoidalPositions(layers.Layer):
    """Adds fixed 2-D sinusoids to the patch tokens: half the width for rows, half for columns.

    The extra tokens in front (time, label, context) get none: each kind has its own embedding.

    Args:
        grid: pair of ints `(H/P, W/P)`.

    Call arguments:
        tokens: `(B, L, D)`, the last `H/P * W/P` of them patches; D divisible by 4.

    Returns:
        `(B, L, D)`.
    """

    def __init__(self, grid: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = tuple(grid)

    def build(self, input_shape: Shape) -> None:
        _, length, dim = input_shape
        if dim % 4:
            raise ValueError(
                'position="sinusoidal" splits the width in four (rows and columns, cosine and '
                f"sine). Received: hidden_dim={dim}; choose a multiple of 4."
            )
        table = [f(a) for a in _patch_angles(self.grid, dim // 4) for f in (np.cos, np.sin)]
        self.table = _after_extras(np.concatenate(table, axis=-1), length)

    def call(self, tokens: Tensor) -> Tensor:
        return tokens + ops.cast(self.table, tokens.dtype)


def rotary_turns(grid: tuple[int, int], length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """What turns the complex numbers that a head's query or key is, token by token.

    K / 4 of them turn by (row f_i), the others by (column f_i), f_i = 10000^(-4 i / K), so that a
    product of query and key depends on where the two are to each other, and not on where they are.
    The extra tokens in front do not turn. Su et al. 2021, arXiv 2104.09864, Eq. 15, for each axis.

    Args:
        grid: pair of ints `(H/P, W/P)`.
        length: int L, of all tokens.
        head_dim: int K, divisible by 4.

    Returns:
        cosines and sines of the angles, `(L, 1, K/2)` float32 each.
    """
    if head_dim % 4:
        raise ValueError(
            'position="rotary" splits each head in four (rows and columns, real and imaginary). '
            f"Received: hidden_dim / num_heads = {head_dim}; choose a multiple of 4."
        )
    angles = np.concatenate(_patch_angles(grid, head_dim // 4), axis=-1)
    angles = _after_extras(angles, length)[:, None]
    cos, sin = (backend.constant(f(angles).astype("float32")) for f in (np.cos, np.sin))
    return cos, sin


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x times cos + i sin: component j of a head is real, j + K/2 its imaginary part.

    In float32, whatever the dtype of x; `(B, L, N, K)` to `(B, L, N, K)`. `turns` are those of
    `rotary_turns`.
    """
    cos, sin = turns
    real, imaginary = ops.split(ops.cast(x, "float32"), 2, axis=-1)  # (B, L, N, K/2)
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return ops.cast(ops.concatenate(turned, axis=-1), x.dtype)


def _patch_angles(grid, count):
    """Of rows and of columns, patch by patch, by `count` frequencies from 1 to almost 1e-4."""
    frequencies = 10000.0 ** (-np.arange(count) / count)
    axes = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    return [axis.reshape(-1, 1) * frequencies for axis in axes]


def _after_extras(table, length):
    """`table`, a row a patch, below zeros for the extra tokens."""
    return np.pad(table, ((length - len(table), 0), (0, 0)))
