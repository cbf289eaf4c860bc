"""The order of batches: a pure function of (seed, epoch), shared among processes."""

import itertools

import numpy as np
import pytest
from tiny import refused

from keras_uvit.data import shuffled
from keras_uvit.data.images import ImageDataset
from keras_uvit.data.shuffled import ShuffledDataset

pytestmark = pytest.mark.once


def _dataset(n=12, batch_size=4, epoch=0, **options):
    """Samples that are their own index; labels are three times that."""
    arrays = {"index": np.arange(n), "label": (3 * np.arange(n)).astype("int32")}
    data = ShuffledDataset(arrays, batch_size, **options)
    data.epoch = epoch
    return data


def _epoch(data):
    return [data[i]["index"].tolist() for i in range(len(data))]


def _flat(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize(
    ("total", "processes", "expected"), [(1000, 1, 16), (5, 1, 5), (1000, 3, 15), (7, 2, 6)]
)
def test_a_batch_of_no_given_size_suits_the_machine(monkeypatch, total, processes, expected):
    monkeypatch.setattr(shuffled.backend, "has_accelerator", lambda: False)
    assert _dataset(total, None, process=(0, processes)).batch_size == expected


def test_batches_do_not_depend_on_what_was_read_before():
    data = _dataset(n=20, batch_size=3, epoch=5)
    forward = _epoch(data)
    for i in (5, 0, 3, 3, 1, 4, 2, 0):
        assert data[i]["index"].tolist() == forward[i]
    for epoch in (6, 5, 123_456, 5, 6):  # more epochs than are kept in memory
        data.epoch = epoch
        assert _epoch(data) == _epoch(_dataset(n=20, batch_size=3, epoch=epoch))


def test_the_order_is_the_one_that_earlier_runs_had():
    # Written down when the format was made: a resumed run must find the order it began with.
    # (NumPy changes the streams of its generators only to mend faults, NEP 19.)
    first = [[2, 4], [3, 6], [0, 5], [1, 7]]
    assert _epoch(_dataset(n=8, batch_size=2, seed=0, epoch=0)) == first
    later = [[3, 5], [0, 4], [2, 7], [1, 6]]
    assert _epoch(_dataset(n=8, batch_size=2, seed=7, epoch=3)) == later


def test_seeds_and_epochs_have_batches_of_their_own():
    batches = [
        {tuple(batch) for batch in _epoch(_dataset(60, 6, seed=seed, epoch=epoch))}
        for seed in (0, 1)
        for epoch in range(5)
    ]  # mixed anew, and not only put in another order
    assert not any(one & other for one, other in itertools.combinations(batches, 2))


def test_the_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = _epoch(_dataset())
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert _epoch(_dataset()) == first


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (13, 4), (7, 7), (5, 1)])
def test_each_epoch_has_full_batches_without_repeats(n, batch_size):
    seen = set()
    for epoch in range(20):
        batches = _epoch(_dataset(n, batch_size, epoch))
        assert [len(batch) for batch in batches] == [batch_size] * (n // batch_size)
        samples = _flat(batches)
        assert len(set(samples)) == len(samples)
        seen.update(samples)
    assert seen == set(range(n))


@pytest.mark.parametrize("count", [2, 6])
def test_the_parts_of_all_processes_are_the_batch_of_one(count):
    order = dict(n=30, batch_size=12, seed=5, epoch=3)
    whole, parts = _dataset(**order), [_dataset(**order, process=(i, count)) for i in range(count)]
    for i in range(len(whole)):
        pieces = [part[i]["index"].tolist() for part in parts]
        assert [len(piece) for piece in pieces] == [12 // count] * count
        assert sorted(_flat(pieces)) == whole[i]["index"].tolist()
    assert {len(part) for part in parts} == {len(whole)}


def test_images_are_mirrored_alike_whatever_the_number_of_processes():
    images = np.random.default_rng(0).integers(0, 256, (24, 2, 4, 1), dtype="uint8")
    originals = {image.tobytes() for image in images}
    whole = ImageDataset({"image": images}, 8, seed=2)
    parts = [ImageDataset({"image": images}, 8, seed=2, process=(i, 4)) for i in range(4)]
    mirrored = 0
    for epoch in range(3):
        for data in (whole, *parts):
            data.epoch = epoch
        for i in range(3):
            pieces = [image.tobytes() for part in parts for image in part[i]["image"]]
            together = [image.tobytes() for image in whole[i]["image"]]
            assert sorted(pieces) == sorted(together)
            mirrored += sum(image not in originals for image in together)
    assert 0 < mirrored < 72  # else nothing was tested


@pytest.mark.parametrize(
    ("batch_size", "process", "words"),
    [
        (0, None, ["number of samples, 12", "0"]),
        (13, None, ["number of samples, 12", "13"]),
        (9, (0, 4), ["number, 4", "9; the nearest is 8"]),
        (11, (0, 4), ["number, 4", "11; the nearest is 12"]),
        (1, (0, 5), ["number, 5", "1; the nearest is 5"]),
        (4, (2, 2), ["process", "(2, 2)"]),
        (4, (-1, 2), ["process", "(-1, 2)"]),
        (4, (0, 0), ["process", "(0, 0)"]),
    ],
)
def test_batches_and_processes_that_do_not_fit_are_refused(batch_size, process, words):
    refused(ValueError, lambda: _dataset(batch_size=batch_size, process=process), *words)


def test_keras_goes_on_from_the_epoch_that_was_set():
    data = _dataset(epoch=5)
    seen = []
    for _ in range(3):
        data.on_epoch_begin()
        seen.append(data.epoch)
        data.on_epoch_end()
        data.on_epoch_end()  # Keras does so at the end of `fit`
    assert seen == [5, 6, 7]
    data.epoch = 2  # as `training.train` does, whether or not the data set is new
    data.on_epoch_begin()
    assert data.epoch == 2
    data.on_epoch_begin()  # a second fit
    assert data.epoch == 3
