"""Other people's autoencoders, with the methods of `AutoencoderKL`."""

import hashlib
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from keras_uvit import progress
from keras_uvit.checks import as_int
from keras_uvit.pixels import (
    PerChannel,
    check_latents,
    check_rank,
    from_unit_range,
    per_channel,
    posterior_sample,
    to_unit_range,
    unscaled,
)
from keras_uvit.types import Array

# Of diffusers' classes, the entry of the config with one width for each level; all levels but the
# last halve the picture.
LEVELS = {"AutoencoderKL": "block_out_channels", "AutoencoderDC": "encoder_block_out_channels"}


class CustomAutoencoder:
    """An autoencoder made of two functions of arrays, channels last.

    Args:
        encode: function of images `(n, H, W, C)` float32 in [-1, 1], to latents
            `(n, H / factor, W / factor, latent_channels)`, or to moments with twice the channels,
            mean and log-variance. The `predict` of a Keras model is one.
        decode: function of latents as `encode` makes them, to images in [-1, 1].
        factor: int, how many times smaller latents are than images, in each direction.
        latent_channels: int.
        image_channels: int, C.
        id: str. Latents of two autoencoders are told apart by it: change it when you train the
            encoder again.
        scale, shift: floats or one per channel; diffusion models learn scale (z - shift). See
            `data.latent_statistics`.

    Raises:
        TypeError: for what cannot be called.
        ValueError: if a number is out of range.

    Example:
        >>> halves = CustomAutoencoder(
        ...     lambda images: images[:, ::2, ::2],
        ...     lambda latents: latents.repeat(2, axis=1).repeat(2, axis=2),
        ...     factor=2, latent_channels=3, id="every second pixel",
        ... )
        >>> halves.decode(halves.sample(halves.encode(np.zeros((1, 8, 8, 3), "uint8")))).shape
        (1, 8, 8, 3)
    """

    def __init__(
        self,
        encode: Callable[[np.ndarray], Array],
        decode: Callable[[np.ndarray], Array],
        *,
        factor: int,
        latent_channels: int,
        id: str,
        image_channels: int = 3,
        scale: PerChannel = 1.0,
        shift: PerChannel = 0.0,
    ) -> None:
        for name, function in (("encode", encode), ("decode", decode)):
            if not callable(function):
                raise TypeError(f"{name} is a function of an array. Received: {function!r}.")
        self._functions = encode, decode
        self.factor = as_int(factor, "factor", 1)
        self.latent_channels = as_int(latent_channels, "latent_channels", 1)
        self.image_channels = as_int(image_channels, "image_channels", 1)
        self.scale = per_channel(scale, "scale", True, latent_channels)
        self.shift = per_channel(shift, "shift", channels=latent_channels)
        self.id, self.fingerprint = id, hashlib.sha256(id.encode()).hexdigest()[:16]

    @classmethod
    def from_diffusers(cls, autoencoder: Any, **arguments: Any) -> Self:
        """Of diffusers' `AutoencoderKL` or `AutoencoderDC`, on the device where it is.

        The fingerprint is of the encoder's weights, and not comparable with that of
        `encoders.AutoencoderKL`.

        Args:
            autoencoder: such as `AutoencoderDC.from_pretrained(...)`.
            **arguments: `scale` and `shift` other than those of its config, `id` other than its
                name.

        Raises:
            TypeError: for other classes.
        """
        kind = type(autoencoder).__name__
        if kind not in LEVELS:
            raise TypeError(
                f"Expected diffusers' {' or '.join(LEVELS)}. Received: {kind}. For others pass two "
                "functions of arrays to `encoders.CustomAutoencoder`."
            )
        config = autoencoder.config
        own = cls(
            *_of_torch(autoencoder),
            **{
                "factor": 2 ** (len(config[LEVELS[kind]]) - 1),
                "latent_channels": config["latent_channels"],
                "image_channels": config["in_channels"],
                "id": getattr(config, "_name_or_path", "") or kind,
                "scale": config["scaling_factor"],
                "shift": config.get("shift_factor") or 0.0,
                **arguments,
            },
        )
        digest = hashlib.sha256(own.fingerprint.encode())
        for name, value in autoencoder.state_dict().items():
            if name.startswith(("encoder", "quant_conv")):
                digest.update(value.float().cpu().numpy().tobytes())
        own.fingerprint = digest.hexdigest()[:16]
        return own

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H / factor, W / factor, 2 latent_channels); ValueError where an image does not fit."""
        height, width, channels = image_shape
        if channels != self.image_channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"Images must have {self.image_channels} channels, and a height and a width that "
                f"are multiples of {self.factor}. Received: {tuple(image_shape)}."
            )
        return height // self.factor, width // self.factor, 2 * self.latent_channels

    def encode(self, images: Array, batch_size: int = 8, verbose: int = 0) -> np.ndarray:
        """Moments of images, float32: mean, then log-variance (-30 where there is none).

        Args:
            images: `(n, H, W, C)` uint8, or float in [-1, 1].
            batch_size: int, images at a time.
            verbose: 0 or 1. Progress bar.
        """
        check_rank(images, "images")
        shape = self.moments_shape(images.shape[1:])
        moments = _in_batches(
            lambda some: self._moments(self._functions[0](to_unit_range(some))),
            images,
            batch_size,
            verbose,
        )
        if moments.shape[1:] != shape:
            raise ValueError(
                f"encode must give {(*shape[:2], self.latent_channels)} for images of "
                f"{images.shape[1:]}, or moments {shape}. Received: {moments.shape[1:]}."
            )
        return moments

    def sample(self, moments: Array, seed: int = 0) -> np.ndarray:
        """Latents, float32: scale (mean + exp(log-variance / 2) noise - shift)."""
        check_rank(moments, "moments")
        return posterior_sample(moments, self.scale, self.shift, seed)

    def decode(self, latents: Array, batch_size: int = 8, verbose: int = 0) -> np.ndarray:
        """Images `(n, factor h, factor w, C)` uint8 of latents as models make them."""
        check_rank(latents, "latents")
        check_latents(latents)
        images = _in_batches(
            lambda some: self._functions[1](unscaled(some, self.scale, self.shift)),
            np.asarray(latents),
            batch_size,
            verbose,
        )
        height, width = (n * self.factor for n in latents.shape[1:3])
        if images.shape[1:] != (height, width, self.image_channels):
            raise ValueError(
                f"decode must give {(height, width, self.image_channels)} for latents of "
                f"{latents.shape[1:]}. Received: {images.shape[1:]}."
            )
        return from_unit_range(images)

    def _moments(self, encoded):
        encoded = np.asarray(encoded, "float32")
        if encoded.shape[-1] == 2 * self.latent_channels:
            return encoded
        return np.concatenate([encoded, np.full_like(encoded, -30.0)], axis=-1)


def _in_batches(function, inputs, batch_size, verbose):
    size, outputs = as_int(batch_size, "batch_size", 1), []
    bar = progress.bar(len(inputs), verbose, "image")
    for first in range(0, len(inputs), size):
        outputs.append(np.asarray(function(inputs[first : first + size]), "float32"))
        bar.update(first + len(outputs[-1]))
    return np.concatenate(outputs)


def _of_torch(autoencoder):
    """The two functions of a diffusers autoencoder, whose tensors have channels first."""
    import torch

    def run(function, array):
        given = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))
        with torch.no_grad():
            out = function(given.to(autoencoder.device, autoencoder.dtype))
        return np.moveaxis(out.float().cpu().numpy(), 1, -1)

    def moments(x):
        out = autoencoder.encode(x)
        return out.latent_dist.parameters if hasattr(out, "latent_dist") else out.latent

    return (
        lambda images: run(moments, images),
        lambda latents: run(lambda z: autoencoder.decode(z).sample, latents),
    )
