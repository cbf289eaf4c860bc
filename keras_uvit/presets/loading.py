"""Models by name: `load`, with fresh or stored weights."""

import difflib
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import keras

from keras_uvit.convert import FAMILIES, load_torch_weights
from keras_uvit.convert.files import TORCH
from keras_uvit.encoders import AutoencoderKL, CLIPText
from keras_uvit.encoders.holder import LEFT_OUT
from keras_uvit.inference import DAMAGE, load_keras_weights, naming_missing_classes
from keras_uvit.presets.preset import Preset
from keras_uvit.presets.table import PRESETS
from keras_uvit.training import DiffusionModel
from keras_uvit.types import PathLike

SHIPPED = Path(__file__).parents[1] / "weights"


def names() -> list[str]:
    """All preset names."""
    return list(PRESETS)


def get(name: str) -> Preset:
    """The `Preset` of this name; raises ValueError with the nearest names for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=3, cutoff=0.3)
        raise ValueError(
            f"Unknown preset {name!r}. Nearest: {near}. All: keras_uvit.presets.names()."
        )
    return PRESETS[name]


def load(
    name: str,
    weights: PathLike | None = None,
    *,
    autoencoder: Any = None,
    text_encoder: Any = None,
    seed: int = 0,
    **network: Any,
) -> DiffusionModel:
    """A `DiffusionModel` of a preset.

    Args:
        name: one of `names()`.
        weights: None for a fresh start; "pretrained" for the weights that ship with the package;
            or the path of network weights (`.weights.h5`, the model's `ema_network.save_weights`),
            of a saved model (`.keras`, whose moving average is taken), or, for a U-ViT, of a
            published checkpoint (`.pth`, `.safetensors`).
        autoencoder: for presets of latents, `encoders.AutoencoderKL` or the path of its weights,
            see `AutoencoderKL.from_file`; the preset's `autoencoder` says which file its FID is of.
            `generate` needs it to make pixels of latents.
        text_encoder: for text-to-image presets, `encoders.CLIPText`, or a folder or preset of CLIP,
            see `CLIPText.from_preset`. `generate` needs it for prompts that are strings. With
            "pretrained" weights the one that ships with them is taken.
        seed: int, of training.
        **network: arguments of the network (`UViT`, `UNet`) to change, such as `num_classes=` or
            `image_shape=` for your own data.

    Returns:
        `DiffusionModel`, not compiled: `compile()` takes the preset's optimizer.

    Raises:
        ValueError: for an unknown name, a preset without shipped weights, or weights that do not
            fit.
        FileNotFoundError: if the path does not exist.
        ImportError: for a text encoder without `pip install "keras-uvit[text]"`.

    Example:
        >>> model = load("uvit_tiny_digits", weights="pretrained")
        >>> model.generate(labels=range(10), num_steps=5, verbose=0).shape
        (10, 8, 8, 1)
    """
    row = get(name)
    path = _weight_file(name, row, weights)
    if isinstance(autoencoder, str | Path) and not Path(autoencoder).exists():
        raise FileNotFoundError(f"No autoencoder weights at {autoencoder}.")
    encoder = row.context_encoder if weights == "pretrained" else None
    model = row.build(network, context_encoder=encoder, seed=seed, name=name)
    if path is not None:
        changes = ", ".join(f"{key}={value!r}" for key, value in network.items())
        _load_weights(model, path, f"preset {name!r}" + (changes and f" with {changes}"))
    if isinstance(autoencoder, str | Path):
        autoencoder = AutoencoderKL.from_file(autoencoder, scale=row.latent_scale or 1.0)
    if text_encoder is None and row.text_encoder and weights == "pretrained":
        text_encoder = SHIPPED / row.text_encoder
    if isinstance(text_encoder, str | Path):
        text_encoder = CLIPText.from_preset(text_encoder)
    model.set_encoders(autoencoder=autoencoder, text_encoder=text_encoder)
    return model


def _weight_file(name, row, weights):
    """The file to load, checked before anything is built; None for a fresh start."""
    if weights is None:
        return None
    if weights == "pretrained":
        if row.weights is None:
            shipped = [key for key, other in PRESETS.items() if other.weights]
            raise ValueError(
                f"{name!r} ships no weights; {shipped} do. Pass the path of weights, such as a "
                "published U-ViT's."
            )
        return SHIPPED / row.weights
    path = Path(weights)
    kinds = (".weights.h5", ".keras")
    if row.architecture.__name__ in FAMILIES:  # there are published checkpoints
        kinds += (*TORCH, ".safetensors")
    if not path.is_file():
        raise FileNotFoundError(f'No weight file at {path}. ("pretrained" takes shipped weights.)')
    if not path.name.endswith(kinds):
        raise ValueError(
            f"{path.name}: unknown kind of weight file for a {row.architecture.__name__}. "
            f"Expected one of {kinds}."
        )
    return path


def _load_weights(model, path, what):
    if path.suffix in (*TORCH, ".safetensors"):
        load_torch_weights(model, path)
        return
    if path.name.endswith(".weights.h5"):
        load_keras_weights(model.network, path, what)
    else:
        try:
            with naming_missing_classes(path), warnings.catch_warnings():
                warnings.filterwarnings("ignore", f".*{LEFT_OUT}")  # `load` sets the encoders
                saved = keras.saving.load_model(path, compile=False)
            model.network.set_weights(saved.ema_network.get_weights())
            _take_encoders(model, saved)
        except (*DAMAGE, BadZipFile) as error:
            raise ValueError(f"{path.name} is damaged or does not fit {what}: {error}") from error
    model.copy_weights_to_ema()


def _take_encoders(model, saved):
    """Whose latents and contexts the weights have learned, and their "no prompt"."""
    model.latent_encoder, model.context_encoder = saved.latent_encoder, saved.context_encoder
    if model.network.context_shape is not None:
        model.null_context.assign(saved.null_context)
