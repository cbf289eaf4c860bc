"""Making caches: the same bytes whoever makes them, whatever stops them, and on a full disk."""

import contextlib
import errno
import functools
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

import caches
import numpy as np
import pytest
from caches import (
    CAPTIONED,
    CAPTIONS,
    IMAGES,
    content,
    read_cache,
    stored,
    write_cache,
    write_captioned,
)
from tiny import refused
from words import Words

import keras_uvit
from keras_uvit import data
from keras_uvit.data import manifest, sources, unfinished
from keras_uvit.data.manifest import CacheError
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once


def write_images(path, source=caches.LABELLED, shard_size=4, verbose=0, batch_size=None, **options):
    return data.write_images(source, path, shard_size=shard_size, verbose=verbose, **options)


# Content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flip", "dtype", "shard_size", "batch_size"),
    [
        (False, "float32", 4, 3),
        (False, "float16", 10, 16),
        (False, "float16", 100, 4),
        (True, "float16", 4, 3),
        (True, "float16", 1, 1),
    ],
)
def test_the_cache_is_the_encoded_images_in_their_order_each_with_its_mirror_image(
    tmp_path, flip, dtype, shard_size, batch_size
):
    options = dict(flip=flip, dtype=dtype, shard_size=shard_size, batch_size=batch_size)
    made = write_cache(tmp_path, **options)
    images, labels = IMAGES, caches.LABELS
    if flip:
        images = np.stack([IMAGES, IMAGES[:, :, ::-1]], axis=1).reshape(-1, 4, 6, 3)
        labels = np.repeat(labels, 2)
    assert stored(tmp_path).dtype == dtype
    np.testing.assert_array_equal(stored(tmp_path), SpaceToDepth().encode(images).astype(dtype))
    assert len(made["shards"]) == made["num_shards"] == math.ceil(10 / shard_size)
    assert (made["count"], made["flip"]) == (len(images), "stored" if flip else "none")
    batch = read_cache(tmp_path, len(images))[0]
    np.testing.assert_array_equal(batch["moments"], stored(tmp_path))
    np.testing.assert_array_equal(batch["label"], labels)


def test_the_manifest_says_how_the_cache_was_made(tmp_path):
    made = write_cache(tmp_path, autoencoder=SpaceToDepth(scale=0.3))
    assert made == json.loads((tmp_path / "manifest.json").read_text())
    name = "space-to-depth-2"
    wanted = dict(source="arrays", source_length=10, field="moments", shape=[2, 3, 24])
    wanted |= dict(dtype="float16", image_size=[4, 6], num_classes=4, flip="none", shard_size=4)
    wanted["autoencoder"] = {"id": name, "fingerprint": name, "scale": 0.3, "shift": 0.0}
    wanted["keras_uvit"] = keras_uvit.__version__
    assert {key: made[key] for key in wanted} == wanted
    assert [shard["count"] for shard in made["shards"]] == [4, 4, 2]
    assert [shard["skipped"] for shard in made["shards"]] == [[], [], []]


def test_moments_are_stored_as_they_are_with_the_autoencoder_that_made_them(tmp_path):
    caches.write_moments(tmp_path / "unknown", range(10))
    cache = read_cache(tmp_path / "unknown", 10)
    assert cache[0]["moments"][:, 0, 0, 0].tolist() == list(range(10))
    about = (cache.scale, cache.fingerprint, cache.autoencoder_id, cache.image_size)
    assert about == (None, None, None, None)
    write_cache(tmp_path / "known", caches.moments_source(range(10)), SpaceToDepth(8))
    cache = read_cache(tmp_path / "known")
    assert (cache.scale, cache.fingerprint, cache.image_size) == (1.0, "space-to-depth-8", [8, 8])


# Several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_processes_make_the_cache_of_one_and_the_last_finishes_it(tmp_path, whole, order):
    counts = {}
    for index in order:  # one more than there are shards
        autoencoder = caches.Counting()
        made = write_captioned(tmp_path, autoencoder=autoencoder, process=(index, 4))
        counts[index] = autoencoder.count
        done = set(range(3)) <= set(counts)
        assert (made is not None) == (tmp_path / "manifest.json").exists() == done
    assert counts == {0: 4, 1: 4, 2: 2, 3: 0}  # its own shards only
    assert content(tmp_path) == whole


def test_processes_that_finish_at_the_same_time_do_not_disturb_each_other(
    tmp_path, whole, monkeypatch
):
    replace = os.replace

    def other_process_first(beside, path):
        if Path(path).name == "manifest.json":
            monkeypatch.setattr(os, "replace", replace)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                write_captioned(tmp_path, process=(1, 2))  # its shards are there: it only finishes
        replace(beside, path)

    write_captioned(tmp_path, process=(1, 2))
    monkeypatch.setattr(os, "replace", other_process_first)
    assert write_captioned(tmp_path, process=(0, 2))["count"] == 10
    assert content(tmp_path) == whole


def test_a_process_that_begins_a_moment_later_agrees(tmp_path, whole, monkeypatch):
    """It sees no plan; the other writes one, and half a shard; only then it looks for files."""
    look = unfinished._foreign

    def late(folder, plan):
        manifest.write_json(folder / "plan.json", plan)
        (folder / "00000-moments.npy").write_bytes(whole["00000-moments.npy"])
        assert look(folder, plan)
        return look(folder, plan)

    monkeypatch.setattr(unfinished, "_foreign", late)
    write_captioned(tmp_path)
    assert content(tmp_path) == whole


# Stopped, and called again ------------------------------------------------------------------------


def test_a_cache_that_was_killed_again_and_again_is_the_same_to_the_bit(tmp_path, alone):
    script = Path(__file__).with_name("killed.py")
    paths = os.pathsep.join([alone["PYTHONPATH"], os.fspath(script.parents[1])])
    command = [sys.executable, script, tmp_path, "24"]
    environment = {**alone, "PYTHONPATH": paths}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["kills"] >= 24
    assert report["halves"] >= 2  # some of them while a file was being written


def test_a_failing_source_leaves_whole_shards_to_go_on_from(tmp_path):
    values = [*range(6), RuntimeError("the disk went away"), *range(7, 10)]
    refused(RuntimeError, lambda: caches.write_moments(tmp_path, values), "the disk went away")
    assert sorted(content(tmp_path)) == ["00000-moments.npy", "00000.json", "plan.json"]
    values[6] = 6
    assert caches.write_moments(tmp_path, values)["count"] == 10
    assert stored(tmp_path)[:, 0, 0, 0].tolist() == list(range(10))


def test_a_finished_cache_is_left_as_it_is(tmp_path, whole):
    write_captioned(tmp_path)
    before = caches.times(tmp_path, "0*")
    caches.assert_resumes(tmp_path, whole, 0)
    assert caches.times(tmp_path, "0*") == before


# A folder of something else -----------------------------------------------------------------------

SOME = caches.moments_source(range(10))
OTHER_WEIGHTS = SpaceToDepth()
OTHER_WEIGHTS.fingerprint = "0123abcd"
EDITED = [["a better caption"], *CAPTIONS[1:]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": True}, "flip was none, is stored"),
        ({"dtype": "float32"}, "dtype was float16, is float32"),
        ({"shard_size": 5}, "shard_size was 4, is 5"),
        ({"autoencoder": SpaceToDepth(scale=0.5)}, "'scale': 0.5"),
        ({"autoencoder": OTHER_WEIGHTS}, "'0123abcd'"),
        ({"source": {"image": IMAGES[:9], "captions": CAPTIONS[:9]}}, "source_length was 10, is 9"),
        ({"source": {"image": IMAGES, "captions": CAPTIONS}}, "num_classes was 4, is None"),
        ({"source": {**CAPTIONED, "image": IMAGES[:, :2]}}, "shape was [2, 3, 24], is"),
        ({"source": {**CAPTIONED, "captions": EDITED}}, "text was"),
        ({"text_encoder": Words(fingerprint="other")}, "text was"),
        ({"source": SOME, "autoencoder": None, "text_encoder": None}, "source was arrays, is some"),
    ],
)
@pytest.mark.filterwarnings("ignore:flip=True")
def test_a_cache_that_was_made_in_another_way_names_what_differs(tmp_path, options, words):
    usual = {"path": tmp_path, "source": CAPTIONED, "text_encoder": Words()}
    write_cache(**usual, process=(0, 2))
    before = content(tmp_path)
    write = lambda: write_cache(**{**usual, **options})  # noqa: E731
    refused(CacheError, write, "made in another way: ", words, "another folder")
    assert content(tmp_path) == before


def test_another_kind_of_cache_is_named(tmp_path):
    write_cache(tmp_path)
    refused(CacheError, lambda: write_images(tmp_path), "field was moments, is image")


@pytest.mark.parametrize("name", ["mine.npy", "00000-moments.npy", "manifest.json", "00001.json"])
def test_files_of_something_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    words = f"{tmp_path} holds .npy files of something else", name
    refused(CacheError, lambda: write_cache(tmp_path), *words)
    assert content(tmp_path) == {name: b"mine"}


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("README.md", "tmp-notes"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "deep").mkdir()
    write_cache(tmp_path)
    assert (tmp_path / "README.md").read_text() == (tmp_path / "tmp-notes").read_text() == "mine"
    assert (tmp_path / "deep").is_dir()


# Disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "images"), [(0, range(10)), (1, range(4, 10)), (2, range(8, 10))]
)
@pytest.mark.parametrize("verbose", [0, 1])
def test_what_is_missing_must_fit_the_disk_or_nothing_is_encoded(
    tmp_path, monkeypatch, there, images, verbose
):
    for k in range(there):
        write_captioned(tmp_path, process=(k, 3))
    before, full, autoencoder = content(tmp_path), shutil.disk_usage(tmp_path), caches.Counting()
    contexts = sum(caches.COUNTS[k] for k in images) + 3 - there  # and the empty prompts
    needed = len(images) * 2 * 3 * 24 * 2 + contexts * 2 * 3 * 2

    def write(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: full._replace(free=free))
        return write_captioned(tmp_path, autoencoder=autoencoder, verbose=verbose)

    with pytest.raises(OSError, match=f"{tmp_path} needs .* GB more.*Nothing was encoded") as error:
        write(needed - 1)
    assert (error.value.errno, autoencoder.count) == (errno.ENOSPC, 0)
    assert {"plan.json": None, **content(tmp_path)} == {**content(tmp_path), **before}
    write(needed)
    assert autoencoder.count == len(images)


@pytest.mark.parametrize(
    ("file", "code"),
    [("00001-label.npy", errno.ENOSPC), ("00001.json", errno.EDQUOT), ("00001.json", errno.EIO)],
)
def test_a_disk_that_fills_up_is_named_and_the_same_run_goes_on(
    tmp_path, whole, monkeypatch, file, code
):
    write_file = manifest.write_file

    def full(path, write):
        if path.name == file:
            raise OSError(code, os.strerror(code))
        write_file(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_file", full)
        with pytest.raises(OSError, match=f"{code}") as error:
            write_captioned(tmp_path)
    assert error.value.errno == code
    words = f"The disk of {tmp_path} is full. Shard 00001 was not written; earlier shards"
    assert (words in str(error.value)) == (code != errno.EIO)  # other errors are not called so
    refused(CacheError, lambda: read_cache(tmp_path), "unfinished: 1 of 3 shards")
    caches.assert_resumes(tmp_path, whole, 6)


@contextlib.contextmanager
def _files_of_at_most(size):
    """The operating system refuses to write more into any file: as on a disk that is full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("limit", [100, 3000, 12_000])
def test_an_array_that_does_not_fit_is_named_and_leaves_nothing_but_whole_shards(tmp_path, limit):
    def large(path, **options):
        """Three shards; moments of the first two are 12,416 bytes each, of the last 4,224."""
        images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 1), dtype="uint8")
        write_cache(path, {"image": images, "label": np.arange(7)}, shard_size=3, **options)

    large(tmp_path / "whole")
    large(tmp_path / "cache", process=(0, 3))
    before = content(tmp_path / "cache")
    with _files_of_at_most(limit), pytest.raises(OSError, match="disk of .* is full") as error:
        large(tmp_path / "cache")
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert content(tmp_path / "cache") == before
    refused(CacheError, lambda: read_cache(tmp_path / "cache"), "unfinished: 1 of 3 shards")
    large(tmp_path / "cache")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


@pytest.mark.parametrize("limit", [600, 1279])
def test_an_array_whose_end_does_not_fit_is_not_taken_for_whole(tmp_path, whole, limit):
    write_captioned(tmp_path, process=(1, 2))
    # Files of 1,280 bytes: their arrays wait in a buffer until the file is closed.
    with _files_of_at_most(limit), contextlib.suppress(OSError):
        write_captioned(tmp_path)
    caches.assert_resumes(tmp_path, whole, 6)


def test_a_file_that_windows_will_not_replace_is_explained(tmp_path, monkeypatch):
    def replace(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(os, "replace", replace)
    write = lambda: manifest.write_json(tmp_path / "plan.json", {})  # noqa: E731
    refused(PermissionError, write, "while a program reads it", "same command again")
    assert not list(tmp_path.iterdir())


# Moments that cannot be stored --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "bad", "dtype"),
    [
        (0, np.nan, "float16"),
        (5, np.inf, "float16"),
        (9, 65_520.0, "float16"),
        (5, -70_000.0, "float16"),
        (2, np.nan, "float32"),
        (2, -np.inf, "float32"),
    ],
)
def test_moments_that_cannot_be_stored_name_their_sample(tmp_path, index, bad, dtype):
    values = [0.0, ValueError("1.png cannot be read"), *map(float, range(2, 10))]
    values[index] = bad
    write = functools.partial(caches.write_moments, tmp_path, values, dtype=dtype, corrupt="skip")
    refused(ValueError, write, f"Sample {index} of some", f"not finite or beyond {dtype}")
    assert not (tmp_path / "manifest.json").exists()
    assert len(list(tmp_path.glob("0000?.json"))) == index // 4  # those before are kept
    values[index] = 1.0
    assert write()["count"] == 9


def test_large_moments_are_stored_where_they_fit(tmp_path):
    caches.write_moments(tmp_path / "16", [65_472.0, -65_472.0, 6e-8])
    assert stored(tmp_path / "16")[:, 0, 0, 0].tolist() == [65_472.0, -65_472.0, 2.0**-24]
    caches.write_moments(tmp_path / "32", [1e30, -70_000.0], dtype="float32")
    assert stored(tmp_path / "32")[:, 0, 0, 0].tolist() == [np.float32(1e30), -70_000.0]


def test_one_bad_number_of_a_mirror_image_names_the_image(tmp_path):
    class Broken(SpaceToDepth):
        def encode(self, images, batch_size=None, verbose=0):
            moments = super().encode(images)
            mirrored = (images == IMAGES[5, :, ::-1]).all(axis=(1, 2, 3))
            moments[mirrored, 1, 2, 23] = np.nan
            return moments

    write = lambda: write_cache(tmp_path, autoencoder=Broken(), flip=True)  # noqa: E731
    refused(ValueError, write, "Sample 5 of arrays")


# Damaged images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "field", "expected", "options"),
    [
        (write_cache, "moments", caches.MOMENTS, {}),
        (write_cache, "moments", caches.MOMENTS, {"flip": True}),
        (write_images, "image", IMAGES, {}),
    ],
)
def test_damaged_images_are_named_or_left_out_and_listed(
    photos, tmp_path, write, field, expected, options
):
    source, folder = sources.folder(photos, (4, 6)), tmp_path / "cache"
    words = "2.png cannot be read", 'corrupt="skip"'
    refused(ValueError, lambda: write(folder, source, **options), *words)
    made = write(folder, source, corrupt="skip", **options)
    copies = 1 + len(options)
    assert (made["count"], made["source"]) == (8 * copies, "folder:photos")
    assert made["class_names"] == ["a", "b"]
    skipped = [entry for shard in made["shards"] for entry in shard["skipped"]]
    assert [index for index, _ in skipped] == [1, 8]  # in the order of the source: 0, 2, 4, ...
    assert [Path(reason.split(" cannot")[0]).name for _, reason in skipped] == ["2.png", "7.png"]
    rows = [0, 4, 6, 8, 1, 3, 5, 9]
    np.testing.assert_array_equal(stored(folder, field)[::copies], expected[rows])
    np.testing.assert_array_equal(stored(folder, "label"), np.repeat([0, 1], 4 * copies))


def test_where_all_images_are_damaged_there_is_no_cache(tmp_path):
    values = [ValueError(f"{k}.png cannot be read") for k in range(10)]
    write = lambda: caches.write_moments(tmp_path, values, corrupt="skip")  # noqa: E731
    refused(CacheError, write, "Not one image of some could be read")
    assert not (tmp_path / "manifest.json").exists()
    refused(CacheError, lambda: read_cache(tmp_path), "unfinished")


# What is printed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "options"),
    [(write_cache, {"flip": True}), (write_cache, {"dtype": "float32"}), (write_images, {})],
)
def test_the_printed_size_is_that_of_the_files(tmp_path, capsys, write, options):
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype="uint8")
    write(tmp_path, images, batch_size=16, shard_size=20, verbose=1, **options)
    printed = capsys.readouterr().out
    assert f"50 images of arrays -> {tmp_path}: 0 of 3 shards are there" in printed
    said = float(re.search(r"the others take (\S+) GB", printed)[1])
    size = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    # Three digits are printed, and each of three files has a header of 128 bytes.
    np.testing.assert_allclose(said * 1e9, size - 3 * 128, rtol=5e-3)
    free = float(re.search(r"; (\S+) GB are free", printed)[1])
    # Others write to the disk meanwhile.
    np.testing.assert_allclose(free * 1e9, shutil.disk_usage(tmp_path).free, rtol=0.05)


@pytest.mark.parametrize("verbose", [0, 1])
def test_nothing_is_printed_unless_asked_for_and_what_is_there_is_counted(tmp_path, capfd, verbose):
    write_captioned(tmp_path / "latents", process=(0, 2), verbose=verbose)
    write_captioned(tmp_path / "latents", verbose=verbose)
    read_cache(tmp_path / "latents", verbose=verbose)
    write_images(tmp_path / "images", verbose=verbose)
    read_cache(tmp_path / "images", reader=data.image_shards, verbose=verbose)
    out, _ = capfd.readouterr()
    words = (
        "2 of 3 shards are there",
        "GB float16 moments + ",
        f"contexts of {sum(caches.COUNTS[4:8])} captions",
    )
    assert all((word in out) == bool(verbose) for word in words)
    assert bool(out) == bool(verbose)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "bfloat16"}, ValueError, ["dtype", "bfloat16"]),
        ({"shard_size": 0}, ValueError, ["shard_size", "0"]),
        ({"corrupt": "ignore"}, ValueError, ["corrupt", "ignore"]),
        ({"process": (2, 2)}, ValueError, ["process", "(2, 2)"]),
        ({"process": (-1, 2)}, ValueError, ["process", "(-1, 2)"]),
        ({"process": (0, 0)}, ValueError, ["process", "(0, 0)"]),
        ({"autoencoder": SpaceToDepth(4)}, ValueError, ["multiples of 4", "4 x 6"]),
        ({"autoencoder": "vae.h5"}, TypeError, ["AutoencoderKL.from_file", "vae.h5"]),
        ({"autoencoder": None}, ValueError, ["needs an autoencoder"]),
        ({"source": IMAGES / 255.0}, TypeError, ["uint8", "float64"]),
        ({"source": SOME, "flip": True}, ValueError, ["cannot be mirrored"]),
        ({"source": CAPTIONED}, ValueError, ["has captions", "text_encoder"]),
        ({"text_encoder": Words()}, ValueError, ["text_encoder", "this source has none"]),
        ({"source": CAPTIONED, "text_encoder": "clip"}, TypeError, ["encoders.CLIPText", "clip"]),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, options, error, words):
    refused(error, lambda: write_cache(tmp_path / "cache", **options), *words)
    assert not (tmp_path / "cache").exists() or not content(tmp_path / "cache")


def test_contexts_that_half_precision_cannot_hold_name_the_image(tmp_path):
    class Loud(Words):
        def encode(self, tokens, *options):
            values = super().encode(tokens, *options)
            values[tokens[:, 0] == self.tokenize("caption 4 0")[0, 0]] *= 1e6
            return values

    write = lambda: write_captioned(tmp_path, text_encoder=Loud())  # noqa: E731
    refused(ValueError, write, "Sample 4 of arrays", "float16")


def test_moments_are_no_images(tmp_path):
    write = lambda: write_images(tmp_path, caches.moments_source([1.0]))  # noqa: E731
    refused(ValueError, write, "Use write_latents for moments")
