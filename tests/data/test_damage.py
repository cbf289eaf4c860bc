"""Damaged caches: whatever is damaged is named, and the same run again mends just that."""

import os

import caches
import numpy as np
import pytest
from caches import assert_resumes, one_bit, read_cache, replace, times, write_captioned
from tiny import refused

from keras_uvit.data.manifest import CacheError, open_shard

pytestmark = pytest.mark.once


@pytest.fixture
def cache(whole, tmp_path):
    """A finished cache, to be damaged."""
    for name, own in whole.items():
        (tmp_path / name).write_bytes(own)
    return tmp_path


# What is in the file instead; what its reader says with checksums, and without.
ARRAYS = {
    "missing": (None, "is missing", "is missing"),
    "empty": (b"", "its checksum", "truncated or damaged"),
    "half of its header": (lambda array: array[:64], "its checksum", "truncated or damaged"),
    "its header alone": (lambda array: array[:128], "its checksum", "truncated or damaged"),
    "a byte less": (lambda array: array[:-1], "its checksum", "truncated or damaged"),
    "a byte more": (lambda array: array + b"\0", "its checksum", "the size that its header says"),
    "one bit": (lambda array: one_bit(array, 8 * 128 + 1), "its checksum", None),
}


@pytest.mark.parametrize("damage", ARRAYS)
@pytest.mark.parametrize("field", ["moments", "label", "context", "captions"])
def test_a_damaged_array_is_named_and_only_its_shard_made_again(cache, whole, field, damage):
    made, checked, unchecked = ARRAYS[damage]
    name = f"00001-{field}.npy"
    replace(cache / name, made)
    refused(CacheError, lambda: read_cache(cache), name, checked, "just that shard")
    if unchecked is None:
        read_cache(cache, verify=False)
    else:
        words = name, unchecked, "just that shard"
        refused(CacheError, lambda: read_cache(cache, verify=False), *words)
    others = times(cache, "0000[02]*")
    assert_resumes(cache, whole, 4)
    assert times(cache, "0000[02]*") == others
    read_cache(cache)


def test_one_flipped_bit_anywhere_is_found_and_named(cache):
    file = cache / "00002-moments.npy"
    array = file.read_bytes()
    last = 8 * len(array) - 1
    for bit in [0, last, *np.random.default_rng(0).integers(0, last, 20)]:
        file.write_bytes(one_bit(array, int(bit)))
        refused(CacheError, lambda: read_cache(cache), f"{file.name} is damaged: its checksum")


def test_a_flipped_bit_in_a_header_is_an_error_or_does_no_harm_without_checksums(cache):
    file = cache / "00001-moments.npy"
    array, expected = file.read_bytes(), np.load(file)
    record = {"count": 4, "files": {"moments": {"file": file.name}}}
    for bit in range(8 * 128):
        file.write_bytes(one_bit(array, bit))
        try:
            rows = open_shard(cache, record, "moments", (2, 3, 24), np.dtype("float16"))
        except CacheError:
            rows = expected
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 2, 3, 20), "float16"),
        np.zeros((5, 2, 3, 24), "float16"),
        np.zeros((4, 2, 3, 24), "float32"),
        np.zeros((4, 2, 3, 24), ">f2"),
    ],
)
def test_another_array_in_place_of_a_shard_is_seen_without_checksums(cache, array):
    np.save(cache / "00001-moments.npy", array)
    words = f"00001-moments.npy holds {array.dtype} {array.shape}", "float16 (4, 2, 3, 24)"
    refused(CacheError, lambda: read_cache(cache, verify=False), *words)


def test_a_pickle_in_place_of_a_shard_is_not_opened(cache):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (os.fspath(cache / "sprung"),)

    array = np.empty(4, object)
    array[:] = Trap()
    np.save(cache / "00001-moments.npy", array, allow_pickle=True)
    words = "00001-moments.npy is truncated or damaged"
    refused(CacheError, lambda: read_cache(cache, verify=False), words)
    assert not (cache / "sprung").exists()


@pytest.mark.parametrize("row", [(1, 1000), (0, 1), (15, 1)])
def test_captions_beyond_their_shard_are_refused_even_without_checksums(cache, row):
    rows = np.load(cache / "00001-captions.npy")
    rows[0] = row
    np.save(cache / "00001-captions.npy", rows)
    words = "a caption is beyond its shard"
    refused(CacheError, lambda: read_cache(cache, verify=False), words)


def test_while_a_damaged_shard_is_made_again_the_cache_is_unfinished(cache):
    replace(cache / "00001-moments.npy", one_bit)
    seen = []

    class Looking(caches.Counting):
        def encode(self, images, batch_size=None, verbose=0):
            refused(CacheError, lambda: read_cache(cache), "unfinished: 2 of 3 shards")
            seen.append(len(images))
            return super().encode(images)

    write_captioned(cache, autoencoder=Looking())
    assert seen == [3, 1]


@pytest.mark.parametrize(
    "made",
    [
        *(None, b"", b"{", b"[]", b"\xff\x00"),
        *(b'{"count": 4}', b'{"count": 4, "files": {"a": {}}}'),
        lambda record: record.update(plan="0123456789abcdef"),
        lambda record: record.update(count=5),
        lambda record: record.update(skipped=3),
        lambda record: record.update(files={}),
        lambda record: record.update(files=[]),
        lambda record: record["files"].update(moments=3),
        lambda record: record["files"]["label"].update(file="no.npy"),
    ],
)
def test_a_shard_whose_record_is_damaged_is_made_again(cache, whole, made):
    replace(cache / "00001.json", made)
    assert_resumes(cache, whole, 4)


DAMAGED = "manifest.json is damaged"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, ["unfinished: 3 of 3 shards"]),
        *(
            (junk, [DAMAGED, "Delete it"])
            for junk in (b"", b"{", b"[1, 2]", b"\xff\xfe\0", b"null")
        ),
        *(
            (lambda about, key=key: about.pop(key), [DAMAGED, key, "Delete it"])
            for key in ("version", "field", "num_classes", "shards")
        ),
        (b'{"name": "my web page", "version": 3}', ["is no manifest of a keras_uvit cache"]),
        (
            lambda about: about.update(version=2, keras_uvit="9.8.7", flip=None),
            ["version 2", "keras_uvit 9.8.7", "Upgrade"],
        ),
        (
            lambda about: [about.update(version=2, keras_uvit="9.8.7"), about.pop("flip")],
            ["version 2", "keras_uvit 9.8.7", "Upgrade"],  # which may say other things
        ),
        *((lambda about, text=text: about.update(text=text), [DAMAGED]) for text in ({}, [1], "x")),
        (lambda about: about["text"].pop("id"), [DAMAGED]),
        (lambda about: about["text"].update(dtype="nonsense"), [DAMAGED]),
        (lambda about: about["text"].update(shape=None), [DAMAGED]),
        (lambda about: about["shards"][1]["files"].pop("context"), [DAMAGED, "has no context"]),
    ],
)
def test_a_damaged_manifest_is_named_and_written_again(cache, whole, made, words):
    replace(cache / "manifest.json", made)
    refused(CacheError, lambda: read_cache(cache, verify=False), *words)
    assert_resumes(cache, whole, 0)


@pytest.mark.parametrize(
    ("made", "left"),
    [(b"", None), (b"{", "00001-moments.npy"), (b"[]", "tmp-123-00001-moments.npy")],
)
def test_a_damaged_plan_is_named_and_can_be_deleted_as_the_error_says(tmp_path, whole, made, left):
    write_captioned(tmp_path, process=(0, 2))
    (tmp_path / "plan.json").write_bytes(made)
    for call in (lambda: write_captioned(tmp_path), lambda: read_cache(tmp_path)):
        refused(CacheError, call, "plan.json is damaged", "Delete it and run the same")
    if left:  # by a kill
        (tmp_path / left).write_bytes(whole["00001-moments.npy"])
    (tmp_path / "plan.json").unlink()
    assert_resumes(tmp_path, whole, 4)


def test_a_plan_that_says_nothing_is_damaged_too(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    refused(CacheError, lambda: read_cache(tmp_path), "plan.json is damaged", "Delete it")


def test_a_plan_of_a_later_version_is_refused_but_another_release_does_not_matter(tmp_path):
    write_captioned(tmp_path, process=(0, 2))
    plan = tmp_path / "plan.json"
    replace(plan, lambda plan: plan.update(version=2))
    refused(CacheError, lambda: write_captioned(tmp_path), "version was 2, is 1")
    replace(plan, lambda plan: plan.update(version=1, keras_uvit="0.0.7"))
    assert write_captioned(tmp_path)["keras_uvit"] == "0.0.7"


def test_a_finished_cache_needs_no_plan_and_no_records(cache):
    for path in (cache / "plan.json", *cache.glob("0000?.json")):
        path.unlink()
    assert read_cache(cache).num_samples == 10
