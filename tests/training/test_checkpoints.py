"""A run that stops anywhere goes on as if it had not, and says what it cannot go on with."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.callbacks import LambdaCallback, LearningRateScheduler
from states import (
    BATCH,
    HALF,
    PICTURES,
    STEPS,
    Batches,
    Kill,
    Killed,
    fresh,
    grain_data,
    state,
    tf_data,
)
from tiny import assert_equal, diffusion_model, numpy, refused

from keras_uvit import io, training
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.training import adamw, checkpoints
from keras_uvit.training.callbacks import Checkpoint
from keras_uvit.training.checkpoints import CheckpointError, steps_in

ROOT = Path(__file__).parents[2]
EPOCHS = 3
once = pytest.mark.once


def fit(model, folder, x=PICTURES, callbacks=(), every_steps=1, epochs=EPOCHS, **options):
    """The run that all tests here are about."""
    keeping = Checkpoint(folder, every_steps, **options.pop("keeping", {}))
    if x is PICTURES:
        options["batch_size"] = BATCH
    return model.fit(x, epochs=epochs, callbacks=[keeping, *callbacks], verbose=0, **options)


def compiled(optimizer, **options):
    model = diffusion_model(compiled=False, **options)
    model.compile(optimizer)
    return model


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """The history of an undisturbed run, the state at its end, and its folder."""
    model, folder = fresh(), tmp_path_factory.mktemp("peace")
    return fit(model, folder).history, state(model), folder


@pytest.fixture
def run(peace, tmp_path):
    """A copy of the folder of the finished run."""
    return shutil.copytree(peace[2], tmp_path / "run")


def newest(folder):
    return checkpoints.read_record(checkpoints.newest(folder))


# Exact --------------------------------------------------------------------------------------------


# What each backend does itself is to restore its state. Where in a run that happens is decided by
# Python and NumPy, so one of the cases is for each backend.
@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=once) for at in ((0, 0), (0, 1), (1, 0), (2, 2))] + [(1, 1)]
)
def test_killed_before_any_step_it_ends_the_same(tmp_path, peace, at):
    with pytest.raises(Killed):
        fit(fresh(), tmp_path, callbacks=[Kill(*at)])
    saved = steps_in(tmp_path)  # if there is nothing, it begins anew
    assert bool(saved) == (at > (0, 0))
    model = fresh(elsewhere=bool(saved))
    history = fit(model, tmp_path).history
    assert_equal(state(model), peace[1])
    for key, values in peace[0].items():  # the means of the epoch that was interrupted too
        assert history[key] == values[at[0] :]


def own():
    return ShuffledDataset(PICTURES, BATCH, seed=1)


def stream():
    generator = np.random.default_rng(1)
    while True:
        rows = generator.permutation(27)[:BATCH]
        yield {key: value[rows] for key, value in PICTURES.items()}


SOURCES = {
    "own, between": (own, None, (1, 0)),
    "own": (own, None, (2, 2)),
    "own, short epochs": (own, 2, (2, 1)),  # epochs that are not the data's
    "own, long epochs": (own, 5, (2, 2)),
    "user's": (Batches, None, (2, 2)),
    "generator": (stream, 4, (2, 2)),
    "grain": (grain_data, None, (2, 2)),
    "tf": (tf_data, None, (2, 2)),
    "tf, endless": (lambda: tf_data().repeat(), 4, (2, 2)),
}


@once
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_goes_on_at_its_place(tmp_path, source):
    data, steps, at = SOURCES[source]
    model = fresh()
    losses = fit(model, tmp_path / "a", data(), steps_per_epoch=steps).history["loss"]
    undisturbed = state(model)
    with pytest.raises(Killed):
        fit(fresh(), tmp_path / "b", data(), [Kill(*at)], steps_per_epoch=steps)
    model = fresh(elsewhere=True)
    history = fit(model, tmp_path / "b", data(), steps_per_epoch=steps).history
    assert history["loss"] == losses[at[0] :]
    assert_equal(state(model), undisturbed)


@once
def test_the_loss_scale_is_part_of_it(tmp_path):
    for folder, killing in (("a", []), ("b", [Kill(1, 1)])):
        model = fresh(**HALF)
        model.optimizer.dynamic_scale.assign(1024.0)
        try:
            fit(model, tmp_path / folder, callbacks=killing)
            undisturbed = state(model)
        except Killed:
            model = fresh(elsewhere=True, **HALF)
            fit(model, tmp_path / folder)
    assert float(numpy(model.optimizer.dynamic_scale)) == 1024.0
    assert_equal(state(model), undisturbed)


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_begin(self, logs=None):
        self.calls.append("train")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append((epoch, self.params["epochs"], self.params["steps"]))

    def on_train_end(self, logs=None):
        self.calls.append("end")


@once
def test_callbacks_see_one_run(tmp_path):
    with pytest.raises(Killed):
        fit(fresh(), tmp_path, callbacks=[Kill(1, 1)])
    seen, model = Seen(), fresh()
    history = fit(model, tmp_path, callbacks=[seen])
    assert seen.calls == ["train", (1, 3, 2), (2, 3, 3), "end"]  # of epoch 1 two are left
    assert history is model.history
    assert history.epoch == [1, 2]


def test_a_finished_run_trains_nothing(run, peace):
    seen, model = Seen(), fresh(elsewhere=True)
    history = fit(model, run, callbacks=[seen])
    assert (history.history, history.epoch, seen.calls) == ({}, [], [])
    assert_equal(state(model), peace[1])


@once
def test_a_model_that_stops_by_itself_does_not_go_on(tmp_path):
    with pytest.raises(Killed):
        fit(fresh(), tmp_path, callbacks=[Kill(0, 1)])
    model = fresh()
    stop = LambdaCallback(on_epoch_end=lambda *_: setattr(model, "stop_training", True))
    assert fit(model, tmp_path, callbacks=[stop]).epoch == [0]
    assert steps_in(tmp_path)[0] == STEPS


@once
def test_what_a_callback_stops_within_an_epoch_goes_on_there(tmp_path, peace):
    model = fresh()
    stop = Kill(1, 1, lambda: setattr(model, "stop_training", True))
    fit(model, tmp_path, callbacks=[stop], every_steps=100)
    record = newest(tmp_path)
    assert (record["epoch"], record["batch"], record["step"]) == (1, 2, 5)
    model = fresh(elsewhere=True)
    fit(model, tmp_path)
    assert_equal(state(model), peace[1])


# Killed for real ----------------------------------------------------------------------------------


@once
def test_a_killed_process_loses_and_repeats_nothing(alone):
    """`benchmarks/faults.py` in short: SIGKILL at a random moment, and inside a save."""
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", "--kills", "2", "--epochs", "6"]
    result = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert (row["curve"], row["state"], row["kills"]) == ("equal", "equal", 2)


@once
@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (signal.SIGTERM, SystemExit, "Asked to stop: step 5 is saved"),
        (signal.SIGINT, KeyboardInterrupt, "Interrupted at step 5, which is saved"),
    ],
)
def test_signals_save_after_the_step_and_stop(tmp_path, peace, capsys, kind, error, words):
    before = signal.getsignal(kind)
    send = Kill(1, 1, lambda: os.kill(os.getpid(), kind))
    with pytest.raises(error) as stopped:
        fit(fresh(), tmp_path, callbacks=[send], every_steps=100)
    assert getattr(stopped.value, "code", 0) == 0
    # The signal came before step 5 of the run, when the checkpoint had seen that it begins.
    assert steps_in(tmp_path) == [5]
    assert words in capsys.readouterr().out
    assert signal.getsignal(kind) is before
    model = fresh(elsewhere=True)
    fit(model, tmp_path)
    assert_equal(state(model), peace[1])


# Files --------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_step(path):
    path.write_text(path.read_text().replace('"step": 9', '"step": 8'))


PIECES, RECORD = "pieces-0000.h5", "checkpoint.json"
DAMAGE = {
    "a flipped bit": (PIECES, flip),
    "a cut file": (PIECES, lambda path: os.truncate(path, 100)),
    "a missing file": (PIECES, Path.unlink),
    "a flipped bit in the record": (RECORD, flip),
    "an empty record": (RECORD, lambda path: path.write_text("")),
    "another step in the record": (RECORD, another_step),
    "no record": (RECORD, Path.unlink),
}


@once
@pytest.mark.parametrize("how", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_is_used(run, peace, how):
    file, damage = DAMAGE[how]
    damage(run / "step-00000009" / file)
    model = fresh(elsewhere=True)
    with pytest.warns(UserWarning, match="checkpoint of step 9 .* damaged"):
        fit(model, run)
    assert (run / "damaged-step-00000009").is_dir()
    assert_equal(state(model), peace[1])  # step 9 was made again, from step 8
    assert steps_in(run)[0] == 9


class Windows:
    """`os` as it is there: no folder is opened, and what is synchronized must be writable."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        if Path(path).is_dir() or not flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, flags)


@once
def test_checkpoints_are_written_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "os", Windows())
    fit(fresh(), tmp_path, epochs=1)
    assert steps_in(tmp_path)[0] == STEPS


@once
def test_what_a_killed_save_left_is_no_checkpoint(run, peace):
    (run / "step-00000009").rename(run / "tmp-step-00000009")
    model = fresh(elsewhere=True)
    fit(model, run)
    assert_equal(state(model), peace[1])
    assert not list(run.glob("tmp-*"))


def test_a_checkpoint_is_a_model_and_its_record_names_all_variables(peace):
    _, end, folder = peace
    path = folder / "step-00000009"
    model = training.load_checkpoint(folder)
    assert_equal(state(model), end)
    assert model.get_config() == fresh().get_config()
    record = json.loads((path / RECORD).read_text())
    assert [record[key] for key in ("step", "epoch", "batch", "batch_size")] == [9, 3, 0, BATCH]
    assert len(record["variables"]) == len(end) + len(model.metrics_variables)
    with h5py.File(path / PIECES) as file:
        assert len(file) == len(record["variables"])


@once
@pytest.mark.parametrize(
    ("every_steps", "keeping", "kept"),
    [
        (4, dict(keep=9), [9, 8, 4]),
        (1, dict(keep=2), [9, 8]),
        (1, dict(keep=1, best="score"), [9, 6]),
    ],
)
def test_which_checkpoints_are_kept(tmp_path, every_steps, keeping, kept):
    scores = [0.2, 0.1, 0.3]
    score = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=scores[epoch]))
    fit(fresh(), tmp_path, callbacks=[score], every_steps=every_steps, keeping=keeping)
    assert steps_in(tmp_path) == kept


@once
def test_a_disk_that_is_too_small_is_named_before_training(tmp_path, monkeypatch):
    small = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    refused(OSError, lambda: fit(fresh(), tmp_path), "Nothing was trained")


@once
def test_a_disk_that_fills_up_leaves_the_older_ones(tmp_path, monkeypatch):
    made = iter(range(100))
    real = checkpoints._write_pieces

    def write(path, variables):
        if next(made) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(path, variables)

    monkeypatch.setattr(checkpoints, "_write_pieces", write)
    refused(OSError, lambda: fit(fresh(), tmp_path), "step 5 could not", "No space left")
    assert steps_in(tmp_path) == [4, 3, 2]
    assert not list(tmp_path.glob("tmp-*"))


@once
@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 5)])
def test_pieces_are_put_together_for_any_other_division(tmp_path, shape):
    generator = np.random.default_rng(0)
    whole = generator.standard_normal(shape)
    cuts = [[0, *sorted(generator.choice(range(1, n), 2, replace=False)), n] for n in shape]
    spans = [[slice(a, b) for a, b in itertools.pairwise(cut)] for cut in cuts]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        for k, part in enumerate(itertools.product(*spans)):
            piece = file.create_dataset(f"0/{k}", data=whole[part])
            piece.attrs["start"] = [s.start for s in part]
        parts = list(file["0"].values())
        for index in ([slice(None)] * len(shape), [slice(1, 3)] * len(shape)):
            part = tuple(index)
            np.testing.assert_array_equal(checkpoints._read(parts, part, shape), whole[part])


# What is refused ----------------------------------------------------------------------------------


REFUSED = {
    "no checkpoint": (dict(resume=True), ValueError, ("no checkpoint in",)),
    "no such way": (dict(resume="yes"), ValueError, ("resume must be one of",)),
    "data without a length": (dict(x=stream()), ValueError, ("a length", "steps_per_epoch")),
    "arrays in order": (dict(shuffle=False), ValueError, ("shuffle=False",)),
    "two": (dict(callbacks=[Checkpoint("b")]), ValueError, ("one Checkpoint",)),
    "no step": (dict(every_steps=0), ValueError, ("every_steps", ">= 1")),
    "half a step": (dict(every_steps=1.5), ValueError, ("every_steps", "1.5")),
    "none kept": (dict(keeping=dict(keep=0)), ValueError, ("keep", ">= 1")),
}


@once
@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_be_is_refused(tmp_path, case):
    options, error, words = REFUSED[case]
    refused(error, lambda: fit(fresh(), tmp_path, **options), *words)
    assert not steps_in(tmp_path)


OTHERS = {
    "model": (dict(prediction="v"), {}, ["'prediction'"]),
    "optimizer": (keras.optimizers.SGD(0.1), {}, ["AdamW", "SGD"]),
    "its schedule": (adamw(1e-3), {}, ["different optimizer", "learning_rate"]),
    "batch size": ({}, dict(x=ShuffledDataset(PICTURES, 4)), ["steps_per_epoch=3", "6"]),
    "number of batches": ({}, dict(x=ShuffledDataset(PICTURES, 5)), ["steps_per_epoch=3", "5"]),
    "a new one": ({}, dict(resume=False), ["step-00000009", "another folder"]),
}


@once
@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused(run, case):
    change, options, words = OTHERS[case]
    model = diffusion_model(**change) if isinstance(change, dict) else compiled(change)
    refused(ValueError, lambda: fit(model, run, **options), *words)
    assert steps_in(run)[0] == 9


def tuned(learning_rate=1e-2, spare=(), **settings):
    """A constant learning rate, which is a variable; the rest are attributes."""
    optimizer = training.optimizers.AdamW(learning_rate, **settings)
    optimizer.exclude_from_weight_decay(var_names=spare)
    return optimizer


SETTINGS = dict(
    learning_rate=1e-3, weight_decay=0.1, beta_1=0.5, epsilon=1e-3, clipnorm=1.0,
    gradient_accumulation_steps=2, spare=["bias"],
)  # fmt: skip


@once
@pytest.mark.parametrize("options", [{}, HALF], ids=["float32", "float16"])
def test_every_changed_setting_of_the_optimizer_is_refused(tmp_path, options):
    fit(compiled(tuned(), **options), tmp_path, epochs=1)
    model = diffusion_model(compiled=False, **options)
    for name, value in SETTINGS.items():
        model.compile(tuned(**{name: value}))
        name = "without_decay" if name == "spare" else name
        refused(CheckpointError, lambda: fit(model, tmp_path), f"'{name}'", "load_checkpoint")
    fit(compiled(tuned(), **options), tmp_path, epochs=2)


@once
def test_a_learning_rate_that_a_callback_lowered_stays(tmp_path):
    """It is compared with that of the run's begin, and with the last."""
    lower = LearningRateScheduler(lambda epoch, rate: rate / 2)
    model = compiled(tuned())
    fit(model, tmp_path, epochs=1, callbacks=[lower])
    fit(model, tmp_path, epochs=2, callbacks=[lower])  # as the callback has left it
    model = compiled(tuned())
    fit(model, tmp_path)  # as it began
    assert float(numpy(model.optimizer.learning_rate)) == np.float32(0.0025)
    another = compiled(tuned(5e-3))
    refused(CheckpointError, lambda: fit(another, tmp_path, epochs=4), "'learning_rate'")


@once
def test_another_encoder_is_refused_and_an_unknown_one_is_learned(tmp_path):
    fit(diffusion_model(latent_encoder="a"), tmp_path, epochs=1)
    other, unknown = diffusion_model(latent_encoder="b"), diffusion_model()
    refused(CheckpointError, lambda: fit(other, tmp_path), "'latent_encoder'")
    fit(unknown, tmp_path, epochs=1)
    assert unknown.latent_encoder == "a"


@once
def test_a_model_that_has_learned_more_is_not_overwritten(run):
    model = fresh()
    model.step.assign(12)
    refused(CheckpointError, lambda: fit(model, run), "at step 12", "at 9")


@once
def test_a_best_that_is_not_in_the_log_is_named(tmp_path):
    call = lambda: fit(fresh(), tmp_path, keeping=dict(best="fid"))  # noqa: E731
    refused(ValueError, call, "best='fid' is not in the log", "'loss'")


@once
def test_no_checkpoint_and_a_damaged_one_are_named(tmp_path, run, peace):
    load, path = training.load_checkpoint, run / "step-00000009"
    refused(FileNotFoundError, lambda: load(tmp_path / "nothing"), "No checkpoint in")
    assert_equal(state(load(path)), peace[1])
    flip(path / PIECES)
    refused(CheckpointError, lambda: load(path), "step-00000009 is damaged", PIECES)
