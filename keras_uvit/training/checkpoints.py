"""Files that a killed process cannot leave half written, and checkpoints made of them.

A checkpoint is a folder, written under another name, synchronized, then renamed:

    step-00001000/
      pieces-0000.h5    what process 0 holds of each variable: weights, moving average, optimizer,
                        loss scale, counters, running means of the log
      checkpoint.json   step, place in the data, the model's and optimizer's configuration, what
                        callbacks have learned, the list of variables, sizes and SHA-256 of the
                        pieces, and its own

A process writes the parts of arrays that its devices own, each part once; any number of devices
reads them back.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np
from keras import ops

from keras_uvit import backend, io
from keras_uvit.inference import naming_missing_classes
from keras_uvit.training.optimizers import settings
from keras_uvit.types import PathLike, Tensor

FORMAT, VERSION = "keras_uvit checkpoint", 1
RECORD = "checkpoint.json"
ENCODERS = ("latent_encoder", "context_encoder")  # a model may not know them yet


class Place(NamedTuple):
    """Where in its data a run is: `batch` batches of `epoch` are done."""

    epoch: int
    batch: int
    steps_per_epoch: int
    batch_size: int  # of all processes; 0 where it is not known

    @property
    def batches(self) -> int:
        """How many are done in all."""
        return self.epoch * self.steps_per_epoch + self.batch


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to a different run."""


def atomically(
    write: Callable[..., None], filepath: PathLike, overwrite: bool, **kwargs: Any
) -> None:
    """Calls Keras' `write` on a file beside `filepath`, then renames it.

    Only single files can be renamed at once: folders, shards and remote paths are Keras' business.

    Raises:
        FileExistsError: if `filepath` exists and `overwrite` is false.
    """
    path = Path(filepath)
    if kwargs or not path.name.endswith((".keras", ".weights.h5")):
        write(filepath, overwrite=overwrite, **kwargs)
        return
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
    with io.replacing(path) as beside:
        write(beside, overwrite=True)


# Writing ------------------------------------------------------------------------------------------


def write(model: Any, directory: PathLike, step: int, place: Place, **more: Any) -> None:
    """Writes a checkpoint of the model as it is. All processes call it together.

    Args:
        model: compiled `DiffusionModel`.
        directory: path, seen by all processes.
        step: int, the checkpoint's number; one that is there already is replaced.
        place: `Place`.
        **more: for the record: "value", a float by which checkpoints are compared, or None;
            "optimizer", its settings when the run began; "callbacks", their state.

    Raises:
        OSError: if the disk is full, or cannot be written. Older checkpoints stay.
    """
    path = Path(directory) / name(step)
    beside = path.with_name(f"tmp-{path.name}")
    index, _ = backend.process()
    if index == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    backend.barrier(f"begin {path.name}")
    try:
        pieces = beside / f"pieces-{index:04d}.h5"
        _write_pieces(pieces, _variables(model))
        io.write_json(pieces.with_suffix(".json"), io.described(pieces), synchronized=True)
        backend.barrier(f"pieces of {path.name}")
        if index == 0:
            _write_record(beside, model, {"step": step, **place._asdict(), **more})
            io.replace_folder(beside, path)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            error.errno,
            f"The checkpoint of step {step} could not be written into {directory} "
            f"({error.strerror or error}). Earlier checkpoints are complete: free disk space, then "
            "start the same run again.",
        ) from error
    backend.barrier(f"end {path.name}")


def name(step: int) -> str:
    return f"step-{step:08d}"


def size(model: Any) -> int:
    """Bytes of a checkpoint of the model."""
    return sum(int(np.prod(v.shape)) * 4 for v in _variables(model))


def prune(directory: PathLike, keep: int) -> None:
    """Leaves the newest `keep` checkpoints, and the one with the lowest value."""
    directory, steps = Path(directory), steps_in(directory)
    found = {step: read_record(directory / name(step)).get("value") for step in steps}
    values = {step: value for step, value in found.items() if value is not None}
    best = min(values, key=lambda step: values[step]) if values else None
    for step in steps[keep:]:
        if step != best:
            gone = directory / f"tmp-{name(step)}"  # what is half deleted is no checkpoint
            os.replace(directory / name(step), gone)
            shutil.rmtree(gone)


def _variables(model):
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


def _write_pieces(path, variables):
    with h5py.File(path, "w") as file:
        for i, variable in enumerate(variables):
            for k, (start, array) in enumerate(backend.pieces(variable)):
                if array.dtype.name == "bfloat16":  # HDF5 has none; float32 holds it exactly
                    array = array.astype("float32")
                file.create_dataset(f"{i}/{k}", data=array).attrs["start"] = start
    io.synchronize(path)


def _write_record(folder, model, where):
    files = {p.stem + ".h5": _read_json(p) for p in sorted(folder.glob("pieces-*.json"))}
    record = {
        "format": FORMAT,
        "version": VERSION,
        **where,
        "backend": backend.NAME,
        "model": keras.saving.serialize_keras_object(model),
        "optimizer_now": settings(model),
        "variables": _list(model),
        "files": files,
    }
    record["sha256"] = io.digest(record)
    io.write_json(folder / RECORD, record, synchronized=True)
    for file in files:
        (folder / file).with_suffix(".json").unlink()
    io.synchronize(folder)


def _list(model):
    # The last part of a path: Keras numbers optimizers and models made one after the other.
    return [[v.path.split("/")[-1], list(v.shape), v.dtype] for v in _variables(model)]


# Reading ------------------------------------------------------------------------------------------


def steps_in(directory: PathLike) -> list[int]:
    """Steps of the checkpoints in a folder, the newest first; none of them opened."""
    found = Path(directory).glob("step-" + "[0-9]" * 8)
    return sorted((int(path.name.removeprefix("step-")) for path in found), reverse=True)


def newest(directory: PathLike) -> Path | None:
    """Path of the newest whole checkpoint, or None. Damaged ones are renamed and named.

    All processes call it together, and get the same.
    """
    directory, chosen = Path(directory), -1
    if backend.is_first():
        for step in steps_in(directory):
            damage = _damage(directory / name(step))
            if damage is None:
                chosen = step
                break
            aside = directory / f"damaged-{name(step)}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(directory / name(step), aside)
            warnings.warn(
                f"The checkpoint of step {step} in {directory} is damaged ({damage}); it is now "
                f"called {aside.name}, and the one before it is used.",
                stacklevel=2,
            )
    chosen = backend.from_first(chosen)
    return None if chosen < 0 else directory / name(chosen)


def _damage(path):
    """What is wrong with a checkpoint, or None."""
    try:
        record = read_record(path)
    except CheckpointError as error:
        return str(error)
    found = (io.damage(path / file, about) for file, about in record["files"].items())
    return next((what for what in found if what), None)


def read_record(path: PathLike) -> dict[str, Any]:
    """The dict in a checkpoint's record.

    Raises:
        CheckpointError: if it is missing, damaged or of a later version.
    """
    record = _read_json(Path(path) / RECORD)
    if record.pop("sha256", None) != io.digest(record):
        raise CheckpointError(f"{RECORD} does not have its own checksum")
    if record["version"] > VERSION:
        raise CheckpointError(f"version {record['version']}, this one reads up to {VERSION}")
    return record


def restore(model: Any, path: PathLike) -> tuple[dict[str, Any], list[tuple[Tensor, np.ndarray]]]:
    """Puts a checkpoint's state into a model that is made and compiled as it was then.

    Args:
        model: compiled `DiffusionModel`.
        path: of one checkpoint, such as `newest(directory)`.

    Returns:
        The record, and the values of all that callbacks may change when an epoch begins, the
        running means and the learning rate, as pairs (variable, array).

    Raises:
        CheckpointError: if model or optimizer are others than those that were saved.
    """
    path, record = Path(path), read_record(path)
    _check_same(model, path, record)
    variables = _variables(model)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(h5py.File(path / file)) for file in record["files"]]
        for i, variable in enumerate(variables):
            parts = [piece for file in files if str(i) in file for piece in file[str(i)].values()]
            backend.assign(variable, lambda index, p=parts, v=variable: _read(p, index, v.shape))
    for key in ENCODERS:
        setattr(model, key, record["model"]["config"][key] or getattr(model, key))
    rate = model.optimizer.learning_rate  # a variable, unless it follows a schedule
    changed = [*model.metrics_variables, *([rate] if isinstance(rate, keras.Variable) else [])]
    return record, [(v, np.array(ops.convert_to_numpy(v))) for v in changed]


def load_checkpoint(path: PathLike) -> Any:
    """The model of a checkpoint, compiled as it was: to sample, to evaluate, or to start a new run.

    Args:
        path: of one checkpoint, or of a folder of them, whose newest is taken.

    Returns:
        `DiffusionModel`.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is damaged.
    """
    path = Path(path)
    chosen = path if (path / RECORD).is_file() else newest(path)
    if chosen is None:
        raise FileNotFoundError(f"No checkpoint in {path}.")
    damage = _damage(chosen)
    if damage:
        raise CheckpointError(f"{chosen} is damaged: {damage}.")
    with naming_missing_classes(chosen):
        model = keras.saving.deserialize_keras_object(read_record(chosen)["model"])
    restore(model, chosen)
    return model


def _check_same(model, path, record):
    there = record["model"]["config"]
    here = json.loads(json.dumps(model.get_config()))  # tuples become lists, as there
    free = {"name", *(key for key in ENCODERS if None in (there[key], here[key]))}
    other = [k for k in here if k not in free and there.get(k, here[k]) != here[k]]
    if other:
        raise CheckpointError(
            f"{path} belongs to a model that differs in {other}. Choose another folder, or delete "
            "it."
        )
    _check_optimizer(path, record, settings(model))
    # Without their types: the seed's and the counter's are a backend's own.
    if [entry[:2] for entry in record["variables"]] != [entry[:2] for entry in _list(model)]:
        raise CheckpointError(f"{path} holds other variables than this model has.")


def _check_optimizer(path, record, here):
    """Each setting must be that of the run's beginning, or what callbacks have made of it."""
    there = record["optimizer"]
    later = record.get("optimizer_now", there)
    other = {
        key: (there.get(key), here.get(key))
        for key in sorted({*there, *here})
        if here.get(key) not in (there.get(key), later.get(key))
    }
    if other:
        raise CheckpointError(
            f"{path} was made with a different optimizer: (then, now) {other}. Use the same. To "
            "continue with other settings, load the model by `training.load_checkpoint`, compile "
            "it with them, and choose another folder."
        )


def _read(parts, index, shape):
    """The part `index` (slices) of an array that lies in pieces."""
    first = [part.start or 0 for part in index]
    last = [n if part.stop is None else part.stop for part, n in zip(index, shape)]
    whole = np.empty([b - a for a, b in zip(first, last)], parts[0].dtype)
    for piece in parts:
        start = piece.attrs["start"]
        low = [max(a, s) for a, s in zip(first, start)]
        high = [min(b, s + n) for b, s, n in zip(last, start, piece.shape)]
        if all(a < b for a, b in zip(low, high)):
            there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))
            here = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first))
            whole[here] = piece[there]
    return whole


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is no record")
    return content
