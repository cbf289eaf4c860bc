"""`fit` around Keras' own: checks, the guard, and going on from a checkpoint at its place."""

import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_uvit import backend, progress
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.networks import quantizing
from keras_uvit.training import (
    arguments,
    batches,
    callback_states,
    checkpoints,
    draws,
    frozen,
    run_length,
)
from keras_uvit.training.callbacks import Checkpoint, StopOnNonFinite
from keras_uvit.training.checkpoints import CheckpointError, Place
from keras_uvit.training.optimizers import unscaled
from keras_uvit.training.progress_line import ProgressLine

RESUME = ("auto", True, False)


def fit(
    model: Any,
    keras_fit: Callable[..., keras.callbacks.History],
    x: Any,
    y: Any,
    callbacks: Any,
    mode: str | bool,
    options: dict[str, Any],
) -> keras.callbacks.History:
    """Checks the data, guards the steps, and calls Keras' `fit` for what is left of the run.

    Args:
        model: `DiffusionModel`.
        keras_fit: bound method.
        x, y, callbacks: as `fit` takes them.
        mode: the argument `resume`.
        options: dict of the other arguments.
    """
    size = options["batch_size"]
    model.check_weights()
    quantizing.check_whole(model.network, "Training")
    if model.compiled:
        frozen.check_compiled(model)
    _check_resume(mode, callbacks, options)
    if isinstance(x, types.GeneratorType) or getattr(x, "shuffles_itself", False):
        options.setdefault("shuffle", False)  # Keras cannot shuffle the one, need not the other
    x = batches.check_source(model, x, y, size)
    batches.adopt(model, x)
    if share := options.pop("validation_split", None):
        x, options["validation_data"] = _split(x, share, options)
    if options["epochs"] is None:
        if model.planned_steps is not None:
            x = _ordered(x, size, options.get("shuffle", True), model.seed)
            if isinstance(x, keras.utils.PyDataset):
                options.update(batch_size=None, shuffle=False)
        options.update(_planned(model, x, options))
    if options.get("validation_data") is not None:
        options["validation_data"] = _validation(model, size, options)
    model.global_batch.assign(size or getattr(x, "batch_size", None) or 0)
    guard = StopOnNonFinite(model)
    own = [guard]
    if options["verbose"] == "auto" and backend.is_first():
        own.append(ProgressLine(model))
    if options["verbose"] == "auto" or not backend.is_first():
        options["verbose"] = 0
    model.skipped_in_row.assign(0)
    draws.begin(model.random, model.seed)  # weights of another model brought its seed with them
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for callback in own:
            callbacks.append(callback)
    else:
        callbacks = [*keras.tree.flatten(callbacks or []), *own]
    backend.synchronize(model)
    history = _fit(model, keras_fit, x, callbacks, mode, options)
    if guard.error:
        raise FloatingPointError(guard.error)
    return history


def _members(callbacks):
    """The callbacks of what `fit` takes: one, a list, or Keras' own list."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    return keras.tree.flatten(callbacks or [])


def _checkpoints(callbacks):
    return [callback for callback in _members(callbacks) if isinstance(callback, Checkpoint)]


def _check_resume(mode, callbacks, options):
    """Raises for what cannot go together with a `Checkpoint`, or without one."""
    found = _checkpoints(callbacks)
    if mode not in RESUME:
        raise ValueError(f"resume must be one of {RESUME}. Received: {mode!r}.")
    if mode is True and not found:
        raise ValueError("resume=True needs a training.Checkpoint among the callbacks.")
    if len(found) > 1 or (found and isinstance(callbacks, keras.callbacks.CallbackList)):
        raise ValueError("fit takes one Checkpoint, in a list of callbacks.")
    if found and options.get("initial_epoch"):
        raise ValueError(
            "With a Checkpoint the run resumes from its newest checkpoint, which knows the epoch. "
            "Leave initial_epoch out."
        )


def _split(x, share, options):
    """Training and validation data out of arrays, for `validation_split`."""
    if not isinstance(x, dict):
        raise ValueError(
            "validation_split divides arrays, and these data come in batches. Leave it out, and "
            "pass validation_data."
        )
    if options.get("validation_data") is not None:
        raise ValueError("Pass validation_split or validation_data, not both.")
    return batches.split(x, share)


def _validation(model, size, options):
    """Checked `validation_data`, as `fit` of Keras takes them."""
    given = options["validation_data"]
    x, *rest = given if isinstance(given, tuple) else (given,)
    y, weight = (*rest, None, None)[:2]
    arguments.checked("fit", {"sample_weight": weight})
    own = options.get("validation_batch_size")
    return batches.check_source(model, x, y, own or (size if batches.is_arrays(x) else None))


def _planned(model, x, options):
    """The arguments `epochs` and `steps_per_epoch` of a run of the length that was planned."""
    steps = options.get("steps_per_epoch")
    length = steps or _steps_of(x, options["batch_size"])
    if model.planned_steps is None or length is None:
        return {"epochs": 1}
    accumulated = unscaled(model.optimizer).gradient_accumulation_steps or 1
    batches = model.planned_steps * accumulated
    steps = steps or run_length.epoch_of(batches, length)
    return {"epochs": math.ceil(batches / (steps or length)), "steps_per_epoch": steps}


def _fit(model, keras_fit, x, callbacks, mode, options):
    """Keras' `fit`, once, or for each part of what a `Checkpoint` has left to do."""
    found = _checkpoints(callbacks)
    callback_states.check(model, _members(callbacks), *found)
    if found or backend.data_shard()[1] > 1:
        x = _ordered(x, options.pop("batch_size"), options.pop("shuffle", True), model.seed)
        options["shuffle"] = False
        model.global_batch.assign(getattr(x, "batch_size", None) or model.global_batch)
    if not found:
        epochs = options["epochs"] - options.get("initial_epoch", 0)
        steps = options.get("steps_per_epoch") or _steps_of(x, options.get("batch_size"))
        run_length.tell(model, steps and epochs * steps)
        if options.get("steps_per_epoch") and isinstance(x, keras.utils.PyDataset):
            # Keras would end an epoch early where the data end.
            x, options = _batches(x, 0), {**options, "shuffle": False}
        return keras_fit(x, callbacks=callbacks, **options)
    (checkpoint,) = found
    epochs, steps = options.pop("epochs"), options.pop("steps_per_epoch", None)
    others = [callback for callback in callbacks if callback is not checkpoint]
    place = _resume(model, checkpoint, others, x, mode, steps)
    run_length.tell(model, epochs * place.steps_per_epoch - place.batches)
    run = _OneRun(others, checkpoint, model, options["verbose"], epochs)
    with checkpoint.watching():
        for part in _parts(x, place, epochs, steps):
            run.set_length(part["steps_per_epoch"] or _length(part["x"]))
            keras_fit(callbacks=run, **part, **options)
            if model.stop_training:
                break
        run.finish()
    return model.history


def _ordered(x, batch_size, shuffle, seed):
    """Arrays as batches whose order is a function of (seed, epoch); other data as they are."""
    if not isinstance(x, dict):
        return x
    if not shuffle:
        raise ValueError(
            "With a Checkpoint, or in several processes, arrays are read in an order of their own, "
            "which can be found again; leave shuffle=False out, or pass a keras.utils.PyDataset."
        )
    arrays = {key: ops.convert_to_numpy(value) for key, value in x.items()}
    total = len(next(iter(arrays.values())))
    return ShuffledDataset(arrays, batch_size or min(32, total), seed)


def _resume(model, checkpoint, others, x, mode, steps_per_epoch):
    """Restores the newest checkpoint, if `mode` wants it, and returns the `Place` to begin at.

    Raises:
        ValueError: if there must be a checkpoint and is none, or the other way round, or if it is
            of another model, optimizer, batch size or number of batches.
    """
    steps = steps_per_epoch or _length(x)
    if steps is None:
        raise ValueError(
            "With a Checkpoint the data must have a length, or fit steps_per_epoch: else a place "
            "in them means nothing."
        )
    here = Place(0, 0, steps, int(ops.convert_to_numpy(model.global_batch)))
    others = [c for c in others if not isinstance(c, StopOnNonFinite | ProgressLine)]
    path = checkpoints.newest(checkpoint.directory)
    if path is None:
        if mode is True:
            raise ValueError(f"resume=True, but there is no checkpoint in {checkpoint.directory}.")
        checkpoint.begin(here, others)
        return here
    if mode is False:
        raise ValueError(
            f"{checkpoint.directory} holds a run up to {path.name}. resume='auto' continues it; "
            "for a new one choose another folder, or delete this."
        )
    _check_younger(model, path)
    record, changed = checkpoints.restore(model, path)
    place = Place(*(record[field] for field in Place._fields))
    _check_data(path, place, here)
    progress.say(f"Resuming from {path}: {place.epoch} epochs and {place.batch} batches are done.")
    if record["backend"] != backend.NAME:
        progress.say(
            f"It was written on {record['backend']}: {backend.NAME} draws other noise, so the "
            "losses will not be those of an undisturbed run, number by number."
        )
    checkpoint.begin(place, others, record, changed)
    return place


def _check_younger(model, path):
    present, saved = int(ops.convert_to_numpy(model.step)), checkpoints.read_record(path)["step"]
    if present > saved:
        raise CheckpointError(
            f"The model is at step {present}, but {path} at {saved}: resuming there would "
            "lose what it has learned. Choose another folder."
        )


def _check_data(path, there, here):
    for field in ("steps_per_epoch", "batch_size"):
        was, now = getattr(there, field), getattr(here, field)
        if None not in (was, now) and was != now:
            raise CheckpointError(
                f"{path} was made with {field}={was}, now it is {now}: its place in the data would "
                "mean another one. Use the same, or choose another folder and begin with the "
                "weights: `training.load_checkpoint`."
            )


def _parts(x, place, epochs, steps_per_epoch):
    """What is left of a run, as arguments of one or two calls of Keras' `fit`.

    An epoch that was interrupted is a call of its own, because Keras has no other way to begin
    inside one.
    """
    first, rest, steps = _from(x, place, steps_per_epoch)
    if place.batch and place.epoch < epochs:
        left = steps and steps - place.batch
        span = {"initial_epoch": place.epoch, "epochs": place.epoch + 1}
        yield {"x": first, "steps_per_epoch": left, **span}
        place = place._replace(epoch=place.epoch + 1)
    if place.epoch < epochs:
        span = {"initial_epoch": place.epoch, "epochs": epochs}
        yield {"x": rest, "steps_per_epoch": steps, **span}


def _from(x, place, steps_per_epoch):
    """The interrupted epoch's rest, the epochs behind it, and Keras' `steps_per_epoch` of both."""
    if isinstance(x, keras.utils.PyDataset) and not steps_per_epoch:
        if hasattr(x, "epoch"):
            x.epoch = place.epoch
        return _Rest(x, place.batch), x, None
    # One endless stream, whatever it is made of: Keras begins epochs of some sources by itself.
    steps = steps_per_epoch or _length(x)
    stream = _batches(x, place.epoch * steps + place.batch)
    left = steps - place.batch if place.batch else 0
    return (batch for batch in itertools.islice(stream, left)), stream, steps


def _batches(x, first):
    """Endless batches of `x` from number `first` on; earlier ones are read only if necessary."""
    length = _length(x)
    if isinstance(x, keras.utils.PyDataset):
        for k in itertools.count(first):
            epoch, index = divmod(k, length)
            if hasattr(x, "epoch") and x.epoch != epoch:
                x.epoch = epoch
            yield batches.as_tuple(x[index])
    elif length:  # such as a tf.data.Dataset: each epoch reads it from its beginning
        yield from map(batches.as_tuple, itertools.islice(iter(x), first % length, None))
        while True:
            yield from map(batches.as_tuple, iter(x))
    else:
        yield from map(batches.as_tuple, itertools.islice(iter(x), first, None))


def _steps_of(x, batch_size):
    """Batches of an epoch of arrays, too."""
    if isinstance(x, dict):
        return -(-len(next(iter(x.values()))) // (batch_size or 32))
    return _length(x)


def _length(x):
    """Batches of an epoch, where the data know it."""
    try:
        length = len(x)
    except TypeError:
        return None
    return (
        length if 0 < length < 2**62 else None
    )  # tf.data and Grain: a huge length means endless data


class _Rest(keras.utils.PyDataset):
    """A data set without its first batches."""

    def __init__(self, dataset, first):
        super().__init__()
        self.dataset, self.first = dataset, first

    def __len__(self):
        return len(self.dataset) - self.first

    def __getitem__(self, index):
        return self.dataset[index + self.first]

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class _OneRun(keras.callbacks.CallbackList):
    """Callbacks that see several calls of Keras' `fit` as one run.

    The checkpoint is the last of them, to be of what the others have seen; but before a batch it
    is the first, because the batch is not part of it.
    """

    def __init__(self, others, checkpoint, model, verbose, epochs):
        more = dict(add_history=True, add_progbar=verbose != 0, model=model)
        callbacks = [*others, checkpoint]
        super().__init__(callbacks, **more, verbose=verbose, epochs=epochs, steps=None)
        self._checkpoint = checkpoint
        self._begun, self._last = False, None
        model.history.epoch = []  # as Keras does when training begins, which it may not

    def set_length(self, steps):
        self.set_params({**self.params, "steps": steps})

    def on_train_begin(self, logs=None):
        if not self._begun:
            super().on_train_begin(logs)
        self._begun = True

    def on_train_batch_begin(self, batch, logs=None):
        self._checkpoint.before_batch(batch)
        super().on_train_batch_begin(batch, logs)

    def on_train_end(self, logs=None):
        self._last = logs

    def finish(self):
        if self._begun:
            super().on_train_end(self._last)
