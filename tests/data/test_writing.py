"""Making caches: the same bytes whoever makes them, whatever stops them, and on a full disk."""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import keras_uvit
from keras_uvit import data
from keras_uvit.data import LatentDataset, manifest, sources, writing
from keras_uvit.data.manifest import CacheError
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once

BACKEND = keras.config.backend()
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype="uint8")
LABELS = np.array([3, 0, 1, 2, 2, 1, 0, 3, 3, 1])
LABELLED = {"image": IMAGES, "label": LABELS}


class Counting(SpaceToDepth):
    """Counts the images that it was asked to encode."""

    def __init__(self, **options):
        super().__init__(**options)
        self.count = 0

    def encode(self, images, batch_size=None, verbose=0):
        self.count += len(images)
        return super().encode(images)


def _write(path, source=None, autoencoder=None, **options):
    """Ten images in three shards, the last of two."""
    source = LABELLED if source is None else source
    autoencoder = SpaceToDepth() if autoencoder is None else autoencoder
    options = {"shard_size": 4, "batch_size": 3, "verbose": 0, **options}
    return data.write_latents(source, path, autoencoder, **options)


def _moments_source(values, **options):
    """A source of moments `(1, 1, 2)` of these values; an Exception is raised instead."""

    def read(i):
        if isinstance(values[i], Exception):
            raise values[i]
        return {"moments": np.full((1, 1, 2), values[i], "float32")}

    return sources.Source("some", len(values), (1, 1, 2), read, field="moments", **options)


def _write_moments(path, values, **options):
    options = {"shard_size": 4, "batch_size": 3, "verbose": 0, **options}
    return data.write_latents(_moments_source(values), path, None, **options)


def _content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _stored(folder, field="moments"):
    return np.concatenate([np.load(path) for path in sorted(Path(folder).glob(f"*-{field}.npy"))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is in a finished cache, by name of file."""
    path = tmp_path_factory.mktemp("whole")
    _write(path)
    return _content(path)


# Content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("shard_size", "batch_size"), [(4, 3), (10, 16), (1, 1), (100, 4), (3, 2)])
def test_the_cache_is_the_encoded_images_in_their_order(tmp_path, dtype, shard_size, batch_size):
    content = _write(tmp_path, dtype=dtype, shard_size=shard_size, batch_size=batch_size)
    stored = _stored(tmp_path)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, SpaceToDepth().encode(IMAGES).astype(dtype))
    np.testing.assert_array_equal(_stored(tmp_path, "label"), LABELS)
    assert content["count"] == 10
    assert len(content["shards"]) == content["num_shards"] == math.ceil(10 / shard_size)
    assert LatentDataset(tmp_path, 10, verbose=0).num_samples == 10


@pytest.mark.parametrize(("shard_size", "batch_size"), [(4, 3), (10, 16), (1, 1)])
def test_flip_stores_each_mirror_image_after_its_image(tmp_path, shard_size, batch_size):
    content = _write(tmp_path, flip=True, shard_size=shard_size, batch_size=batch_size)
    stored, encode = _stored(tmp_path), SpaceToDepth().encode
    np.testing.assert_array_equal(stored[::2], encode(IMAGES).astype("float16"))
    np.testing.assert_array_equal(stored[1::2], encode(IMAGES[:, :, ::-1]).astype("float16"))
    np.testing.assert_array_equal(_stored(tmp_path, "label"), np.repeat(LABELS, 2))
    assert (content["count"], content["flip"]) == (20, "stored")
    cache = LatentDataset(tmp_path, 20, verbose=0)
    np.testing.assert_array_equal(cache[0]["moments"], stored)
    np.testing.assert_array_equal(cache[0]["label"], np.repeat(LABELS, 2))


def test_the_encoder_gets_whole_batches_of_images(tmp_path):
    sizes = []

    class Noting(SpaceToDepth):
        def encode(self, images, batch_size=None, verbose=0):
            assert images.dtype == np.uint8
            sizes.append((len(images), batch_size))
            return super().encode(images)

    _write(tmp_path, autoencoder=Noting(), shard_size=8)
    assert sizes == [(3, 3), (3, 3), (2, 3), (2, 3)]


def test_the_manifest_says_how_the_cache_was_made(tmp_path):
    content = _write(tmp_path, autoencoder=SpaceToDepth(scale=0.3))
    assert content == json.loads((tmp_path / "manifest.json").read_text())
    assert content["autoencoder"] == {
        "id": "space-to-depth-2",
        "fingerprint": "space-to-depth-2",
        "scale": 0.3,
    }
    wanted = {
        "source": "arrays",
        "source_length": 10,
        "field": "moments",
        "shape": [2, 3, 24],
        "dtype": "float16",
        "image_size": [4, 6],
        "num_classes": 4,
        "flip": "none",
        "shard_size": 4,
    }
    assert {key: content[key] for key in wanted} == wanted
    assert [shard["count"] for shard in content["shards"]] == [4, 4, 2]
    assert [shard["skipped"] for shard in content["shards"]] == [[], [], []]


def test_moments_are_stored_as_they_are_with_the_autoencoder_that_made_them(tmp_path):
    _write_moments(tmp_path / "unknown", range(10))
    cache = LatentDataset(tmp_path / "unknown", 10, verbose=0)
    assert cache[0]["moments"][:, 0, 0, 0].tolist() == list(range(10))
    about = (cache.scale, cache.fingerprint, cache.autoencoder_id, cache.image_size)
    assert about == (None, None, None, None)
    data.write_latents(_moments_source(range(10)), tmp_path / "known", SpaceToDepth(8), verbose=0)
    cache = LatentDataset(tmp_path / "known", 10, verbose=0)
    assert (cache.scale, cache.fingerprint, cache.image_size) == (1.0, "space-to-depth-8", [8, 8])


def test_class_names_and_labels_of_a_folder_are_kept(tmp_path):
    for k, name in enumerate(["bee", "ant", "bee"]):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[k]).save(tmp_path / "photos" / name / f"{k}.png")
    source = sources.folder(tmp_path / "photos", (4, 6))
    content = _write(tmp_path / "cache", source)
    assert (content["source"], content["class_names"]) == ("folder:photos", ["ant", "bee"])
    assert _stored(tmp_path / "cache", "label").tolist() == [0, 1, 1]
    expected = SpaceToDepth().encode(IMAGES[[1, 0, 2]]).astype("float16")
    np.testing.assert_array_equal(_stored(tmp_path / "cache"), expected)


def test_images_are_stored_as_they_are(tmp_path):
    content = data.write_images(LABELLED, tmp_path, shard_size=4, verbose=0)
    np.testing.assert_array_equal(_stored(tmp_path, "image"), IMAGES)
    np.testing.assert_array_equal(_stored(tmp_path, "label"), LABELS)
    assert (content["field"], content["dtype"], content["shape"]) == ("image", "uint8", [4, 6, 3])


# Several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_processes_make_the_cache_of_one_and_the_last_finishes_it(tmp_path, whole, order):
    for k, index in enumerate(order):
        made = _write(tmp_path, process=(index, 3))
        assert (made is None) == (k < 2)
        assert (tmp_path / "manifest.json").exists() == (k == 2)
    assert _content(tmp_path) == whole


def test_each_process_encodes_its_own_shards_only(tmp_path):
    counts = []
    for index in range(4):  # one more than there are shards
        autoencoder = Counting()
        last = _write(tmp_path, autoencoder=autoencoder, process=(index, 4))
        counts.append(autoencoder.count)
    assert counts == [4, 4, 2, 0]
    assert last["count"] == 10


def test_one_process_goes_on_where_several_left_off(tmp_path, whole):
    _write(tmp_path, process=(1, 2))
    autoencoder = Counting()
    _write(tmp_path, autoencoder=autoencoder)
    assert autoencoder.count == 6
    assert _content(tmp_path) == whole


def test_processes_that_finish_at_the_same_time_do_not_disturb_each_other(
    tmp_path, whole, monkeypatch
):
    replace = os.replace

    def other_process_first(beside, path):
        if Path(path).name == "manifest.json":
            monkeypatch.setattr(os, "replace", replace)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                _write(tmp_path, process=(1, 2))  # its shards are there: it only finishes
        replace(beside, path)

    _write(tmp_path, process=(1, 2))
    monkeypatch.setattr(os, "replace", other_process_first)
    assert _write(tmp_path, process=(0, 2))["count"] == 10
    assert _content(tmp_path) == whole


@pytest.mark.parametrize("process", [(2, 2), (-1, 2), (0, 0)])
def test_processes_count_from_zero(tmp_path, process):
    with pytest.raises(ValueError, match=r"process is \(index, count\)"):
        _write(tmp_path / "cache", process=process)


# Killed, and called again -------------------------------------------------------------------------

# Run once, so that the package is imported once; it forks before anything starts threads.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path

import numpy as np
import keras_uvit
from keras_uvit import data
from keras_uvit.data.manifest import CacheError

out, wanted = Path(sys.argv[1]), int(sys.argv[2])


class Slow:
    factor, scale, id, fingerprint = 1, 1.0, "slow", "slow-1"

    def __init__(self, seconds):
        self.seconds = seconds

    def moments_shape(self, shape):
        return (*shape[:2], 2 * shape[2])

    def encode(self, images, batch_size=None, verbose=0):
        time.sleep(self.seconds)
        return np.concatenate([images / 8.0, -images / 16.0], axis=-1).astype("float32")


def write(path, seconds=0.0):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype="uint8")
    source = {"image": images, "label": np.arange(50)}
    options = dict(flip=True, shard_size=4, batch_size=2, verbose=0)
    return data.write_latents(source, path, Slow(seconds), **options)


def killed(path, after):
    child = os.fork()
    if not child:
        synchronize = os.fsync
        os.fsync = lambda file: (time.sleep(0.002), synchronize(file))  # longer in write_file
        try:
            write(path, 0.003)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)  # where it has ended it is still there, not yet waited for
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    return True


def done(path):
    # Shards that are there, by what a reader is told.
    try:
        data.LatentDataset(path, 10, verbose=0)
        return 13
    except FileNotFoundError:  # killed before the plan was there
        return 0
    except CacheError as error:
        words = str(error).split("is unfinished: ")[1].split()
        assert words[1:4] == ["of", "13", "shards"], words
        return int(words[0])


write(out / "whole")
clock, kills, halves, folders = random.Random(0), 0, 0, 0
while kills < wanted:
    path, before = out / f"killed-{folders}", 0
    folders += 1
    while killed(path, clock.uniform(0.0, 0.06)):
        kills += 1
        halves += path.is_dir() and any(path.glob("tmp-*"))
        now = done(path)
        assert now >= before, (now, before)
        before = now
print(json.dumps({"kills": kills, "halves": halves, "folders": folders}))
"""


def test_a_cache_that_was_killed_again_and_again_is_the_same_to_the_bit(tmp_path, alone):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, os.fspath(tmp_path), "24"],
        env=alone,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] >= 24
    assert report["halves"] >= 2  # some of them while a file was being written
    expected = _content(tmp_path / "whole")
    assert len(expected) == 3 * 13 + 2
    for k in range(report["folders"]):
        assert _content(tmp_path / f"killed-{k}") == expected  # and no tmp-* beside
    cache = LatentDataset(tmp_path / "killed-0", 100, verbose=0)
    assert cache[0]["label"].tolist() == np.repeat(np.arange(50), 2).tolist()


def test_a_failing_source_leaves_whole_shards_to_go_on_from(tmp_path):
    values = [*range(6), RuntimeError("the disk went away"), *range(7, 10)]
    with pytest.raises(RuntimeError, match="the disk went away"):
        _write_moments(tmp_path, values)
    assert sorted(_content(tmp_path)) == ["00000-moments.npy", "00000.json", "plan.json"]
    values[6] = 6
    assert _write_moments(tmp_path, values)["count"] == 10
    assert _stored(tmp_path)[:, 0, 0, 0].tolist() == list(range(10))


def test_a_finished_cache_is_left_as_it_is(tmp_path, whole):
    _write(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*")}
    autoencoder = Counting()
    assert _write(tmp_path, autoencoder=autoencoder)["count"] == 10
    assert autoencoder.count == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*")} == times
    assert _content(tmp_path) == whole


# Damaged, and called again ------------------------------------------------------------------------


def _damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "one bit"])
@pytest.mark.parametrize("name", ["00001-moments.npy", "00001-label.npy"])
def test_only_the_damaged_shard_is_made_again(tmp_path, whole, name, how):
    _write(tmp_path)
    _damage(tmp_path / name, how)
    others = [path for path in tmp_path.glob("0*") if not path.name.startswith("00001")]
    times = [path.stat().st_mtime_ns for path in others]
    autoencoder = Counting()
    assert _write(tmp_path, autoencoder=autoencoder)["count"] == 10
    assert autoencoder.count == 4
    assert _content(tmp_path) == whole
    assert [path.stat().st_mtime_ns for path in others] == times
    LatentDataset(tmp_path, 10, verbose=0)


def test_while_a_damaged_shard_is_made_again_the_cache_is_unfinished(tmp_path):
    _write(tmp_path)
    _damage(tmp_path / "00001-moments.npy", "one bit")
    seen = []

    class Looking(SpaceToDepth):
        def encode(self, images, batch_size=None, verbose=0):
            with pytest.raises(CacheError, match="unfinished: 2 of 3 shards"):
                LatentDataset(tmp_path, 10, verbose=0)
            seen.append(len(images))
            return super().encode(images)

    _write(tmp_path, autoencoder=Looking())
    assert seen == [3, 1]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"count": 4}', b"\xff\x00", b'{"count": 4, "files": {"a": {}}}']
)
def test_a_shard_whose_record_is_damaged_is_made_again(tmp_path, whole, content):
    _write(tmp_path)
    (tmp_path / "00001.json").write_bytes(content)
    autoencoder = Counting()
    _write(tmp_path, autoencoder=autoencoder)
    assert autoencoder.count == 4
    assert _content(tmp_path) == whole


@pytest.mark.parametrize(
    "changes", [{"count": 5}, {"files": {}}, {"files": []}, {"files": {"moments": 3}}]
)
def test_a_shard_whose_record_says_something_else_is_made_again(tmp_path, whole, changes):
    _write(tmp_path)
    record = json.loads((tmp_path / "00001.json").read_text())
    (tmp_path / "00001.json").write_text(json.dumps({**record, **changes}))
    _write(tmp_path)
    assert _content(tmp_path) == whole


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": "other"}'])
def test_a_damaged_manifest_is_written_again(tmp_path, whole, content):
    _write(tmp_path)
    if content is None:
        (tmp_path / "manifest.json").unlink()
    else:
        (tmp_path / "manifest.json").write_bytes(content)
    _write(tmp_path)
    assert _content(tmp_path) == whole


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_damaged_plan_is_named(tmp_path, content):
    _write(tmp_path, process=(0, 2))
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"plan\.json is damaged.*Delete it and run the same"):
        _write(tmp_path)


def test_a_damaged_plan_can_be_deleted_as_the_error_says(tmp_path, whole):
    _write(tmp_path, process=(0, 2))
    (tmp_path / "plan.json").unlink()
    _write(tmp_path)
    assert _content(tmp_path) == whole


@pytest.mark.parametrize("left", ["00001-moments.npy", "tmp-123-00001-moments.npy"])
def test_a_damaged_plan_can_be_deleted_after_a_kill_too(tmp_path, whole, left):
    _write(tmp_path, process=(0, 2))
    (tmp_path / left).write_bytes(whole["00001-moments.npy"])
    (tmp_path / "plan.json").unlink()
    _write(tmp_path)
    assert _content(tmp_path) == whole


# A folder of something else -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"flip": True}, "flip was none, is stored"),
        ({"dtype": "float32"}, "dtype was float16, is float32"),
        ({"shard_size": 5}, "shard_size was 4, is 5"),
        ({"autoencoder": SpaceToDepth(scale=0.5)}, "autoencoder was .*1.0.*, is .*'scale': 0.5"),
        ({"source": {"image": IMAGES[:9], "label": LABELS[:9]}}, "source_length was 10, is 9"),
        ({"source": {"image": IMAGES}}, "num_classes was 4, is None"),
        ({"source": {"image": IMAGES[:, :2], "label": LABELS}}, r"shape was \[2, 3, 24\], is"),
    ],
)
def test_a_cache_that_was_made_in_another_way_names_what_differs(tmp_path, options, named):
    _write(tmp_path, process=(0, 2))
    before = _content(tmp_path)
    with pytest.raises(CacheError, match=rf"made in another way: .*{named}.*another folder"):
        _write(tmp_path, **options)
    assert _content(tmp_path) == before


def test_an_autoencoder_of_other_weights_is_named(tmp_path):
    _write(tmp_path)
    other = SpaceToDepth()
    other.fingerprint = "0123abcd"
    with pytest.raises(CacheError, match="autoencoder was .*space-to-depth-2.*, is .*0123abcd"):
        _write(tmp_path, autoencoder=other)


def test_another_source_or_kind_of_cache_is_named(tmp_path):
    _write(tmp_path)
    with pytest.raises(CacheError, match="source was arrays, is some"):
        _write_moments(tmp_path, range(10))
    with pytest.raises(CacheError, match="field was moments, is image"):
        data.write_images(LABELLED, tmp_path, verbose=0)


def test_a_plan_of_a_later_version_is_refused(tmp_path):
    _write(tmp_path, process=(0, 2))
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "version": 2}))
    with pytest.raises(CacheError, match="version was 2, is 1"):
        _write(tmp_path)


def test_the_release_that_made_the_first_shards_does_not_matter(tmp_path):
    _write(tmp_path, process=(0, 2))
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "keras_uvit": "0.0.7"}))
    assert _write(tmp_path)["keras_uvit"] == "0.0.7"


def test_a_process_that_begins_a_moment_later_agrees(tmp_path, whole, monkeypatch):
    """It sees no plan; the other writes one, and half a shard; only then it looks for files."""
    look = writing._foreign

    def late(folder, plan):
        manifest.write_json(folder / "plan.json", plan)
        (folder / "00000-moments.npy").write_bytes(whole["00000-moments.npy"])
        assert look(folder, plan)
        return look(folder, plan)

    monkeypatch.setattr(writing, "_foreign", late)
    _write(tmp_path)
    assert _content(tmp_path) == whole


@pytest.mark.parametrize("name", ["mine.npy", "00000-moments.npy", "00002-label.npy"])
def test_arrays_of_something_else_are_not_overwritten(tmp_path, name):
    np.save(tmp_path / name, np.arange(5))
    before = _content(tmp_path)
    with pytest.raises(CacheError, match=f"{tmp_path} holds .npy files of something else"):
        _write(tmp_path)
    assert _content(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest.json", "00001.json", "tmp-notes"])
def test_other_files_of_something_else_are_not_overwritten_or_removed(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with contextlib.suppress(CacheError):
        _write(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "deep").mkdir()
    _write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "deep").is_dir()


# Disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [0, 1])
def test_too_small_a_disk_is_refused_before_anything_is_encoded(tmp_path, monkeypatch, verbose):
    needed = 10 * 2 * 3 * 24 * 2
    full = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    autoencoder = Counting()
    with pytest.raises(OSError, match=f"{tmp_path} needs .* GB more.*Nothing was encoded") as error:
        _write(tmp_path, autoencoder=autoencoder, verbose=verbose)
    assert error.value.errno == errno.ENOSPC
    assert autoencoder.count == 0
    assert list(_content(tmp_path)) == ["plan.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full._replace(free=needed))
    _write(tmp_path, autoencoder=autoencoder)
    assert autoencoder.count == 10


def test_only_what_is_missing_must_fit_the_disk(tmp_path, monkeypatch):
    _write(tmp_path, process=(0, 2))  # two shards of three
    full = shutil.disk_usage(tmp_path)._replace(free=4 * 2 * 3 * 24 * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert _write(tmp_path)["count"] == 10


def test_a_short_last_shard_needs_less(tmp_path, monkeypatch):
    _write(tmp_path, process=(0, 3))
    _write(tmp_path, process=(1, 3))
    full = shutil.disk_usage(tmp_path)._replace(free=2 * 2 * 3 * 24 * 2)  # two images
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert _write(tmp_path)["count"] == 10


@contextlib.contextmanager
def _files_of_at_most(size):
    """The operating system refuses to write more into any file: as on a disk that is full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def _large(path, **options):
    """Three shards; moments of the first two are 12,416 bytes each, of the last 4,224."""
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 1), dtype="uint8")
    return _write(path, {"image": images, "label": np.arange(7)}, shard_size=3, **options)


@pytest.mark.parametrize("file", ["00001-moments.npy", "00001-label.npy", "00001.json"])
def test_a_disk_that_fills_up_is_named_and_the_same_run_goes_on(tmp_path, whole, monkeypatch, file):
    write_file = manifest.write_file

    def full(path, write):
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_file", full)
        message = f"The disk of {tmp_path} is full. Shard 00001 was not written; earlier shards"
        with pytest.raises(OSError, match=message) as error:
            _write(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert "00001.json" not in _content(tmp_path)
    with pytest.raises(CacheError, match="unfinished: 1 of 3 shards"):
        LatentDataset(tmp_path, 4, verbose=0)
    autoencoder = Counting()
    _write(tmp_path, autoencoder=autoencoder)
    assert autoencoder.count == 6
    assert _content(tmp_path) == whole


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_other_errors_of_the_disk_are_not_called_full(tmp_path, monkeypatch, code):
    def refuse(path, write):
        raise OSError(code, os.strerror(code))

    _write(tmp_path, process=(1, 2))
    monkeypatch.setattr(manifest, "write_file", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        _write(tmp_path)
    assert error.value.errno == code
    assert "full" not in str(error.value)


@pytest.mark.parametrize("limit", [100, 3000, 12_000])
def test_an_array_that_does_not_fit_leaves_nothing_but_whole_shards(tmp_path, limit):
    _large(tmp_path / "whole")
    _large(tmp_path / "cache", process=(0, 3))
    before = _content(tmp_path / "cache")
    with _files_of_at_most(limit), pytest.raises(OSError):  # noqa: PT011  (the next test)
        _large(tmp_path / "cache")
    assert _content(tmp_path / "cache") == before
    with pytest.raises(CacheError, match="unfinished: 1 of 3 shards"):
        LatentDataset(tmp_path / "cache", 4, verbose=0)
    _large(tmp_path / "cache")
    assert _content(tmp_path / "cache") == _content(tmp_path / "whole")


@pytest.mark.parametrize("limit", [3000, 12_000])
def test_an_array_that_does_not_fit_is_named(tmp_path, limit):
    with _files_of_at_most(limit), pytest.raises(OSError, match="disk of .* is full") as error:
        _large(tmp_path)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)


@pytest.mark.parametrize("limit", [600, 1279])
def test_an_array_whose_end_does_not_fit_is_not_taken_for_whole(tmp_path, whole, limit):
    _write(tmp_path, process=(1, 2))
    # Files of 1,280 bytes: their arrays wait in a buffer until the file is closed.
    with _files_of_at_most(limit), contextlib.suppress(OSError):
        _write(tmp_path)
    _write(tmp_path)
    assert _content(tmp_path) == whole


# Moments that cannot be stored --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65_520.0, -70_000.0])
@pytest.mark.parametrize("index", [0, 5, 9])
def test_moments_beyond_float16_name_their_sample(tmp_path, bad, index):
    values = [float(k) for k in range(10)]
    values[index] = bad
    with pytest.raises(
        ValueError, match=f"Sample {index} of some is encoded to values that are not finite"
    ):
        _write_moments(tmp_path, values)
    assert not (tmp_path / "manifest.json").exists()
    assert len(list(tmp_path.glob("0000?.json"))) == index // 4  # those before are kept
    values[index] = 1.0
    assert _write_moments(tmp_path, values)["count"] == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused_in_float32_too(tmp_path, bad):
    with pytest.raises(ValueError, match="Sample 2 of some .* or beyond float32"):
        _write_moments(tmp_path, [0, 1, bad], dtype="float32")


def test_large_moments_are_stored_where_they_fit(tmp_path):
    _write_moments(tmp_path / "16", [65_472.0, -65_472.0, 6e-8])
    assert _stored(tmp_path / "16")[:, 0, 0, 0].tolist() == [65_472.0, -65_472.0, 2.0**-24]
    _write_moments(tmp_path / "32", [1e30, -70_000.0], dtype="float32")
    assert _stored(tmp_path / "32")[:, 0, 0, 0].tolist() == [np.float32(1e30), -70_000.0]


def test_one_bad_number_among_many_is_found(tmp_path):
    def read(i):
        moments = np.zeros((5, 7, 2), "float32")
        if i == 6:
            moments[4, 6, 1] = np.nan
        return {"moments": moments}

    source = sources.Source("some", 10, (5, 7, 2), read, field="moments")
    with pytest.raises(ValueError, match="Sample 6 of some"):
        data.write_latents(source, tmp_path, None, verbose=0)


def test_with_mirror_images_the_sample_is_the_image(tmp_path):
    class Broken(SpaceToDepth):
        def encode(self, images, batch_size=None, verbose=0):
            moments = super().encode(images)
            moments[(images == IMAGES[5, :, ::-1]).all(axis=(1, 2, 3))] = np.nan  # a mirror image
            return moments

    with pytest.raises(ValueError, match="Sample 5 of arrays"):
        _write(tmp_path, autoencoder=Broken(), flip=True)


def test_the_sample_is_named_behind_skipped_ones_too(tmp_path):
    values = [0.0, ValueError("1.png cannot be read"), 2.0, np.nan]
    with pytest.raises(ValueError, match="Sample 3 of some"):
        _write_moments(tmp_path, values, batch_size=4, corrupt="skip")


# Damaged images -----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Ten files of two classes, of which 2 and 7 are no images."""
    for k in range(10):
        path = tmp_path / "photos" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[k]).save(path)
    for name in ("a/2.png", "b/7.png"):
        (tmp_path / "photos" / name).write_text("not an image")
    return tmp_path / "photos"


def test_a_damaged_image_is_named(photos, tmp_path):
    source = sources.folder(photos, (4, 6))
    message = r'2\.png cannot be read.*corrupt="skip"'
    with pytest.raises(ValueError, match=message):
        _write(tmp_path / "latents", source)
    with pytest.raises(ValueError, match=message):
        data.write_images(source, tmp_path / "images", verbose=0)


@pytest.mark.parametrize("flip", [False, True])
def test_damaged_images_are_left_out_and_listed(photos, tmp_path, flip):
    source = sources.folder(photos, (4, 6))
    content = _write(tmp_path / "cache", source, corrupt="skip", flip=flip)
    copies = 1 + flip
    assert content["count"] == 8 * copies
    skipped = [entry for shard in content["shards"] for entry in shard["skipped"]]
    assert [index for index, _ in skipped] == [1, 8]  # in the order of the source: 0, 2, 4, ...
    assert [Path(reason.split(" cannot")[0]).name for _, reason in skipped] == ["2.png", "7.png"]
    rows = [0, 4, 6, 8, 1, 3, 5, 9]
    expected = SpaceToDepth().encode(IMAGES[rows]).astype("float16")
    np.testing.assert_array_equal(_stored(tmp_path / "cache")[::copies], expected)
    labels = np.repeat([0, 0, 0, 0, 1, 1, 1, 1], copies)
    np.testing.assert_array_equal(_stored(tmp_path / "cache", "label"), labels)
    assert LatentDataset(tmp_path / "cache", 8, verbose=0).num_samples == 8 * copies


def test_damaged_images_are_left_out_of_images_too(photos, tmp_path):
    source = sources.folder(photos, (4, 6))
    content = data.write_images(source, tmp_path / "cache", corrupt="skip", verbose=0)
    assert content["count"] == 8
    np.testing.assert_array_equal(
        _stored(tmp_path / "cache", "image"), IMAGES[[0, 4, 6, 8, 1, 3, 5, 9]]
    )


def test_where_all_images_are_damaged_there_is_no_cache(tmp_path):
    values = [ValueError(f"{k}.png cannot be read") for k in range(10)]
    with pytest.raises(CacheError, match="Not one image of some could be read"):
        _write_moments(tmp_path, values, corrupt="skip")
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(CacheError):
        LatentDataset(tmp_path, 1, verbose=0)


# What is printed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"dtype": "float32"}, {"dtype": "float32", "flip": True}]
)
@pytest.mark.parametrize("kind", ["latents", "images"])
def test_the_printed_size_is_that_of_the_files(tmp_path, capsys, options, kind):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 16, 16, 3), dtype="uint8")  # without labels
    if kind == "latents":
        _write(tmp_path, images, shard_size=20, verbose=1, **options)
    else:
        data.write_images(images, tmp_path, shard_size=20, verbose=1)
    printed = capsys.readouterr().out
    assert f"50 images of arrays -> {tmp_path}: 0 of 3 shards are there" in printed
    said = float(re.search(r"the others take (\S+) GB", printed)[1])
    size = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    # Three digits are printed, and each of three files has a header of 128 bytes.
    np.testing.assert_allclose(said * 1e9, size - 3 * 128, rtol=5e-3)
    free = float(re.search(r"; (\S+) GB are free", printed)[1])
    # Others write to the disk meanwhile.
    np.testing.assert_allclose(free * 1e9, shutil.disk_usage(tmp_path).free, rtol=0.05)


def test_what_is_printed_counts_what_is_there(tmp_path, capsys):
    _write(tmp_path, process=(0, 2))
    _write(tmp_path, verbose=1)
    assert "2 of 3 shards are there" in capsys.readouterr().out


@pytest.mark.parametrize("verbose", [0, 1])
def test_nothing_is_printed_unless_asked_for(tmp_path, capfd, verbose):
    _write(tmp_path / "latents", verbose=verbose)
    data.write_images(LABELLED, tmp_path / "images", verbose=verbose)
    LatentDataset(tmp_path / "latents", 2, verbose=verbose)
    data.image_shards(tmp_path / "images", 2, verbose=verbose)
    out, _ = capfd.readouterr()
    assert bool(out) == bool(verbose)


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "bfloat16"}, ValueError, 'dtype must be "float16" or "float32".*bfloat16'),
        ({"shard_size": 0}, ValueError, "shard_size must be at least 1. Received: 0"),
        ({"corrupt": "ignore"}, ValueError, 'corrupt must be "raise" or "skip".*ignore'),
        ({"autoencoder": SpaceToDepth(4)}, ValueError, "multiples of 4. Received: 4 x 6"),
        ({"source": IMAGES / 255.0}, TypeError, "uint8.*float64"),
        ({"source": {"pixels": IMAGES}}, ValueError, 'keys "image".*pixels'),
    ],
)
def test_arguments_that_mean_nothing_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        _write(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists() or not _content(tmp_path / "cache")


def test_images_need_an_autoencoder_and_moments_cannot_be_mirrored(tmp_path):
    with pytest.raises(ValueError, match="source of images needs an autoencoder"):
        data.write_latents(IMAGES, tmp_path, None)
    with pytest.raises(ValueError, match="cannot be mirrored.*flip=True needs images"):
        data.write_latents(_moments_source([1.0]), tmp_path, None, flip=True)
    with pytest.raises(ValueError, match="Use write_latents for moments"):
        data.write_images(_moments_source([1.0]), tmp_path)
    assert not _content(tmp_path)


def test_a_file_that_windows_will_not_replace_is_explained(tmp_path, monkeypatch):
    def replace(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError, match="while a program reads it.*same command again"):
        manifest.write_json(tmp_path / "plan.json", {})
    assert not list(tmp_path.iterdir())


def test_the_version_of_a_cache_is_known_without_an_installed_package(tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    made = data.write_images(np.zeros((2, 4, 4, 1), "uint8"), tmp_path, verbose=0)
    assert made["keras_uvit"] == keras_uvit.__version__
