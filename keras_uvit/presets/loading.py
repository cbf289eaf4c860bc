"""Models by name: `load`, with fresh or stored weights."""

import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import keras

from keras_uvit.convert import FAMILIES, load_torch_weights
from keras_uvit.convert.files import TORCH
from keras_uvit.encoders import AutoencoderKL, CLIPText
from keras_uvit.encoders.holder import LEFT_OUT
from keras_uvit.inference import DAMAGE, load_keras_weights, naming_missing_classes
from keras_uvit.networks.transferring import ADAPTABLE
from keras_uvit.presets import folders, sharing
from keras_uvit.presets.preset import Preset
from keras_uvit.presets.table import PRESETS
from keras_uvit.training import DiffusionModel, load_checkpoint
from keras_uvit.training.adapting import adapt, begin, take_encoders
from keras_uvit.training.checkpoints import steps_in
from keras_uvit.types import PathLike

SHIPPED = Path(__file__).parents[1] / "weights"
PUBLISHED = (*TORCH, ".safetensors")


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
    name: PathLike,
    weights: PathLike | None = None,
    *,
    key: str | None = None,
    classes: Mapping[int, int] | None = None,
    strict: bool = False,
    autoencoder: Any = None,
    text_encoder: Any = None,
    seed: int | None = None,
    verbose: int = 1,
    **network: Any,
) -> DiffusionModel:
    """A `DiffusionModel` of a preset, with fresh weights or with weights to begin at.

    Or the model of a folder that `DiffusionModel.save_to_preset` wrote, with its weights: to draw,
    to measure, or to fine-tune.

    The weights may be those of other classes, of another image size, of other channels or another
    context. What `networks.transfer` cannot keep of them is resized or made anew, and printed in
    three lines.

    Args:
        name: one of `names()`; or the path of a model's folder, or "hf://user/name" for one on the
            Hugging Face Hub, at a branch, tag or commit "hf://user/name@revision".
        weights: None for a fresh start; "pretrained" for the weights that ship with the package;
            or the path of network weights (`.weights.h5`, the model's `ema_network.save_weights`),
            of a saved model (`.keras`), a model's folder, here or at "hf://user/name", or a folder
            of checkpoints, whose moving average is taken, or, for a U-ViT, of a published
            checkpoint (`.pth`, `.safetensors`). A model's folder has its own.
        key: str, the part of a published checkpoint that holds several, such as "ema".
        classes: dict of a class to the class of the weights whose row of the label table it begins
            with. `None`: the table is kept where both have as many classes.
        strict: bool. Raise unless all weights fit as they are.
        autoencoder: for presets of latents, `encoders.AutoencoderKL` or the path of its weights,
            see `AutoencoderKL.from_file`; the preset's `autoencoder` says which file its FID is of.
            `generate` needs it to make pixels of latents.
        text_encoder: for text-to-image presets, `encoders.CLIPText`, or a folder or preset of CLIP,
            see `CLIPText.from_preset`. `generate` needs it for prompts that are strings. With
            "pretrained" weights the one that ships with them is taken. Encoders that a model's
            folder has are taken where none is given.
        seed: int, of training; `None` is 0, or that of a model's folder.
        verbose: 0 or 1, whether to print what was kept, where it is not all.
        **network: arguments of the network (`UViT`, `UNet`) to change, such as `num_classes=` or
            `image_shape=` for your own data.

    Returns:
        `DiffusionModel`, not compiled: `compile()` takes the preset's optimizer.

    Raises:
        ValueError: for an unknown name, a preset without shipped weights, or weights that do not
            fit.
        FileNotFoundError: if the path does not exist.
        ImportError: for a text encoder without `pip install "keras-uvit[text]"`, a model's folder
            without "keras-uvit[latent]", or one on the Hub without "keras-uvit[hub]".

    Example:
        >>> model = load("uvit_tiny_digits", weights="pretrained")
        >>> model.generate(labels=range(10), num_steps=5, verbose=0).shape
        (10, 8, 8, 1)
        >>> load("uvit_tiny_digits", weights="pretrained", num_classes=3).network.num_classes
        Kept: 67 weights of 68.
        Resized: label_embed/embeddings.
        Made anew: none.
        3
    """
    if isinstance(autoencoder, str | Path) and not Path(autoencoder).exists():
        raise FileNotFoundError(f"No autoencoder weights at {autoencoder}.")
    if name not in PRESETS and _is_place(name):
        if weights is not None or key is not None:
            raise ValueError(f"{name} has its own weights: leave weights= and key= out.")
        model = from_folder(name, autoencoder, text_encoder, seed)
        if network or classes is not None:
            model = adapt(model, classes=classes, strict=strict, verbose=verbose, **network)
        return model
    model = _of_preset(str(name), weights, key, classes, strict, seed or 0, verbose, network)
    row = get(str(name))
    if text_encoder is None and row.text_encoder and weights == "pretrained":
        text_encoder = SHIPPED / row.text_encoder
    set_encoders(model, autoencoder, text_encoder)
    return model


def from_folder(
    source: PathLike, autoencoder: Any = None, text_encoder: Any = None, seed: int | None = None
) -> DiffusionModel:
    """The model of a folder, here or at `hf://user/name`; see `load` for the arguments."""
    given = {"autoencoder": autoencoder, "text_encoder": text_encoder}
    without = [part for part, encoder in given.items() if encoder is not None]
    model = folders.read(sharing.find(source), seed, without)
    set_encoders(model, **given)
    return model


def set_encoders(model: DiffusionModel, autoencoder: Any = None, text_encoder: Any = None) -> None:
    """Sets encoders of a model that are given: objects, or the paths or names of their files."""
    if isinstance(autoencoder, str | Path):
        scale, shift = model.latent_scale or 1.0, model.latent_shift
        autoencoder = AutoencoderKL.from_file(autoencoder, scale=scale, shift=shift)
    if isinstance(text_encoder, str | Path):
        text_encoder = CLIPText.from_preset(text_encoder)
    parts = {"autoencoder": autoencoder, "text_encoder": text_encoder}
    model.set_encoders(**{name: part for name, part in parts.items() if part is not None})


def _is_place(name):
    """Whether this is a model's folder, or meant as one, and not the name of a preset."""
    return isinstance(name, Path) or sharing.is_preset(name) or Path(name).is_dir()


def _of_preset(name, weights, key, classes, strict, seed, verbose, network):
    """The model of a row of the table, without encoders but those of a model's folder."""
    row = get(name)
    path = _weight_file(name, row, weights)
    if key is not None and (path is None or path.suffix not in PUBLISHED):
        raise ValueError(f"key={key!r} chooses a part of a file in {PUBLISHED}. Received: {path}.")
    encoder = row.context_encoder if weights == "pretrained" else None
    model = row.build(network, context_encoder=encoder, seed=seed, name=name)
    if path is not None:
        changes = ", ".join(f"{k}={value!r}" for k, value in network.items())
        what = f"preset {name!r}" + (changes and f" with {changes}")
        source, saved = _source(model, row, network, path, key, what)
        try:
            begin(model, source, classes, strict, verbose)
        except ValueError as error:
            raise ValueError(f"{path.name} does not fit {what}: {error}") from error
        if saved is not None:
            take_encoders(model, saved)
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
    if sharing.is_preset(weights):
        return sharing.find(weights)
    path = Path(weights)
    if steps_in(path):
        return path
    kinds = (".weights.h5", ".keras")
    if row.architecture.__name__ in FAMILIES:  # there are published checkpoints
        kinds += PUBLISHED
    if not path.is_file():
        raise FileNotFoundError(f'No weight file at {path}. ("pretrained" takes shipped weights.)')
    if not path.name.endswith(kinds):
        raise ValueError(
            f"{path.name}: unknown kind of weight file for a {row.architecture.__name__}. "
            f"Expected one of {kinds}, a model's folder, or a folder of checkpoints."
        )
    return path


def _source(model, row, changes, path, key, what):
    """A network with the weights of the file, and the model in it, if there is one."""
    if path.is_dir() or path.suffix == ".keras":
        saved = _saved(path, what)
        return saved.ema_network, saved
    # The file does not say of which network it is: of the one that is asked for, or of the preset.
    usual = {name: value for name, value in changes.items() if name not in ADAPTABLE}
    network = model.network
    try:
        _read(network, path, key, what)
    except ValueError as error:
        if usual == changes:
            raise
        network = row.new_network(**usual)
        try:
            _read(network, path, key, what)
        except ValueError:
            raise ValueError(
                f"{error} Nor is it a file of the preset's own network. If it is of a third one, "
                "load it with the arguments of that one, and pass the model to `training.adapt`."
            ) from error
    return network, None


def _read(network, path, key, what):
    if path.suffix in PUBLISHED:
        load_torch_weights(network, path, key)
    else:
        load_keras_weights(network, path, what)


def _saved(path, what):
    """The `DiffusionModel` of a file, of its own folder or of a folder of checkpoints."""
    if folders.is_folder(path):
        return folders.read(path)
    try:
        with naming_missing_classes(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", f".*{LEFT_OUT}")  # `load` sets the encoders
            if path.is_dir():
                return load_checkpoint(path)
            saved = keras.saving.load_model(path, compile=False)
        if isinstance(saved, DiffusionModel):
            return saved
        raise ValueError(f"expected a DiffusionModel, received {type(saved).__name__}")
    except (*DAMAGE, BadZipFile) as error:
        raise ValueError(f"{path.name} is damaged or does not fit {what}: {error}") from error
