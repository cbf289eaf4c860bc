"""Images to patch tokens and back."""

from typing import Any

from keras import layers, ops

from keras_uvit.networks.basics import Shape
from keras_uvit.networks.layers import Dense, fan_in_init, serializable
from keras_uvit.types import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) -> (B, H/P * W/P, P * P * C); inside a patch: row, column, channel."""
    p, (h, w, c) = patch_size, images.shape[1:]
    x = ops.reshape(images, (-1, h // p, p, w // p, p, c))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (B, H/P, W/P, P, P, C)
    return ops.reshape(x, (-1, (h // p) * (w // p), p * p * c))


def unpatchify(patches: Tensor, patch_size: int, image_shape: tuple[int, ...]) -> Tensor:
    """(B, H/P * W/P, P * P * C) -> (B, H, W, C), the inverse of `patchify`."""
    p, (h, w, c) = patch_size, image_shape
    x = ops.reshape(patches, (-1, h // p, w // p, p, p, c))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (B, H/P, P, W/P, P, C)
    return ops.reshape(x, (-1, h, w, c))


@serializable
class PatchEmbedding(layers.Layer):
    """Cuts an image into patches and projects each one to a token.

    The published convolution of kernel P and stride P, written as what it is: a dense layer on
    flattened patches. Initialised like PyTorch's convolution.

    Args:
        hidden_dim: int. Width D of a token.
        patch_size: int. Side P of a patch in pixels; divides H and W.

    Call arguments:
        images: `(B, H, W, C)`.

    Returns:
        `(B, H/P * W/P, D)`.
    """

    def __init__(self, hidden_dim: int, patch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.patch_size = patch_size

    def build(self, input_shape: Shape) -> None:
        fan_in = self.patch_size**2 * input_shape[-1]
        self.proj = Dense(
            self.hidden_dim,
            kernel_initializer=fan_in_init(fan_in),
            bias_initializer=fan_in_init(fan_in),
            dtype=self.dtype_policy,
            name="proj",
        )
        self.proj.build((None, None, fan_in))

    def call(self, images: Tensor) -> Tensor:
        return self.proj(patchify(images, self.patch_size))


@serializable
class ConvPatchEmbedding(layers.Layer):
    """Stride-2 3x3 convolutions with GELU, then a 1x1 convolution: the paper's ablation.

    Each convolution halves the image and the last has the full width, so P must be a power of two;
    P = 1 has one 3x3 convolution of stride 1. Arguments and shapes as in `PatchEmbedding`.
    """

    def __init__(self, hidden_dim: int, patch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if patch_size & (patch_size - 1):
            raise ValueError(
                'patch_embed="conv" halves the image step by step, so patch_size must be a power '
                f'of two. Received: patch_size={patch_size}. Use patch_embed="linear".'
            )
        self.hidden_dim = hidden_dim
        self.patch_size = patch_size

    def build(self, input_shape: Shape) -> None:
        halvings = self.patch_size.bit_length() - 1
        kernels = [(3, 2)] * halvings or [(3, 1)]  # (kernel size, stride)
        widths = [max(8, self.hidden_dim >> i) for i in range(len(kernels) - 1, -1, -1)]
        self.convs, shape = [], tuple(input_shape)
        for i, ((size, stride), width) in enumerate(zip(kernels + [(1, 1)], widths + widths[-1:])):
            fan_in = size * size * shape[-1]
            conv = layers.Conv2D(
                width,
                size,
                stride,
                "same",
                data_format="channels_last",
                kernel_initializer=fan_in_init(fan_in),
                bias_initializer=fan_in_init(fan_in),
                dtype=self.dtype_policy,
                name=f"conv_{i}",
            )
            conv.build(shape)
            shape = conv.compute_output_shape(shape)
            self.convs.append(conv)

    def call(self, images: Tensor) -> Tensor:
        x = images
        for conv in self.convs[:-1]:
            x = ops.gelu(conv(x), approximate=False)
        x = self.convs[-1](x)  # (B, H/P, W/P, D)
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], self.hidden_dim))


@serializable
class Unpatchify(layers.Layer):
    """Patches back to an image; see `unpatchify`. `(B, L, P * P * C)` -> `(B, H, W, C)`."""

    def __init__(self, patch_size: int, image_shape: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.image_shape = tuple(image_shape)

    def call(self, patches: Tensor) -> Tensor:
        return unpatchify(patches, self.patch_size, self.image_shape)
