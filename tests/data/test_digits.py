"""The bundled digits: sizes, types and the fixed split."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from keras_uvit.data import digits

pytestmark = pytest.mark.once


def _scans(data):
    return {image.tobytes() for image in data["image"]}


@pytest.mark.parametrize(("split", "count"), [("train", 1437), ("test", 360)])
def test_sizes_and_types_are_what_fit_takes(split, count):
    data = digits(split)
    assert sorted(data) == ["image", "label"]
    assert data["image"].shape == (count, 8, 8, 1)
    assert data["image"].dtype == np.uint8
    assert data["label"].shape == (count,)
    assert data["label"].dtype == np.int32


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_span_all_of_uint8_white_on_black(split):
    image = digits(split)["image"]
    assert image.min() == 0
    assert image.max() == 255  # 16 of 16 grey levels is full white
    assert len(np.unique(image)) == 17  # the scans have 17 levels; rounding merges none
    assert image[:, :, 0].mean() < 30  # the left edge is background


def test_train_is_the_default():
    np.testing.assert_array_equal(digits()["label"], digits("train")["label"])


def test_no_scan_is_in_both_splits():
    train, test = digits("train"), digits("test")
    assert not _scans(train) & _scans(test)
    assert len(_scans(train) | _scans(test)) == 1797  # no scan is lost, all differ


def test_each_class_has_its_share_of_the_test_scans():
    train, test = (np.bincount(digits(split)["label"], minlength=10) for split in ("train", "test"))
    # Within one scan of the exact share, which is no whole number.
    np.testing.assert_allclose(test, (train + test) * 360 / 1797, atol=1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_split_is_the_same_every_time(split):
    first = digits(split)
    np.random.seed(99)  # a library that drew from the global generator would differ now
    second = digits(split)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_labels_belong_to_their_scans():
    scans = load_digits()
    target = {
        np.round(image * 255 / 16).astype("uint8").tobytes(): label
        for image, label in zip(scans.images, scans.target)
    }
    for split in ("train", "test"):
        data = digits(split)
        assert [target[image.tobytes()] for image in data["image"]] == data["label"].tolist()


@pytest.mark.parametrize("split", ["validation", "Train", None])
def test_another_split_is_refused(split):
    with pytest.raises(ValueError, match=f'split must be "train" or "test".*{split}'):
        digits(split)


def test_missing_scikit_learn_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "keras-uvit\[data\]"'):
        digits()
