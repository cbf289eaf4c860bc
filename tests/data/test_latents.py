"""Reading caches: order, labels, a caption drawn at each visit, and training from files."""

import dataclasses
import functools

import caches
import keras
import numpy as np
import pytest
from caches import CAPTIONED, CAPTIONS, COUNTS, IMAGES, LABELS, read_cache, write_cache
from keras import ops
from tiny import numpy, refused, uvit
from words import Words

from keras_uvit import DiffusionModel
from keras_uvit.data import LatentDataset, image_shards, sources, write_images
from keras_uvit.data.contexts import Contexts
from keras_uvit.data.images import in_memory
from keras_uvit.data.latents import ShardedArray
from keras_uvit.data.manifest import CacheError
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once


def half(captions):
    return Words()(captions).astype("float16")


@pytest.fixture(scope="module", params=["latents", "images"])
def captioned(request, tmp_path_factory):
    """Opens a cache of captioned samples; its field, and what is in it."""
    path = tmp_path_factory.mktemp("captioned")
    if request.param == "latents":
        caches.write_captioned(path)
        return functools.partial(read_cache, path), "moments", caches.MOMENTS
    write_images(CAPTIONED, path, text_encoder=Words(), shard_size=4, verbose=0)
    return functools.partial(read_cache, path, reader=image_shards), "image", IMAGES


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
    n = len(whole)
    for rows in (n, -1, [0, n], [-1, 2], [n - 1, 3, n], np.int64(n)):
        with pytest.raises(IndexError, match=rf"Rows are in \[0, {n}\)"):
            sharded[rows]


# A cache ------------------------------------------------------------------------------------------


def test_a_cache_says_what_it_holds(tmp_path):
    caches.write_captioned(tmp_path, autoencoder=SpaceToDepth(scale=1.7))
    cache = read_cache(tmp_path)
    assert (cache.num_samples, cache.num_classes, len(cache)) == (10, 4, 2)
    assert (cache.sample_shape, cache.image_size) == ((2, 3, 24), [4, 6])
    assert (cache.scale, read_cache(tmp_path, scale=2).scale) == (1.7, 2.0)
    assert cache.autoencoder_id == cache.fingerprint == "space-to-depth-2"
    about = cache.manifest["text"]
    assert len(about.pop("captions")) == 16
    encoder = {"id": "words", "fingerprint": "words-1", "clean": False}
    assert about == {**encoder, "shape": [2, 3], "dtype": "float16"}
    assert {key: (value.shape, value.dtype.name) for key, value in cache[0].items()} == {
        "moments": ((4, 2, 3, 24), "float16"),
        "label": ((4,), "int32"),
        "context": ((4, 2, 3), "float16"),
    }


def test_every_caption_is_kept_in_half_precision(captioned):
    contexts = captioned[0]().contexts
    assert (contexts.context_shape, contexts.array.dtype) == ((2, 3), np.float16)
    for (first, count), texts in zip(contexts.rows, CAPTIONS):
        assert count == len(texts)
        own = contexts.array[np.arange(first, first + count)]
        np.testing.assert_array_equal(own, half(texts))
    np.testing.assert_array_equal(contexts.null_context, half([""])[0])
    assert (contexts.id, contexts.fingerprint) == ("words", "words-1")


@pytest.mark.parametrize("verify", [True, False])
def test_samples_come_in_the_order_of_the_seed_with_label_and_a_caption_of_their_own(
    captioned, verify
):
    opened, field, values = captioned
    data, own = opened(5, seed=4, verify=verify), [half(texts) for texts in CAPTIONS]
    seen = [set() for _ in COUNTS]
    for data.epoch in range(60):
        order = np.random.default_rng([4, data.epoch]).permutation(10)
        for i in range(2):
            batch, rows = data[i], np.sort(order[5 * i : 5 * i + 5])
            np.testing.assert_array_equal(batch[field], values[rows])
            np.testing.assert_array_equal(batch["label"], LABELS[rows])
            for k, context in zip(rows, batch["context"]):
                (j,) = np.flatnonzero((own[k] == context).all(axis=(1, 2)))
                seen[k].add(int(j))
    # 60 visits miss one of 7 captions with probability 7 (6/7)^60 = 7e-4 an image.
    assert seen == [set(range(count)) for count in COUNTS]


def test_captions_and_labels_may_be_left_out(captioned, tmp_path):
    opened, field, _ = captioned
    assert set(opened(captions=None)[0]) == {field, "label"}
    data = opened(captions=None, labels=None)
    assert (set(data[0]), data.num_classes, data.contexts) == ({field}, None, None)
    write_cache(tmp_path, IMAGES)  # or are not there
    data = read_cache(tmp_path)
    assert (set(data[0]), data.num_classes, data.contexts) == ({"moments"}, None, None)


def test_captions_are_drawn_evenly():
    about = {"id": 0, "fingerprint": 0}
    contexts = Contexts(np.zeros((8, 1, 1)), np.array([[1, 3], [4, 4]]), None, about)
    drawn = np.array([contexts.chosen(0, epoch) for epoch in range(3000)])
    for column, first, count in [(0, 1, 3), (1, 4, 4)]:
        share = np.bincount(drawn[:, column] - first, minlength=count) / 3000
        # Standard deviation sqrt(p (1 - p) / 3000) < 0.009; five of them.
        assert np.abs(share - 1 / count).max() < 0.045


def test_the_draw_depends_on_seed_and_epoch_alone(captioned):
    opened, _, _ = captioned
    one, many = opened(10, seed=3), opened(2, seed=3)
    halves = [opened(4, seed=3, process=(k, 2)) for k in range(2)]
    for data in (one, many, *halves):
        data.epoch = 5
    by_row = dict(zip(one.rows(5, 0), one[0]["context"]))
    for data in (many, *halves):
        for index in range(len(data)):
            for k, context in zip(data.rows(5, index), data[index]["context"]):
                np.testing.assert_array_equal(context, by_row[k])
    other = opened(seed=4)
    assert (other.contexts.chosen(4, 5) != one.contexts.chosen(3, 5)).any()


def test_mirror_images_share_the_captions_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="left and right becomes false"):
        caches.write_captioned(tmp_path, flip=True)
    data = read_cache(tmp_path, 20)
    np.testing.assert_array_equal(data.contexts.rows[::2], data.contexts.rows[1::2])
    assert data.num_samples == 20
    assert len(data.contexts.array) == sum(COUNTS) + 3  # and the empty prompt in each shard


def test_pixels_are_mirrored_at_random_unless_captions_say_left_and_right(tmp_path):
    write_images(CAPTIONED, tmp_path, text_encoder=Words(), shard_size=4, verbose=0)
    opened = functools.partial(read_cache, tmp_path, 10, image_shards)
    assert not opened().flip
    assert opened(flip=True).flip
    data, mirrored = opened(captions=None), 0
    for data.epoch in range(3):
        for image, own in zip(data[0]["image"], IMAGES):
            mirrored += not np.array_equal(image, own)
            assert any(np.array_equal(image, own[:, ::step]) for step in (1, -1))
    assert 0 < mirrored < 30


def test_a_shard_of_which_no_image_could_be_read_is_passed_over(tmp_path):
    values = [0, 1, *[ValueError("cannot be read")] * 4, 6, 7, 8]
    write_cache(
        tmp_path, caches.moments_source(values, num_classes=9), None, shard_size=2, corrupt="skip"
    )
    batch = read_cache(tmp_path, 5)[0]
    assert batch["moments"][:, 0, 0, 0].tolist() == batch["label"].tolist() == [0, 1, 6, 7, 8]


def test_damaged_images_take_their_captions_along(tmp_path):
    whole = sources.arrays(CAPTIONED)

    def read(k):
        if k in (1, 6):
            raise ValueError("broken")
        return whole.read(k)

    caches.write_captioned(tmp_path, dataclasses.replace(whole, read=read), corrupt="skip")
    contexts = read_cache(tmp_path).contexts
    assert contexts.rows[:, 1].tolist() == [*COUNTS[:1], *COUNTS[2:6], *COUNTS[7:]]
    first = contexts.array[contexts.rows[1, 0]]
    np.testing.assert_array_equal(first, half(CAPTIONS[2][:1])[0])


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


def _numbers(moments):
    """The images' numbers, from their moments."""
    # float16 next to 1 has steps of 0.001; neighbouring numbers are 0.08 apart.
    return np.round((np.asarray(moments, "float32")[:, 0, 0, 0] + 1.0) * 12.75).astype(int)


def test_fit_gives_the_model_what_the_cache_says_epoch_by_epoch(tmp_path, monkeypatch):
    # Image k is of one grey level, 10 k, of which its latents tell k again.
    levels = np.repeat(np.arange(22, dtype="uint8") * 10, 16).reshape(-1, 4, 4, 1)
    write_cache(tmp_path, {"image": levels, "label": np.arange(22) % 3}, SpaceToDepth(scale=1.7))
    read, arrived = [], []
    cache, again = (read_cache(tmp_path, seed=2) for _ in range(2))
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


def test_a_model_trains_on_a_captioned_cache(tmp_path):
    caches.write_captioned(tmp_path)
    network = dict(image_shape=(2, 3, 12), patch_size=1)
    model = DiffusionModel(uvit(**network, context_shape=(2, 3)), latent_scale=1.0, num_steps=3)
    model.compile()
    data = read_cache(tmp_path, labels=None)
    losses = model.fit(data, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(numpy(model.null_context), half([""])[0])
    model.set_encoders(text_encoder=Words(), autoencoder=SpaceToDepth(2))
    images = model.generate(prompts=["caption 1 0"], guidance_scale=2.0, verbose=0)
    assert images.shape == (1, 4, 6, 3)
    plain = DiffusionModel(uvit(**network), latent_scale=1.0)
    refused(ValueError, lambda: plain.fit(data, verbose=0), "'context'")


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


def test_each_kind_of_cache_names_its_reader(tmp_path):
    write_cache(tmp_path / "latents")
    read = functools.partial(read_cache, tmp_path / "latents")
    refused(CacheError, lambda: read(reader=image_shards), "holds moments", "data.LatentDataset")
    refused(ValueError, lambda: read(labels="ids"), "labels", "ids")
    refused(ValueError, lambda: read(captions="all"), "captions", "all")
    write_images(IMAGES, tmp_path / "images", verbose=0)
    words = "holds image", "data.image_shards"
    refused(CacheError, lambda: read_cache(tmp_path / "images"), *words)


def test_captions_are_not_read_into_memory():
    words = "write_images", "text_encoder"
    refused(ValueError, lambda: in_memory(sources.arrays(CAPTIONED), 2), *words)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["a"] * 3, ["10 images", "3"]),
        ([["a"], ["b"], [], *["c"] * 7], ["Sample 2 of arrays", "no caption"]),
        (["a", "\ud83d", *["c"] * 8], ["Sample 1 of arrays", "surrogate"]),
    ],
)
def test_captions_attached_to_a_source_are_checked(captions, words):
    plain = sources.arrays(IMAGES)
    single = dataclasses.replace(plain, captions=["abc"] * 10).captions
    assert single == [["abc"]] * 10  # not a caption a letter
    refused(ValueError, lambda: dataclasses.replace(plain, captions=captions), *words)
