"""Keras' callbacks beside a `Checkpoint`: what they change is saved, what they learned is kept."""

import json

import keras
import numpy as np
import pytest
from keras import callbacks as kc
from keras import ops
from states import assert_same, state

from keras_uvit import DiffusionModel, UViT, training
from keras_uvit.training import checkpoints

pytestmark = pytest.mark.eager

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), "uint8")
EPOCHS, STEPS, BATCH = 4, 2, 4


def make(optimizer=None):
    keras.utils.set_random_seed(0)
    model = DiffusionModel(UViT((4, 4, 1), 2, 16, num_layers=1, num_heads=2))
    model.compile(optimizer or training.adamw(1e-2, warmup_steps=0))
    return model


def fit(model, callbacks, epochs=EPOCHS):
    return model.fit(PICTURES, batch_size=BATCH, epochs=epochs, callbacks=callbacks, verbose=0)


class Score(keras.callbacks.Callback):
    """Logs a score that gets worse, from the first epoch on."""

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = float(epoch)


class Back(keras.callbacks.Callback):
    """Puts the network's first weights back at the end."""

    def on_train_begin(self, logs=None):
        self.first = self.model.network.get_weights()

    def on_train_end(self, logs=None):
        self.model.network.set_weights(self.first)


class BackInBetween(Back):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.model.set_weights(self.all)

    def on_train_begin(self, logs=None):
        self.all = self.model.get_weights()

    def on_train_end(self, logs=None):
        """Leaves them."""


def stopping(**options):
    return kc.EarlyStopping("val_loss", patience=1, **options)


def on_each_backend(names, chosen):
    """What a callback does is Keras' own on each backend: one of them is tried on all."""
    return [pytest.param(name, marks=[] if name == chosen else pytest.mark.once) for name in names]


# Weights and optimizer ----------------------------------------------------------------------------

TOUCHING = {
    "EarlyStopping": lambda path: stopping(restore_best_weights=True),
    "EarlyStopping, the last": lambda path: stopping(),
    "ModelCheckpoint": lambda path: kc.ModelCheckpoint(path / "best.keras", save_best_only=True),
    "ReduceLROnPlateau": lambda path: kc.ReduceLROnPlateau(patience=1),
    "LearningRateScheduler": lambda path: kc.LearningRateScheduler(lambda epoch, rate: rate / 2),
    "TerminateOnNaN": lambda path: kc.TerminateOnNaN(),
    "weights put back": lambda path: Back(),
    "weights put back in between": lambda path: BackInBetween(),
}


@pytest.mark.parametrize("name", on_each_backend(TOUCHING, "EarlyStopping"))
@pytest.mark.parametrize(
    "options",
    [dict(best="val_loss"), pytest.param(dict(every_steps=2, keep=2), marks=pytest.mark.once)],
    ids=["best", "every"],
)
def test_the_newest_checkpoint_is_what_fit_left(tmp_path, name, options):
    model = make()
    checkpoint = training.Checkpoint(tmp_path / "run", **options)
    history = fit(model, [Score(), TOUCHING[name](tmp_path), checkpoint])
    record = checkpoints.read_record(checkpoints.newest(tmp_path / "run"))
    assert (record["epoch"], record["batch"]) == (len(history.epoch), 0)
    assert record["step"] == STEPS * len(history.epoch)
    assert_same(state(training.load_checkpoint(tmp_path / "run")), state(model))


@pytest.mark.once
@pytest.mark.parametrize(
    ("callback", "optimizer", "words"),
    [
        (kc.SwapEMAWeights(), None, "keeps its own"),
        (kc.BackupAndRestore("backup"), None, "both restore a run"),
        (kc.ReduceLROnPlateau(), training.adamw(), "follows a schedule"),
        (kc.LearningRateScheduler(lambda epoch: 1.0), training.adamw(), "follows a schedule"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_work_is_refused_before_training(tmp_path, callback, optimizer, words):
    model = make(optimizer)
    with pytest.raises(ValueError, match=f"{type(callback).__name__}.*{words}"):
        fit(model, [callback, training.Checkpoint(tmp_path)])
    assert int(ops.convert_to_numpy(model.step)) == 0


@pytest.mark.once
def test_an_average_of_the_optimizers_is_refused():
    with pytest.raises(ValueError, match="leave use_ema out"):
        make(keras.optimizers.SGD(0.1, use_ema=True))


@pytest.mark.once
def test_a_backup_without_a_checkpoint_goes_on(tmp_path):
    with pytest.raises(InterruptedError):
        fit(make(), [kc.BackupAndRestore(tmp_path / "backup"), Stop(2, 0)])
    model = make()
    assert fit(model, [kc.BackupAndRestore(tmp_path / "backup")]).epoch == [2, 3]
    assert int(ops.convert_to_numpy(model.step)) == EPOCHS * STEPS


# State --------------------------------------------------------------------------------------------


class Stop(keras.callbacks.Callback):
    """As a kill before a batch; a file is never closed in it."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.epoch, self.batch = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, self.batch):
            raise InterruptedError


class Constant(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = 1.0


class Own(keras.callbacks.Callback):
    """Counts all that it sees, and keeps it in several forms."""

    def __init__(self, best=np.inf):
        super().__init__()
        self.best, self.batches, self.epochs, self.seen = best, 0, [], {"first": None}

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(epoch)
        rate = self.model.optimizer.learning_rate
        rate.assign(rate * 0.9)

    def on_train_batch_begin(self, batch, logs=None):
        self.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        self.best = min(self.best, np.float32(logs["loss"]))
        self.seen["last"] = epoch


REMEMBERING = {
    "ReduceLROnPlateau": lambda: kc.ReduceLROnPlateau("val_loss", factor=0.5, patience=2),
    "EarlyStopping": lambda: kc.EarlyStopping("val_loss", patience=3),
    "LearningRateScheduler": lambda: kc.LearningRateScheduler(lambda epoch, rate: rate / 2),
    "own": Own,
}


@pytest.mark.parametrize(
    "at", [pytest.param((2, 0), marks=pytest.mark.once), (2, 1)], ids=["between", "within"]
)
@pytest.mark.parametrize("name", on_each_backend(REMEMBERING, "ReduceLROnPlateau"))
def test_callbacks_remember_when_a_run_is_resumed(tmp_path, name, at):
    whole, model = make(), make()
    callbacks = [REMEMBERING[name]() for _ in range(3)]
    fit(whole, [Constant(), callbacks[0], training.Checkpoint(tmp_path / "a")], epochs=5)
    checkpoint = training.Checkpoint(tmp_path / "b", every_steps=1)
    with pytest.raises(InterruptedError):
        fit(make(), [Constant(), callbacks[1], checkpoint, Stop(*at)], epochs=5)
    fit(model, [Constant(), callbacks[2], checkpoint], epochs=5)
    assert_same(state(model), state(whole))
    states = [
        checkpoints.read_record(checkpoints.newest(tmp_path / run))["callbacks"] for run in "ab"
    ]
    assert states[0] == states[1]


def resume(tmp_path, first, second):
    """The callbacks of a run of two epochs, then those of its third."""
    fit(make(), [Constant(), *first, training.Checkpoint(tmp_path)], epochs=2)
    fit(make(), [Constant(), *second, training.Checkpoint(tmp_path)], epochs=3)


class Adding(keras.callbacks.Callback):
    def __init__(self, number):
        super().__init__()
        self.number, self.total = number, 0

    def on_epoch_end(self, epoch, logs=None):
        self.total += self.number


@pytest.mark.once
def test_two_of_a_kind_are_not_confused(tmp_path):
    ones, tens, new = Adding(1), Adding(10), Adding(100)
    resume(tmp_path, [Adding(1), Adding(10)], [ones, tens, new])
    assert (ones.total, tens.total, new.total) == (3, 30, 100)


@pytest.mark.once
def test_a_setting_that_the_user_has_changed_is_the_new_one(tmp_path, capsys):
    plateau, own = kc.ReduceLROnPlateau("val_loss", patience=5), Own(best=0.25)
    resume(tmp_path, [kc.ReduceLROnPlateau("val_loss"), Own()], [plateau, own])
    assert (plateau.patience, plateau.wait) == (5, 2)
    assert (own.best, own.batches) == (0.25, 6)
    assert "Own: best is 0.25, as it was set now" in capsys.readouterr().out


@pytest.mark.once
def test_a_callback_that_cannot_be_kept_is_named(tmp_path):
    first, second = (stopping(restore_best_weights=True) for _ in range(2))
    with pytest.warns(UserWarning, match="EarlyStopping begins again.*best_weights"):
        resume(tmp_path, [first], [second])


@pytest.mark.once
def test_a_record_of_states_is_plain(tmp_path):
    fit(make(), [kc.ReduceLROnPlateau("loss"), Own(), training.Checkpoint(tmp_path)])
    record = checkpoints.read_record(checkpoints.newest(tmp_path))
    assert record["callbacks"] == json.loads(json.dumps(record["callbacks"]))
    assert record["callbacks"]["Own"]["state"].keys() == {"best", "batches", "epochs", "seen"}
