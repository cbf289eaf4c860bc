"""Pictures and FID in a real `fit`: when, of which weights, and without a trace in the training."""

import json
import sys
import types
import warnings

import keras
import numpy as np
import pytest
from stubs import StubInception, random_images
from tiny import assert_equal, fit, randomize, refused, uvit
from words import Words

from keras_uvit import DiffusionModel
from keras_uvit.evaluation import FIDCallback, SampleGridCallback, evaluate, image_grid
from keras_uvit.evaluation import read_images as pictures
from keras_uvit.inference import fingerprint

pytestmark = pytest.mark.once

LABELS = (0, 1, 1)
DATA = {"image": random_images(8), "label": np.arange(8) % 2}
SHAPE = dict(image_shape=(8, 8, 3), patch_size=4)
OPTIONS = dict(allow_few=True, batch_size=4)


class Trainee:
    """One compiled model, which every fit starts afresh from the same weights."""

    def __init__(self):
        model = self.model = DiffusionModel(uvit(**SHAPE, num_classes=2), num_steps=2)
        randomize(model.network, 0.2)
        model.copy_weights_to_ema()
        model.compile(keras.optimizers.SGD(0.0))
        self.variables = model.variables + model.optimizer.variables
        self.start = self.values()

    def values(self):
        return [keras.ops.convert_to_numpy(variable).copy() for variable in self.variables]

    def fit(self, callbacks, learning_rate=0.05, epochs=3):
        """Two steps an epoch."""
        for variable, value in zip(self.variables, self.start):
            variable.assign(value)
        self.model.optimizer.learning_rate = learning_rate
        keras.utils.set_random_seed(0)
        return fit(self.model, DATA, batch_size=4, epochs=epochs, callbacks=callbacks)

    def grid(self, **options):
        return image_grid(self.model.generate(labels=LABELS, verbose=0, **options))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trainee():
    return Trainee()


@pytest.fixture(scope="module")
def run(tmp_path_factory, trainee, real):
    """One fit with everything: pictures of each epoch, FID, the best by it, TensorBoard."""
    folder, inception = tmp_path_factory.mktemp("run"), StubInception()
    grids = SampleGridCallback(
        folder / "grids", labels=LABELS, columns=2, zoom=2, log_dir=folder / "a"
    )
    path = folder / "deep" / "fid.jsonl"
    measured = FIDCallback(real, inception, path, num_images=8, log_dir=folder / "b", **OPTIONS)
    best = keras.callbacks.ModelCheckpoint(
        folder / "best.keras", monitor="fid", mode="min", save_best_only=True
    )
    history = trainee.fit([grids, measured, best])
    model = trainee.model
    return types.SimpleNamespace(
        folder=folder,
        history=history,
        records=lines(path),
        values=trainee.values(),
        average=model.generate(labels=LABELS, verbose=0),
        raw=model.generate(labels=LABELS, use_ema=False, verbose=0),
        again=evaluate(model, real, inception, 8, usual=0, verbose=0, **OPTIONS),
    )


def test_every_epoch_has_a_picture_of_what_the_average_generates(run):
    found = pictures(run.folder / "grids")
    assert names(run.folder / "grids") == [f"epoch-000{k}.png" for k in (1, 2, 3)]
    # Three images of 8 pixels twice as large in two columns, 2 pixels apart.
    assert found.shape == (3, 34, 34, 3)
    assert (found[0] != found[2]).any()
    np.testing.assert_array_equal(found[2], image_grid(run.average, columns=2, zoom=2))
    assert (run.average != run.raw).any()


@pytest.mark.each_backend
def test_the_callbacks_do_not_disturb_training(run, trainee):
    history = trainee.fit([])
    alone = trainee.values()
    assert len(alone) > 30
    assert_equal(alone, run.values)
    assert any((a != b).any() for a, b in zip(alone, trainee.start))
    assert history["loss"] == run.history["loss"]


def test_each_epoch_has_a_record_of_the_final_evaluation(run):
    assert [record["epoch"] for record in run.records] == [1, 2, 3]
    assert [record["step"] for record in run.records] == [2, 4, 6]
    assert len({record["weights"] for record in run.records}) == 3
    assert {record["global_batch"] for record in run.records} == {4}
    assert run.records[-1] == {"epoch": 3, **run.again}
    assert run.history["fid"] == [record["fid"] for record in run.records]
    assert len(set(run.history["fid"])) == 3


def test_the_best_model_by_fid_is_kept(run):
    best = min(run.records, key=lambda record: record["fid"])
    kept = keras.saving.load_model(run.folder / "best.keras")
    assert fingerprint(kept.ema_network) == best["weights"]


def events(folder):
    """(step, value) of each summary in a folder of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            # A record: length, its checksum, the event, its checksum.
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            found += [(event.step, value) for value in event.summary.value]
    return found


def test_tensorboard_gets_pictures_and_fid(run):
    grids, scalars = events(run.folder / "a"), events(run.folder / "b")
    assert [(step, value.tag) for step, value in grids] == [(k, "samples") for k in (1, 2, 3)]
    assert {(value.image.height, value.image.width) for _, value in grids} == {(34, 34)}
    assert [(step, value.tag) for step, value in scalars] == [(k, "fid") for k in (1, 2, 3)]
    values = [value.simple_value for _, value in scalars]
    np.testing.assert_array_equal(values, np.asarray(run.history["fid"], "float32"))


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 4


def test_an_unchanging_model_draws_the_same_up_to_the_end(tmp_path, trainee, real, inception):
    grid = SampleGridCallback(tmp_path / "grids", every=2, labels=LABELS, seed=7)
    path = tmp_path / "fid.jsonl"
    path.write_text('{"epoch": 0, "fid": 1.0}\n')
    measured = FIDCallback(real, inception, path, num_images=4, seed=7, **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FID")  # of few images: that is meant
        history = trainee.fit([grid, measured, Stop()], learning_rate=0.0, epochs=9)
    # Every second epoch, and the last of a fit that stopped early.
    assert names(tmp_path / "grids") == [f"epoch-000{k}.png" for k in (2, 4, 5)]
    drawn = trainee.grid(seed=7)
    assert_equal(pictures(tmp_path / "grids"), [drawn] * 3)
    assert (drawn != trainee.grid()).any()
    old, *records = lines(path)
    assert old == {"epoch": 0, "fid": 1.0}  # a run that goes on adds to the file
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]  # the last one once
    assert len({record["fid"] for record in records}) == 1
    assert {record["seed"] for record in records} == {7}
    assert history["fid"] == [record["fid"] for record in records]


@pytest.mark.parametrize("prompts", ["a dog", ["a dog"]])
def test_prompts_stand_below_their_images(tmp_path, prompts):
    model = DiffusionModel(uvit(**SHAPE, context_shape=(2, 3)), num_steps=2)
    model.set_encoders(text_encoder=Words())
    callback = SampleGridCallback(tmp_path, every=2, prompts=prompts, zoom=10)
    callback.set_params({"epochs": 1})
    callback.set_model(model)
    callback.on_epoch_end(0)  # the last one planned
    grid = pictures(tmp_path)[0]
    assert grid.shape[1] == 80
    assert grid.shape[0] > 80
    assert (grid[80:] < 128).any()  # the text, black


@pytest.mark.parametrize(
    "options", [dict(prompts=["a dog"]), dict(num_images=2, num_stepz=3), dict(labels=[7])]
)
def test_what_cannot_be_drawn_is_refused_before_training(tmp_path, trainee, options):
    with pytest.raises((ValueError, TypeError)):
        trainee.fit([SampleGridCallback(tmp_path, **options)])
    assert int(trainee.model.step) == 0


@pytest.mark.parametrize(
    "make", [SampleGridCallback, lambda x, **o: FIDCallback(None, None, x, **o)]
)
def test_bad_arguments_are_refused_when_a_callback_is_made(monkeypatch, make):
    refused(ValueError, lambda: make("a", every=0), "every", "0")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused(ImportError, lambda: make("a", log_dir="logs"), 'pip install "keras-uvit[eval]"')
    make("a")  # not needed without log_dir
