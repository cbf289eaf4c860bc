"""Contexts of one text encoder mean nothing to a model of another's: checks that they agree."""

import numpy as np
from keras import ops

ARRAYS = "arrays"  # `context_encoder` of a model that has learned contexts of unknown origin

CLEANING = {True: "after cleaning", False: "as they are typed"}


def check_encoder(encoder):
    """Raises TypeError for what is no text encoder."""
    needed = ("context_shape", "fingerprint", "tokenize", "encode")
    if not all(hasattr(encoder, name) for name in needed):
        raise TypeError(
            "A text encoder is encoders.CLIPText or has its methods; a folder is read by "
            f"CLIPText.from_preset. Received: {encoder!r}."
        )


def agree(model, other, what):
    """Raises unless a text encoder or a cache is of the contexts that the model reads.

    A model that has seen no text encoder takes this one's fingerprint as its `context_encoder`,
    and the empty prompt's context as its `null_context`, unless that was assigned or the model has
    learned from arrays of contexts, for which the zeros it starts with mean "no prompt".

    Args:
        model: `DiffusionModel`.
        other: `encoders.CLIPText` or a cache's `contexts`: has `context_shape`, `id`, `fingerprint`
            and `null_context`.
        what: what to call it in errors.

    Raises:
        ValueError: if shape or encoder differ.
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


def note_arrays(model):
    """Called before training: whose contexts a model learns from arrays is not known."""
    if model.network.context_shape is not None and model.context_encoder is None:
        model.context_encoder = ARRAYS


def has_null(model):
    """Whether the model's context of "no prompt" means something: it was set, or trained with."""
    return model.context_encoder == ARRAYS or _is_set(model)


def _is_set(model):
    return bool(ops.convert_to_numpy(model.null_context).any())
