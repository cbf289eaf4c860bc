"""Captions in caches: all are kept, one is drawn at each visit, the empty prompt goes with them."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import ops
from words import Words

from keras_uvit import DiffusionModel, UViT
from keras_uvit.data import LatentDataset, image_shards, shapes, sources, writing
from keras_uvit.data.contexts import Contexts
from keras_uvit.data.images import in_memory
from keras_uvit.data.manifest import CacheError, read_manifest
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once

COUNTS = [1, 5, 2, 7, 3, 1, 4, 6, 2, 5, 3]
ALL = len(COUNTS)
CAPTIONS = [[f"caption {k} {j}" for j in range(count)] for k, count in enumerate(COUNTS)]
IMAGES = np.random.default_rng(0).integers(0, 256, (len(COUNTS), 4, 6, 3), "uint8")
DATA = {"image": IMAGES, "captions": CAPTIONS, "label": np.arange(len(COUNTS)) % 3}


def cache(path, source=DATA, words=None, autoencoder=None, **options):
    options = {"shard_size": 4, "verbose": 0, "batch_size": 3, **options}
    words, autoencoder = words or Words(), autoencoder or SpaceToDepth(2)
    writing.write_latents(source, path, autoencoder, text_encoder=words, **options)
    return path


def pixels(path, **options):
    writing.write_images(
        sources.arrays(DATA),
        path,
        text_encoder=Words(),
        **{"shard_size": 4, "verbose": 0} | options,
    )
    return path


def opened(path, reader=LatentDataset, batch_size=ALL, **options):
    return reader(path, batch_size, verbose=0, **options)


def test_every_caption_is_kept_in_half_precision(tmp_path):
    data = opened(cache(tmp_path))
    contexts, words = data.contexts, Words()
    assert contexts.context_shape == (2, 3)
    assert contexts.array.dtype == np.float16
    for (first, count), texts in zip(contexts.rows, CAPTIONS):
        assert count == len(texts)
        np.testing.assert_array_equal(
            contexts.array[np.arange(first, first + count)], words(texts).astype("float16")
        )
    np.testing.assert_array_equal(contexts.null_context, words([""])[0].astype("float16"))
    assert (contexts.id, contexts.fingerprint) == ("words", "words-1")
    about = read_manifest(tmp_path)["text"]
    assert len(about.pop("captions")) == 16
    assert about == {
        "id": "words",
        "fingerprint": "words-1",
        "clean": False,
        "shape": [2, 3],
        "dtype": "float16",
    }


@pytest.mark.parametrize("reader", [LatentDataset, image_shards])
def test_each_batch_has_a_caption_of_its_own_image(tmp_path, reader):
    made = cache(tmp_path) if reader is LatentDataset else pixels(tmp_path)
    data, words = opened(made, reader), Words()
    seen = [set() for _ in COUNTS]
    for epoch in range(60):
        data.epoch = epoch
        rows, batch = data.rows(epoch, 0), data[0]
        assert set(batch) == {"moments" if reader is LatentDataset else "image", "label", "context"}
        for k, context in zip(rows, batch["context"]):
            own = words(CAPTIONS[k]).astype("float16")
            (j,) = np.flatnonzero((own == context).all(axis=(1, 2)))
            seen[k].add(int(j))
    # 60 visits miss one of 7 captions with probability 7 (6/7)^60 = 7e-4 an image.
    assert seen == [set(range(count)) for count in COUNTS]


def test_captions_are_drawn_evenly():
    contexts = Contexts(
        np.zeros((8, 1, 1)), np.array([[1, 3], [4, 4]]), None, {"id": 0, "fingerprint": 0}
    )
    drawn = np.array([contexts.chosen(0, epoch) for epoch in range(3000)])
    for column, first, count in [(0, 1, 3), (1, 4, 4)]:
        share = np.bincount(drawn[:, column] - first, minlength=count) / 3000
        # Standard deviation sqrt(p (1 - p) / 3000) < 0.009; five of them.
        assert np.abs(share - 1 / count).max() < 0.045


def test_the_draw_depends_on_seed_and_epoch_alone(tmp_path):
    cache(tmp_path)
    one, many = opened(tmp_path, seed=3), opened(tmp_path, seed=3, batch_size=2)
    one.epoch = many.epoch = 5
    by_row = dict(zip(one.rows(5, 0), one[0]["context"]))
    for index in range(len(many)):
        for k, context in zip(many.rows(5, index), many[index]["context"]):
            np.testing.assert_array_equal(context, by_row[k])
    other = opened(tmp_path, seed=4)
    assert (other.contexts.chosen(4, 5) != one.contexts.chosen(3, 5)).any()


def test_two_processes_see_what_one_does(tmp_path):
    cache(tmp_path)
    whole = opened(tmp_path, batch_size=4)
    halves = [opened(tmp_path, batch_size=4, process=(k, 2)) for k in range(2)]
    for index in range(len(whole)):
        together = {tuple(c.ravel()) for c in whole[index]["context"]}
        parts = {tuple(c.ravel()) for half in halves for c in half[index]["context"]}
        assert parts == together


def test_captions_may_be_left_out(tmp_path):
    data = opened(cache(tmp_path), captions=None)
    assert data.contexts is None
    assert set(data[0]) == {"moments", "label"}


def test_mirror_images_share_the_captions_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="left and right becomes false"):
        cache(tmp_path, flip=True)
    data = opened(tmp_path, batch_size=2 * len(COUNTS))
    np.testing.assert_array_equal(data.contexts.rows[::2], data.contexts.rows[1::2])
    assert data.num_samples == 2 * len(COUNTS)
    assert len(data.contexts.array) == sum(COUNTS) + 3  # and the empty prompt in each shard


def test_captioned_pixels_are_not_mirrored_unless_told(tmp_path):
    pixels(tmp_path)
    assert not opened(tmp_path, image_shards).flip
    assert opened(tmp_path, image_shards, captions=None).flip
    assert opened(tmp_path, image_shards, flip=True).flip


def test_an_interrupted_cache_is_the_same_to_the_bit(tmp_path):
    cache(tmp_path / "whole")

    class Dies(Words):
        def encode(self, tokens, *options):
            if self.encoded > 20:
                raise KeyboardInterrupt
            return super().encode(tokens, *options)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "cut", words=Dies())
    with pytest.raises(CacheError, match="unfinished"):
        opened(tmp_path / "cut")
    cache(tmp_path / "cut")
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "cut").iterdir())
    for name in names:
        same = (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
        assert same, name


def test_another_text_encoder_is_another_cache(tmp_path):
    cache(tmp_path)
    with pytest.raises(CacheError, match="made in another way: text was"):
        cache(tmp_path, words=Words(fingerprint="other"))


def test_other_captions_are_another_cache(tmp_path):
    cache(tmp_path)
    edited = [list(own) for own in CAPTIONS]
    edited[3][2] = "a better caption"
    with pytest.raises(CacheError, match="made in another way: text was"):
        cache(tmp_path, {**DATA, "captions": edited})


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: about.update(text={}),
        lambda about: about.update(text=[1]),
        lambda about: about.update(text="words"),
        lambda about: about["text"].pop("id"),
        lambda about: about["text"].update(dtype="nonsense"),
        lambda about: about["text"].update(shape=None),
        lambda about: about["shards"][1]["files"].pop("context"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, damage):
    file = cache(tmp_path) / "manifest.json"
    about = json.loads(file.read_text())
    damage(about)
    file.write_text(json.dumps(about))
    with pytest.raises(CacheError, match="manifest.json is damaged"):
        opened(tmp_path, verify=False)


@pytest.mark.parametrize("name", ["context", "captions"])
def test_damage_is_named_and_mended(tmp_path, name):
    cache(tmp_path)
    file = tmp_path / f"00001-{name}.npy"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(CacheError, match=file.name):
        opened(tmp_path)
    cache(tmp_path)
    assert file.read_bytes() == before
    file.unlink()
    with pytest.raises(CacheError, match=file.name):
        opened(tmp_path, verify=False)


def test_rows_beyond_the_shard_are_refused_even_without_checksums(tmp_path):
    cache(tmp_path)
    file = tmp_path / "00001-captions.npy"
    rows = np.load(file)
    rows[0, 1] = 1000
    np.save(file, rows)
    with pytest.raises(CacheError, match="a caption is beyond its shard"):
        opened(tmp_path, verify=False)


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_take_their_captions_along(tmp_path):
    whole = sources.arrays(DATA)

    def read(k):
        if k in (1, 6):
            raise ValueError("broken")
        return whole.read(k)

    cache(tmp_path, dataclasses.replace(whole, read=read), corrupt="skip")
    data = opened(tmp_path, batch_size=len(COUNTS) - 2)
    left = [count for k, count in enumerate(COUNTS) if k not in (1, 6)]
    assert list(data.contexts.rows[:, 1]) == left
    first = data.contexts.rows[1, 0]
    np.testing.assert_array_equal(
        data.contexts.array[first], Words()(CAPTIONS[2][:1])[0].astype("float16")
    )


def test_captions_and_encoder_come_together(tmp_path):
    with pytest.raises(ValueError, match="has captions: pass text_encoder"):
        writing.write_latents(DATA, tmp_path, SpaceToDepth(2), verbose=0)
    with pytest.raises(ValueError, match="this source has none"):
        cache(tmp_path, IMAGES)
    plain = dataclasses.replace(sources.arrays(DATA), captions=None)
    writing.write_latents(plain, tmp_path, SpaceToDepth(2), verbose=0)
    with pytest.raises(ValueError, match="write_images.*text_encoder"):
        in_memory(sources.arrays(DATA), 2)


def test_captions_attached_to_a_source_are_checked(tmp_path):
    plain = dataclasses.replace(sources.arrays(DATA), captions=None)
    names = [f"caption {k}" for k in range(ALL)]
    cache(tmp_path, dataclasses.replace(plain, captions=names))
    assert (opened(tmp_path).contexts.rows[:, 1] == 1).all()  # not a caption a letter
    with pytest.raises(ValueError, match="11 images need as many captions. Received: 3"):
        dataclasses.replace(plain, captions=names[:3])
    with pytest.raises(ValueError, match="Sample 2 of arrays has no caption"):
        dataclasses.replace(plain, captions=[["a"], ["b"], [], *names[3:]])
    with pytest.raises(ValueError, match="Sample 1 of arrays: half of a surrogate pair"):
        dataclasses.replace(plain, captions=["a", "\ud83d", *names[2:]])


def test_a_name_is_no_text_encoder(tmp_path):
    with pytest.raises(TypeError, match="such as encoders.CLIPText"):
        cache(tmp_path, words="clip_vit_large_patch14")


def test_contexts_that_half_precision_cannot_hold_name_the_image(tmp_path):
    class Loud(Words):
        def encode(self, tokens, *options):
            values = super().encode(tokens, *options)
            bad = tokens[:, 0] == self.tokenize("caption 4 1")[0, 0]
            values[bad] *= 1e6
            return values

    with pytest.raises(ValueError, match="Sample 4 of arrays is encoded to values"):
        cache(tmp_path, words=Loud())


def test_the_size_on_disk_is_said_first(tmp_path, capsys):
    cache(tmp_path, verbose=1)
    said = capsys.readouterr().out
    assert "GB float16 moments" in said
    assert f"GB float16 contexts of {sum(COUNTS)} captions" in said


def test_a_full_disk_counts_the_contexts(tmp_path, monkeypatch):
    moments = len(COUNTS) * 2 * 3 * 24 * 2
    contexts = (sum(COUNTS) + 3) * 6 * 2

    def free(size):
        usage = type("Usage", (), {"free": size})
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)

    free(moments + contexts - 1)
    with pytest.raises(OSError, match="Nothing was encoded"):
        cache(tmp_path)
    free(moments + contexts)
    cache(tmp_path)


def test_a_model_trains_on_a_captioned_cache(tmp_path):
    data = opened(cache(tmp_path / "cache"), batch_size=4, labels=None)
    network = UViT(
        (2, 3, 12), patch_size=1, hidden_dim=16, num_layers=1, num_heads=2, context_shape=(2, 3)
    )
    model = DiffusionModel(network, latent_scale=1.0, num_steps=3)
    model.compile()
    history = model.fit(data, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    np.testing.assert_array_equal(
        ops.convert_to_numpy(model.null_context), Words()("")[0].astype("float16")
    )
    model.set_encoders(text_encoder=Words(), autoencoder=SpaceToDepth(2))
    images = model.generate(prompts=["caption 1 0"], guidance_scale=2.0, verbose=0)
    assert images.shape == (1, 4, 6, 3)
    plain = DiffusionModel(
        UViT((2, 3, 12), patch_size=1, hidden_dim=16, num_layers=1, num_heads=2), latent_scale=1.0
    )
    with pytest.raises(ValueError, match="'context'"):
        plain.fit(data, verbose=0)


def test_shapes_through_the_cache(tmp_path):
    source = shapes.source(6)
    writing.write_images(source, tmp_path, text_encoder=Words(), verbose=0)
    data = opened(tmp_path, image_shards, batch_size=6)
    batch = data[0]
    for k, image, context in zip(data.rows(0, 0), batch["image"], batch["context"]):
        assert shapes.read_back(image) in [shapes.parse(text) for text in source.captions[k]]
        own = Words()(source.captions[k]).astype("float16")
        assert (own == context).all(axis=(1, 2)).any()
    assert isinstance(data, keras.utils.PyDataset)
