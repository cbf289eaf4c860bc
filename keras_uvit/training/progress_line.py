"""The line that `fit` shows: how far, how good, how fast, how long still."""

import sys
import time
from typing import Any, TextIO

import keras
from keras import ops

from keras_uvit import progress
from keras_uvit.training.optimizers import unscaled

FIRST_ESTIMATE = 20  # steps after which the duration of the run is estimated
REDRAW = 0.2  # seconds between changes of the line in a terminal
ALWAYS_SHOWN = ("loss", "grad_norm")
NOT_SHOWN = (*ALWAYS_SHOWN, "learning_rate", "ema_decay", "skipped_steps", "skipped_in_row")


class ProgressLine(keras.callbacks.Callback):
    """Loss, learning rate, gradient norm, images per second and the time left, in one line.

    In a terminal or notebook the line of an epoch moves; elsewhere each epoch is one line, and the
    first steps of the run are followed by an estimate of its duration. Images per second leave out
    the first step, which compiles, and what comes between epochs, such as validation; the time left
    leaves out the first step.

    Args:
        watched: the `DiffusionModel`. (Keras' own `self.model` synchronizes JAX' state at each use,
            and this runs in another thread.)
        stream: where to write; `None` is `sys.stdout`.
    """

    async_safe = True  # reads the logs only, so JAX need not wait for each step

    def __init__(self, watched: Any, stream: TextIO | None = None):
        super().__init__()
        self.watched, self.stream = watched, stream
        self.moves = progress.is_watched() if stream is None else False
        self._width = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        optimizer = unscaled(self.watched.optimizer)
        self._schedule = getattr(optimizer, "schedule", None)
        self._rate = float(ops.convert_to_numpy(optimizer.learning_rate))
        self._batches_before = int(ops.convert_to_numpy(optimizer.iterations)) * (
            optimizer.gradient_accumulation_steps or 1
        )
        self._size = int(ops.convert_to_numpy(self.watched.global_batch))
        self._done = 0
        self._started: float | None = None
        self._timed, self._seconds = 0, 0.0  # steps of which the time is known, and that time

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch, self._batch = epoch, 0
        self._drawn = 0.0
        self._before: float | None = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        now = time.perf_counter()
        self._batch = batch + 1
        if self._before is not None:
            self._timed += 1
            self._seconds += now - self._before
        self._before = now
        if self._started is None:
            self._started = now
            return
        self._done += 1
        if self.moves and now - self._drawn > REDRAW:
            self._drawn = now
            self._write("\r" + self._line(logs or {}))
        elif not self.moves and self._done == FIRST_ESTIMATE and (self._seconds_left() or 0) > 60:
            self._write(
                f"The first {self._done + 1} steps are done: {self._done / self._elapsed():.2g} "
                f"steps per second, about {duration(self._seconds_left())} to go\n"
            )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._write(("\r" if self.moves else "") + self._line(logs or {}) + "\n")
        self._width = 0

    def _elapsed(self):
        return max(time.perf_counter() - self._started, 1e-9) if self._started else 0.0

    def _seconds_left(self):
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        if not steps or not self._done:
            return None
        left = steps - self._batch + steps * (epochs - self._epoch - 1)
        return left * self._elapsed() / self._done

    def _line(self, logs):
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        parts = [f"epoch {self._epoch + 1}/{epochs}", f"step {self._batch}/{steps or '?'}"]
        parts += [f"{key} {float(logs[key]):.4f}" for key in ALWAYS_SHOWN[:1] if key in logs]
        more = [key for key in logs if key not in NOT_SHOWN]
        parts += [f"{key} {float(logs[key]):.4g}" for key in more]
        parts += [f"lr {self._current_rate(logs):.1e}"]
        parts += [f"grad {float(logs[key]):.2f}" for key in ALWAYS_SHOWN[1:] if key in logs]
        if float(logs.get("skipped_steps", 0)):
            parts += [f"{int(logs['skipped_steps'])} steps skipped"]
        if self._timed:
            speed = self._timed / max(self._seconds, 1e-9)
            unit = f"{speed * self._size:,.0f} images/s" if self._size else f"{speed:.3g} steps/s"
            parts += [unit]
        left = self._seconds_left()
        if left:
            parts += [f"{duration(left)} left"]
        return "  ".join(parts)

    def _current_rate(self, logs):
        if self._schedule is None:  # Keras' callbacks that change it write it into the logs
            self._rate = float(logs.get("learning_rate", self._rate))
            return self._rate
        return float(ops.convert_to_numpy(self._schedule(self._batches_before + self._done)))

    def _write(self, text):
        stream = self.stream or sys.stdout
        plain = text.strip("\r\n")
        if self.moves:  # what is left of a longer line before
            text = text.replace(plain, plain.ljust(self._width))
            self._width = len(plain)
        stream.write(text)
        stream.flush()


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
