"""The frozen parts of a model, in a holder that Keras does not look into."""

import dataclasses
import warnings
from typing import Any

from keras_uvit.encoders import compatibility

LEFT_OUT = "is no part of a model's file"


@dataclasses.dataclass
class Encoders:
    """What turns latents into pixels and prompts into contexts.

    Keras would count, train and save parts that are attributes of a model. These are none of it:
    they are set by `DiffusionModel.set_encoders` and are no part of the model's file.

    Attributes:
        autoencoder: `encoders.AutoencoderKL`, or what has its methods; None for a model of pixels.
        text_encoder: `encoders.CLIPText`, or what has its methods; None for a model without text.
    """

    autoencoder: Any = None
    text_encoder: Any = None

    def warn_of_saving(self) -> None:
        """Warns of the parts that a file will not have."""
        _warn([name for name, part in vars(self).items() if part is not None])


def warn_of_loading(model: Any) -> None:
    """Warns of the parts that a model from a file needs for pixels and for prompts."""
    needs = {
        "autoencoder": model.latent_scale is not None,
        "text_encoder": model.context_encoder not in (None, compatibility.ARRAYS),
    }
    _warn([name for name, needed in needs.items() if needed])


def _warn(names):
    makers = {"autoencoder": "AutoencoderKL.from_file", "text_encoder": "CLIPText.from_preset"}
    for name in names:
        warnings.warn(
            f"The {name.replace('_', ' ')} {LEFT_OUT}. `generate` needs it: after loading, call "
            f"`model.set_encoders({name}=encoders.{makers[name]}(...))`.",
            stacklevel=4,
        )
