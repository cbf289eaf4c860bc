"""Contexts of one text encoder mean nothing to a model of another's: checks that they agree."""

import numpy as np
from keras import ops


def agree(model, other, what):
    """Raises unless a text encoder or a cache is of the contexts that the model reads.

    A model that has seen no text encoder takes this one's fingerprint as its `context_encoder`,
    and, before its first step, the empty prompt's context as its `null_context`.

    Args:
        model: `DiffusionModel`.
        other: `latent.CLIPText` or a cache's `contexts`: has `context_shape`, `id`, `fingerprint`
            and `null_context`.
        what: what to call it in errors.

    Raises:
        TypeError: for what is no text encoder.
        ValueError: if shape or encoder differ.
    """
    if not (hasattr(other, "context_shape") and hasattr(other, "fingerprint")):
        raise TypeError(f"{what} must be latent.CLIPText or have its methods. Received: {other!r}.")
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
    if model.context_encoder not in (None, other.fingerprint):
        raise ValueError(
            f"{what} ({other.id}) is of text encoder {other.fingerprint}, the model has learned "
            f"the contexts of {model.context_encoder}. Use the same. (If you know that they agree, "
            "set model.context_encoder = None.)"
        )
    if model.context_encoder is None:
        model.context_encoder = other.fingerprint
        if not ops.convert_to_numpy(model.step):
            model.null_context.assign(np.asarray(other.null_context, "float32"))


def has_null(model):
    """Whether the model's context of "no prompt" means something: it was set, or trained with."""
    trained = ops.convert_to_numpy(model.step) > 0
    return bool(trained or ops.convert_to_numpy(model.null_context).any())
