"""The state of callbacks, such as the best value so far: a checkpoint saves and restores it."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_uvit import progress

SET_RATES = keras.callbacks.LearningRateScheduler | keras.callbacks.ReduceLROnPlateau
# They show what happens and decide nothing.
SHOWING = (
    keras.callbacks.CSVLogger,
    keras.callbacks.History,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)
# Of the last one Keras itself changes the sign, when the first epoch ends.
NOT_STATE = ("params", "_model", "min_delta")


def check(
    model: Any,
    callbacks: Sequence[keras.callbacks.Callback],
    checkpoint: keras.callbacks.Callback | None = None,
) -> None:
    """Raises for callbacks that could not do what they are for, before anything is trained.

    Args:
        model: `DiffusionModel`, compiled.
        callbacks: list.
        checkpoint: the `Checkpoint` among them, or None.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, keras.callbacks.SwapEMAWeights):
            raise ValueError(
                f"{name} swaps in a moving average of the optimizer's. The model keeps its own, "
                "which `generate` and `evaluate` use: leave the callback out."
            )
        if checkpoint and isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ValueError(
                f"{name} and Checkpoint both restore a run. Use one of them: Checkpoint also keeps "
                "the optimizer and the place in the data."
            )
        if isinstance(callback, SET_RATES) and not isinstance(
            model.optimizer.learning_rate, keras.Variable
        ):
            raise ValueError(
                f"{name} sets the learning rate, which follows a schedule here. Leave the callback "
                "out, or compile with a constant rate: `compile(training.adamw(rate, "
                "warmup_steps=0))`."
            )


class CallbackStates:
    """The attributes of callbacks that have changed since the run began.

    Numbers, texts, and lists and dicts of them can be kept. A callback in which anything else has
    changed, such as the best weights of `EarlyStopping`, begins again, and a warning names it.

    Args:
        callbacks: list, when a run begins and each has done its `on_train_begin`.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]):
        self.callbacks: dict[str, keras.callbacks.Callback] = {}
        for callback in callbacks:
            if not isinstance(callback, SHOWING):
                kind = type(callback).__name__
                number = sum(type(c).__name__ == kind for c in self.callbacks.values()) + 1
                self.callbacks[kind if number == 1 else f"{kind} {number}"] = callback
        # What is restored: (callback, name of the attribute, value).
        self.chosen: list[tuple[keras.callbacks.Callback, str, Any]] = []
        # As texts, because lists and arrays change in place.
        self.begun = {
            name: {key: repr(value) for key, value in _attributes(callback).items()}
            for name, callback in self.callbacks.items()
        }

    def collect(self) -> dict[str, Any]:
        """The state of each callback, as JSON keeps it."""
        return {name: self._state(name, callback) for name, callback in self.callbacks.items()}

    def _state(self, name, callback):
        begun, state, lost = self.begun[name], {}, []
        for key, value in _attributes(callback).items():
            if repr(value) == begun.get(key):
                continue
            try:
                state[key] = _plain(value)
            except TypeError:
                lost += [] if callable(value) else [key]
        return {"state": state, "lost": lost, "begun": {key: begun.get(key) for key in state}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Gives the callbacks what `collect` has returned; those that it does not know, nothing.

        What the user has set otherwise since then stays as it is now.
        """
        for name in self.callbacks.keys() & saved.keys():
            if saved[name]["lost"]:
                warnings.warn(
                    f"{name} begins again: the checkpoint cannot keep its {saved[name]['lost']}, "
                    "only numbers, texts, and lists and dicts of them.",
                    stacklevel=2,
                )
            else:
                self._choose(name, **saved[name])
        self.restore_again()

    def _choose(self, name, state, lost, begun):
        callback = self.callbacks[name]
        for key, value in state.items():
            now = repr(getattr(callback, key)) if hasattr(callback, key) else None
            if now in (begun[key], repr(value)):
                self.begun[name][key] = begun[key]
                self.chosen.append((callback, key, value))
            else:
                progress.say(f"{name}: {key} is {now}, as it was set now; it was {value}.")

    def restore_again(self) -> None:
        """Takes back what the callbacks have changed since `restore`."""
        for callback, key, value in self.chosen:
            setattr(callback, key, copy.deepcopy(value))


def _attributes(callback):
    return {key: value for key, value in vars(callback).items() if key not in NOT_STATE}


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError
