"""The autoencoder of Stable Diffusion: pixels to latents and back."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import keras
import numpy as np
from keras import layers, ops

from keras_uvit import backend, pixels
from keras_uvit.convert import load_torch_weights
from keras_uvit.convert.files import TORCH
from keras_uvit.inference import (
    DAMAGE,
    Frozen,
    fingerprint,
    load_keras_weights,
    naming_missing_classes,
    own_defaults,
)
from keras_uvit.networks.basics import DType, Shape
from keras_uvit.networks.layers import serializable
from keras_uvit.pixels import PerChannel, from_unit_range, per_channel, to_unit_range
from keras_uvit.types import Array, Config, PathLike, Tensor

# In a diffusers folder, the first of these that is there.
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
DIFFUSERS_FILES = [f"diffusion_pytorch_model{ending}" for ending in ENDINGS]


def group_norm(name: str) -> layers.GroupNormalization:
    return layers.GroupNormalization(groups=32, epsilon=1e-6, name=name)


@serializable
class ResidualBlock(layers.Layer):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution of x where widths differ.

    Call arguments: x `(B, H, W, C)`. Returns `(B, H, W, dim)`.
    """

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.norm_1, self.norm_2 = group_norm("norm_1"), group_norm("norm_2")
        self.conv_1 = layers.Conv2D(dim, 3, padding="same", name="conv_1")
        self.conv_2 = layers.Conv2D(dim, 3, padding="same", name="conv_2")
        self.shortcut: layers.Layer | None = None

    def build(self, shape: Shape) -> None:
        inside = (*shape[:-1], self.dim)
        for layer, given in [
            (self.norm_1, shape),
            (self.conv_1, shape),
            (self.norm_2, inside),
            (self.conv_2, inside),
        ]:
            layer.build(given)
        if shape[-1] != self.dim:
            self.shortcut = layers.Conv2D(self.dim, 1, name="shortcut")
            self.shortcut.build(shape)

    def call(self, x: Tensor) -> Tensor:
        h = self.conv_1(ops.silu(self.norm_1(x)))
        h = self.conv_2(ops.silu(self.norm_2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))

    def compute_output_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.dim)


@serializable
class PixelAttention(layers.Layer):
    """x + one-head self-attention over all pixels of norm(x).

    Call arguments: x `(B, H, W, C)`. Returns the same shape.
    """

    def build(self, shape: Shape) -> None:
        self.norm = group_norm("norm")
        self.norm.build(shape)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, layers.Conv2D(shape[-1], 1, name=name))
            getattr(self, name).build(shape)

    def call(self, x: Tensor) -> Tensor:
        batch, height, width, dim = ops.shape(x)
        h = self.norm(x)
        heads = (batch, height * width, 1, dim)
        q, k, v = (ops.reshape(conv(h), heads) for conv in (self.q, self.k, self.v))
        h = ops.reshape(backend.attention(q, k, v), (batch, height, width, dim))
        return x + self.proj_out(h)

    def compute_output_shape(self, shape: Shape) -> Shape:
        return shape


@serializable
class Downsample(layers.Layer):
    """Half the size: a 3x3 convolution of stride 2, one row of zeros below and one at the right.

    Call arguments: x `(B, H, W, C)`. Returns `(B, H/2, W/2, C)`.
    """

    def build(self, shape: Shape) -> None:
        self.pad = layers.ZeroPadding2D(((0, 1), (0, 1)))
        self.conv = layers.Conv2D(shape[-1], 3, strides=2, name="conv")
        self.conv.build(shape)

    def call(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))

    def compute_output_shape(self, shape: Shape) -> Shape:
        return (shape[0], *(n and n // 2 for n in shape[1:3]), shape[3])


@serializable
class Upsample(layers.Layer):
    """Twice the size: each pixel repeated, then a 3x3 convolution.

    Call arguments: x `(B, H, W, C)`. Returns `(B, 2 H, 2 W, C)`.
    """

    def build(self, shape: Shape) -> None:
        self.conv = layers.Conv2D(shape[-1], 3, padding="same", name="conv")
        self.conv.build(shape)

    def call(self, x: Tensor) -> Tensor:
        return self.conv(ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2))

    def compute_output_shape(self, shape: Shape) -> Shape:
        return (shape[0], *(n and 2 * n for n in shape[1:3]), shape[3])


def _middle(x, dim):
    x = ResidualBlock(dim, name="mid_block_1")(x)
    x = PixelAttention(name="mid_attention")(x)
    return ResidualBlock(dim, name="mid_block_2")(x)


def _output(x, channels):
    x = layers.Activation("silu", name="act_out")(group_norm("norm_out")(x))
    return layers.Conv2D(channels, 3, padding="same", name="conv_out")(x)


def encoder(
    base_dim: int,
    multipliers: Sequence[int],
    num_res_blocks: int,
    latent_channels: int,
    image_channels: int,
) -> keras.Model:
    """Images `(B, H, W, C)` in [-1, 1] to moments `(B, H/f, W/f, 2 latent_channels)`."""
    x = image = layers.Input((None, None, image_channels), name="image")
    x = layers.Conv2D(base_dim, 3, padding="same", name="conv_in")(x)
    for i, multiplier in enumerate(multipliers):
        if i:
            x = Downsample(name=f"downsample_{i - 1}")(x)
        for j in range(num_res_blocks):
            x = ResidualBlock(base_dim * multiplier, name=f"block_{i}_{j}")(x)
    x = _output(_middle(x, base_dim * multipliers[-1]), 2 * latent_channels)
    x = layers.Conv2D(2 * latent_channels, 1, name="quant_conv")(x)
    return keras.Model(image, x, name="encoder")


def decoder(
    base_dim: int,
    multipliers: Sequence[int],
    num_res_blocks: int,
    latent_channels: int,
    image_channels: int,
) -> keras.Model:
    """Latents `(B, h, w, latent_channels)`, unscaled, to images `(B, f h, f w, C)`."""
    x = latent = layers.Input((None, None, latent_channels), name="latent")
    x = layers.Conv2D(latent_channels, 1, name="post_quant_conv")(x)
    x = layers.Conv2D(base_dim * multipliers[-1], 3, padding="same", name="conv_in")(x)
    x = _middle(x, base_dim * multipliers[-1])
    for i, multiplier in reversed(list(enumerate(multipliers))):
        for j in range(num_res_blocks + 1):
            x = ResidualBlock(base_dim * multiplier, name=f"block_{i}_{j}")(x)
        if i:
            x = Upsample(name=f"upsample_{i}")(x)
    return keras.Model(latent, _output(x, image_channels), name="decoder")


def _without_ending(name):
    for ending in (".weights.h5", ".safetensors", *TORCH):
        name = name.removesuffix(ending)
    return name


@keras.saving.register_keras_serializable("keras_uvit")
class AutoencoderKL(keras.Model):
    """The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

    An image becomes the mean and log-variance of a normal distribution of latents, its moments.
    The default arguments are Stable Diffusion 1's, 8 times smaller latents of 4 channels, 83.7 M
    weights. Frozen: it is used, not trained.

    Args:
        base_dim: width of the outermost level, a multiple of 32.
        multipliers: widths of the levels over `base_dim`; each but the last halves the size.
        num_res_blocks: residual blocks a level of the encoder; the decoder has one more.
        latent_channels: channels of the latents.
        image_channels: channels of the images.
        scale: float, what latents are multiplied by to have variance 1: 0.18215 on ImageNet,
            0.23010 for the COCO models; or one for each channel. It must be the diffusion model's
            `latent_scale`.
        shift: float, what is subtracted before, or one for each channel: its `latent_shift`.
        id: name of the weights, kept in caches and records.

    Call arguments: images `(B, H, W, C)` in [-1, 1]; returns them encoded to the mean and decoded.

    Example:
        >>> tiny = AutoencoderKL(base_dim=32, multipliers=(1, 1), num_res_blocks=1)
        >>> tiny.encode(np.zeros((1, 16, 24, 3), "uint8"), verbose=0).shape
        (1, 8, 12, 8)
    """

    def __init__(
        self,
        base_dim: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 4,
        image_channels: int = 3,
        scale: PerChannel = 0.18215,
        shift: PerChannel = 0.0,
        id: str = "random",
        name: str = "autoencoder_kl",
        dtype: DType = "float32",
    ) -> None:
        if base_dim % 32:
            raise ValueError(f"base_dim must be a multiple of 32. Received: {base_dim}.")
        if not multipliers or num_res_blocks < 1:
            raise ValueError(
                "There is at least one level, with one block. Received: "
                f"multipliers={multipliers}, num_res_blocks={num_res_blocks}."
            )
        super().__init__(name=name, dtype=dtype)
        self.config: Config = {
            "base_dim": base_dim,
            "multipliers": tuple(multipliers),
            "num_res_blocks": num_res_blocks,
            "latent_channels": latent_channels,
            "image_channels": image_channels,
        }
        self.scale = per_channel(scale, "scale", True, latent_channels)
        self.shift, self.id = per_channel(shift, "shift", channels=latent_channels), id
        self.factor = 2 ** (len(multipliers) - 1)
        with own_defaults(dtype):
            self.encoder, self.decoder = encoder(**self.config), decoder(**self.config)
        self._encode, self._decode = Frozen(self.encoder), Frozen(self.decoder)
        self.trainable = False
        self.built = True

    @classmethod
    def from_file(cls, path: PathLike, **arguments: Any) -> Self:
        """With weights from a file; its name becomes the `id`.

        Args:
            path: the published program's `autoencoder_kl.pth` or `autoencoder_kl_ema.pth`, a
                diffusers folder or its `diffusion_pytorch_model.safetensors`, Keras weights
                (`.weights.h5`), or an autoencoder that `save` wrote (`.keras`).
            **arguments: of the class: `scale` and `shift` other than those of a saved autoencoder;
                for other files also another architecture than Stable Diffusion 1's.

        Raises:
            FileNotFoundError, ImportError, ValueError: see `convert.load_torch_weights`.
        """
        path = Path(path).resolve()
        if path.is_dir():
            there = [path / name for name in DIFFUSERS_FILES if (path / name).is_file()]
            path = there[0] if there else path / DIFFUSERS_FILES[0]
        if not path.is_file():
            raise FileNotFoundError(f"No weight file at {path}.")
        if path.suffix == ".keras":
            return cls._saved(path, arguments)
        name = path.parent.name if path.name in DIFFUSERS_FILES else _without_ending(path.name)
        autoencoder = cls(**{"id": name, **arguments})
        if path.name.endswith(".weights.h5"):
            load_keras_weights(autoencoder, path)
        else:
            load_torch_weights(autoencoder, path)
        return autoencoder

    @classmethod
    def _saved(cls, path, arguments):
        try:
            with naming_missing_classes(path):
                autoencoder = keras.saving.load_model(path, compile=False)
        except (*DAMAGE, BadZipFile) as error:
            raise ValueError(f"{path.name} is damaged or no autoencoder: {error}") from error
        if not isinstance(autoencoder, cls):
            raise ValueError(
                f"Expected an AutoencoderKL in {path.name}. Received: {type(autoencoder).__name__}."
            )
        for key in arguments.keys() & {"scale", "shift"}:
            channels = autoencoder.config["latent_channels"]
            setattr(autoencoder, key, per_channel(arguments[key], key, key == "scale", channels))
        return autoencoder

    @property
    def fingerprint(self) -> str:
        """Of the encoder's weights: what latents depend on. (Decoders may be exchanged.)"""
        return fingerprint(self.encoder)

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the moments of one image of shape (H, W, C).

        Raises:
            ValueError: if H or W is no multiple of `factor`, or C another number.
        """
        height, width, channels = image_shape
        if channels != self.config["image_channels"]:
            raise ValueError(
                f"The autoencoder takes {self.config['image_channels']} channels. "
                f"Received: images of {channels}."
            )
        if height % self.factor or width % self.factor:
            near = [max(1, round(n / self.factor)) * self.factor for n in (height, width)]
            raise ValueError(
                f"Height and width must be multiples of {self.factor}. Received: {height} x "
                f"{width}; the nearest are {near[0]} x {near[1]}."
            )
        latent = (height // self.factor, width // self.factor)
        return (*latent, 2 * self.config["latent_channels"])

    def encode(self, images: Array, batch_size: int = 8, verbose: int = 1) -> np.ndarray:
        """Moments of images.

        Args:
            images: `(n, H, W, C)` uint8, or float in [-1, 1]; H and W multiples of `factor`.
            batch_size: int, images at a time. Memory grows with it; 1 needs least.
            verbose: 0 or 1. Progress bar.

        Returns:
            `(n, H / factor, W / factor, 2 latent_channels)` float32: mean, then log-variance.

        Raises:
            ValueError, TypeError: if the images do not fit.
        """
        self._check(images, self.config["image_channels"], "images")
        self.moments_shape(images.shape[1:])
        return self._encode(images, batch_size, to_unit_range, verbose).astype("float32")

    def sample(self, moments: Array, seed: int = 0) -> np.ndarray:
        """Latents, float32: scale (mean + exp(log-variance / 2) noise - shift).

        Args:
            moments: `(n, h, w, 2 latent_channels)`.
            seed: int.
        """
        self._check(moments, 2 * self.config["latent_channels"], "moments")
        return pixels.posterior_sample(moments, self.scale, self.shift, seed)

    def decode(self, latents: Array, batch_size: int = 8, verbose: int = 0) -> np.ndarray:
        """Images of latents.

        Args:
            latents: `(n, h, w, latent_channels)` float, scaled and shifted, as a diffusion
                model makes them.
            batch_size: int, images at a time. Memory grows with it; 1 needs least.
            verbose: 0 or 1. Progress bar.

        Returns:
            `(n, factor h, factor w, C)` uint8.

        Raises:
            ValueError, TypeError: if the latents do not fit.
        """
        self._check(latents, self.config["latent_channels"], "latents")
        pixels.check_latents(latents)
        prepare = functools.partial(pixels.unscaled, scale=self.scale, shift=self.shift)
        images = self._decode(latents, batch_size, prepare, verbose)
        return from_unit_range(images)

    def decode_tensor(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents, a tensor by the decoder's own operations, not checked."""
        return self.decoder(pixels.unscaled_tensor(latents, self.scale, self.shift), training=False)

    def _check(self, arrays, channels, what):
        shape = tuple(arrays.shape)
        if len(shape) != 4 or shape[-1] != channels or 0 in shape:
            raise ValueError(
                f"{what} must have shape (n, height, width, {channels}), n at least 1. "
                f"Received: {shape}."
            )

    def call(self, images: Tensor) -> Tensor:
        mean, _ = ops.split(self.encoder(images), 2, axis=-1)
        return self.decoder(mean)

    def get_config(self) -> Config:
        own = {key: pixels.listed(getattr(self, key)) for key in ("scale", "shift", "id", "name")}
        return {**self.config, **own, "dtype": self.dtype_policy.name}
