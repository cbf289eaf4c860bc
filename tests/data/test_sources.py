"""Samples one at a time: reading ahead in threads, damaged samples, arrays, cutting out first."""

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from keras_uvit.data import pictures, sources
from keras_uvit.data.sources import Source

pytestmark = pytest.mark.once

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 10, 14, 3), dtype="uint8")


def _source(read, length=20):
    return Source("some", length, (1, 1, 1), read)


def _number(i):
    return {"image": np.full((1, 1, 1), i, "uint8")}


def _groups(source, rows=range(20), batch_size=4, corrupt="raise"):
    return list(source.batches(np.array(rows), batch_size, corrupt))


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 20, 1000])
@pytest.mark.parametrize("rows", [range(20), [7, 3, 3, 19, 0], [5], []])
def test_batches_are_the_rows_in_their_order(rows, batch_size):
    groups = _groups(_source(_number), rows, batch_size)
    found = [index for group in groups for index, _ in group]
    assert found == list(rows)
    assert all(sample["image"].item() == index for group in groups for index, sample in group)
    assert all(len(group) == batch_size for group in groups[:-1])


def test_the_order_does_not_depend_on_which_sample_is_read_first():
    def read(i):
        time.sleep(0.004 if i % 4 == 0 else 0.0)
        return _number(i)

    assert [i for group in _groups(_source(read)) for i, _ in group] == list(range(20))


def test_indices_are_ints_of_python():
    kinds = set()
    _groups(_source(lambda i: kinds.add(type(i)) or _number(i)))
    assert kinds == {int}


def test_one_batch_is_read_ahead_and_no_more():
    begun, turn = set(), threading.Event()

    def read(i):
        begun.add(i)
        if i >= 4:
            turn.set()
        return _number(i)

    groups = _source(read).batches(np.arange(20), 4)
    next(groups)
    assert turn.wait(10)  # the second batch, though nobody has asked for it
    time.sleep(0.05)
    assert begun <= set(range(8))
    next(groups)
    time.sleep(0.05)
    assert begun <= set(range(12))
    groups.close()


def test_several_samples_are_read_at_once(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=10)  # passed by two threads, or broken

    def read(i):
        both.wait()
        return _number(i)

    assert len(_groups(_source(read), range(2), 2)) == 1


def test_who_stops_early_stops_the_reading():
    count = 0

    def read(i):
        nonlocal count
        count += 1
        return _number(i)

    groups = _source(read, 1000).batches(np.arange(1000), 4)
    next(groups)
    groups.close()
    threads = threading.active_count()
    assert count <= 8
    time.sleep(0.05)
    assert count <= 8
    assert threading.active_count() <= threads


# Damaged samples ----------------------------------------------------------------------------------


def _damaged(*bad, error=ValueError):
    def read(i):
        if i in bad:
            raise error(f"{i}.png cannot be read")
        return _number(i)

    return _source(read)


@pytest.mark.parametrize("bad", [0, 5, 19])
def test_a_damaged_sample_stops_the_reading_and_is_named(bad):
    with pytest.raises(ValueError, match=f"^{bad}.png cannot be read"):
        _groups(_damaged(bad))


def test_damaged_samples_are_handed_out_as_the_reason():
    groups = _groups(_damaged(0, 5, 6, 19), corrupt="skip")
    samples = dict(pair for group in groups for pair in group)
    reasons = {i: sample for i, sample in samples.items() if isinstance(sample, str)}
    assert reasons == {i: f"{i}.png cannot be read" for i in (0, 5, 6, 19)}
    assert list(samples) == list(range(20))


@pytest.mark.parametrize("corrupt", ["raise", "skip"])
@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyError])
def test_other_errors_are_nobodys_damaged_sample(error, corrupt):
    with pytest.raises(error, match="5.png"):
        _groups(_damaged(5, error=error), corrupt=corrupt)


# Arrays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (IMAGES, None),
        ({"image": IMAGES}, None),
        ({"image": IMAGES, "label": [2, 0, 1, 1, 0, 2]}, [2, 0, 1, 1, 0, 2]),
    ],
)
def test_arrays_are_read_one_by_one(data, labels):
    source = sources.arrays(data, "mine")
    assert (source.name, len(source), source.shape) == ("mine", 6, (10, 14, 3))
    assert source.field == "image"
    assert source.num_classes == (None if labels is None else 3)
    for i in range(6):
        sample = source.read(i)
        np.testing.assert_array_equal(sample["image"], IMAGES[i])
        assert sample.get("label") == (None if labels is None else labels[i])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"image": IMAGES, "caption": [0] * 6}, ValueError, 'keys "image".*caption'),
        ({"label": [0] * 6}, ValueError, 'keys "image".*label'),
        (IMAGES[0], ValueError, r"shape \(n, H, W, C\).*\(10, 14, 3\)"),
        (IMAGES[:0], ValueError, r"n >= 1.*\(0, 10, 14, 3\)"),
        (IMAGES.astype("int32"), TypeError, "uint8.*int32"),
        (IMAGES / 255.0, TypeError, "uint8.*float64"),
        ({"image": IMAGES, "label": [0] * 5}, ValueError, r"6 integers.*\(5,\)"),
        ({"image": IMAGES, "label": np.eye(6, dtype=int)}, ValueError, r"integers.*\(6, 6\)"),
        ({"image": IMAGES, "label": [0.0] * 6}, ValueError, "integers.*float64"),
        ({"image": IMAGES, "label": ["cat"] * 6}, ValueError, "integers.*<U3"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        sources.arrays(data)


def test_negative_labels_are_refused():
    with pytest.raises(ValueError, match="-1"):
        sources.arrays({"image": IMAGES, "label": [0, 1, -1, 2, 0, 1]})


# Folders ------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for k, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    return tmp_path


def test_a_folder_is_read_when_it_is_asked_for(photos):
    source = sources.folder(photos, (10, 14))
    (photos / "3.png").write_text("changed since")
    np.testing.assert_array_equal(source.read(2)["image"], IMAGES[2])
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        source.read(3)


def test_a_part_is_cut_out_before_anything_is_resized(photos):
    source = sources.folder(photos, (4, 6), crop=(3, 5, 4, 6))
    for i, image in enumerate(IMAGES):
        np.testing.assert_array_equal(source.read(i)["image"], image[3:7, 5:11])
    halved = sources.folder(photos, (2, 3), crop=(3, 5, 4, 6)).read(0)["image"]
    mean = IMAGES[0, 3:7, 5:11].reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    # Pillow's box filter goes along rows, then columns, and rounds each time.
    np.testing.assert_allclose(halved, mean, atol=1)


def test_without_a_size_an_image_keeps_its_own():
    image = Image.fromarray(IMAGES[0])
    np.testing.assert_array_equal(pictures.fitted(image, None), IMAGES[0])
    cut = pictures.fitted(image, None, crop=(1, 2, 3, 4))
    np.testing.assert_array_equal(cut, IMAGES[0, 1:4, 2:6])
    assert pictures.fitted(image, None, channels=1).shape == (10, 14, 1)


@pytest.mark.parametrize("crop", [(0, 0, 11, 14), (8, 0, 4, 4), (-1, 0, 4, 4)])
def test_a_part_that_is_not_in_the_image_is_refused(photos, crop):
    source = sources.folder(photos, 4, crop=crop)
    with pytest.raises(ValueError, match=r"0\.png"):
        source.read(0)


def test_an_image_too_large_for_pillow_is_named(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"0\.png cannot be read \(DecompressionBombError"):
        sources.folder(photos, 4).read(0)


# Folders ------------------------------------------------------------------------------------------


def _picture(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGES[0]).save(path, **options)
    return path


def test_all_that_pillow_reads_is_a_picture_and_the_rest_is_named(tmp_path):
    endings = ["jpg", "JPG", "jfif", "jpe", "png", "ppm", "webp", "tif", "gif", "bmp", "tga"]
    wanted = [_picture(tmp_path / f"{k}.{end}") for k, end in enumerate(endings)]
    for name in ("0.txt", "notes.pdf", "weights.h5", "film.mpg"):
        (tmp_path / name).write_text("no picture")
    with pytest.warns(
        UserWarning, match=r"4 no pictures \(0\.txt, film\.mpg, notes\.pdf, \.\.\.\)"
    ):
        assert sources.list_pictures(tmp_path) == sorted(wanted)


def test_what_systems_leave_is_no_picture_and_no_class(tmp_path):
    wanted = [_picture(tmp_path / name / "1.png") for name in ("cats", "dogs")]
    for name in (
        ".thumbnails/1.png",
        "__MACOSX/cats/1.png",
        "cats/._1.png",
        ".ipynb_checkpoints/1.png",
    ):
        _picture(tmp_path / name)
    (tmp_path / "Thumbs.db").write_text("")
    (tmp_path / "dogs" / ".DS_Store").write_text("")
    with pytest.warns(UserWarning, match=r"6 hidden \(\.ipynb_checkpoints, \.thumbnails, Thumbs"):
        source = sources.folder(tmp_path, 8)
    assert source.class_names == ["cats", "dogs"]
    assert len(source) == len(wanted)


def test_links_are_followed_but_not_in_circles(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    _picture(kept / "1.png")
    wanted = [_picture(folder / "cats" / "2.png")]
    for name in ("birds", "dogs"):
        (folder / name).symlink_to(kept, target_is_directory=True)
        wanted.append(folder / name / "1.png")
    (folder / "cats" / "3.png").symlink_to(kept / "1.png")
    wanted.append(folder / "cats" / "3.png")
    (folder / "cats" / "again").symlink_to(folder, target_is_directory=True)
    with pytest.warns(UserWarning, match=r"1 links to a folder above \(cats/again\)"):
        assert sources.list_pictures(folder) == sorted(wanted)


def test_a_folder_of_pictures_alone_is_taken_without_a_word(tmp_path, recwarn):
    _picture(tmp_path / "1.png")
    assert len(sources.list_pictures(tmp_path)) == 1
    assert not recwarn
