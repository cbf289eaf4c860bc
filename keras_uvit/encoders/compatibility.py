"""Whose latents and whose text a model has learned: checks that two encoders agree.

Latents of one autoencoder mean nothing to a model that learned those of a different one, and the
same holds for the contexts of text encoders. `check_...` functions change nothing; those named
`adopt_...` note, in a model that has seen no encoder yet, whose latents or contexts it will learn.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_uvit.pixels import moments_std, same_per_channel
from keras_uvit.types import Array

# Bounds on the standard deviation of scaled latents. Stable Diffusion's have 5.5 without their
# scale, and 0.2 where it was applied twice.
STD = (1 / 3, 3.0)
ARRAYS = "arrays"  # `context_encoder` of a model that has learned contexts of unknown origin
CLEANING = {True: "after cleaning", False: "as they are typed"}


# Latents ------------------------------------------------------------------------------------------


def check_autoencoder(autoencoder: Any) -> None:
    """Raises TypeError for what is no autoencoder."""
    if not all(hasattr(autoencoder, name) for name in ("scale", "fingerprint", "decode")):
        raise TypeError(
            "An autoencoder is encoders.AutoencoderKL or has its methods; a path is read by "
            f"AutoencoderKL.from_file. Received: {autoencoder!r}."
        )


def check_latents(model: Any, other: Any, what: str) -> None:
    """Raises unless an autoencoder or a cache has the latents that the model works on.

    Args:
        model: `DiffusionModel`.
        other: has `scale`, `id` or `autoencoder_id`, and `fingerprint`; None where not known.
        what: what to call it in errors.

    Raises:
        ValueError: if the scale or the encoder differs, or the model works on pixels.
    """
    name = getattr(other, "id", None) or getattr(other, "autoencoder_id", None)
    check_is_latent(model, other, what)
    for key in ("scale", "shift"):
        theirs = getattr(other, key, 0.0)  # an encoder of your own may have no shift
        ours = getattr(model, f"latent_{key}")
        if theirs is not None and not same_per_channel(theirs, ours):
            raise ValueError(
                f"{what} ({name}) has {key} {theirs}, the model latent_{key}={ours}. Latents of "
                f"one {key} are noise or grey at the other: build the model with the same, or "
                "choose the other autoencoder."
            )
    if None not in (other.fingerprint, model.latent_encoder) and (
        other.fingerprint != model.latent_encoder
    ):
        raise ValueError(
            f"{what} ({name}) is of encoder {other.fingerprint}, the model has learned the latents "
            f"of encoder {model.latent_encoder}. Use the same autoencoder. (If you know that they "
            "agree, set model.latent_encoder = None.)"
        )


def adopt_latents(model: Any, other: Any) -> None:
    """Makes an encoder the model's own, if it has none: `other` as in `check_latents`."""
    if model.latent_encoder is None:
        model.latent_encoder = other.fingerprint


def check_is_latent(model: Any, other: Any, what: str) -> None:
    """Raises for a model of pixels."""
    if model.latent_scale is None:
        value = "the autoencoder's scale" if other.scale is None else other.scale
        raise ValueError(
            f"This model works on pixels (latent_scale=None), but {what} is of latents. Build it "
            f"with latent_scale={value}."
        )


def check_cache(model: Any, cache: Any) -> None:
    """Raises unless `model` can be trained on a `data.LatentDataset`."""
    check_is_latent(model, cache, "The cache")
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


def check_std(model: Any, key: str, value: Array) -> None:
    """Raises unless the standard deviation of a batch of latents is near 1."""
    value = np.asarray(value, "float32")
    if value.size < 1000:
        return
    if value.min() == value.max():
        raise ValueError(
            f"All numbers in the first batch of {key!r} are equal: {value.flat[0]:g}. Pass what an "
            "autoencoder makes of images, such as a cache of `keras-uvit encode`."
        )
    scale, shift = model.latent_scale, model.latent_shift
    std = value.std() if key == "latent" else moments_std(value, scale, shift)
    if not STD[0] < std < STD[1]:
        times = "" if key == "latent" else f", times latent_scale={scale},"
        fits = f"{1 / (std if key == 'latent' else moments_std(value)):.4g}"
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


# Text ---------------------------------------------------------------------------------------------


def check_text_encoder(encoder: Any) -> None:
    """Raises TypeError for what is no text encoder."""
    needed = ("context_shape", "fingerprint", "tokenize", "encode")
    if not all(hasattr(encoder, name) for name in needed):
        raise TypeError(
            "A text encoder is encoders.CLIPText or has its methods; a folder is read by "
            f"CLIPText.from_preset. Received: {encoder!r}."
        )


def check_contexts(model: Any, other: Any, what: str) -> None:
    """Raises unless a text encoder or a cache has the contexts that the model reads.

    Args:
        model: `DiffusionModel`.
        other: `encoders.CLIPText` or a cache's `contexts`: has `context_shape`, `id`, `fingerprint`
            and `null_context`.
        what: what to call it in errors.

    Raises:
        ValueError: if the shape or the encoder differs.
    """
    shape = model.network.context_shape
    if shape is None:
        raise ValueError(
            f"The network reads no text. Build it with context_shape={tuple(other.context_shape)}, "
            f"or leave out {what[0].lower() + what[1:]}."
        )
    if tuple(other.context_shape) != tuple(shape):
        raise ValueError(
            f"{what} ({other.id}) makes contexts of shape {tuple(other.context_shape)}, the "
            f"network has context_shape={tuple(shape)}. Build it with the same, or choose the "
            "other text encoder."
        )
    if model.context_encoder not in (None, ARRAYS, other.fingerprint):
        _check_cleaning(model, other, what)
        raise ValueError(
            f"{what} ({other.id}) is of text encoder {other.fingerprint}, the model has learned "
            f"the contexts of {model.context_encoder}. Use the same, with the same choice of "
            "clean=. (If you know that they agree, set model.context_encoder = None.)"
        )


def adopt_contexts(model: Any, other: Any) -> None:
    """Makes a text encoder the model's own, if it has none: `other` as in `check_contexts`.

    The model takes its fingerprint, and its context of the empty prompt, unless that was assigned
    or the model has learned from arrays of contexts, for which the zeros it starts with mean "no
    prompt".
    """
    if model.context_encoder == ARRAYS:
        return
    model.context_encoder = other.fingerprint
    if not _is_set(model):
        model.null_context.assign(np.asarray(other.null_context, "float32"))


def _check_cleaning(model, other, what):
    """Raises where the encoder is the model's but for `clean`."""
    clean = not getattr(other, "clean", True)
    if hasattr(other, "fingerprint_of") and other.fingerprint_of(clean) == model.context_encoder:
        raise ValueError(
            f"{what} ({other.id}) reads prompts {CLEANING[other.clean]}, and the model has learned "
            f"contexts of prompts read {CLEANING[clean]}. Use "
            f"CLIPText.from_preset(..., clean={clean})."
        )


def adopt_arrays(model: Any) -> None:
    """Notes that a model is going to learn contexts from arrays, whose encoder is not known."""
    model.context_encoder = ARRAYS


def has_null(model: Any) -> bool:
    """Whether the model's context of "no prompt" means something: it was set, or trained with."""
    return model.context_encoder == ARRAYS or _is_set(model)


def _is_set(model):
    return bool(ops.convert_to_numpy(model.null_context).any())
