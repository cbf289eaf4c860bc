"""Pictures and FID in a real `fit`: when, of which weights, and without a trace in the training."""

import json
import sys
import types

import keras
import numpy as np
import pytest
from PIL import Image
from stubs import StubInception, random_images, reference

from keras_uvit import DiffusionModel, UViT
from keras_uvit.evaluation import FIDCallback, SampleGridCallback, evaluate, image_grid
from keras_uvit.inference import fingerprint

pytestmark = pytest.mark.once

LABELS = (0, 1, 1)
DATA = {"image": random_images(8), "label": np.arange(8) % 2}
OPTIONS = dict(allow_few=True, batch_size=4)


class Trainee:
    """One compiled model, which every fit starts afresh from the same weights."""

    def __init__(self):
        keras.utils.set_random_seed(0)
        shape = dict(image_shape=(8, 8, 3), patch_size=4, hidden_dim=16, num_layers=1, num_heads=2)
        model = self.model = DiffusionModel(UViT(**shape, num_classes=2), num_steps=2)
        rng = np.random.default_rng(0)
        for weight in model.network.weights:
            weight.assign(rng.normal(size=weight.shape, scale=0.2))
        model.copy_weights_to_ema()
        model.compile(keras.optimizers.SGD(0.0))
        self.start = self.values()

    def values(self):
        variables = self.model.variables + self.model.optimizer.variables
        return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]

    def fit(self, callbacks, learning_rate=0.05, epochs=3):
        """Two steps an epoch."""
        model = self.model
        for variable, value in zip(model.variables + model.optimizer.variables, self.start):
            variable.assign(value)
        model.optimizer.learning_rate = learning_rate
        keras.utils.set_random_seed(0)
        return model.fit(DATA, batch_size=4, epochs=epochs, verbose=0, callbacks=callbacks).history


def picture(folder, epoch):
    with Image.open(folder / f"epoch-{epoch:04d}.png") as image:
        return np.asarray(image)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def inception():
    return StubInception()


@pytest.fixture(scope="module")
def trainee():
    return Trainee()


@pytest.fixture(scope="module")
def run(tmp_path_factory, trainee, inception):
    """One fit with everything: pictures of each epoch, FID, the best by it, TensorBoard."""
    folder, real = tmp_path_factory.mktemp("run"), reference(inception)
    grids = SampleGridCallback(
        folder / "grids", labels=LABELS, columns=2, zoom=2, log_dir=folder / "a"
    )
    path = folder / "deep" / "fid.jsonl"
    measured = FIDCallback(real, inception, path, num_images=8, log_dir=folder / "b", **OPTIONS)
    best = keras.callbacks.ModelCheckpoint(
        folder / "best.keras", monitor="fid", mode="min", save_best_only=True
    )
    history = trainee.fit([grids, measured, best])
    for callback in (grids, measured):
        callback.writer.close()  # tensorboardX writes in a thread, which `flush` does not wait for
    model = trainee.model
    return types.SimpleNamespace(
        folder=folder,
        history=history,
        records=[json.loads(line) for line in path.read_text().splitlines()],
        values=trainee.values(),
        average=model.generate(labels=LABELS, verbose=0),
        raw=model.generate(labels=LABELS, use_ema=False, verbose=0),
        again=evaluate(model, real, inception, 8, usual=0, verbose=0, **OPTIONS),
    )


def test_every_epoch_has_a_picture(run):
    assert names(run.folder / "grids") == [f"epoch-000{k}.png" for k in (1, 2, 3)]
    pictures = [picture(run.folder / "grids", k) for k in (1, 2, 3)]
    # Three images of 8 pixels twice as large in two columns, 2 pixels apart.
    assert [p.shape for p in pictures] == [(34, 34, 3)] * 3
    assert (pictures[0][18:, 18:] == 255).all()
    assert (pictures[0] != pictures[2]).any()


def test_the_last_picture_is_what_the_average_generates(run):
    np.testing.assert_array_equal(
        picture(run.folder / "grids", 3), image_grid(run.average, columns=2, zoom=2)
    )
    assert (run.average != run.raw).any()


@pytest.mark.each_backend
def test_the_callbacks_do_not_disturb_training(run, trainee):
    history = trainee.fit([])
    alone = trainee.values()
    assert len(alone) == len(run.values) > 30
    for a, b in zip(alone, run.values):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(alone, trainee.start))
    assert history["loss"] == run.history["loss"]


def test_each_epoch_has_a_record_of_the_final_evaluation(run):
    assert [record["epoch"] for record in run.records] == [1, 2, 3]
    assert [record["step"] for record in run.records] == [2, 4, 6]
    assert len({record["weights"] for record in run.records}) == 3
    assert {record["global_batch"] for record in run.records} == {4}
    assert {record["num_images"] for record in run.records} == {8}
    assert run.records[-1] == {"epoch": 3, **run.again}


def test_fid_is_in_the_logs(run):
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
    pictures, scalars = events(run.folder / "a"), events(run.folder / "b")
    assert [(step, value.tag) for step, value in pictures] == [(k, "samples") for k in (1, 2, 3)]
    assert {(value.image.height, value.image.width) for _, value in pictures} == {(34, 34)}
    assert [(step, value.tag) for step, value in scalars] == [(k, "fid") for k in (1, 2, 3)]
    values = [value.simple_value for _, value in scalars]
    np.testing.assert_array_equal(values, np.asarray(run.history["fid"], "float32"))


def test_an_unchanging_model_draws_the_same_every_epoch(tmp_path, trainee, inception):
    grid = SampleGridCallback(tmp_path / "grids", every=2, labels=LABELS, seed=7)
    path = tmp_path / "fid.jsonl"
    path.write_text('{"epoch": 0, "fid": 1.0}\n')
    measured = FIDCallback(
        reference(inception), inception, path, every=2, num_images=4, seed=7, **OPTIONS
    )
    history = trainee.fit([grid, measured], learning_rate=0.0, epochs=5)
    # Every second epoch, and the last.
    assert names(tmp_path / "grids") == [f"epoch-000{k}.png" for k in (2, 4, 5)]
    drawn = image_grid(trainee.model.generate(labels=LABELS, seed=7, verbose=0))
    for epoch in (2, 4, 5):
        np.testing.assert_array_equal(picture(tmp_path / "grids", epoch), drawn)
    assert (drawn != image_grid(trainee.model.generate(labels=LABELS, verbose=0))).any()
    old, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert old == {"epoch": 0, "fid": 1.0}  # a run that goes on adds to the file
    assert [record["epoch"] for record in records] == [2, 4, 5]
    assert len({record["fid"] for record in records}) == 1
    assert {record["seed"] for record in records} == {7}
    assert len(history["fid"]) == 3


class Painter:
    """Stands for a model where nothing is trained."""

    stop_training = False

    def generate(self, **options):
        return random_images(2)[..., :1]


def attached(callback, epochs):
    callback.set_params({"epochs": epochs})
    callback.set_model(Painter())
    return callback


def test_grey_pictures_are_drawn_and_logged(tmp_path):
    callback = attached(SampleGridCallback(tmp_path / "a", log_dir=tmp_path / "b"), epochs=1)
    callback.on_epoch_end(0)
    callback.writer.close()
    np.testing.assert_array_equal(
        picture(tmp_path / "a", 1), image_grid(Painter().generate())[..., 0]
    )
    assert [step for step, _ in events(tmp_path / "b")] == [1]


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 2


def test_the_last_epoch_of_a_fit_that_stops_early_is_drawn(tmp_path, trainee, inception):
    path = tmp_path / "fid.jsonl"
    callbacks = [
        SampleGridCallback(tmp_path / "grids", every=2, labels=LABELS),
        FIDCallback(reference(inception), inception, path, every=3, num_images=4, **OPTIONS),
        Stop(),
    ]
    trainee.fit(callbacks, epochs=9)
    assert names(tmp_path / "grids") == ["epoch-0002.png", "epoch-0003.png"]
    drawn = trainee.model.generate(labels=LABELS, verbose=0)
    np.testing.assert_array_equal(picture(tmp_path / "grids", 3), image_grid(drawn))
    # Due by itself: once, not again at the end.
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [3]


@pytest.mark.parametrize(
    "make",
    [
        lambda **logs: SampleGridCallback("grids", **logs),
        lambda **logs: FIDCallback(None, None, "fid.jsonl", **logs),
    ],
    ids=["grid", "fid"],
)
def test_missing_tensorboardx_is_named_when_the_callback_is_made(monkeypatch, make):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'tensorboardX: pip install "keras-uvit\[eval\]"'):
        make(log_dir="logs")
    make()  # not needed without log_dir


def test_fid_of_few_images_is_not_warned_about_in_training(trainee, recwarn, inception, tmp_path):
    path = tmp_path / "fid.jsonl"
    callback = FIDCallback(reference(inception), inception, path, num_images=4, **OPTIONS)
    callback.set_params({"epochs": 1})
    callback.set_model(trainee.model)
    logs = {}
    callback.on_epoch_end(0, logs)
    assert logs["fid"] > 0
    assert not [w for w in recwarn if "FID" in str(w.message)]
