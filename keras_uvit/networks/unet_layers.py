"""The layers of the U-Net: residual block, attention of pixels to pixels or to text.

Kernels start as PyTorch's, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases at zero. The last layer of
each block starts at zero, so that a new block adds nothing.
"""

from collections.abc import Callable
from typing import Any

from keras import initializers, layers, ops

from keras_uvit import backend
from keras_uvit.networks.basics import Dense, DType, Shape, rematerialized, serializable
from keras_uvit.types import Config, Tensor

RESAMPLINGS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "down": lambda x: ops.average_pool(x, 2, 2, data_format="channels_last"),
    "up": lambda x: ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2),
}


def kernel_init(zero: bool = False) -> str | initializers.Initializer:
    return "zeros" if zero else initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def conv(dim: int, size: int, dtype: DType, name: str, zero: bool = False) -> layers.Conv2D:
    """A convolution that keeps the size."""
    return layers.Conv2D(
        dim,
        size,
        padding="same",
        data_format="channels_last",
        kernel_initializer=kernel_init(zero),
        dtype=dtype,
        name=name,
    )


def linear(
    dim: int, dtype: DType, name: str, zero: bool = False, lora: Config | None = None
) -> Dense:
    return Dense(dim, lora, kernel_initializer=kernel_init(zero), dtype=dtype, name=name)


def group_norm(dim: int, dtype: DType, name: str) -> layers.GroupNormalization:
    """Of 32 groups, or the most that divide `dim` and have four channels; epsilon 1e-5.

    A group of one channel would lose its mean, which at 2x2 pixels is most of what there is.
    """
    groups = max(n for n in range(1, 33) if dim % n == 0 and (n == 1 or dim // n >= 4))
    return layers.GroupNormalization(groups, epsilon=1e-5, dtype=dtype, name=name)


@serializable
class UNetBlock(layers.Layer):
    """A residual block that the time embedding e modulates, and that may change the size.

    x' + conv(silu((1 + scale(e)) norm(h) + shift(e))), h = conv(resampled silu(norm(x))), x' the
    resampled x, through a 1x1 convolution where widths differ; scale and shift are linear in e.

    Dhariwal and Nichol 2021, arXiv 2105.05233, Section 3.1: adaptive group norm y_s norm(h) + y_b,
    here with the constant part of y_s written out.

    Args:
        dim: int. Width of the result.
        resample: "down" (mean of 2x2 pixels), "up" (each pixel four times) or None.
        remat: bool. Recompute the block in the backward pass instead of storing it.

    Call arguments:
        x: `(B, H, W, C)`.
        time: `(B, E)`, the embedding after its SiLU.

    Returns:
        `(B, H, W, dim)`, H and W halved or doubled.
    """

    def __init__(
        self, dim: int, resample: str | None = None, remat: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.resample = resample
        self.remat = remat

    def build(self, x_shape: Shape, time_shape: Shape | None = None) -> None:
        policy, width = self.dtype_policy, x_shape[-1]
        inside = self.compute_output_shape(x_shape)
        self.norm_1 = group_norm(width, policy, "norm_1")
        self.conv_1 = conv(self.dim, 3, policy, "conv_1")
        self.modulation = linear(2 * self.dim, policy, "modulation")
        self.norm_2 = group_norm(self.dim, policy, "norm_2")
        self.conv_2 = conv(self.dim, 3, policy, "conv_2", zero=True)
        for layer in (self.norm_1, self.conv_1):
            layer.build(x_shape)
        for layer in (self.norm_2, self.conv_2):
            layer.build(inside)
        self.modulation.build(time_shape)
        self.shortcut: layers.Layer | None = None
        if width != self.dim:
            self.shortcut = conv(self.dim, 1, policy, "shortcut")
            self.shortcut.build(x_shape)

    def call(self, x: Tensor, time: Tensor, training: bool = False) -> Tensor:
        if self.remat and training:
            return rematerialized(self._body, x, time)
        return self._body(x, time)

    def _body(self, x, time):
        resampled = RESAMPLINGS[self.resample]
        h = self.conv_1(resampled(ops.silu(self.norm_1(x))))  # (B, H', W', dim)
        scale, shift = ops.split(self.modulation(time)[:, None, None], 2, axis=-1)  # (B, 1, 1, dim)
        h = self.conv_2(ops.silu((1 + scale) * self.norm_2(h) + shift))
        x = resampled(x)
        return h + (x if self.shortcut is None else self.shortcut(x))

    def compute_output_shape(self, x_shape: Shape, time_shape: Shape | None = None) -> Shape:
        batch, height, width, _ = x_shape
        by = {None: (1, 1), "down": (1, 2), "up": (2, 1)}[self.resample]
        return (batch, height * by[0] // by[1], width * by[0] // by[1], self.dim)


@serializable
class UNetAttention(layers.Layer):
    """x + attention of every pixel to all pixels, or to the tokens of a text.

    softmax(Q K^T / sqrt(K)) V, softmax in float32, Q of norm(x); K and V are of norm(x) as well,
    or of the context (Rombach et al. 2022, arXiv 2112.10752, Section 3.3).

    Args:
        num_heads: int N, divides C.
        remat: bool; see `UNetBlock`.
        lora: dict or None, of the pairs of its projections; see `networks.lora`.

    Call arguments:
        x: `(B, H, W, C)`.
        context: `(B, length, width)`, or None for self-attention.

    Returns:
        `(B, H, W, C)`.
    """

    def __init__(
        self, num_heads: int, remat: bool = False, lora: Config | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.remat = remat
        self.lora = lora

    def build(self, x_shape: Shape, context_shape: Shape | None = None) -> None:
        policy, dim = self.dtype_policy, x_shape[-1]
        self.norm = group_norm(dim, policy, "norm")
        self.query = linear(dim, policy, "query", lora=self.lora)
        self.key_value = linear(2 * dim, policy, "key_value", lora=self.lora)
        self.proj = linear(dim, policy, "proj", zero=True, lora=self.lora)
        for layer in (self.norm, self.query, self.proj):
            layer.build(x_shape)
        self.key_value.build(context_shape or x_shape)

    def call(self, x: Tensor, context: Tensor | None = None, training: bool = False) -> Tensor:
        inputs = (x,) if context is None else (x, context)
        if self.remat and training:
            return rematerialized(self._body, *inputs)
        return self._body(*inputs)

    def _body(self, x, context=None):
        height, width, dim = x.shape[1:]
        heads = (self.num_heads, dim // self.num_heads)
        pixels = ops.reshape(self.norm(x), (-1, height * width, dim))  # (B, L, C)
        tokens = pixels if context is None else context  # (B, M, width)
        query = ops.reshape(self.query(pixels), (-1, height * width, *heads))  # (B, L, N, K)
        both = ops.reshape(self.key_value(tokens), (-1, tokens.shape[1], 2, *heads))
        h = backend.attention(query, both[:, :, 0], both[:, :, 1])  # (B, L, N, K)
        return x + self.proj(ops.reshape(h, (-1, height, width, dim)))

    def compute_output_shape(self, x_shape: Shape, context_shape: Shape | None = None) -> Shape:
        return x_shape
