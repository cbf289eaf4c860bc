"""The order of batches: a pure function of (seed, epoch), shared among processes."""

import itertools

import numpy as np
import pytest

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


# A function of seed and epoch ---------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 7, 123_456])
def test_a_new_dataset_set_to_an_epoch_reads_that_epoch(epoch):
    went = _dataset(seed=3)
    for earlier in (0, 1, 7, 123_456):
        went.epoch = earlier
        order = _epoch(went)
        if earlier == epoch:
            break
    assert _epoch(_dataset(seed=3, epoch=epoch)) == order


def test_batches_do_not_depend_on_what_was_read_before():
    data = _dataset(n=20, batch_size=3, epoch=5)
    forward = _epoch(data)
    for i in (5, 0, 3, 3, 1, 4, 2, 0):
        assert data[i]["index"].tolist() == forward[i]
    for epoch in (6, 5, 9, 5, 6):  # more epochs than are kept in memory
        data.epoch = epoch
        assert _epoch(data) == _epoch(_dataset(n=20, batch_size=3, epoch=epoch))


def test_the_order_is_the_one_that_earlier_runs_had():
    # Written down when the format was made: a resumed run must find the order it began with.
    # (NumPy changes the streams of its generators only to mend faults, NEP 19.)
    first = [[2, 4], [3, 6], [0, 5], [1, 7]]
    assert _epoch(_dataset(n=8, batch_size=2, seed=0, epoch=0)) == first
    later = [[3, 5], [0, 4], [2, 7], [1, 6]]
    assert _epoch(_dataset(n=8, batch_size=2, seed=7, epoch=3)) == later


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [
        _flat([data.rows(data.epoch, i).tolist() for i in range(len(data))])
        for data in (
            _dataset(n=30, batch_size=5, seed=s, epoch=e) for s in (0, 1) for e in range(5)
        )
    ]
    assert len(set(map(tuple, orders))) == 10


def test_the_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = _epoch(_dataset())
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert _epoch(_dataset()) == first


# An epoch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (12, 12), (12, 1), (30, 5)])
def test_where_batches_divide_the_samples_each_is_read_once(n, batch_size):
    for epoch in range(4):
        batches = _epoch(_dataset(n, batch_size, epoch))
        assert [len(batch) for batch in batches] == [batch_size] * (n // batch_size)
        assert sorted(_flat(batches)) == list(range(n))


@pytest.mark.parametrize(("n", "batch_size"), [(23, 4), (7, 5), (10, 9)])
def test_a_remainder_waits_for_another_epoch(n, batch_size):
    seen = set()
    for epoch in range(40):
        batches = _epoch(_dataset(n, batch_size, epoch))
        assert [len(batch) for batch in batches] == [batch_size] * (n // batch_size)
        samples = _flat(batches)
        assert len(set(samples)) == len(samples)
        seen.update(samples)
    assert seen == set(range(n))


def test_every_sample_is_left_out_equally_often():
    n, epochs = 5, 2000
    left_out = np.zeros(n)
    for epoch in range(epochs):
        left_out[list(set(range(n)) - set(_flat(_epoch(_dataset(n, 4, epoch)))))] += 1
    # One of five an epoch: 400 +- 18 each; five deviations.
    np.testing.assert_allclose(left_out, epochs / n, atol=90)


def test_batches_are_mixed_anew_and_not_only_put_in_another_order():
    first, second = ({tuple(b) for b in _epoch(_dataset(60, 6, epoch))} for epoch in (0, 1))
    assert not first & second


def test_rows_of_a_batch_ascend_and_keys_stay_together():
    data = _dataset(n=40, batch_size=8)
    for i in range(len(data)):
        batch = data[i]
        assert (np.diff(batch["index"]) > 0).all()
        np.testing.assert_array_equal(batch["label"], 3 * batch["index"])
        assert batch["label"].dtype == np.int32


# Processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_parts_of_all_processes_are_the_batch_of_one(count, epoch):
    whole = _dataset(n=30, batch_size=12, seed=5, epoch=epoch)
    parts = [
        _dataset(n=30, batch_size=12, seed=5, epoch=epoch, process=(i, count)) for i in range(count)
    ]
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
    ("batch_size", "count", "nearest"), [(9, 4, 8), (11, 4, 12), (3, 4, 4), (1, 5, 5), (16, 3, 15)]
)
def test_a_batch_size_that_does_not_divide_is_told_the_nearest(batch_size, count, nearest):
    with pytest.raises(
        ValueError, match=f"number, {count}. Received: {batch_size}; the nearest is {nearest}"
    ):
        _dataset(n=20, batch_size=batch_size, process=(0, count))
    assert _dataset(n=20, batch_size=nearest, process=(0, count)).batch_size == nearest


@pytest.mark.parametrize("process", [(2, 2), (-1, 2), (0, 0), (5, 3)])
def test_processes_count_from_zero(process):
    with pytest.raises(ValueError, match=r"process is \(index, count\)"):
        _dataset(process=process)


@pytest.mark.parametrize("batch_size", [0, -4, 13])
def test_the_batch_size_must_fit_the_number_of_samples(batch_size):
    with pytest.raises(ValueError, match=f"number of samples, 12.*Received: {batch_size}"):
        _dataset(batch_size=batch_size)


# Keras' calls -------------------------------------------------------------------------------------


def test_the_first_epoch_that_keras_begins_is_the_one_that_was_set():
    data = _dataset(epoch=5)
    seen = []
    for _ in range(3):
        data.on_epoch_begin()
        seen.append(data.epoch)
        data.on_epoch_end()
        data.on_epoch_end()  # Keras does so at the end of `fit`
    assert seen == [5, 6, 7]


def test_a_dataset_that_was_used_before_can_be_set_to_an_epoch_too():
    data = _dataset()
    data.on_epoch_begin()
    data.epoch = 5  # as `training.train` does, whether or not the data set is new
    data.on_epoch_begin()
    assert data.epoch == 5


def test_a_second_fit_goes_on_with_the_next_epoch():
    data = _dataset()
    for _ in range(2):
        data.on_epoch_begin()
    data.on_epoch_end()
    data.on_epoch_begin()
    assert data.epoch == 2


def test_keras_is_kept_from_shuffling_once_more():
    assert _dataset().shuffles_itself
