"""A report's numbers on models whose quality is known."""

import json

import numpy as np
import pytest

from keras_uvit import DiffusionModel, UViT, evaluation
from keras_uvit.evaluation import reports
from keras_uvit.evaluation.classifier import Classifier

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def squares(count, classes=2):
    """A bright square, left or right, on noise."""
    images = RNG.integers(0, 60, (count, 8, 8, 1)).astype("uint8")
    labels = np.arange(count) % classes
    for image, label in zip(images, labels):
        image[2:6, 4 * label : 4 * label + 3] += RNG.integers(120, 180, dtype="uint8")
    return {"image": images, "label": labels}


@pytest.fixture(scope="module")
def content():
    return squares(200)


@pytest.fixture(autouse=True)
def _easy(monkeypatch):
    """Squares are learned in 60 steps of a classifier."""
    monkeypatch.setattr(reports, "CLASSIFIER_STEPS", (60, 60))


def model_of(num_classes, draw):
    """A model that "draws" what it is told."""
    network = UViT((8, 8, 1), 2, 16, num_layers=1, num_heads=2, num_classes=num_classes)
    model = DiffusionModel(network, prediction="x0")
    object.__setattr__(model, "generate", draw)
    return model


def test_a_classifier_reads_what_it_has_learned(content):
    judge = Classifier((8, 8, 1), 2).fit(content["image"], content["label"], steps=60)
    new = squares(50)
    assert (judge.classes(new["image"]) == new["label"]).mean() > 0.9
    assert judge.features(new["image"]).shape == (50, 64)


def test_real_pictures_score_as_real_ones_and_copies_are_found(content, tmp_path):
    same = model_of(2, lambda labels, **_: content["image"][: len(labels)])
    found = evaluation.report(same, content, tmp_path / "a", num_images=60, verbose=0)
    assert found["copies"] == 16
    assert found["agreement"] > 0.9
    new = model_of(2, lambda labels, **_: squares(len(labels))["image"])
    found = evaluation.report(new, content, tmp_path / "b", num_images=60, verbose=0)
    assert found["copies"] == 0
    assert found["spread"] == pytest.approx(1.0, abs=0.3)  # of 30 pictures a class
    assert found["distance_pixels"] < 10 * found["distance_pixels_floor"]
    assert found == json.loads((tmp_path / "b" / "report.json").read_text())
    assert (tmp_path / "b" / "report.png").stat().st_size > 1000
    assert len(list((tmp_path / "b").glob("classifier-*.weights.h5"))) == 1


def test_wrong_and_collapsed_classes_are_found(content, tmp_path):
    def draw(labels, **_):
        return content["image"][np.where(labels, 0, 1)]  # one picture a class, of the other class

    found = evaluation.report(model_of(2, draw), content, tmp_path, num_images=40, verbose=0)
    assert found["agreement"] < 0.1
    assert found["spread"] < 0.05


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


def test_a_model_without_classes_has_no_classifier(content, tmp_path):
    model = model_of(None, lambda num_images, **_: content["image"][:num_images])
    found = evaluation.report(
        model, {"image": content["image"]}, tmp_path, num_images=20, verbose=0
    )
    assert "agreement" not in found
    assert found["copies"] == 16


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"image": np.zeros((30, 4, 4, 1), "uint8")}, r"of \(8, 8, 1\).* \(4, 4, 1\)"),
        ({"image": np.zeros((9, 8, 8, 1), "uint8")}, "at least 20 .* 9"),
        ({"image": np.zeros((30, 8, 8, 1), "uint8")}, 'need "label"'),
        ([1], "Received: list"),
    ],
)
def test_bad_input_is_named(tmp_path, data, named):
    with pytest.raises((ValueError, TypeError), match=named):
        evaluation.report(model_of(2, None), data, tmp_path)
