"""The event files of TensorBoard hold what the callback promises, in a real `fit`."""

import sys

import keras
import numpy as np
import pytest
from test_callbacks import events as summaries
from tiny import DATA, LABELS, diffusion_model, fit, refused

from keras_uvit.evaluation import TensorBoardCallback, image_grid, loss_by_time
from keras_uvit.training import adamw

BATCH = {key: value[:8] for key, value in DATA.items()}


def events(folder):
    """(step, tag, value) of each summary: a float, or the (height, width) of a picture."""
    found = []
    for step, value in summaries(folder):
        image = value.image
        size = (image.height, image.width) if image.height else value.simple_value
        found.append((step, value.tag, size))
    return found


def test_event_files_hold_what_is_promised(tmp_path):
    model = diffusion_model(compiled=False)
    model.compile(adamw(1e-2, warmup_steps=4))
    shown = TensorBoardCallback(
        tmp_path, every_steps=2, batch=BATCH, buckets=4, labels=[0, 1, 2], num_steps=2, zoom=2
    )
    history = fit(model, epochs=2, callbacks=[shown], validation_data=BATCH)
    found = events(tmp_path)

    def curve(tag):
        return {step: value for step, name, value in found if name == tag}

    # Three batches an epoch: the first and the third of each.
    assert [*curve("train/loss")] == [*curve("train/grad_norm")] == [1, 3, 4, 6]
    # The mean of an epoch is that of its last batch.
    ends = [curve("train/loss")[step] for step in (3, 6)]
    np.testing.assert_allclose(ends, history["loss"], rtol=1e-6)  # float32 in the file
    # After k steps the optimizer is about to make step k at rate min(k / 4, 1) * 0.01.
    rates = curve("train/learning_rate")
    np.testing.assert_allclose([*rates.values()], [0.0025, 0.0075, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose([*curve("val/loss").values()], history["val_loss"], rtol=1e-6)
    now = loss_by_time(model, BATCH, 4)
    assert [*now] == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    for name, value in now.items():
        logged = curve(f"loss_by_time/{name}")
        assert [*logged] == [3, 6]
        np.testing.assert_allclose(logged[6], value, rtol=1e-6)
        assert logged[3] != logged[6]
    images = model.generate(labels=[0, 1, 2], num_steps=2, verbose=0)
    size = image_grid(images, zoom=2).shape[:2]
    assert curve("samples") == {3: size, 6: size}


def test_the_callback_does_not_disturb_training(tmp_path):
    shown = TensorBoardCallback(tmp_path, batch=BATCH, labels=LABELS[:2], num_steps=2)
    losses = [fit(diffusion_model(), epochs=2, callbacks=c)["loss"] for c in ([], [shown])]
    assert losses[0] == losses[1]


@pytest.mark.once
def test_buckets_are_the_validation_loss_by_parts():
    """Their mean is the loss that `evaluate` gives, up to the noise that each of them draws."""
    model = diffusion_model()
    fit(model, epochs=5)
    many = {key: np.tile(value, (40, *[1] * (value.ndim - 1))) for key, value in DATA.items()}
    found = loss_by_time(model, many, 5)
    # 960 images: the mean of two draws of their squared errors differs by about 3 %.
    np.testing.assert_allclose(
        np.mean([*found.values()]), model.evaluate(many, batch_size=96, verbose=0), rtol=0.1
    )


@pytest.mark.once
def test_what_cannot_be_shown_is_refused_before_training(tmp_path, monkeypatch):
    model = diffusion_model()
    for options in (dict(labels=[7]), dict(num_images=2)):
        shown = TensorBoardCallback(tmp_path, **options)
        refused(ValueError, lambda shown=shown: fit(model, callbacks=[shown]), "labels")
    assert int(keras.ops.convert_to_numpy(model.step)) == 0
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused(ImportError, lambda: TensorBoardCallback(tmp_path), 'pip install "keras-uvit[eval]"')
