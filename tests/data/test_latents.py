"""Reading caches: shards as one array, damage that is named, and training from files."""

import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT, data
from keras_uvit.data import LatentDataset, image_shards, manifest, sources
from keras_uvit.data.latents import ShardedArray
from keras_uvit.data.manifest import CacheError
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once

BACKEND = keras.config.backend()
NUM_SAMPLES, SHARD_SIZE = 22, 5


def _images():
    """Image k is of one grey level, 10 k, of which its latents tell k again."""
    return np.repeat(np.arange(NUM_SAMPLES, dtype="uint8") * 10, 16).reshape(-1, 4, 4, 1)


def _numbers(moments):
    """The images' numbers, from their moments."""
    # float16 next to 1 has steps of 0.001; neighbouring numbers are 0.08 apart.
    return np.round((np.asarray(moments, "float32")[:, 0, 0, 0] + 1.0) * 12.75).astype(int)


def _write(path, **options):
    labelled = {"image": _images(), "label": np.arange(NUM_SAMPLES) % 3}
    options = {"shard_size": SHARD_SIZE, "verbose": 0, **options}
    return data.write_latents(labelled, path, SpaceToDepth(scale=1.7), **options)


def _read(path, batch_size=4, **options):
    return LatentDataset(path, batch_size, **{"verbose": 0, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A cache of five shards, the last of two samples. Not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "cache"
    _write(path)
    return path


@pytest.fixture
def cache(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "cache")


# Shards as one array ------------------------------------------------------------------------------

LENGTHS = [[7], [3, 4], [1, 1, 5], [0, 3, 0, 0, 4, 0], [2, 5, 9, 1, 3]]


def _sharded(lengths, shape=(2, 3), dtype="float16"):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, *shape)).astype(dtype) for n in lengths]
    return ShardedArray(parts), np.concatenate(parts)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_come_from_the_right_shards(lengths):
    sharded, whole = _sharded(lengths)
    rng = np.random.default_rng(1)
    for count in (0, 1, 2, 5, 40):
        rows = rng.integers(0, len(whole), count)  # with repeats, in any order
        for wanted in (rows, np.sort(rows), np.sort(rows)[::-1], rows.tolist()):
            np.testing.assert_array_equal(sharded[wanted], whole[np.asarray(wanted, int)])
    everything = np.arange(len(whole))
    np.testing.assert_array_equal(sharded[everything], whole)
    np.testing.assert_array_equal(sharded[everything[::-1]], whole[::-1])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_single_rows_and_slices_are_those_of_one_array(lengths):
    sharded, whole = _sharded(lengths)
    for k in range(len(whole)):
        np.testing.assert_array_equal(sharded[k], whole[k])
        np.testing.assert_array_equal(sharded[np.int64(k)], whole[k])
    for cut in (
        slice(None),
        slice(2, 5),
        slice(5, 2),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(-3, None),
        slice(4, 1000),
    ):
        np.testing.assert_array_equal(sharded[cut], whole[cut])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_shape_length_and_dtype_are_those_of_one_array(lengths):
    sharded, whole = _sharded(lengths)
    assert (sharded.shape, len(sharded), sharded.dtype) == (whole.shape, len(whole), whole.dtype)
    assert sharded[[0, 1]].dtype == whole.dtype
    assert sharded[[]].shape == (0, 2, 3)


def test_labels_without_further_axes_are_gathered_too():
    sharded, whole = _sharded([3, 0, 4], shape=(), dtype="float32")
    np.testing.assert_array_equal(sharded[[6, 0, 0, 3]], whole[[6, 0, 0, 3]])
    assert sharded[2] == whole[2]


@pytest.mark.parametrize("rows", [7, -1, [0, 7], [-1, 2], [6, 3, 7], np.int64(7)])
def test_rows_that_are_not_there_are_refused(rows):
    sharded, _ = _sharded([3, 4])
    with pytest.raises(IndexError, match=r"Rows are in \[0, 7\)"):
        sharded[rows]


def test_what_was_read_can_be_changed_without_changing_the_array():
    sharded, whole = _sharded([3, 4])
    sharded[[0, 5]][:] = 0
    sharded[:][:] = 0
    np.testing.assert_array_equal(sharded[:], whole)


# A cache ------------------------------------------------------------------------------------------


def test_a_cache_says_what_it_holds(finished):
    cache = _read(finished)
    assert cache.num_samples == NUM_SAMPLES
    assert cache.sample_shape == (2, 2, 8)
    assert cache.image_size == [4, 4]
    assert cache.num_classes == 3
    assert cache.scale == 1.7
    assert cache.autoencoder_id == cache.fingerprint == "space-to-depth-2"
    assert cache.manifest["source_length"] == NUM_SAMPLES
    assert len(cache) == 5


def test_a_batch_has_the_shapes_and_types_that_fit_takes(finished):
    batch = _read(finished)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "moments": ((4, 2, 2, 8), "float16"),
        "label": ((4,), "int32"),
    }


@pytest.mark.parametrize("verify", [True, False])
def test_samples_and_labels_stay_together_in_the_order_of_the_seed(finished, verify):
    cache = _read(finished, seed=4, verify=verify)
    for epoch in (0, 2):
        cache.epoch = epoch
        order = np.random.default_rng([4, epoch]).permutation(NUM_SAMPLES)
        for i in range(len(cache)):
            batch = cache[i]
            numbers = _numbers(batch["moments"])
            assert numbers.tolist() == sorted(order[4 * i : 4 * i + 4])
            np.testing.assert_array_equal(batch["label"], numbers % 3)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_each_batch(finished, count):
    parts = [_read(finished, process=(i, count)) for i in range(count)]
    whole = _read(finished)
    for i in range(len(whole)):
        pieces = np.concatenate([_numbers(part[i]["moments"]) for part in parts])
        assert sorted(pieces) == _numbers(whole[i]["moments"]).tolist()


def test_labels_can_be_left_out(finished):
    cache = _read(finished, labels=None)
    assert sorted(cache[0]) == ["moments"]
    assert cache.num_classes is None
    with pytest.raises(ValueError, match='labels must be "auto" or None.*ids'):
        _read(finished, labels="ids")


def test_a_cache_without_labels_gives_none(tmp_path):
    data.write_latents(_images(), tmp_path, SpaceToDepth(), verbose=0)
    cache = _read(tmp_path)
    assert sorted(cache[0]) == ["moments"]
    assert cache.num_classes is None


def test_a_shard_of_which_no_image_could_be_read_is_passed_over(tmp_path):
    def read(i):
        if 2 <= i < 6:
            raise ValueError(f"{i} cannot be read")
        return {"moments": np.full((1, 1, 2), i, "float32"), "label": i}

    source = sources.Source("some", 9, (1, 1, 2), read, num_classes=9, field="moments")
    data.write_latents(source, tmp_path, None, shard_size=2, corrupt="skip", verbose=0)
    batch = _read(tmp_path, 5)[0]
    assert batch["moments"][:, 0, 0, 0].tolist() == batch["label"].tolist() == [0, 1, 6, 7, 8]


def test_images_are_read_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (11, 4, 6, 3), dtype="uint8"), np.arange(11) % 4
    data.write_images({"image": images, "label": labels}, tmp_path, shard_size=4, verbose=0)
    still = image_shards(tmp_path, 5, flip=False, seed=1, verbose=0)
    moving = image_shards(tmp_path, 5, seed=1, verbose=0)
    assert (still.num_classes, still.num_samples, len(still)) == (4, 11, 2)
    mirrored = 0
    for epoch in range(3):
        still.epoch = moving.epoch = epoch
        order = np.random.default_rng([1, epoch]).permutation(11)
        for i in range(2):
            rows = np.sort(order[5 * i : 5 * i + 5])
            np.testing.assert_array_equal(still[i]["image"], images[rows])
            np.testing.assert_array_equal(still[i]["label"], labels[rows])
            for image, row in zip(moving[i]["image"], rows):
                mirrored += not np.array_equal(image, images[row])
                assert any(np.array_equal(image, images[row][:, ::s]) for s in (1, -1))
    assert 0 < mirrored < 30
    assert image_shards(tmp_path, 5, labels=None, verbose=0).labels is None


def test_reading_a_cache_needs_neither_tensorflow_nor_tensorflow_datasets(finished, alone):
    code = f"""
import sys
sys.modules["tensorflow_datasets"] = None  # as if it were not installed
from keras_uvit.data import LatentDataset
cache = LatentDataset({os.fspath(finished)!r}, 4, verbose=0)
cache.on_epoch_begin()
print(sum(len(cache[i]["label"]) for i in range(len(cache))))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=alone,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["20"]


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


@pytest.fixture(scope="module")
def trained(finished):
    """Three epochs: losses, what was read, what arrived at the model, the model and its cache."""
    read, arrived = [], []
    cache = _read(finished, seed=2)
    network = UViT((2, 2, 4), patch_size=1, hidden_dim=8, num_layers=1, num_heads=1, num_classes=3)
    model = Spy(network, latent_scale=1.7)
    model.compile()

    def keep(batch, logs):
        levels = np.array([logs[f"level_{k}"] for k in range(4)]).reshape(4, 1, 1, 1)
        arrived.append((_numbers(levels).tolist(), [int(logs[f"label_{k}"]) for k in range(4)]))

    get = LatentDataset.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LatentDataset,
            "__getitem__",
            lambda self, i: read.append((self.epoch, i)) or get(self, i),
        )
        history = model.fit(
            cache,
            epochs=3,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=keep)],
        )
    return history.history["loss"], read, arrived, model, cache


def test_a_model_trains_on_a_cache(trained):
    losses, _, _, model, _ = trained
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert int(ops.convert_to_numpy(model.skipped_steps)) == 0
    assert model.latent_encoder == "space-to-depth-2"


def test_fit_takes_the_epochs_one_by_one_each_in_its_own_order(trained):
    _, read, _, _, _ = trained
    # Before training, the first batches are read once or twice more, to look at their shapes.
    ahead = len(read) - 15
    assert 0 <= ahead <= 3
    assert set(read[:ahead]) <= {(0, 0), (0, 1)}
    assert read[ahead:] == [(epoch, i) for epoch in range(3) for i in range(5)]


def test_the_model_gets_what_the_cache_says(trained, finished):
    _, _, arrived, _, _ = trained
    expected, again = [], _read(finished, seed=2)
    for epoch in range(3):
        again.epoch = epoch
        for i in range(5):
            numbers = again.rows(epoch, i).tolist()
            assert _numbers(again[i]["moments"]).tolist() == numbers
            expected.append((numbers, [n % 3 for n in numbers]))
    assert arrived == expected


def test_evaluating_twice_gives_the_same_loss(trained):
    _, _, _, model, cache = trained
    losses = [model.evaluate(cache, verbose=0, return_dict=True)["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


# What is not there, or not finished ---------------------------------------------------------------


@pytest.mark.parametrize("read", [_read, lambda path: image_shards(path, 4, verbose=0)])
def test_what_is_not_there_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="No folder at .*nowhere.*encode"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"No cache in {tmp_path}"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="No folder at .*file"):
        read(tmp_path / "file")


def test_an_unfinished_cache_says_how_many_shards_are_done(tmp_path):
    assert _write(tmp_path, process=(1, 2)) is None
    with pytest.raises(CacheError, match="unfinished: 2 of 5 shards.*again; it resumes there"):
        _read(tmp_path)
    assert _write(tmp_path, process=(0, 3)) is None  # the first and the fourth, which is there
    with pytest.raises(CacheError, match="unfinished: 3 of 5 shards"):
        _read(tmp_path)


def test_each_kind_of_cache_names_its_reader(finished, tmp_path):
    with pytest.raises(CacheError, match=r"holds moments: read it with `data\.LatentDataset`"):
        image_shards(finished, 4, verbose=0)
    data.write_images(_images(), tmp_path, verbose=0)
    with pytest.raises(CacheError, match=r"holds image: read it with `data\.image_shards`"):
        _read(tmp_path)


def test_a_later_version_asks_for_a_later_package(cache):
    _change(cache / "manifest.json", version=manifest.VERSION + 1, keras_uvit="9.8.7")
    with pytest.raises(CacheError, match=r"version 2, made by keras_uvit 9\.8\.7.*Upgrade"):
        _read(cache)


def test_a_later_version_may_say_other_things(cache):
    content = json.loads((cache / "manifest.json").read_text())
    del content["flip"]
    content |= {"version": 2, "keras_uvit": "9.8.7", "mirrored": True}
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CacheError, match=r"version 2, made by keras_uvit 9\.8\.7.*Upgrade"):
        _read(cache)


def test_a_manifest_of_something_else_is_refused(cache):
    (cache / "manifest.json").write_text('{"name": "my web page", "version": 3}')
    with pytest.raises(CacheError, match="is no manifest of a keras_uvit cache"):
        _read(cache)


# Damage -------------------------------------------------------------------------------------------


def _change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["00000-moments.npy", "00002-label.npy", "00004-moments.npy"])
def test_one_flipped_bit_anywhere_is_found_and_named(cache, name):
    bits = 8 * (cache / name).stat().st_size
    for bit in [0, bits - 1, *np.random.default_rng(0).integers(0, bits, 60)]:
        _flip_bit(cache / name, int(bit))
        with pytest.raises(CacheError, match=f"{name} is damaged: its checksum.*just that shard"):
            _read(cache)
        _flip_bit(cache / name, int(bit))
    _read(cache)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["00001-moments.npy", "00003-label.npy"])
@pytest.mark.parametrize("left", [0, 1, 7, 64, 128, 129, -1])
def test_a_truncated_file_is_named(cache, name, left, verify):
    content = (cache / name).read_bytes()
    (cache / name).write_bytes(content[:left])
    with pytest.raises(CacheError, match=f"{name} is (truncated or )?damaged.*just that shard"):
        _read(cache, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["00001-moments.npy", "00003-label.npy"])
def test_a_missing_file_is_named(cache, name, verify):
    (cache / name).unlink()
    with pytest.raises(CacheError, match=f"{name} is missing.*just that shard"):
        _read(cache, verify=verify)


@pytest.mark.parametrize(
    ("array", "there"),
    [
        (np.zeros((5, 2, 2, 6), "float16"), r"float16 \(5, 2, 2, 6\)"),
        (np.zeros((4, 2, 2, 8), "float16"), r"float16 \(4, 2, 2, 8\)"),
        (np.zeros((5, 2, 2, 8), "float32"), r"float32 \(5, 2, 2, 8\)"),
        (np.zeros((5, 2, 2, 8), ">f2"), r">f2 \(5, 2, 2, 8\)"),
    ],
)
def test_another_array_in_place_of_a_shard_is_seen_without_checksums(cache, array, there):
    np.save(cache / "00001-moments.npy", array)
    with pytest.raises(CacheError, match=rf"00001-moments.npy holds {there}; the manifest says"):
        _read(cache, verify=False)


def test_a_pickle_in_place_of_a_shard_is_not_opened(cache):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (os.fspath(cache / "sprung"),)

    array = np.empty(5, object)
    array[:] = Trap()
    np.save(cache / "00001-moments.npy", array, allow_pickle=True)
    with pytest.raises(CacheError, match="00001-moments.npy is truncated or damaged"):
        _read(cache, verify=False)
    assert not (cache / "sprung").exists()


def test_a_flipped_bit_in_a_header_is_an_error_or_does_no_harm_without_checksums(cache):
    name = "00001-moments.npy"
    expected = np.load(cache / name)
    for bit in range(8 * 128):
        _flip_bit(cache / name, bit)
        try:
            rows = _read(cache, verify=False).arrays["moments"][SHARD_SIZE : 2 * SHARD_SIZE]
        except CacheError:
            rows = expected
        np.testing.assert_array_equal(rows, expected)
        _flip_bit(cache / name, bit)


def test_without_checksums_only_sizes_are_looked_at(cache):
    _flip_bit(cache / "00001-label.npy", 8 * 128)
    _read(cache, verify=False)
    with pytest.raises(CacheError, match="00001-label.npy"):
        _read(cache)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null"])
def test_a_damaged_manifest_is_named_and_made_again(cache, finished, content):
    (cache / "manifest.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"manifest\.json is damaged.*Delete it and run the same"):
        _read(cache)
    (cache / "manifest.json").unlink()
    _write(cache)
    assert (cache / "manifest.json").read_bytes() == (finished / "manifest.json").read_bytes()


@pytest.mark.parametrize("key", ["version", "field", "shape", "num_classes", "shards"])
def test_a_manifest_that_lacks_a_key_is_damaged(cache, key):
    content = json.loads((cache / "manifest.json").read_text())
    del content[key]
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CacheError, match=r"manifest\.json"):
        _read(cache)


def test_a_finished_cache_needs_no_plan_and_no_records(cache):
    for path in (cache / "plan.json", *cache.glob("0000?.json")):
        path.unlink()
    assert _numbers(_read(cache).arrays["moments"][:]).tolist() == list(range(NUM_SAMPLES))
