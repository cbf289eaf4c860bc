"""Samples on disk: what is written is read, whole or not at all; grids."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stubs import random_images

from keras_uvit import data
from keras_uvit.evaluation import files, image_grid, read_images, write_npz, write_png, write_pngs

pytestmark = pytest.mark.once


def grey_images(n=3):
    return random_images(n)[..., :1]


def test_npz_is_the_adm_suites(tmp_path):
    images, labels = random_images(5), [3, 1, 4, 1, 5]
    path = tmp_path / "deep" / "samples.npz"
    write_npz(path, images, labels)
    np.testing.assert_array_equal(read_images(path), images)
    with np.load(path) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.issubdtype(file["arr_1"].dtype, np.integer)
        np.testing.assert_array_equal(file["arr_1"], labels)


def test_npz_without_labels_has_images_alone(tmp_path):
    write_npz(str(tmp_path / "samples.npz"), random_images(2))
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]


def test_png_keeps_every_bit_of_colour(tmp_path):
    images = random_images(4)[:, :, :6]  # taller than wide
    write_pngs(tmp_path / "deep" / "images", images)
    found = read_images(tmp_path / "deep" / "images")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)


def test_png_keeps_every_bit_of_grey(tmp_path):
    images = grey_images()
    write_pngs(tmp_path, images)
    with Image.open(tmp_path / "000001.png") as picture:
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), images[1, ..., 0])
    # Read for Inception, which wants three channels.
    np.testing.assert_array_equal(read_images(tmp_path), images.repeat(3, axis=-1))


def test_pngs_are_numbered_from_first(tmp_path):
    images = random_images(5)
    write_pngs(tmp_path, images[:2])
    write_pngs(tmp_path, images[2:], first=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"00000{k}.png" for k in range(5)]
    np.testing.assert_array_equal(read_images(tmp_path), images)


def test_the_order_of_a_folder_is_that_of_the_names(tmp_path):
    images = random_images(3)
    for name, image in zip(("b", "c", "a"), images):
        write_png(tmp_path / f"{name}.png", image)
    (tmp_path / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(read_images(tmp_path), images[[2, 0, 1]])


def test_what_a_killed_process_left_is_no_image(tmp_path):
    write_pngs(tmp_path, random_images(2))
    (tmp_path / "000001.png").rename(tmp_path / "tmp-123-000001.png")
    assert len(read_images(tmp_path)) == 1


@pytest.mark.parametrize(
    ("write", "name", "method"),
    [
        (lambda path: write_npz(path, random_images(3, seed=5)), "a.npz", (np, "savez")),
        (lambda path: write_png(path, random_images(1, seed=5)[0]), "a.png", (Image.Image, "save")),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, write, name, method, exists):
    path = tmp_path / name
    if exists:
        path.write_bytes(b"old")

    def fails(*arguments, **options):
        beside = next(a for a in arguments if isinstance(a, str | Path))
        Path(beside).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(*method, fails)
    with pytest.raises(OSError, match="disk full"):
        write(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if exists else [])


def test_writing_again_replaces(tmp_path):
    for seed in (0, 1):
        write_npz(tmp_path / "a.npz", random_images(2, seed=seed))
        write_png(tmp_path / "a.png", random_images(1, seed=seed)[0])
    np.testing.assert_array_equal(read_images(tmp_path / "a.npz"), random_images(2, seed=1))
    np.testing.assert_array_equal(read_images(tmp_path), random_images(1, seed=1))


def test_other_suffixes_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="a.npy must end in .npz"):
        write_npz(tmp_path / "deep" / "a.npy", random_images(1))
    with pytest.raises(ValueError, match="a.jpg must end in .png"):
        write_png(tmp_path / "deep" / "a.jpg", random_images(1)[0])
    assert not list(tmp_path.iterdir())


def test_a_path_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No images at .*nothing"):
        read_images(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="No picture in .*" + tmp_path.name):
        read_images(tmp_path)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz holds no images: .*\['mu'\]"):
        read_images(tmp_path / "other.npz")


def test_images_of_several_sizes_are_refused(tmp_path):
    write_png(tmp_path / "a.png", random_images(1)[0])
    write_png(tmp_path / "b.png", random_images(1, size=4)[0])
    with pytest.raises(ValueError, match="differ in size: a.png of 8x8 and b.png of 4x4"):
        read_images(tmp_path)


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


@pytest.mark.parametrize("content", ["truncated", "npy"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "samples.npz"
    write_npz(path, random_images(3))
    path.write_bytes(path.read_bytes()[:-100])
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, random_images(3))
    with pytest.raises(ValueError, match="samples.npz"):
        read_images(path)


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_images(tmp_path / "a.npz")


def test_nothing_is_left_beside_what_is_written(tmp_path):
    files.save_arrays(tmp_path / "a.npz", {"x": np.arange(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


# Grids --------------------------------------------------------------------------------------------


def test_a_grid_has_each_image_in_its_place_on_white():
    images = random_images(5)[:, :, :6] // 2  # none is white
    grid = image_grid(images, columns=3, gap=2)
    assert grid.shape == (8 + 2 + 8, 3 * 6 + 2 * 2, 3)
    assert grid.dtype == np.uint8
    seen = np.zeros(grid.shape[:2], bool)
    for k, image in enumerate(images):
        top, left = (k // 3) * 10, (k % 3) * 8
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 6], image)
        seen[top : top + 8, left : left + 6] = True
    assert (grid[~seen] == 255).all()
    assert (~seen).sum() == 18 * 22 - 5 * 48


@pytest.mark.parametrize(
    ("n", "shape"), [(1, (8, 8)), (2, (8, 18)), (4, (18, 18)), (5, (18, 28)), (9, (28, 28))]
)
def test_a_grid_is_about_square_unless_told(n, shape):
    assert image_grid(random_images(n)).shape == (*shape, 3)


def test_zoom_repeats_pixels_not_gaps():
    images = random_images(2)
    grid = image_grid(images, columns=1, zoom=3, gap=4)
    assert grid.shape == (24 + 4 + 24, 24, 3)
    for dy in range(3):
        for dx in range(3):
            np.testing.assert_array_equal(grid[dy:24:3, dx::3], images[0])
            np.testing.assert_array_equal(grid[28 + dy :: 3, dx::3], images[1])


def test_grey_grids_and_grids_without_gap():
    images = grey_images(4)
    grid = image_grid(images, gap=0)
    assert grid.shape == (16, 16, 1)
    np.testing.assert_array_equal(grid[8:, :8], images[2])
    assert image_grid(images, columns=4).shape == (8, 38, 1)


def test_a_grid_wider_than_its_images_is_white_there():
    grid = image_grid(random_images(2), columns=4)
    assert grid.shape == (8, 38, 3)
    assert (grid[:, 18:] == 255).all()
