"""Captions in caches: all are kept, one is drawn at each visit, the empty prompt goes with them."""

import dataclasses

import caches
import numpy as np
import pytest
from caches import CAPTIONED, CAPTIONS, COUNTS, read_cache, write_cache, write_captioned
from tiny import numpy, refused, uvit
from words import Words

from keras_uvit import DiffusionModel
from keras_uvit.data import LatentDataset, image_shards, sources, write_images
from keras_uvit.data.contexts import Contexts
from keras_uvit.data.images import in_memory
from keras_uvit.data.manifest import read_manifest
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once

EACH = np.array(COUNTS)


def half(captions):
    return Words()(captions).astype("float16")


def write_pixels(path):
    options = dict(text_encoder=Words(), shard_size=4, verbose=0)
    write_images(sources.arrays(CAPTIONED), path, **options)


def test_every_caption_is_kept_in_half_precision(tmp_path):
    write_captioned(tmp_path)
    contexts = read_cache(tmp_path).contexts
    assert (contexts.context_shape, contexts.array.dtype) == ((2, 3), np.float16)
    for (first, count), texts in zip(contexts.rows, CAPTIONS):
        assert count == len(texts)
        own = contexts.array[np.arange(first, first + count)]
        np.testing.assert_array_equal(own, half(texts))
    np.testing.assert_array_equal(contexts.null_context, half([""])[0])
    assert (contexts.id, contexts.fingerprint) == ("words", "words-1")
    about = read_manifest(tmp_path)["text"]
    assert len(about.pop("captions")) == 16
    encoder = {"id": "words", "fingerprint": "words-1", "clean": False}
    assert about == {**encoder, "shape": [2, 3], "dtype": "float16"}


@pytest.mark.parametrize(
    ("write", "reader", "field"),
    [(write_captioned, LatentDataset, "moments"), (write_pixels, image_shards, "image")],
)
def test_each_batch_has_a_caption_of_its_own_image(tmp_path, write, reader, field):
    write(tmp_path)
    data = read_cache(tmp_path, 10, reader)
    own = [half(texts) for texts in CAPTIONS]
    seen = [set() for _ in COUNTS]
    for epoch in range(60):
        data.epoch = epoch
        rows, batch = data.rows(epoch, 0), data[0]
        assert set(batch) == {field, "label", "context"}
        for k, context in zip(rows, batch["context"]):
            (j,) = np.flatnonzero((own[k] == context).all(axis=(1, 2)))
            seen[k].add(int(j))
    # 60 visits miss one of 7 captions with probability 7 (6/7)^60 = 7e-4 an image.
    assert seen == [set(range(count)) for count in COUNTS]
    plain = read_cache(tmp_path, 10, reader, captions=None)
    assert plain.contexts is None
    assert set(plain[0]) == {field, "label"}


def test_captions_are_drawn_evenly():
    about = {"id": 0, "fingerprint": 0}
    contexts = Contexts(np.zeros((8, 1, 1)), np.array([[1, 3], [4, 4]]), None, about)
    drawn = np.array([contexts.chosen(0, epoch) for epoch in range(3000)])
    for column, first, count in [(0, 1, 3), (1, 4, 4)]:
        share = np.bincount(drawn[:, column] - first, minlength=count) / 3000
        # Standard deviation sqrt(p (1 - p) / 3000) < 0.009; five of them.
        assert np.abs(share - 1 / count).max() < 0.045


def test_the_draw_depends_on_seed_and_epoch_alone(tmp_path):
    write_captioned(tmp_path)
    one, many = read_cache(tmp_path, 10, seed=3), read_cache(tmp_path, 2, seed=3)
    halves = [read_cache(tmp_path, 4, seed=3, process=(k, 2)) for k in range(2)]
    for data in (one, many, *halves):
        data.epoch = 5
    by_row = dict(zip(one.rows(5, 0), one[0]["context"]))
    for data in (many, *halves):
        for index in range(len(data)):
            for k, context in zip(data.rows(5, index), data[index]["context"]):
                np.testing.assert_array_equal(context, by_row[k])
    other = read_cache(tmp_path, seed=4)
    assert (other.contexts.chosen(4, 5) != one.contexts.chosen(3, 5)).any()


def test_mirror_images_share_the_captions_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="left and right becomes false"):
        write_captioned(tmp_path, flip=True)
    data = read_cache(tmp_path, 20)
    np.testing.assert_array_equal(data.contexts.rows[::2], data.contexts.rows[1::2])
    assert data.num_samples == 20
    assert len(data.contexts.array) == sum(COUNTS) + 3  # and the empty prompt in each shard


def test_captioned_pixels_are_not_mirrored_unless_told(tmp_path):
    write_pixels(tmp_path)
    assert not read_cache(tmp_path, 4, image_shards).flip
    assert read_cache(tmp_path, 4, image_shards, captions=None).flip
    assert read_cache(tmp_path, 4, image_shards, flip=True).flip


def test_damaged_images_take_their_captions_along(tmp_path):
    whole = sources.arrays(CAPTIONED)

    def read(k):
        if k in (1, 6):
            raise ValueError("broken")
        return whole.read(k)

    write_captioned(tmp_path, dataclasses.replace(whole, read=read), corrupt="skip")
    contexts = read_cache(tmp_path).contexts
    assert contexts.rows[:, 1].tolist() == [*EACH[:1], *EACH[2:6], *EACH[7:]]
    first = contexts.array[contexts.rows[1, 0]]
    np.testing.assert_array_equal(first, half(CAPTIONS[2][:1])[0])


def test_a_model_trains_on_a_captioned_cache(tmp_path):
    write_captioned(tmp_path)
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


class Loud(Words):
    """Encodes a caption of image 4 to values that half precision cannot hold."""

    def encode(self, tokens, *options):
        values = super().encode(tokens, *options)
        values[tokens[:, 0] == self.tokenize("caption 4 1")[0, 0]] *= 1e6
        return values


@pytest.mark.parametrize(
    ("source", "encoder", "error", "words"),
    [
        (CAPTIONED, None, ValueError, ["has captions", "text_encoder"]),
        (caches.LABELLED, Words(), ValueError, ["text_encoder", "this source has none"]),
        (CAPTIONED, "clip_vit_large_patch14", TypeError, ["encoders.CLIPText", "clip_vit"]),
        (CAPTIONED, Loud(), ValueError, ["Sample 4 of arrays", "float16"]),
    ],
)
def test_captions_and_encoders_that_do_not_fit_are_refused(tmp_path, source, encoder, error, words):
    refused(error, lambda: write_cache(tmp_path, source, text_encoder=encoder), *words)


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
    plain = sources.arrays(caches.IMAGES)
    single = dataclasses.replace(plain, captions=["abc"] * 10).captions
    assert single == [["abc"]] * 10  # not a caption a letter
    refused(ValueError, lambda: dataclasses.replace(plain, captions=captions), *words)
