"""A training run in a folder, which resumes when it is started again."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_uvit import backend, distribution, io
from keras_uvit.training import checkpoints
from keras_uvit.training.callbacks import Checkpoint
from keras_uvit.training.checkpoints import atomically
from keras_uvit.types import PathLike

MODEL, AVERAGE, LOG, CHECKPOINTS = "model.keras", "ema.weights.h5", "log.csv", "checkpoints"


def train(
    model: Any,
    dataset: Any,
    folder: PathLike,
    iterations: int,
    *,
    steps_per_epoch: int | None = None,
    every_steps: int = 1000,
    keep: int = 2,
    resume: str | bool = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    validation_data: Any = None,
    verbose: str | int = "auto",
) -> Any:
    """Trains for at least `iterations` batches, in whole epochs.

    `folder` gets `checkpoints/` while the run lasts, `log.csv` after each epoch, and at the end
    `model.keras` (everything) and `ema.weights.h5` (to sample). Started again, the run resumes from
    the newest checkpoint and ends as an uninterrupted one would: see `Checkpoint`.

    Args:
        model: `DiffusionModel`, compiled or not.
        dataset: `data.LatentDataset` or `data.ImageDataset`.
        folder: path, made if need be.
        iterations: int.
        steps_per_epoch: int, batches that count as an epoch; `None` is all of the data.
        every_steps, keep: of `Checkpoint`.
        resume: of `DiffusionModel.fit`.
        callbacks: Keras callbacks.
        validation_data, verbose: of `fit`.

    Returns:
        `model`, trained.

    Raises:
        ValueError: if the folder holds another run, or the data do not fit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not model.compiled:
        model.compile()
    keeping = Checkpoint(folder / CHECKPOINTS, every_steps, keep)
    logging = []
    if backend.is_first():
        logging = [_Log(folder / LOG)]
    model.fit(
        dataset,
        epochs=math.ceil(iterations / (steps_per_epoch or len(dataset))),
        steps_per_epoch=steps_per_epoch,
        callbacks=[*logging, *callbacks, keeping],
        validation_data=validation_data,
        verbose=verbose,
        resume=resume,
    )
    _finish(model, folder)
    return model


def _finish(model, folder):
    """Writes the files to use, unless they are there and not older than the last checkpoint."""
    if not backend.is_first():
        return
    step, *_ = checkpoints.steps_in(folder / CHECKPOINTS)
    last = folder / CHECKPOINTS / checkpoints.name(step)
    made = (last / checkpoints.RECORD).stat().st_mtime_ns
    paths = [folder / AVERAGE, folder / MODEL]
    if all(path.is_file() and path.stat().st_mtime_ns >= made for path in paths):
        return
    has_all = not distribution.divides_among_processes()
    with distribution.alone():
        model = model if has_all else checkpoints.load_checkpoint(last)
        for path, part in zip(paths, (model.ema_network.save_weights, model.save)):
            atomically(part, path, overwrite=True)


class _Log(keras.callbacks.CSVLogger):
    """A row an epoch; rows of epochs that are trained again are cut off first."""

    def __init__(self, path):
        super().__init__(path, append=True)
        self.csv_file = None  # Keras 3.10 has none before training begins

    def on_train_begin(self, logs=None):
        """Waits for the first epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if self.csv_file is None:
            self._cut(epoch)
            super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        if self.csv_file is not None:
            super().on_train_end(logs)

    def _cut(self, epoch):
        path = Path(self.filename)
        if not path.is_file():
            return
        header, *rows = path.read_bytes().decode().splitlines(keepends=True) or [""]
        column = header.strip().split(",").index("epoch") if header else 0
        kept = [row for row in rows if int(row.split(",")[column]) < epoch]
        with io.replacing(path) as beside:
            beside.write_bytes("".join([header, *kept]).encode() if kept else b"")
