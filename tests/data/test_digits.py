"""The bundled digits: sizes, types and the fixed split."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny import refused

from keras_uvit.data import digits

pytestmark = pytest.mark.once


@pytest.mark.parametrize(("split", "count"), [("train", 1437), ("test", 360)])
def test_a_split_is_what_fit_takes_and_spans_all_of_uint8_white_on_black(split, count):
    data = digits(split)
    assert {key: (value.shape, value.dtype.name) for key, value in data.items()} == {
        "image": ((count, 8, 8, 1), "uint8"),
        "label": ((count,), "int32"),
    }
    levels = np.unique(data["image"])
    assert (len(levels), levels[0], levels[-1]) == (17, 0, 255)  # as many as the scans have
    assert data["image"][:, :, 0].mean() < 30  # the left edge is background


def test_each_scan_is_in_one_split_with_its_label():
    scans = load_digits()
    target = {
        np.round(image * 255 / 16).astype("uint8").tobytes(): label
        for image, label in zip(scans.images, scans.target)
    }
    assert len(target) == 1797  # all differ
    train, test = digits(), digits("test")
    seen = [image.tobytes() for data in (train, test) for image in data["image"]]
    assert sorted(seen) == sorted(target)
    assert [target[scan] for scan in seen] == [*train["label"], *test["label"]]
    counts = [np.bincount(data["label"], minlength=10) for data in (train, test)]
    # Within one scan of the exact share, which is no whole number.
    np.testing.assert_allclose(counts[1], sum(counts) * 360 / 1797, atol=1)
    np.random.seed(99)  # a library that drew from the global generator would differ now
    np.testing.assert_array_equal(digits()["image"], train["image"])


def test_another_split_and_a_missing_package_are_named(monkeypatch):
    refused(ValueError, lambda: digits("Train"), '"train" or "test"', "'Train'")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(ImportError, digits, 'pip install "keras-uvit[data]"')
