"""Keras' callbacks beside a `Checkpoint`: what they change is saved, what they learned is kept."""

import numpy as np
import pytest
from keras import callbacks as kc
from states import Kill, Killed, fresh, state
from tiny import DATA, assert_equal, diffusion_model, numpy, refused

from keras_uvit import training
from keras_uvit.training import checkpoints

SIXTEEN = {key: value[:16] for key, value in DATA.items()}
EPOCHS, STEPS = 4, 2


def fit(model, callbacks, epochs=EPOCHS):
    return model.fit(SIXTEEN, batch_size=8, epochs=epochs, callbacks=callbacks, verbose=0)


def newest(folder):
    return checkpoints.read_record(checkpoints.newest(folder))


def scored(score):
    return kc.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(val_loss=score(epoch)))


class Back(kc.Callback):
    """Puts the first weights back, at the end or in between."""

    def __init__(self, epoch=None):
        super().__init__()
        self.epoch = epoch

    def on_train_begin(self, logs=None):
        self.first = self.model.get_weights()

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.set_weights(self.first)

    def on_train_end(self, logs=None):
        if self.epoch is None:
            self.model.set_weights(self.first)


def stopping(**options):
    return kc.EarlyStopping("val_loss", patience=1, **options)


def on_each_backend(names, chosen):
    """What a callback does is Keras' own on each backend: one of them is tried on all."""
    return [pytest.param(name, marks=[] if name == chosen else pytest.mark.once) for name in names]


# Weights and optimizer ----------------------------------------------------------------------------

BEST, EVERY = dict(best="val_loss"), dict(every_steps=2, keep=2)
TOUCHING = {
    "EarlyStopping": (lambda: stopping(restore_best_weights=True), BEST),
    "EarlyStopping, every 2": (lambda: stopping(restore_best_weights=True), EVERY),
    "EarlyStopping, the last": (stopping, EVERY),
    "ModelCheckpoint": (lambda: kc.ModelCheckpoint("best.keras", save_best_only=True), BEST),
    "ReduceLROnPlateau": (lambda: kc.ReduceLROnPlateau(patience=1), BEST),
    "LearningRateScheduler": (lambda: kc.LearningRateScheduler(lambda _, rate: rate / 2), EVERY),
    "weights put back": (Back, BEST),
    "weights put back, every 2": (Back, EVERY),
    "weights put back in between": (lambda: Back(1), BEST),
}


@pytest.mark.parametrize("name", on_each_backend(TOUCHING, "EarlyStopping"))
def test_the_newest_checkpoint_is_what_fit_left(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    callback, options = TOUCHING[name]
    worse = scored(float)  # from the first epoch on
    model = fresh()
    epochs = len(fit(model, [worse, callback(), training.Checkpoint("run", **options)]).epoch)
    record = newest("run")
    assert (record["epoch"], record["batch"], record["step"]) == (epochs, 0, STEPS * epochs)
    assert_equal(state(training.load_checkpoint("run")), state(model))


@pytest.mark.once
@pytest.mark.parametrize(
    ("callback", "warm_up", "words"),
    [
        (kc.SwapEMAWeights(), 0, "keeps its own"),
        (kc.BackupAndRestore("backup"), 0, "both restore a run"),
        (kc.ReduceLROnPlateau(), 9, "follows a schedule"),
        (kc.LearningRateScheduler(lambda epoch: 1.0), 9, "follows a schedule"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_work_is_refused_before_training(tmp_path, callback, warm_up, words):
    model = diffusion_model(optimizer=dict(warmup_steps=warm_up))
    callbacks = [callback, training.Checkpoint(tmp_path)]
    refused(ValueError, lambda: fit(model, callbacks), type(callback).__name__, words)
    assert int(numpy(model.step)) == 0


@pytest.mark.once
def test_a_backup_without_a_checkpoint_goes_on(tmp_path):
    with pytest.raises(Killed):
        fit(fresh(), [kc.BackupAndRestore(tmp_path / "backup"), Kill(2, 0)])
    model = diffusion_model()  # Keras notes the epoch in it for ever
    assert fit(model, [kc.BackupAndRestore(tmp_path / "backup")]).epoch == [2, 3]
    assert int(numpy(model.step)) == EPOCHS * STEPS


# State --------------------------------------------------------------------------------------------


class Own(kc.Callback):
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
    "EarlyStopping": lambda: kc.EarlyStopping("val_loss", patience=2),
    "LearningRateScheduler": lambda: kc.LearningRateScheduler(lambda epoch, rate: rate / 2),
    "own": Own,
}


@pytest.mark.parametrize(
    "at", [pytest.param((2, 0), marks=pytest.mark.once), (2, 1)], ids=["between", "within"]
)
@pytest.mark.parametrize("name", on_each_backend(REMEMBERING, "ReduceLROnPlateau"))
def test_callbacks_remember_when_a_run_is_resumed(tmp_path, name, at):
    def run(model, folder, *more, every_steps=1):
        keeping = training.Checkpoint(tmp_path / folder, every_steps)
        fit(model, [scored(lambda _: 1.0), REMEMBERING[name](), keeping, *more])
        return state(model)

    whole = run(fresh(), "a", every_steps=100)
    with pytest.raises(Killed):
        run(fresh(), "b", Kill(*at))
    assert_equal(run(fresh(elsewhere=True), "b"), whole)
    assert newest(tmp_path / "a")["callbacks"] == newest(tmp_path / "b")["callbacks"]


def resume(tmp_path, first, second):
    """The callbacks of a run of two epochs, then those of its third."""
    for epochs, callbacks in ((2, first), (3, second)):
        fit(fresh(), [scored(lambda _: 1.0), *callbacks, training.Checkpoint(tmp_path)], epochs)


class Adding(kc.Callback):
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
    assert "Own: best is 0.25" in capsys.readouterr().out


@pytest.mark.once
def test_a_callback_that_cannot_be_kept_is_named(tmp_path):
    first, second = (stopping(restore_best_weights=True) for _ in range(2))
    with pytest.warns(UserWarning, match="EarlyStopping begins again.*best_weights"):
        resume(tmp_path, [first], [second])
