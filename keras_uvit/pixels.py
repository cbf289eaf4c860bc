"""Between uint8 images and the [-1, 1] of networks."""

import numpy as np

from keras_uvit.types import Array


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


def moments_std(moments: Array) -> float:
    """Standard deviation of latents drawn from moments `(..., 2 C)`, without any scale."""
    mean, log_variance = np.split(np.asarray(moments, "float32"), 2, axis=-1)
    noise = np.exp(np.clip(log_variance, -30.0, 20.0)).mean()
    return float(np.sqrt(mean.var() + noise))


def check_latents(latents: Array) -> None:
    """Raises unless latents are finite floats."""
    latents = np.asarray(latents)
    if not np.issubdtype(latents.dtype, np.floating) and latents.dtype.name != "bfloat16":
        raise TypeError(f"latents are float. Received: dtype {latents.dtype}.")
    if not np.isfinite(latents.astype("float32")).all():
        raise ValueError("latents hold NaN or infinity: look at the model that made them.")
