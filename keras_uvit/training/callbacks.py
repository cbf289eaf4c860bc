"""Callbacks of `fit`: the guard that it adds by itself, and the one that keeps a run."""

import contextlib
import errno
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
from keras import ops

from keras_uvit import backend, progress
from keras_uvit.checks import as_int
from keras_uvit.training import checkpoints
from keras_uvit.training.callback_states import CallbackStates
from keras_uvit.training.checkpoints import Place
from keras_uvit.training.optimizers import settings
from keras_uvit.types import Array, PathLike, Tensor


class StopOnNonFinite(keras.callbacks.Callback):
    """Stops `fit` after too many steps in a row whose loss or gradient was not finite.

    `fit` raises `error` once Keras has brought the weights back from the device: an exception in
    the middle of an epoch would lose them on JAX.

    Args:
        watched: the `DiffusionModel`; its `max_skipped_steps` is the limit. (Keras' own
            `self.model` synchronizes JAX' state at every use, and this runs in another thread.)
    """

    async_safe = True  # reads the logs only, so JAX need not wait for each step

    def __init__(self, watched: Any):
        super().__init__()
        self.watched = watched
        self.error: str | None = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        limit = self.watched.max_skipped_steps
        if self.error is None and logs and logs["skipped_in_row"] >= limit:
            self.error = (
                f"Training stopped: {int(logs['skipped_in_row'])} steps in a row had a loss or "
                f"gradient that was not finite ({int(logs['skipped_steps'])} in all). The weights "
                "are those of the last good step. Look for NaN or infinity in the data, labels "
                "out of range, a learning rate that is too high, or float16 overflow (use "
                "mixed_bfloat16); `max_skipped_steps` of DiffusionModel sets the limit."
            )
            self.watched.stop_training = True


class Checkpoint(keras.callbacks.Callback):
    """Saves a run in a folder, from which `fit` resumes as if it had never been stopped.

    A checkpoint is everything: weights, moving average, optimizer, loss scale, counters, the place
    in the data, and what other callbacks have learned (`CallbackStates` says what of it can be
    kept). It is numbered by the batches of the run, and at the end of `fit` it is of the model as
    the other callbacks have left it, such as `EarlyStopping` with its best weights.
    Noise is a function of (seed, step): the same losses follow, bit by bit on a CPU (on TensorFlow
    if `jit_compile` stays as it was: XLA draws other noise).
    Each is written beside its name and renamed, with checksums; a damaged one is put aside, and the
    one before it is used. SIGTERM, which a scheduler sends before it takes a machine away, makes
    the run save after the present step and exit with code 0; so does Ctrl-C, which then raises
    KeyboardInterrupt as ever. A second Ctrl-C does not wait.

    With several processes the folder is one that all of them see; each writes what its devices own.

    Args:
        directory: path, made if need be.
        every_steps: int, batches between checkpoints; there is one at the end of `fit` too.
        keep: int, how many of the newest are kept.
        best: name in the log of an epoch, such as "val_loss" or "fid": the epoch with the lowest is
            saved and kept too.

    Example:
        >>> checkpoint = Checkpoint("/tmp/run", every_steps=500)
        >>> # model.fit(dataset, epochs=100, callbacks=[checkpoint]); started again, it resumes
    """

    def __init__(
        self, directory: PathLike, every_steps: int = 1000, keep: int = 3, best: str | None = None
    ):
        super().__init__()
        self.directory = Path(directory)
        self.every_steps, self.keep = as_int(every_steps, "every_steps", 1), as_int(keep, "keep", 1)
        self.best = best
        self._asked_to_stop = self._interrupted = False
        self.begin(Place(0, 0, 0, 0))

    def begin(
        self,
        place: Place,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        record: dict | None = None,
        changed: Sequence[tuple[Tensor, Array]] = (),
    ) -> None:
        """Called by `fit`: where in the data the run begins, and with what.

        Args:
            place: `Place`.
            callbacks: those of the user, whose state is kept.
            record: of the checkpoint from which the run resumes, or None.
            changed: what callbacks change when an epoch begins, `checkpoints.restore`.
        """
        self._place, self._skipped = place, place.batch
        self._callbacks, self._record, self._changed = callbacks, record or {}, changed

    def on_train_begin(self, logs: dict | None = None) -> None:
        # From here on counted by itself: callbacks may turn back the model's own count.
        self._step = self._record.get("step", int(ops.convert_to_numpy(self.model.step)))
        self._saved, self._mark = self._step, self._mark_of_state()
        self._before = self._step - self._place.batches
        self._at_once = self.model.steps_per_execution
        self._settings = self._record.get("optimizer") or settings(self.model)
        self._states = CallbackStates(self._callbacks)
        self._states.restore(self._record.get("callbacks", {}))
        self._check_space()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, SIGTERM and Ctrl-C stop the run after the current step, with a checkpoint."""
        self._asked_to_stop = self._interrupted = False
        is_main = threading.current_thread() is threading.main_thread()  # others may not ask
        if backend.catches_sigterm() or not is_main:
            yield
            return
        before = {kind: signal.signal(kind, self._stop) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _stop(self, kind, _):
        self._asked_to_stop = True
        if kind == signal.SIGINT:
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # who asks twice is in a hurry

    def _check_space(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        present = len(checkpoints.steps_in(self.directory))
        # One more than is kept: the oldest goes when the newest is there.
        needed = checkpoints.size(self.model) * max(1, self.keep + 1 + bool(self.best) - present)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.directory} needs {needed / 1e9:.3g} GB for checkpoints, {free / 1e9:.3g} "
                "GB are free. Nothing was trained. Make room, choose another folder, or a lower "
                "keep.",
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._place = self._place._replace(epoch=epoch, batch=self._skipped)
        if self._skipped:  # the other callbacks have begun this epoch twice now
            self._states.restore_again()
            for variable, value in self._changed:
                variable.assign(value)
        self._first, self._skipped = self._skipped, 0
        self._begun = self._first

    def before_batch(self, batch: int) -> None:
        """Called by `fit` before the other callbacks see the batch.

        Before a batch, not after one: Keras calls this in the main thread and without waiting for
        the device, and the state is that after the batch before.
        """
        self._move(self._first + batch)
        self._begun = self._place.batch + self._at_once
        self._save_if_due()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._begun < self._place.steps_per_epoch:  # a callback has stopped it
            self._move(self._begun)
        else:
            self._place = self._place._replace(epoch=epoch + 1)
            self._move(0)
        value = logs.get(self.best) if self.best and logs else None
        if self.best and value is None:
            raise ValueError(f"best={self.best!r} is not in the log: {sorted(logs or {})}.")
        self._save_if_due(value)

    def _move(self, batch):
        self._place = self._place._replace(batch=batch)
        self._step = self._before + self._place.batches

    def _save_if_due(self, value=None):
        stop = backend.any_process(self._asked_to_stop, self._step)
        due = self._step // self.every_steps > self._saved // self.every_steps
        if due or self._is_best(value) or (stop and self._step > self._saved):
            self._save(value)
        if stop and self._interrupted:
            progress.say(
                f"\nInterrupted at step {self._step}, which is saved in {self.directory}. Run the "
                "same command to resume."
            )
            raise KeyboardInterrupt
        if stop:
            progress.say(f"Asked to stop: step {self._step} is saved in {self.directory}.")
            raise SystemExit(0)

    def _is_best(self, value):
        if value is None:
            return False
        steps = checkpoints.steps_in(self.directory)
        records = (checkpoints.read_record(self.directory / checkpoints.name(s)) for s in steps)
        return all(value < r["value"] for r in records if r["value"] is not None)

    def _save(self, value=None):
        more = {
            "value": value,
            "optimizer": self._settings,
            "callbacks": self._states.collect(),
        }
        checkpoints.write(self.model, self.directory, self._step, self._place, **more)
        self._saved, self._mark = self._step, self._mark_of_state()
        if backend.is_first():
            checkpoints.prune(self.directory, self.keep)

    def _mark_of_state(self):
        """Differs where another callback has put other weights into the model."""
        # As tensors: of TensorFlow's replicas the values are a kind of their own.
        weights = [ops.convert_to_tensor(weight) for weight in self.model.network.weights]
        numbers = backend.norm(weights), ops.convert_to_tensor(self.model.step)
        return [float(ops.convert_to_numpy(backend.alone(number))) for number in numbers]

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._step > self._saved or self._mark_of_state() != self._mark:
            self._save()
