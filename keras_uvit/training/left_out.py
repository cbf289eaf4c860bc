"""Frozen encoders are no part of a model's file: said when it is written and when it is read."""

import warnings

from keras_uvit.training.text_space import ARRAYS

# What is left out, and how it is set.
ENCODERS = {
    "autoencoder": "encoders.AutoencoderKL.from_file(...)",
    "text_encoder": "encoders.CLIPText.from_preset(...)",
}
MESSAGE = "is no part of a model's file"


def say_saved(model):
    """Warns of the encoders that a model has and its file will not have."""
    _say([name for name in ENCODERS if getattr(model, name) is not None])


def say_loaded(model):
    """Warns of the encoders that a model from a file needs for pixels and for prompts."""
    needed = {
        "autoencoder": model.latent_scale is not None,
        "text_encoder": model.context_encoder not in (None, ARRAYS),
    }
    _say([name for name in ENCODERS if needed[name]])


def _say(names):
    for name in names:
        warnings.warn(
            f"The {name.replace('_', ' ')} {MESSAGE}. `generate` needs it: after loading, set "
            f"`model.{name} = {ENCODERS[name]}`.",
            stacklevel=4,
        )
