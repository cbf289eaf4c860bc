"""Reading caches: shards as one array, and training from files."""

import functools

import keras
import numpy as np
import pytest
from caches import IMAGES, LABELS, moments_source, noise, read_cache, write_cache
from keras import ops
from tiny import numpy, refused, uvit

from keras_uvit import DiffusionModel, data
from keras_uvit.data import LatentDataset, image_shards
from keras_uvit.data.latents import ShardedArray
from keras_uvit.data.manifest import CacheError
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once

NUM_SAMPLES, SHARD_SIZE = 22, 5
# Image k is of one grey level, 10 k, of which its latents tell k again.
LEVELS = np.repeat(np.arange(NUM_SAMPLES, dtype="uint8") * 10, 16).reshape(-1, 4, 4, 1)


def _numbers(moments):
    """The images' numbers, from their moments."""
    # float16 next to 1 has steps of 0.001; neighbouring numbers are 0.08 apart.
    return np.round((np.asarray(moments, "float32")[:, 0, 0, 0] + 1.0) * 12.75).astype(int)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A cache of five shards, the last of two samples. Not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "cache"
    source = {"image": LEVELS, "label": np.arange(NUM_SAMPLES) % 3}
    write_cache(path, source, SpaceToDepth(scale=1.7), shard_size=SHARD_SIZE)
    return path


# Shards as one array ------------------------------------------------------------------------------


def _sharded(lengths, shape=(2, 3), dtype="float16"):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, *shape)).astype(dtype) for n in lengths]
    return ShardedArray(parts), np.concatenate(parts)


@pytest.mark.parametrize("lengths", [[7], [0, 3, 0, 0, 4, 0], [2, 5, 9, 1, 3]])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), "float16"), ((), "float32")])
def test_shards_are_read_as_one_array(lengths, shape, dtype):
    sharded, whole = _sharded(lengths, shape, dtype)
    assert (sharded.shape, len(sharded), sharded.dtype) == (whole.shape, len(whole), whole.dtype)
    assert (sharded[[0, 1]].dtype, sharded[[]].shape) == (whole.dtype, (0, *shape))
    rng, everything = np.random.default_rng(1), np.arange(len(whole))
    some = [rng.integers(0, len(whole), count) for count in (0, 1, 2, 5, 40)]  # with repeats
    for rows in (everything, everything[::-1], *some):
        for wanted in (rows, np.sort(rows), np.sort(rows)[::-1], rows.tolist()):
            np.testing.assert_array_equal(sharded[wanted], whole[np.asarray(wanted, int)])
    slices = [(None,), (2, 5), (5, 2), (None, None, 2), (None, None, -1), (-3, None), (4, 1000)]
    for row in (*range(len(whole)), np.int64(3), *(slice(*ends) for ends in slices)):
        np.testing.assert_array_equal(sharded[row], whole[row])
    sharded[[0, 5]][...] = 0  # what was read can be changed
    sharded[:][...] = 0
    np.testing.assert_array_equal(sharded[:], whole)


@pytest.mark.parametrize("rows", [7, -1, [0, 7], [-1, 2], [6, 3, 7], np.int64(7)])
def test_rows_that_are_not_there_are_refused(rows):
    sharded, _ = _sharded([3, 4])
    refused(IndexError, lambda: sharded[rows], "Rows are in [0, 7)")


# A cache ------------------------------------------------------------------------------------------


def test_a_cache_says_what_it_holds_and_gives_what_fit_takes(finished):
    cache = read_cache(finished)
    assert (cache.num_samples, cache.num_classes, len(cache)) == (NUM_SAMPLES, 3, 5)
    assert (cache.sample_shape, cache.image_size) == ((2, 2, 8), [4, 4])
    assert (cache.scale, read_cache(finished, scale=2).scale) == (1.7, 2.0)
    assert cache.autoencoder_id == cache.fingerprint == "space-to-depth-2"
    assert cache.manifest["source_length"] == NUM_SAMPLES
    assert {key: (value.shape, value.dtype.name) for key, value in cache[0].items()} == {
        "moments": ((4, 2, 2, 8), "float16"),
        "label": ((4,), "int32"),
    }


@pytest.mark.parametrize("verify", [True, False])
def test_samples_and_labels_stay_together_in_the_order_of_the_seed(finished, verify):
    cache = read_cache(finished, seed=4, verify=verify)
    for epoch in (0, 2):
        cache.epoch = epoch
        order = np.random.default_rng([4, epoch]).permutation(NUM_SAMPLES)
        for i in range(len(cache)):
            batch = cache[i]
            numbers = _numbers(batch["moments"])
            assert numbers.tolist() == sorted(order[4 * i : 4 * i + 4])
            np.testing.assert_array_equal(batch["label"], numbers % 3)


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_can_be_left_out_or_missing(finished, tmp_path, labelled):
    if labelled:
        cache = read_cache(finished, labels=None)
    else:
        write_cache(tmp_path, IMAGES)
        cache = read_cache(tmp_path)
    assert ([*cache[0]], cache.num_classes) == (["moments"], None)


def test_a_shard_of_which_no_image_could_be_read_is_passed_over(tmp_path):
    values = [0, 1, *[ValueError("cannot be read")] * 4, 6, 7, 8]
    write_cache(tmp_path, moments_source(values, num_classes=9), None, shard_size=2, corrupt="skip")
    batch = read_cache(tmp_path, 5)[0]
    assert batch["moments"][:, 0, 0, 0].tolist() == batch["label"].tolist() == [0, 1, 6, 7, 8]


def test_images_are_read_back_as_they_were_written(tmp_path):
    data.write_images({"image": IMAGES, "label": LABELS}, tmp_path, shard_size=4, verbose=0)
    still = read_cache(tmp_path, 5, image_shards, flip=False, seed=1)
    moving = read_cache(tmp_path, 5, image_shards, seed=1)
    assert (still.num_classes, still.num_samples, len(still)) == (4, 10, 2)
    mirrored = 0
    for epoch in range(3):
        still.epoch = moving.epoch = epoch
        order = np.random.default_rng([1, epoch]).permutation(10)
        for i in range(2):
            rows = np.sort(order[5 * i : 5 * i + 5])
            np.testing.assert_array_equal(still[i]["image"], IMAGES[rows])
            np.testing.assert_array_equal(still[i]["label"], LABELS[rows])
            for image, row in zip(moving[i]["image"], rows):
                mirrored += not np.array_equal(image, IMAGES[row])
                assert any(np.array_equal(image, IMAGES[row][:, ::s]) for s in (1, -1))
    assert 0 < mirrored < 30
    assert read_cache(tmp_path, 5, image_shards, labels=None).labels is None


# Training -----------------------------------------------------------------------------------------


class Spy(DiffusionModel):
    """Reports, of each training step, the numbers and labels of the samples that arrived."""

    def unpack(self, *args):
        batch = super().unpack(*args)
        self.__dict__["seen"] = batch  # past Keras, which would track it
        return batch

    def report(self, loss, norm):
        moments, label = self.__dict__["seen"]["moments"], self.__dict__["seen"]["label"]
        level = ops.cast(moments, "float32")[:, 0, 0, 0]
        arrived = {f"level_{k}": level[k] for k in range(4)}
        arrived |= {f"label_{k}": ops.cast(label, "float32")[k] for k in range(4)}
        return {**super().report(loss, norm), **arrived}


def test_fit_gives_the_model_what_the_cache_says_epoch_by_epoch(finished, monkeypatch):
    read, arrived = [], []
    cache, again = (read_cache(finished, seed=2) for _ in range(2))
    network = uvit(image_shape=(2, 2, 4), patch_size=1, hidden_dim=8, num_heads=1, num_classes=3)
    model = Spy(network, latent_scale=1.7)
    model.compile()

    def keep(batch, logs):
        levels = np.array([logs[f"level_{k}"] for k in range(4)]).reshape(4, 1, 1, 1)
        arrived.append((_numbers(levels).tolist(), [int(logs[f"label_{k}"]) for k in range(4)]))

    def get(self, i, get=LatentDataset.__getitem__):
        read.append((self.epoch, i))
        return get(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(LatentDataset, "__getitem__", get)
        callback = keras.callbacks.LambdaCallback(on_train_batch_end=keep)
        losses = model.fit(cache, epochs=3, verbose=0, callbacks=[callback]).history["loss"]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert int(numpy(model.skipped_steps)) == 0
    assert model.latent_encoder == "space-to-depth-2"
    # Before training, the first batches are read once or twice more, to look at their shapes.
    visits = [(epoch, i) for epoch in range(3) for i in range(5)]
    ahead = len(read) - 15
    assert 0 <= ahead <= 3
    assert set(read[:ahead]) <= {(0, 0), (0, 1)}
    assert read[ahead:] == visits
    expected = []
    for again.epoch, i in visits:
        numbers = again.rows(again.epoch, i).tolist()
        assert _numbers(again[i]["moments"]).tolist() == numbers
        expected.append((numbers, [n % 3 for n in numbers]))
    assert arrived == expected
    losses = [model.evaluate(cache, verbose=0, return_dict=True)["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [LatentDataset, image_shards])
def test_what_is_not_there_is_named(tmp_path, reader):
    (tmp_path / "file").write_text("")
    for name, words in [
        ("nowhere", ["No folder at", "nowhere", "encode"]),
        ("file", ["No folder at", "file"]),
        (".", [f"No cache in {tmp_path}"]),
    ]:
        path = tmp_path / name
        refused(FileNotFoundError, functools.partial(read_cache, path, reader=reader), *words)


def test_an_unfinished_cache_says_how_many_shards_are_done(tmp_path):
    assert write_cache(tmp_path, shard_size=2, process=(1, 2)) is None
    refused(CacheError, lambda: read_cache(tmp_path), "unfinished: 2 of 5 shards", "resumes there")
    assert write_cache(tmp_path, shard_size=2, process=(0, 3)) is None  # 0, and 3 which is there
    refused(CacheError, lambda: read_cache(tmp_path), "unfinished: 3 of 5 shards")


def test_each_kind_of_cache_names_its_reader(finished, tmp_path):
    words = "holds moments", "data.LatentDataset"
    refused(CacheError, lambda: read_cache(finished, reader=image_shards), *words)
    data.write_images(noise(8, 8)[None], tmp_path, verbose=0)
    refused(CacheError, lambda: read_cache(tmp_path), "holds image", "data.image_shards")
    refused(ValueError, lambda: read_cache(finished, labels="ids"), "labels", "ids")
    refused(ValueError, lambda: read_cache(finished, captions="all"), "captions", "all")
