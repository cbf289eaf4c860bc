"""Between uint8 images and the [-1, 1] of networks."""

from typing import Any, TypeAlias

import numpy as np
from keras import ops

from keras_uvit.types import Array, Tensor

PerChannel: TypeAlias = float | tuple[float, ...]  # of latents: one for all channels, or for each


def to_unit_range(images: Array) -> np.ndarray:
    """float32 in [-1, 1] of uint8 images; floats must be in [-1, 1] already.

    Raises:
        TypeError: for other integers.
        ValueError: for floats out of range.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype("float32") / 127.5 - 1.0
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"Images are uint8, or float in [-1, 1]. Received: dtype {images.dtype}.")
    if not np.abs(images).max() <= 1.001:  # NaN too
        raise ValueError(
            "Float images are in [-1, 1]. Received values in "
            f"[{images.min():.4g}, {images.max():.4g}]; pass uint8, or x / 127.5 - 1."
        )
    return images.astype("float32")


def from_unit_range(images: np.ndarray) -> np.ndarray:
    """uint8 of float images in [-1, 1], rounded; what lies outside is clipped.

    Raises:
        FloatingPointError: for NaN or infinity, which would become black.
    """
    if not np.isfinite(images).all():
        raise FloatingPointError(
            "The network made NaN or infinity instead of images: look at its weights, or use "
            "float32 or bfloat16 instead of float16."
        )
    return np.clip(np.round((images + 1.0) * 127.5), 0, 255).astype("uint8")


def moments_std(moments: Array, scale: PerChannel = 1.0, shift: PerChannel = 0.0) -> float:
    """Standard deviation of scale (z - shift), z latents drawn from moments `(..., 2 C)`."""
    mean, log_variance = np.split(np.asarray(moments, "float32"), 2, axis=-1)
    noise = np.asarray(scale) ** 2 * np.exp(np.clip(log_variance, -30.0, 20.0))
    return float(np.sqrt(scaled(mean, scale, shift).var() + noise.mean()))


def posterior_sample(moments: Array, scale: PerChannel, shift: PerChannel, seed: int) -> np.ndarray:
    """scale (mean + exp(log-variance / 2) noise - shift), float32, of moments `(..., 2 C)`."""
    mean, log_variance = np.split(np.asarray(moments, "float32"), 2, axis=-1)
    noise = np.random.default_rng(seed).standard_normal(mean.shape, "float32")
    latents = mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * noise
    return scaled(latents, scale, shift)


def scaled(latents: Array, scale: PerChannel, shift: PerChannel) -> np.ndarray:
    """scale (z - shift): latents as diffusion models learn them, float32."""
    return np.asarray(scale, "float32") * (latents - np.asarray(shift, "float32"))


def unscaled(latents: Array, scale: PerChannel, shift: PerChannel) -> np.ndarray:
    """z / scale + shift, float32: undoes `scaled`."""
    latents = np.asarray(latents, "float32")
    return latents / np.asarray(scale, "float32") + np.asarray(shift, "float32")


def unscaled_tensor(latents: Tensor, scale: PerChannel, shift: PerChannel) -> Tensor:
    """As `unscaled`, of a tensor by `keras.ops`."""
    return ops.add(ops.divide(latents, np.asarray(scale, "float32")), np.asarray(shift, "float32"))


def per_channel(
    value: Any, name: str, positive: bool = False, channels: int | None = None
) -> PerChannel:
    """A number, or one for each channel as a tuple, with Python's own floats.

    Args:
        value: number, or a sequence of them.
        name: what to call it in errors.
        positive: bool, whether all must be above 0.
        channels: int, how many channels there are; None where it is not known.

    Raises:
        ValueError: for other things, NaN and infinity.
    """
    numbers = np.asarray(value, "float64")
    if numbers.ndim > 1 or not np.isfinite(numbers).all() or positive and not (numbers > 0).all():
        kind = "positive" if positive else "finite"
        raise ValueError(
            f"{name} must be a {kind} number, or one for each channel. Received: {value!r}."
        )
    if numbers.ndim and channels not in (None, len(numbers)):
        raise ValueError(
            f"{name} must be one number, or one for each of {channels} channels. Received: "
            f"{len(numbers)} numbers."
        )
    return float(numbers) if numbers.ndim == 0 else tuple(numbers.tolist())


def listed(value: Any) -> Any:
    """As JSON keeps it: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value


def same_per_channel(a: PerChannel, b: PerChannel) -> bool:
    """Whether two of them are equal, up to float32 rounding."""
    lengths = {len(value) for value in (a, b) if isinstance(value, tuple)}
    return len(lengths) < 2 and bool(np.allclose(a, b, rtol=1e-5, atol=1e-6))


def check_rank(array: Array, name: str) -> None:
    """Raises ValueError for what is not `(n, height, width, channels)`, or is empty."""
    if len(np.shape(array)) != 4 or 0 in np.shape(array):
        raise ValueError(
            f"{name} must have shape (n, height, width, channels), none of them 0. "
            f"Received: {np.shape(array)}."
        )


def check_latents(latents: Array) -> None:
    """Raises unless latents are finite floats."""
    latents = np.asarray(latents)
    if not np.issubdtype(latents.dtype, np.floating) and latents.dtype.name != "bfloat16":
        raise TypeError(f"latents are float. Received: dtype {latents.dtype}.")
    if not np.isfinite(latents.astype("float32")).all():
        raise ValueError("latents hold NaN or infinity: look at the model that made them.")
