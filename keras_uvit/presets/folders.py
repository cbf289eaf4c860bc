"""A model as one folder: written by `DiffusionModel.save_to_preset`, read by `presets.load`.

    config.json        the model's configuration, its counters, its encoders, sizes and SHA-256 of
                       the other files, and its own
    model.safetensors  the moving average of the network's weights by their paths
    text_encoder/      the encoders, where they are included
    autoencoder/
    samples.png        what the model draws
    README.md          the model card, which may be edited and has no checksum

What a folder holds is data: nothing in it is run when it is read.
"""

import json
import shutil
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend, distribution, io, progress
from keras_uvit.convert.files import TORCH, read_tensors, write_tensors
from keras_uvit.encoders.holder import LEFT_OUT
from keras_uvit.evaluation import write_png
from keras_uvit.inference import naming_missing_classes
from keras_uvit.presets import parts
from keras_uvit.presets.card import Card, sizes
from keras_uvit.training import DiffusionModel
from keras_uvit.types import Config, PathLike
from keras_uvit.version import __version__

FORMAT, VERSION = "keras_uvit model", 1
RECORD, WEIGHTS, README, GRID = "config.json", parts.WEIGHTS, "README.md", "samples.png"
FILES = {WEIGHTS, GRID, *parts.FILES}  # that a record may list
COUNTERS = ("step", "ema_step", "global_batch")
NO_PROMPT = "null_context"  # the name of the context of the empty prompt among the weights
PICKLES = (*TORCH, ".pkl", ".pickle", ".joblib", ".dill")
# What Keras keeps in a configuration beside classes and functions.
DATA = ("__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__")
AGAIN = "Copy the folder again, or delete it and download it again."


# Writing ------------------------------------------------------------------------------------------


def write(
    model: DiffusionModel,
    folder: PathLike,
    card: Card,
    include_encoders: bool = True,
    overwrite: bool = False,
    source: str | None = None,
    verbose: int = 1,
) -> None:
    """Writes a model as a folder, whole or not at all: see `DiffusionModel.save_to_preset`.

    Args:
        model: `DiffusionModel`.
        folder: path.
        card: `Card`.
        include_encoders: bool. Write the encoders too, not only their fingerprints.
        overwrite: bool. Replace a folder of a model.
        source: what the README tells `presets.load` to load; `None` is the folder's name.
        verbose: 0 or 1. Print what was written, and show the progress of drawing.
    """
    folder = Path(folder).absolute()
    _check_target(folder, overwrite)
    config = _config_of(model)
    names = _names(model)
    if include_encoders:
        parts.check(vars(model.encoders))
    card.check(model)
    grid, caption = card.grid(model, verbose)
    with io.replacing_folder(folder) as beside:
        arrays = {n: ops.convert_to_numpy(w) for n, w in zip(names, _averaged(model))}
        write_tensors(arrays, beside / WEIGHTS)
        if grid is not None:
            write_png(beside / GRID, grid)
        record = _record(model, config, beside, include_encoders)
        io.write_json(beside / RECORD, record)
        text = card.text(model, record, source or folder.name, caption)
        (beside / README).write_text(text, encoding="utf-8")
        for name in record["files"]:  # safetensors hides its files from other users
            shutil.copymode(beside / README, beside / name)
    if verbose:
        progress.say(f"{source or folder}: {', '.join(sizes(record))}.")


def _record(model, config, folder, include_encoders):
    """What config.json says; writes the encoders, so that it can say how large all files are."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "keras_uvit": __version__,
        "keras": keras.__version__,
        "backend": backend.NAME,
        "model": config,
        "counters": {k: int(ops.convert_to_numpy(getattr(model, k))) for k in COUNTERS},
        "encoders": parts.write(vars(model.encoders), folder, include_encoders),
        "files": _described(folder),
    }
    record["sha256"] = io.digest(record)
    return record


def _check_target(folder, overwrite):
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists. Choose another folder, or pass overwrite=True (--overwrite)."
        )
    known = {RECORD, README, *FILES}
    found = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    other = sorted(set(found) - known)
    if folder.is_file() or RECORD not in found or other:
        raise FileExistsError(
            f"{folder} is not replaced, because it is more than the folder of a model: "
            f"{other[:3] or 'it has no ' + RECORD}. Choose another folder."
        )


def _config_of(model):
    """The model's configuration without what `compile` was given, as JSON keeps it."""
    model.check_weights()
    distribution.check_whole()
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    config = json.loads(json.dumps(config))
    check_classes(config, repr(model.name))
    return config


def _averaged(model):
    """The weights that a folder holds."""
    has_text = model.network.context_shape is not None
    return [*model.ema_network.weights, *([model.null_context] if has_text else [])]


def _names(model):
    """The names of `_averaged`; raises where the next model would have other ones."""
    names, copied = ([w.path for w in n.weights] for n in (model.network, model.ema_network))
    if names != copied or len({*names, NO_PROMPT}) <= len(names):
        different = [name for name, other in zip(names, copied) if name != other]
        raise ValueError(
            "The weights in a folder go by their names, and those of this network are not the "
            f"same in each copy of it, or not unique, such as {(different or names)[0]!r}. Name "
            "the layers of your own network."
        )
    return [*names, NO_PROMPT][: len(_averaged(model))]


def _described(folder):
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): io.described(path) for path in found}


# Reading ------------------------------------------------------------------------------------------


def is_folder(source: PathLike) -> bool:
    """Whether this path is a folder that may be a model's."""
    return (Path(source) / RECORD).is_file()


def read(
    folder: PathLike, seed: int | None = None, without: Collection[str] = ()
) -> DiffusionModel:
    """The model of a folder, not compiled.

    Args:
        folder: path.
        seed: int, of training; `None` is that of the folder.
        without: of "autoencoder" and "text_encoder", those that are not read.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ImportError: if the model has a class of its own that is not registered.
        ValueError: if the folder is damaged, of something else, or of a newer version.
    """
    folder = Path(folder)
    record = check(folder)
    model = _made(record, folder, seed)
    tensors = read_tensors(folder / WEIGHTS)
    _assign(dict(zip(_names(model), _averaged(model))), tensors, folder)
    for average, weight in zip(model.ema_network.weights, model.network.weights):
        weight.assign(ops.copy(average.value))  # a copy: JAX must not donate one buffer twice
    for key in COUNTERS:
        getattr(model, key).assign(record["counters"][key])
    read_parts = {
        name: parts.read(folder / name, about)
        for name, about in record["encoders"].items()
        if name not in without and about["config"] is not None
    }
    model.set_encoders(**read_parts)
    _warn_of_missing(model, record, folder, without)
    return model


def check(folder: PathLike) -> Config:
    """The record of a folder, after comparing the checksums of all its files.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    folder = Path(folder)
    record = read_record(folder)
    for name, about in record["files"].items():
        damage = io.damage(folder / name, about)
        if damage:
            error = ValueError if (folder / name).is_file() else FileNotFoundError
            raise error(f"{folder} is damaged: {damage}. {AGAIN}")
    pickled = [path.name for path in folder.rglob("*") if path.suffix.lower() in PICKLES]
    if pickled:
        raise ValueError(
            f"{folder} has {pickled[0]}, a kind of file that can run code when it is read. A "
            "model's folder has none: delete it, and ask who made the folder."
        )
    return record


def read_record(folder: PathLike) -> Config:
    """What config.json says, checked by itself.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no model's folder: it has no {RECORD}. Expected what "
            "`DiffusionModel.save_to_preset` writes, or hf://user/name. (The names of presets are "
            "for `presets.load`.)"
        )
    record = io.read_json(path, advice=AGAIN)
    if record.get("format") != FORMAT or not isinstance(record.get("version"), int):
        raise ValueError(
            f"{path} is that of something else: expected the format {FORMAT!r}, which "
            f"`DiffusionModel.save_to_preset` writes. Received: {record.get('format')!r}."
        )
    if record["version"] > VERSION:
        raise ValueError(
            f"{path} has version {record['version']} of the format, of keras_uvit "
            f"{record.get('keras_uvit')}. This is {__version__}, which reads up to version "
            f"{VERSION}: update keras_uvit."
        )
    if record.pop("sha256", None) != io.digest(record):
        raise ValueError(f"{path} is damaged: it does not have its own checksum. {AGAIN}")
    other = {*record["files"]} - FILES | {*record["encoders"]} - {*parts.PARTS}
    if other:
        raise ValueError(f"{path} lists what a model's folder does not have: {sorted(other)[:3]}.")
    lacking = {WEIGHTS, *parts.files(record["encoders"])} - {*record["files"]}
    if lacking:
        raise ValueError(f"{path} has no checksum of {sorted(lacking)}, which it needs.")
    return record


def _made(record, folder, seed):
    """The model of a record, with fresh weights."""
    path, config = folder / RECORD, record["model"]
    check_classes(config, str(path))
    if seed is not None:
        config["config"]["seed"] = seed
    try:
        with naming_missing_classes(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", f".*{LEFT_OUT}")  # `_warn_of_missing` says it
            model = keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError, KeyError) as error:
        # Keras quotes the whole configuration before what is wrong with it.
        reason = str(error).rpartition("Exception encountered: ")[2].partition("\n")[0][:300]
        raise ValueError(
            f"{path} of keras_uvit {record['keras_uvit']} makes no model of keras_uvit "
            f"{__version__}: {reason}"
        ) from error
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"Expected a DiffusionModel in {path}. Received: {type(model).__name__}.")
    return model


def check_classes(config: Any, where: str) -> None:
    """Raises unless all classes that a configuration names are Keras' own or registered.

    Keras before 3.12 imports any module that a configuration names.

    Raises:
        ImportError: for a class that is not known.
        ValueError: for code, as a `Lambda` layer keeps it.
    """
    for part in _objects(config):
        name, module = part["class_name"], part.get("module") or ""
        if name in ("Lambda", "__lambda__"):
            raise ValueError(
                f"{where} has a Lambda layer, whose code is no data. Write a layer, registered by "
                "keras.saving.register_keras_serializable, instead."
            )
        registered = part["config"] if name == "function" else part.get("registered_name")
        is_known = (
            name in DATA
            or keras.saving.get_registered_object(str(registered)) is not None
            or (name != "function" and module.partition(".")[0] == "keras")
            or (name == "function" and hasattr(keras.activations, str(registered)))
        )
        if not is_known:
            raise ImportError(
                f"{where} needs {registered or name!r}, which is not known here: import the module "
                "that defines it, decorated by keras.saving.register_keras_serializable, first."
            )


def _objects(config: Any) -> Iterator[Config]:
    """All that Keras would make of a configuration."""
    if isinstance(config, dict):
        if "class_name" in config and "config" in config:
            yield config
        for value in config.values():
            yield from _objects(value)
    elif isinstance(config, list):
        for value in config:
            yield from _objects(value)


def _assign(variables, tensors, folder):
    wrong = sorted(
        name
        for name in {*variables, *tensors}
        if name not in variables
        or name not in tensors
        or tuple(variables[name].shape) != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit the model of {RECORD}: {wrong[:3]} differ or are "
            f"missing, {len(wrong)} in all."
        )
    for name, variable in variables.items():
        variable.assign(np.array(tensors[name]))


def _warn_of_missing(model, record, folder, without):
    """Warns of encoders that `generate` will need, and that the folder does not have."""
    needed = {
        "autoencoder": model.latent_scale is not None,
        "text_encoder": model.network.context_shape is not None,
    }
    for part, is_needed in needed.items():
        if is_needed and part not in without and getattr(model.encoders, part) is None:
            about = record["encoders"].get(part, {})
            named = f" {about['id']!r} ({about['fingerprint']})" if about else ""
            warnings.warn(
                f"The {part.replace('_', ' ')}{named} is no part of the folder {folder}. "
                f"`generate` needs it: pass {part}=, or call `model.set_encoders({part}=...)`.",
                stacklevel=5,
            )
