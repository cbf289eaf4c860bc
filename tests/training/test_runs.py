"""A run in a folder ends the same however often it is interrupted."""

import csv
import math
import tempfile

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.data import sources
from keras_uvit.data.images import in_memory
from keras_uvit.diffusion.schedules import VPCosine
from keras_uvit.training import runs, train

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
RNG = np.random.default_rng(0)
PICTURES = {
    "image": RNG.integers(0, 256, (20, 4, 4, 1)).astype("uint8"),
    "label": np.arange(20) % 3,
}
STEPS = 3  # an epoch: batches of 6 of 20 pictures, the rest waits
BACKEND = keras.config.backend()
FILES = {"model.keras", "ema.weights.h5", "log.csv", "checkpoints"}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """All runs of this file are of one program: JAX need not compile it again for each."""
    if BACKEND != "jax":
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, 0.0), strict=True):
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def pictures(seed=0):
    return in_memory(sources.arrays(PICTURES, "pictures"), 6, seed=seed, verbose=0)


def make(network=None, **arguments):
    """A fresh model; weights differ from call to call, as in another process they may."""
    arguments.setdefault("optimizer", dict(learning_rate=1e-2, warmup_steps=2))
    return DiffusionModel(UViT(**{**TINY, "num_classes": 3, **(network or {})}), **arguments)


def same_start():
    keras.utils.set_random_seed(0)
    model = make()
    if BACKEND == "tensorflow":
        model.compile(jit_compile=False)  # XLA takes longer than all the steps here
    return model


def make_as_there():
    """A model compiled as that of `same_start`, of other weights. (TensorFlow draws other noise in
    XLA than outside.)
    """
    model = make()
    if BACKEND == "tensorflow":
        model.compile(jit_compile=False)
    return model


def state(model):
    """All that training moves."""
    variables = [*model.network.weights, *model.ema_network.weights, *model.optimizer.variables]
    counters = [model.step, model.ema_step, model.skipped_steps]
    return [ops.convert_to_numpy(v) for v in (*variables, *counters)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def log(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def epochs_of(folder):
    return [row["epoch"] for row in log(folder)]


class Killed(Exception):
    pass


class KillAfter(keras.callbacks.Callback):
    """Ends the run at the end of an epoch, or inside the next one."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_end(self, epoch, logs=None):
        if self.at == (epoch, None):
            raise Killed

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.at == (self.epoch, batch):
            raise Killed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    model = train(same_start(), pictures(), folder, 3 * STEPS, verbose=0)
    return model, folder


@pytest.fixture
def no_training(monkeypatch):
    def train_step(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(DiffusionModel, "train_step", train_step)


# The folder ---------------------------------------------------------------------------------------


def test_a_run_leaves_model_average_and_log(uninterrupted):
    model, folder = uninterrupted
    assert {path.name for path in folder.iterdir()} == FILES
    assert int(ops.convert_to_numpy(model.step)) == 3 * STEPS
    assert epochs_of(folder) == ["0", "1", "2"]
    losses = [float(row["loss"]) for row in log(folder)]
    assert np.isfinite(losses).all()
    saved = keras.saving.load_model(folder / "model.keras")
    assert_same(state(saved), state(model))
    average = make().network
    average.load_weights(folder / "ema.weights.h5")
    assert_same(average.get_weights(), model.ema_network.get_weights())
    assert any((a != b).any() for a, b in zip(average.get_weights(), model.network.get_weights()))


@pytest.mark.parametrize("iterations", [1, 3, 4])
def test_runs_are_of_whole_epochs(tmp_path, monkeypatch, iterations):
    asked = {}
    monkeypatch.setattr(DiffusionModel, "fit", lambda self, x, **options: asked.update(options))
    monkeypatch.setattr(runs, "_finish", lambda *_: None)
    train(make(), pictures(), tmp_path, iterations, verbose=0)
    assert asked["epochs"] == math.ceil(iterations / STEPS)


@pytest.mark.once  # on each backend it is tested with checkpoints
@pytest.mark.parametrize("every_steps", [1, 2, 100])
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(KillAfter(1), id="after an epoch"),
        pytest.param(KillAfter(1, batch=1), id="inside an epoch"),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path, uninterrupted, kill, every_steps
):
    options = dict(every_steps=every_steps, verbose=0)
    with pytest.raises(Killed):
        train(same_start(), pictures(), tmp_path, 3 * STEPS, callbacks=[kill], **options)
    if every_steps < 100:  # else it begins anew, from the same start
        keras.utils.set_random_seed(1)
    fresh = same_start() if every_steps == 100 else make_as_there()
    model = train(fresh, pictures(), tmp_path, 3 * STEPS, **options)
    assert_same(state(model), state(uninterrupted[0]))
    assert epochs_of(tmp_path) == ["0", "1", "2"]
    assert (tmp_path / "log.csv").read_bytes() == (uninterrupted[1] / "log.csv").read_bytes()
    average = make().network
    average.load_weights(tmp_path / "ema.weights.h5")
    assert_same(average.get_weights(), uninterrupted[0].ema_network.get_weights())


@pytest.mark.once
def test_more_iterations_go_on_from_a_finished_run(tmp_path, uninterrupted):
    train(same_start(), pictures(), tmp_path, STEPS, verbose=0)
    model = train(make_as_there(), pictures(), tmp_path, 3 * STEPS, verbose=0)
    assert_same(state(model), state(uninterrupted[0]))
    assert epochs_of(tmp_path) == ["0", "1", "2"]


@pytest.mark.once
def test_the_same_data_object_may_be_used_for_the_rest(tmp_path, uninterrupted):
    dataset = pictures()
    train(same_start(), dataset, tmp_path, STEPS, verbose=0)
    model = train(make_as_there(), dataset, tmp_path, 3 * STEPS, verbose=0)
    assert_same(state(model), state(uninterrupted[0]))


@pytest.mark.once
@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("iterations", [1, 3 * STEPS - 1, 3 * STEPS])
def test_a_finished_run_returns_at_once(uninterrupted, iterations):
    finished, folder = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    model = train(make(), pictures(), folder, iterations, verbose=0)
    assert_same(state(model), state(finished))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.once
@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(network=dict(hidden_dim=32)), "network"),
        (dict(network=dict(num_classes=4)), "network"),
        (dict(schedule=VPCosine()), "schedule"),
        (dict(prediction="v"), "prediction"),
        (dict(condition_dropout=0.5), "condition_dropout"),
        (dict(time_scale=1.0), "time_scale"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_another_model_in_the_folder_is_refused(uninterrupted, change, named):
    before = (uninterrupted[1] / "model.keras").read_bytes()
    with pytest.raises(ValueError, match=rf"differs in .*'{named}'.*Choose"):
        train(make(**change), pictures(), uninterrupted[1], 3 * STEPS, verbose=0)
    assert (uninterrupted[1] / "model.keras").read_bytes() == before


# The model ----------------------------------------------------------------------------------------


def test_an_uncompiled_model_takes_its_recipe_and_a_compiled_one_keeps_its_optimizer(
    tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(DiffusionModel, "fit", lambda self, x, **_: seen.append(self.optimizer))
    monkeypatch.setattr(runs, "_finish", lambda *_: None)
    train(make(), pictures(), tmp_path, 1, verbose=0)
    assert isinstance(seen[-1], keras.optimizers.AdamW)
    mine = keras.optimizers.SGD(0.25)
    model = make()
    model.compile(mine)
    train(model, pictures(), tmp_path, 1, verbose=0)
    assert seen[-1] is mine


# Kills while files are written --------------------------------------------------------------------


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
def test_a_kill_while_the_last_files_are_written_leaves_none_of_them_half(
    tmp_path, uninterrupted, method
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, method, HalfWritten(getattr(keras.Model, method)))
        with pytest.raises(Killed):
            train(same_start(), pictures(), tmp_path, 3 * STEPS, verbose=0)
    assert not (tmp_path / "model.keras").exists()
    model = train(make(), pictures(), tmp_path, 3 * STEPS, verbose=0)
    assert_same(state(model), state(uninterrupted[0]))
    saved = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(state(saved), state(model))
    average = make().network
    average.load_weights(tmp_path / "ema.weights.h5")
    assert_same(average.get_weights(), model.ema_network.get_weights())


@pytest.mark.once
def test_a_longer_run_replaces_the_files_of_a_shorter(tmp_path, uninterrupted):
    train(same_start(), pictures(), tmp_path, STEPS, verbose=0)
    model = train(make_as_there(), pictures(), tmp_path, 3 * STEPS, verbose=0)
    saved = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(state(saved), state(model))
    assert_same(state(saved), state(uninterrupted[0]))
