"""Samples on disk: what is written is read, whole or not at all; grids, with captions too."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stubs import random_images
from tiny import refused

from keras_uvit import data
from keras_uvit.evaluation import (
    captioned_grid,
    image_grid,
    read_images,
    write_film,
    write_npz,
    write_png,
    write_pngs,
)

pytestmark = pytest.mark.once


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("labels", [[3, 1, 4, 1, 5], None])
def test_npz_is_the_adm_suites(tmp_path, labels):
    images, path = random_images(5), tmp_path / "deep" / "samples.npz"
    write_npz(str(path), images[::-1], labels)
    write_npz(path, images, labels)  # replaces it
    np.testing.assert_array_equal(read_images(path), images)
    with np.load(path) as file:
        assert file["arr_0"].dtype == np.uint8
        assert file.files == ["arr_0"] + ["arr_1"] * (labels is not None)
        if labels:
            assert np.issubdtype(file["arr_1"].dtype, np.integer)
            np.testing.assert_array_equal(file["arr_1"], labels)
    assert names(path.parent) == ["samples.npz"]


def test_pngs_keep_every_bit_and_are_numbered(tmp_path):
    images, folder = random_images(5)[:, :, :6], tmp_path / "deep" / "images"  # taller than wide
    write_pngs(folder, images[2:], first=2)
    write_pngs(folder, images[[4, 1]])
    write_pngs(folder, images[:1])  # replaces it
    (folder / "notes.txt").write_text("not an image")
    assert names(folder) == [*(f"00000{k}.png" for k in range(5)), "notes.txt"]
    found = read_images(folder)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)
    # Of a process that was killed.
    (folder / "000001.png").rename(folder / "tmp-123-000001.png")
    np.testing.assert_array_equal(read_images(folder), images[[0, 2, 3, 4]])


def test_grey_pngs_are_read_in_colour(tmp_path):
    images = random_images(3)[..., :1]
    write_pngs(tmp_path, images)
    with Image.open(tmp_path / "000001.png") as picture:
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), images[1, ..., 0])
    # Inception wants three channels.
    np.testing.assert_array_equal(read_images(tmp_path), images.repeat(3, axis=-1))


@pytest.mark.parametrize("old", [[b"old"], []])
@pytest.mark.parametrize(
    ("write", "name", "method"),
    [
        (lambda path: write_npz(path, random_images(3)), "a.npz", (np, "savez")),
        (lambda path: write_png(path, random_images(1)[0]), "a.png", (Image.Image, "save")),
    ],
)
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, write, name, method, old):
    for content in old:
        (tmp_path / name).write_bytes(content)

    def fails(*arguments, **options):
        beside = next(a for a in arguments if isinstance(a, str | Path))
        Path(beside).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(*method, fails)
    refused(OSError, lambda: write(tmp_path / name), "disk full")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == old


def test_a_folder_is_read_by_the_code_that_training_reads_it_with(tmp_path):
    image = random_images(1)[0]
    (tmp_path / "deep").mkdir()
    Image.fromarray(image).save(tmp_path / "1.PNG")
    Image.fromarray(image[..., 0].astype("uint16") * 256).save(tmp_path / "2.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "deep" / "3.webp", lossless=True)
    Image.fromarray(image).save(tmp_path / "4.bmp")
    Image.new("RGBA", (8, 8), (255, 0, 255, 0)).save(tmp_path / "5.png")
    (tmp_path / ".6.png").write_bytes(b"a resource fork")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(image).save(tmp_path / "7.png", exif=exif)
    with pytest.warns(UserWarning, match="1 of 6 .* may lose pixels, such as 3.webp"):
        found = read_images(tmp_path)
    trained = data.image_folder(tmp_path, 8, labels=None, verbose=0)
    np.testing.assert_array_equal(found, trained.images)
    assert len(found) == 6


# Refusals -----------------------------------------------------------------------------------------


def damaged(damage):
    def make(folder):
        write_npz(folder / "a.npz", random_images(3))
        content = bytearray((folder / "a.npz").read_bytes())
        (folder / "a.npz").write_bytes(damage(content))

    return make


def overwritten(content):
    content[200:240] = b"?" * 40  # within the pixels
    return content


def zip_of_text(folder):
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("arr_0", "text")


def bare_array(folder):
    np.save(folder / "a.npy", random_images(3))
    (folder / "a.npy").rename(folder / "a.npz")


def two_sizes(folder):
    write_png(folder / "a.png", random_images(1)[0])
    write_png(folder / "b.png", random_images(1, size=4)[0])


@pytest.mark.parametrize(
    ("make", "path", "error", "words"),
    [
        (lambda _: None, "gone", FileNotFoundError, ["No images at", "gone"]),
        (lambda _: None, ".", FileNotFoundError, ["No picture in"]),
        (two_sizes, ".", ValueError, ["a.png of 8x8", "b.png of 4x4"]),
        (damaged(lambda content: content[:-100]), "a.npz", ValueError, ["a.npz is damaged"]),
        (damaged(overwritten), "a.npz", ValueError, ["a.npz is damaged"]),
        (damaged(lambda _: b"text"), "a.npz", ValueError, ["a.npz is damaged"]),
        (zip_of_text, "a.npz", ValueError, ["a.npz", "no images"]),
        (bare_array, "a.npz", ValueError, ["a.npz is damaged"]),
        (lambda p: np.savez(p / "a", mu=1), "a.npz", ValueError, ["a.npz", "no images", "['mu']"]),
        (
            lambda p: np.savez(p / "a", arr_0=np.array([{}], object)),
            "a.npz",
            ValueError,
            ["allow_pickle=False"],
        ),
    ],
)
def test_what_holds_no_images_is_named(tmp_path, make, path, error, words):
    make(tmp_path)
    refused(error, lambda: read_images(tmp_path / path), *words)


@pytest.mark.parametrize(("write", "end"), [(write_npz, "npz"), (write_png, "png")])
def test_other_suffixes_are_refused_before_anything_is_made(tmp_path, write, end):
    path = tmp_path / "deep" / "a.jpg"
    refused(ValueError, lambda: write(path, random_images(1)[0]), f"a.jpg must end in .{end}")
    assert not list(tmp_path.iterdir())


# Grids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [1, 3])
def test_a_grid_has_each_image_in_its_place_on_white(zoom):
    images = random_images(5)[:, :, :6] // 2  # none is white
    grid = image_grid(images, columns=3, gap=2, zoom=zoom)
    height, width = 8 * zoom, 6 * zoom
    assert grid.shape == (2 * height + 2, 3 * width + 2 * 2, 3)  # gaps are not enlarged
    assert grid.dtype == np.uint8
    seen = np.zeros(grid.shape[:2], bool)
    for k, image in enumerate(images):
        top, left = k // 3 * (height + 2), k % 3 * (width + 2)
        place = slice(top, top + height), slice(left, left + width)
        np.testing.assert_array_equal(grid[place], image.repeat(zoom, 0).repeat(zoom, 1))
        seen[place] = True
    assert (grid[~seen] == 255).all()


@pytest.mark.parametrize(
    ("n", "options", "shape"),
    [
        (1, {}, (8, 8)),
        (2, {}, (8, 18)),
        (5, {}, (18, 28)),  # about square
        (9, {}, (28, 28)),
        (4, dict(gap=0), (16, 16)),
        (2, dict(columns=4), (8, 38)),  # wider than its images
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_of_grids(n, options, shape, channels):
    assert image_grid(random_images(n)[..., :channels], **options).shape == (*shape, channels)


WIDE = np.random.default_rng(0).integers(0, 256, (5, 30, 100, 3), "uint8")


def test_a_grid_holds_images_and_captions():
    grid = captioned_grid(WIDE, ["a dog"] * 5, columns=3, zoom=2)
    blank = captioned_grid(WIDE, [""] * 5, columns=3, zoom=2)
    assert grid.shape == blank.shape
    assert grid.shape[1] == 3 * 200 + 2 * 10
    np.testing.assert_array_equal(grid[:60:2, :200:2], WIDE[0])
    np.testing.assert_array_equal(grid[:60], blank[:60])
    assert (grid[60:80] != blank[60:80]).any()  # the text
    assert captioned_grid(WIDE[..., :1], list("abcde")).shape[-1] == 3  # grey ones too


def test_long_captions_take_more_lines_up_to_eight():
    heights = [captioned_grid(WIDE[:1], ["word " * n]).shape[0] for n in (1, 10, 30, 300, 3000)]
    assert heights[0] < heights[1] < heights[2] <= heights[3] == heights[4]


@pytest.mark.parametrize("captions", [["a"], "abcde", []])
def test_there_is_a_caption_an_image(captions):
    refused(ValueError, lambda: captioned_grid(WIDE, captions), "5 captions")


@pytest.mark.parametrize("channels", [1, 3])
def test_films_are_strips_or_move(tmp_path, channels):
    frames = random_images(6)[..., :channels].reshape(3, 2, *random_images(1).shape[1:3], channels)
    height, width = frames.shape[2:4]
    write_film(tmp_path / "film.png", frames, zoom=2)
    strip = np.asarray(Image.open(tmp_path / "film.png")).reshape(-1, 3 * 2 * width + 4, channels)
    # A row an image, a column a frame.
    shown = strip[2 * height + 2 :: 2, 2 * (2 * width + 2) :: 2]
    np.testing.assert_array_equal(shown, frames[2, 1])
    write_film(tmp_path / "film.webp", frames)
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames == 3
        film.seek(2)
        last = np.asarray(film.convert("RGB"))
    np.testing.assert_array_equal(last[:height, :width] - frames[2, 0], 0)
    np.testing.assert_array_equal(last[:height, width + 2 :] - frames[2, 1], 0)


def test_films_of_another_shape_or_name_are_refused(tmp_path):
    frames = random_images(4)
    refused(ValueError, lambda: write_film(tmp_path / "film.png", frames), "(k, n, H, W, C)")
    floats = frames[None].astype("float32")
    refused(ValueError, lambda: write_film(tmp_path / "film.png", floats), "uint8", "float32")
    refused(ValueError, lambda: write_film(tmp_path / "film.gif", frames[None]), ".png or .webp")
    assert names(tmp_path) == []
