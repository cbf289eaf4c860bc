"""A report's numbers on models whose quality is known."""

import json

import numpy as np
import pytest
from tiny import refused, uvit

from keras_uvit import DiffusionModel, evaluation
from keras_uvit.diffusion.schedules import LinearPath, VPCosine
from keras_uvit.evaluation import reports
from keras_uvit.evaluation.classifier import Classifier

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def squares(count):
    """A bright square, left or right, on noise."""
    images = RNG.integers(0, 60, (count, 8, 8, 1)).astype("uint8")
    labels = np.arange(count) % 2
    for image, label in zip(images, labels):
        image[2:6, 4 * label : 4 * label + 3] += RNG.integers(120, 180, dtype="uint8")
    return {"image": images, "label": labels}


CONTENT = squares(200)


@pytest.fixture(autouse=True)
def _easy(monkeypatch):
    """Squares are learned in 60 steps of a classifier."""
    monkeypatch.setattr(reports, "CLASSIFIER_STEPS", (60, 60))


def model_of(num_classes, draw):
    """A model that "draws" what it is told."""
    network = uvit(image_shape=(8, 8, 1), num_classes=num_classes)
    model = DiffusionModel(network, prediction="x0")
    object.__setattr__(model, "generate", draw)
    return model


def report(draw, folder, num_classes=2, data=CONTENT, num_images=60):
    model = model_of(num_classes, draw)
    return evaluation.report(model, data, folder, num_images=num_images, verbose=0)


def test_a_classifier_reads_what_it_has_learned():
    judge = Classifier((8, 8, 1), 2).fit(CONTENT["image"], CONTENT["label"], steps=60)
    new = squares(50)
    assert (judge.classes(new["image"]) == new["label"]).mean() > 0.9
    assert judge.features(new["image"]).shape == (50, 64)


def test_real_pictures_score_as_real_ones_and_wrong_or_collapsed_classes_do_not(
    tmp_path, monkeypatch
):
    found = report(lambda labels, **_: squares(len(labels))["image"], tmp_path)
    assert found["copies"] == 0
    assert found["agreement"] > 0.9
    assert found["spread"] == pytest.approx(1.0, abs=0.3)  # of 30 pictures a class
    assert found["distance_pixels"] < 10 * found["distance_pixels_floor"]
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").stat().st_size > 1000

    monkeypatch.setattr(Classifier, "fit", None)  # it is there already
    monkeypatch.setattr(reports, "_draw", lambda *_: None)
    # One picture a class, of the other class.
    found = report(lambda labels, **_: CONTENT["image"][np.where(labels, 0, 1)], tmp_path)
    assert found["agreement"] < 0.1
    assert found["spread"] < 0.05


def test_copies_are_found_of_a_model_without_classes(tmp_path):
    data = {"image": CONTENT["image"]}
    found = report(
        lambda num_images, **_: CONTENT["image"][:num_images], tmp_path, None, data, num_images=20
    )
    assert "agreement" not in found
    assert found["copies"] == 16


def test_the_error_of_the_mean_picture_is_one():
    images = squares(100)["image"]
    x0 = images.astype("float32") / 127.5 - 1

    class Mean:
        def predict(self, inputs, **_):
            return np.broadcast_to(x0.mean(axis=0), x0.shape)

    model = model_of(None, None)
    object.__setattr__(model, "ema_network", Mean())
    errors = reports._errors(model, images, None, 0)
    np.testing.assert_allclose(errors, 1.0, rtol=1e-4)  # float32 sums


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"image": np.zeros((30, 4, 4, 1), "uint8")}, ValueError, ["(8, 8, 1)", "(4, 4, 1)"]),
        ({"image": np.zeros((9, 8, 8, 1), "uint8")}, ValueError, ["at least 20", "9"]),
        ({"image": np.zeros((30, 8, 8, 1), "uint8")}, ValueError, ['need "label"']),
        ([1], TypeError, ["list"]),
    ],
)
def test_bad_input_is_named(tmp_path, data, error, words):
    refused(error, lambda: report(None, tmp_path / "new", data=data), *words)
    assert not (tmp_path / "new").exists()


def test_what_is_typical_is_compared_at_equal_noise():
    np.testing.assert_allclose(reports.typical(LinearPath()), reports.TYPICAL, rtol=1e-12)
    cosine = VPCosine()
    found = reports.typical(cosine)
    # The cosine schedule's noise over signal at t is tan(pi t / 2) but for its ends; a linear path
    # has as much at tan / (1 + tan).
    ratio = np.tan(np.pi / 2 * reports.TIMES)
    expected = np.interp(ratio / (1 + ratio), reports.TIMES, reports.TYPICAL)
    np.testing.assert_allclose(found[2:8], expected[2:8], rtol=0.05)  # between ten known points
    assert (np.diff(found) > 0).all()
