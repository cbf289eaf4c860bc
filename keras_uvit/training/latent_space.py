"""Latents of one autoencoder mean nothing to a model of another's: checks that they agree."""

import numpy as np

from keras_uvit.pixels import moments_std

STD = (
    1 / 3,
    3.0,
)  # of scaled latents; without the scale Stable Diffusion's are 5.5, with it twice 0.2


def check_autoencoder(autoencoder):
    """Raises TypeError for what is no autoencoder."""
    if not all(hasattr(autoencoder, name) for name in ("scale", "fingerprint", "decode")):
        raise TypeError(
            "An autoencoder is encoders.AutoencoderKL or has its methods; a path is read by "
            f"AutoencoderKL.from_file. Received: {autoencoder!r}."
        )


def agree(model, other, what):
    """Raises unless an autoencoder or a cache is of the latents that the model works on.

    A model that has seen no autoencoder yet takes this one's fingerprint as its `latent_encoder`.

    Args:
        model: `DiffusionModel`.
        other: has `scale`, `id` or `autoencoder_id`, and `fingerprint`; None where not known.
        what: what to call it in errors.

    Raises:
        ValueError: if scale or encoder differ.
    """
    name = getattr(other, "id", None) or getattr(other, "autoencoder_id", None)
    check_latent(model, other, what)
    if other.scale is not None and not np.isclose(other.scale, model.latent_scale, rtol=1e-5):
        raise ValueError(
            f"{what} ({name}) has scale {other.scale}, the model latent_scale="
            f"{model.latent_scale}. Latents of one scale are noise or grey at the other: build the "
            "model with the same, or choose the other autoencoder."
        )
    if None not in (other.fingerprint, model.latent_encoder) and (
        other.fingerprint != model.latent_encoder
    ):
        raise ValueError(
            f"{what} ({name}) is of encoder {other.fingerprint}, the model has learned the latents "
            f"of encoder {model.latent_encoder}. Use the same autoencoder. (If you know that they "
            "agree, set model.latent_encoder = None.)"
        )
    if model.latent_encoder is None:
        model.latent_encoder = other.fingerprint


def check_latent(model, other, what):
    """Raises for a model of pixels."""
    if model.latent_scale is None:
        value = "the autoencoder's scale" if other.scale is None else other.scale
        raise ValueError(
            f"This model works on pixels (latent_scale=None), but {what} is of latents. Build it "
            f"with latent_scale={value}."
        )


def check_cache(model, cache):
    """Raises unless `model` can be trained on a `data.LatentDataset`."""
    check_latent(model, cache, "The cache")
    height, width, channels = model.network.image_shape
    if tuple(cache.sample_shape) != (height, width, 2 * channels):
        size = cache.image_size and f", of {' x '.join(map(str, cache.image_size))} pixels"
        raise ValueError(
            f"The cache holds moments of shape {tuple(cache.sample_shape)}{size or ''}; the "
            f"network's latents {model.network.image_shape} need "
            f"{(height, width, 2 * channels)}. Encode the images at the network's size, or change "
            "its image_shape."
        )
    known = model.network.num_classes
    if known is not None and cache.num_classes is not None and cache.num_classes > known:
        raise ValueError(
            f"The cache has {cache.num_classes} classes, the network num_classes={known}. Build "
            f"it with num_classes={cache.num_classes}."
        )


def check_std(model, key, value):
    """Raises unless the standard deviation of a batch of latents is near 1."""
    value = np.asarray(value, "float32")
    if value.size < 1000:
        return
    if value.min() == value.max():
        raise ValueError(
            f"All numbers in the first batch of {key!r} are equal: {value.flat[0]:g}. Pass what an "
            "autoencoder makes of images, such as a cache of `keras-uvit encode`."
        )
    std = value.std() if key == "latent" else model.latent_scale * moments_std(value)
    if not STD[0] < std < STD[1]:
        times = "" if key == "latent" else f", times latent_scale={model.latent_scale},"
        fits = f"{(1 if key == 'latent' else model.latent_scale) / std:.4g}"
        advice = (
            f"the scale that fits is {fits}: multiply them by it."
            if key == "latent"
            else f"the scale that fits is {fits}: build the model with latent_scale={fits}, the "
            f"autoencoder with scale={fits}, and open a cache with data.LatentDataset(..., "
            f"scale={fits}). Moments are kept without the scale, so nothing is encoded again."
        )
        raise ValueError(
            f"The first batch of {key!r}{times} has standard deviation {std:.3g}; diffusion "
            "expects about 1. Latents that were not scaled, or scaled twice, look like this: "
            + advice
        )
