"""Samples one at a time: reading ahead in threads, damaged samples, arrays, lists of files."""

import os
import threading
import time

import numpy as np
import pytest
from caches import IMAGES, save
from PIL import Image
from tiny import refused

from keras_uvit.data import sources
from keras_uvit.data.sources import Source

pytestmark = pytest.mark.once


def _number(i):
    assert type(i) is int  # Python's own
    return {"image": np.full((1, 1, 1), i, "uint8")}


def _groups(read=_number, rows=range(20), batch_size=4, corrupt="raise"):
    source = Source("some", 1000, (1, 1, 1), read)
    return source.batches(np.array(rows), batch_size, corrupt)


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("rows", [range(20), [7, 3, 3, 19, 0], []])
def test_batches_are_the_rows_in_their_order(rows, batch_size):
    def read(i):
        time.sleep(0.004 if i % 4 == 0 else 0.0)  # whichever is read first
        return _number(i)

    groups = list(_groups(read, rows, batch_size))
    assert [index for group in groups for index, _ in group] == list(rows)
    assert all(sample["image"].item() == index for group in groups for index, sample in group)
    assert all(len(group) == batch_size for group in groups[:-1])


def test_one_batch_is_read_ahead_and_no_more_and_who_stops_early_stops_the_reading():
    begun, turn = set(), threading.Event()

    def read(i):
        begun.add(i)
        if i >= 4:
            turn.set()
        return _number(i)

    groups = _groups(read, range(1000))
    next(groups)
    assert turn.wait(10)  # the second batch, though nobody has asked for it
    time.sleep(0.05)
    assert begun <= set(range(8))
    next(groups)
    groups.close()
    threads = threading.active_count()
    time.sleep(0.05)
    assert begun <= set(range(12))
    assert threading.active_count() <= threads


def test_several_samples_are_read_at_once(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=10)  # passed by two threads, or broken

    def read(i):
        both.wait()
        return _number(i)

    assert len(list(_groups(read, range(2), 2))) == 1


def _damaged(*bad, error=ValueError):
    def read(i):
        if i in bad:
            raise error(f"{i}.png cannot be read")
        return _number(i)

    return read


@pytest.mark.parametrize("bad", [0, 5, 19])
def test_a_damaged_sample_stops_the_reading_and_is_named(bad):
    refused(ValueError, lambda: list(_groups(_damaged(bad))), f"{bad}.png cannot be read")


def test_damaged_samples_are_handed_out_as_the_reason():
    groups = _groups(_damaged(0, 5, 6, 19), corrupt="skip")
    samples = dict(pair for group in groups for pair in group)
    reasons = {i: sample for i, sample in samples.items() if isinstance(sample, str)}
    assert reasons == {i: f"{i}.png cannot be read" for i in (0, 5, 6, 19)}
    assert list(samples) == list(range(20))


@pytest.mark.parametrize("error", [OSError, KeyError])
def test_other_errors_are_nobodys_damaged_sample(error):
    refused(error, lambda: list(_groups(_damaged(5, error=error), corrupt="skip")), "5.png")


@pytest.mark.parametrize("more", [{}, {"label": [2, 0, 1, 1, 0, 2, 0, 0, 0, 0]}])
def test_arrays_are_read_one_by_one(more):
    source = sources.arrays({"image": IMAGES, **more}, "mine")
    assert (source.name, len(source), source.shape) == ("mine", 10, (4, 6, 3))
    assert (source.field, source.num_classes) == ("image", 3 if more else None)
    for i in range(10):
        sample = source.read(i)
        np.testing.assert_array_equal(sample["image"], IMAGES[i])
        assert sample.get("label") == (more["label"][i] if more else None)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"image": IMAGES, "caption": [0] * 10}, ValueError, ['keys "image"', "caption"]),
        ({"label": [0] * 10}, ValueError, ['keys "image"', "label"]),
        (IMAGES[0], ValueError, ["(n, H, W, C)", "(4, 6, 3)"]),
        (IMAGES[:0], ValueError, ["n >= 1", "(0, 4, 6, 3)"]),
        (IMAGES.astype("int32"), TypeError, ["uint8", "int32"]),
        (IMAGES / 255.0, TypeError, ["uint8", "float64"]),
        ({"image": IMAGES, "label": [0] * 5}, ValueError, ["10 integers", "(5,)"]),
        ({"image": IMAGES, "label": np.eye(10, dtype=int)}, ValueError, ["integers", "(10, 10)"]),
        ({"image": IMAGES, "label": [0.0] * 10}, ValueError, ["integers", "float64"]),
        ({"image": IMAGES, "label": ["cat"] * 10}, ValueError, ["integers", "<U3"]),
        ({"image": IMAGES, "label": [*range(9), -1]}, ValueError, ["from 0", "-1"]),
        ({"image": IMAGES, "captions": ["a", "b"]}, ValueError, ["10 images", "2"]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(data, error, words):
    refused(error, lambda: sources.arrays(data), *words)


def test_an_image_too_large_for_pillow_is_named(numbered, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    source = sources.folder(numbered, 4)
    refused(ValueError, lambda: source.read(0), "0.png cannot be read", "DecompressionBombError")


def test_all_that_pillow_reads_is_a_picture_and_the_rest_is_named(tmp_path):
    endings = ["jpg", "JPG", "jfif", "jpe", "png", "ppm", "webp", "tif", "gif", "bmp", "tga"]
    wanted = [save(tmp_path / f"{k}.{end}", IMAGES[0]) for k, end in enumerate(endings)]
    for name in ("0.txt", "notes.pdf", "weights.h5", "film.mpg"):
        (tmp_path / name).write_text("no picture")
    named = r"4 no pictures \(0\.txt, film\.mpg, notes\.pdf, \.\.\.\)"
    with pytest.warns(UserWarning, match=named):
        assert sources.list_pictures(tmp_path) == sorted(wanted)


def test_what_systems_leave_is_no_picture_and_no_class(tmp_path):
    wanted = [save(tmp_path / name / "1.png", IMAGES[0]) for name in ("cats", "dogs")]
    litter = [".thumbnails/1.png", "__MACOSX/cats/1.png", "cats/._1.png", ".checkpoints/1.png"]
    for name in litter:
        save(tmp_path / name, IMAGES[0])
    (tmp_path / "Thumbs.db").write_text("")
    (tmp_path / "dogs" / ".DS_Store").write_text("")
    with pytest.warns(UserWarning, match=r"6 hidden \(\.checkpoints, \.thumbnails, Thumbs"):
        source = sources.folder(tmp_path, 8)
    assert source.class_names == ["cats", "dogs"]
    assert len(source) == len(wanted)


def test_links_are_followed_but_not_in_circles(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    save(kept / "1.png", IMAGES[0])
    wanted = [save(folder / "cats" / "2.png", IMAGES[0])]
    for name in ("birds", "dogs"):
        (folder / name).symlink_to(kept, target_is_directory=True)
        wanted.append(folder / name / "1.png")
    (folder / "cats" / "3.png").symlink_to(kept / "1.png")
    wanted.append(folder / "cats" / "3.png")
    (folder / "cats" / "again").symlink_to(folder, target_is_directory=True)
    with pytest.warns(UserWarning, match=r"1 links to a folder above \(cats/again\)"):
        assert sources.list_pictures(folder) == sorted(wanted)


def test_a_folder_of_pictures_alone_is_taken_without_a_word(numbered, recwarn):
    assert len(sources.list_pictures(numbered)) == 10
    assert not recwarn
