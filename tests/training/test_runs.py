"""`train`: a run in a folder, which ends the same however often it is interrupted."""

import csv
import math

import keras
import numpy as np
import pytest
from states import BATCH, PICTURES, STEPS, Kill, Killed, fresh, kept_in_files, state
from tiny import assert_equal, diffusion_model, refused, uvit, weights

from keras_uvit import DiffusionModel
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.training import runs, train

FILES = {"model.keras", "ema.weights.h5", "log.csv", "checkpoints"}
ALL = 3 * STEPS


def pictures():
    return ShuffledDataset(PICTURES, BATCH)


def log(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """The state at the end of an undisturbed run, and its folder."""
    folder = tmp_path_factory.mktemp("peace")
    return state(train(fresh(), pictures(), folder, ALL, verbose=0)), folder


def assert_ended_like(peace, folder, model):
    """All files and the log, too."""
    end, undisturbed = peace
    assert_equal(state(model), end)
    assert {path.name for path in folder.iterdir()} == FILES
    saved = keras.saving.load_model(folder / "model.keras")
    assert_equal(kept_in_files(saved), kept_in_files(model))
    average = uvit(num_classes=3)
    average.load_weights(folder / "ema.weights.h5")
    assert_equal(weights(average), weights(model.ema_network))
    assert (folder / "log.csv").read_bytes() == (undisturbed / "log.csv").read_bytes()


def test_a_run_leaves_model_average_and_log(peace):
    model = train(fresh(elsewhere=True), pictures(), peace[1], ALL, verbose=0)  # has ended
    assert_ended_like(peace, peace[1], model)
    assert int(model.step) == ALL
    assert [row["epoch"] for row in log(peace[1])] == ["0", "1", "2"]
    assert np.isfinite([float(row["loss"]) for row in log(peace[1])]).all()
    pairs = zip(weights(model.ema_network), weights(model.network))
    assert any((a != b).any() for a, b in pairs)


@pytest.mark.once
@pytest.mark.parametrize(
    ("kill", "every_steps"),
    [(Kill(1), 2), (Kill(1), 100), (Kill(1, 2), 1)],
    ids=["after an epoch", "before a checkpoint", "inside an epoch"],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, peace, kill, every_steps):
    options = dict(every_steps=every_steps, verbose=0)
    with pytest.raises(Killed):
        train(fresh(), pictures(), tmp_path, ALL, callbacks=[kill], **options)
    model = fresh(elsewhere=every_steps < 100)  # else it begins anew, from the same start
    train(model, pictures(), tmp_path, ALL, **options)
    assert_ended_like(peace, tmp_path, model)


@pytest.mark.once
def test_more_iterations_go_on_from_a_finished_run(tmp_path, peace):
    dataset = pictures()  # the same one may be used for the rest
    train(fresh(), dataset, tmp_path, STEPS, verbose=0)
    model = train(fresh(elsewhere=True), dataset, tmp_path, ALL, verbose=0)
    assert_ended_like(peace, tmp_path, model)


@pytest.mark.once
def test_a_finished_run_returns_at_once_and_another_model_is_refused(peace, monkeypatch):
    monkeypatch.setattr(DiffusionModel, "train_step", None)
    end, folder = peace
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for iterations in (1, ALL):
        model = train(fresh(elsewhere=True), pictures(), folder, iterations, verbose=0)
        assert_equal(state(model), end)
    for change in (dict(network=dict(hidden_dim=32)), dict(prediction="v")):
        other = diffusion_model(**change)
        call = lambda: train(other, pictures(), folder, ALL, verbose=0)  # noqa: E731, B023
        refused(ValueError, call, f"'{next(iter(change))}'", "Choose")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.once
def test_runs_are_of_whole_epochs_and_keep_a_compiled_models_optimizer(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        DiffusionModel,
        "fit",
        lambda self, x, **options: seen.append((options["epochs"], self.optimizer)),
    )
    monkeypatch.setattr(runs, "_finish", lambda *_: None)
    for iterations in (1, STEPS, STEPS + 1):
        train(fresh(), pictures(), tmp_path, iterations, verbose=0)
        assert seen[-1] == (math.ceil(iterations / STEPS), fresh().optimizer)
    train(diffusion_model(compiled=False), pictures(), tmp_path, 1, verbose=0)
    assert isinstance(seen[-1][1], keras.optimizers.AdamW)


class HalfWritten:
    """Replaces a saving method of Keras: its first call leaves half a file and dies."""

    def __init__(self, method):
        self.method = method

    def __get__(self, model, owner=None):
        def write(filepath, *arguments, **options):
            self.method(model, filepath, *arguments, **options)
            with open(filepath, "r+b") as file:
                file.truncate(file.seek(0, 2) // 2)
            raise Killed

        return write


@pytest.mark.once
@pytest.mark.parametrize("method", ["save", "save_weights"])
def test_a_kill_while_the_last_files_are_written_leaves_none_of_them_half(tmp_path, peace, method):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, method, HalfWritten(getattr(keras.Model, method)))
        with pytest.raises(Killed):
            train(fresh(), pictures(), tmp_path, ALL, verbose=0)
    assert not (tmp_path / "model.keras").exists()
    model = train(fresh(elsewhere=True), pictures(), tmp_path, ALL, verbose=0)
    assert_ended_like(peace, tmp_path, model)
