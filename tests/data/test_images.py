"""Folders of images: classes, the crop, odd files, mirror images, and training on one."""

import numpy as np
import pytest
from caches import grey, noise, save
from PIL import Image
from tiny import diffusion_model, fit, refused

from keras_uvit.data import image_folder, images, pictures

pytestmark = pytest.mark.once


def _read(path, image_size=8, **options):
    return image_folder(path, image_size, **{"batch_size": 1, "verbose": 0, **options})


def _read_one(path, image_size=8, **options):
    return _read(path, image_size, **options).images[0]


def _make(path):
    """A file by its name: a grey picture, one that is cut, or none that anyone can read."""
    if path.name == "depth.tif":
        save(path, np.zeros((8, 8), "float32"))
    elif path.name == "deep.tif":
        save(path, np.zeros((8, 8), "int32"))
    elif path.suffix in (".png", ".jpg"):
        whole = save(path, noise(64, 64)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if path.stem == "cut" else whole)
    else:
        path.write_bytes(b"" if path.stem == "empty" else b"no image")
    return path


# Classes ------------------------------------------------------------------------------------------


def test_sub_folders_are_classes_in_sorted_order(tmp_path):
    for name, level in (("zebra", 30), ("ant/deep/er", 10), ("bee", 20)):
        for k in range(2):
            save(tmp_path / name / f"{k}.PNG", grey(level + k))
    data = _read(tmp_path, batch_size=3)
    assert (data.class_names, data.num_classes) == (["ant", "bee", "zebra"], 3)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.images[:, 0, 0, 0].tolist() == [10, 11, 20, 21, 30, 31]
    assert {key: (value.shape, value.dtype.name) for key, value in data[0].items()} == {
        "image": ((3, 8, 8, 3), "uint8"),
        "label": ((3,), "int32"),
    }


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (["0.png", "1.png"], {}),
        (["cat/0.png", "1.png"], {"labels": None}),
        (["cat/0.png", "dog/1.png"], {"labels": None}),
    ],
)
def test_a_flat_folder_has_no_labels_nor_has_one_that_is_asked_for_none(tmp_path, files, options):
    for name in files:
        save(tmp_path / name, grey(0))
    data = _read(tmp_path, corrupt="skip", **options)
    assert (data.labels, data.class_names, data.num_classes) == (None, None, None)
    assert (len(data.images), [*data[0]], data.skipped) == (2, ["image"], [])


# The crop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (8, 14), (37, 50), (100, 65), (5, 7), (16, 16), (8, 33)])
def test_the_crop_is_adms(tmp_path, shape):
    save(tmp_path / "0.png", noise(*shape))
    # The crop of Dhariwal and Nichol's program, for square sizes.
    image = Image.open(tmp_path / "0.png")
    while min(*image.size) >= 2 * 8:
        image = image.resize(tuple(n // 2 for n in image.size), Image.Resampling.BOX)
    scale = 8 / min(*image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), Image.Resampling.BICUBIC)
    image = np.asarray(image)
    top, left = (image.shape[0] - 8) // 2, (image.shape[1] - 8) // 2
    np.testing.assert_array_equal(_read_one(tmp_path), image[top : top + 8, left : left + 8])


@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_a_size_need_not_be_square(tmp_path, size):
    image = noise(8, 8)
    save(tmp_path / "0.png", image)
    top, left = (8 - size[0]) // 2, (8 - size[1]) // 2
    cut = image[top : top + size[0], left : left + size[1]]
    np.testing.assert_array_equal(_read_one(tmp_path, size), cut)


@pytest.mark.parametrize(
    ("shape", "size"), [((40, 30), (16, 16)), ((33, 50), (16, 16)), ((40, 40), (8, 16))]
)
def test_lanczos_resizes_the_centre_at_once(shape, size):
    pixels = noise(*shape)
    fitted = pictures.fitted(Image.fromarray(pixels), size, method="lanczos")
    side = min(shape)
    height, width = side * size[0] // max(size), side * size[1] // max(size)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    cut = Image.fromarray(pixels[top : top + height, left : left + width])
    expected = cut.resize(size[::-1], Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fitted, np.asarray(expected))


def test_a_part_is_cut_out_before_anything_is_resized(tmp_path):
    pixels = noise(10, 14)
    save(tmp_path / "0.png", pixels)
    part = pixels[3:7, 5:11]
    np.testing.assert_array_equal(_read_one(tmp_path, (4, 6), crop=(3, 5, 4, 6)), part)
    halved = _read_one(tmp_path, (2, 3), crop=(3, 5, 4, 6))
    mean = part.reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    # Pillow's box filter goes along rows, then columns, and rounds each time.
    np.testing.assert_allclose(halved, mean, atol=1)
    image = Image.fromarray(pixels)  # without a size it keeps its own
    np.testing.assert_array_equal(pictures.fitted(image, None, crop=(3, 5, 4, 6)), part)
    assert pictures.fitted(image, None, channels=1).shape == (10, 14, 1)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("method", pictures.FITS)
def test_a_very_long_picture_is_not_enlarged_whole(monkeypatch, size, method):
    made, resize = [], Image.Image.resize

    def recorded(image, *arguments, **options):
        made.append(resize(image, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(Image.Image, "resize", recorded)
    fitted = pictures.fitted(Image.new("RGB", size, "red"), (256, 256), method=method)
    assert fitted.shape == (256, 256, 3)
    assert (fitted == [255, 0, 0]).all()
    assert max(image.width * image.height for image in made) <= 16 * 256 * 256


# Kinds of files -----------------------------------------------------------------------------------

# How an upright image is stored under each EXIF orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def test_images_are_turned_upright_by_their_exif_tag(tmp_path):
    image, exif = noise(6, 8), Image.Exif()
    for orientation, stored in STORED.items():
        exif[0x0112] = orientation
        save(tmp_path / f"{orientation}.png", np.ascontiguousarray(stored(image)), exif=exif)
    np.testing.assert_array_equal(_read(tmp_path, (6, 8)).images, [image] * 8)


def _made(mode, value):
    """A picture in a mode of Pillow, all of it of one value."""
    image = Image.new(mode, (8, 8), value)
    if mode == "P":
        image.putpalette([200, 100, 0])
    return image


# A picture, the ending of its file, and what 8-bit colour it has.
MODES = [
    (_made("1", 1), "png", (255, 255, 255)),
    (_made("L", 77), "png", (77, 77, 77)),
    (_made("P", 0), "gif", (200, 100, 0)),
    (_made("RGB", (1, 2, 3)), "png", (1, 2, 3)),
    (_made("CMYK", (0, 255, 255, 0)), "tif", (255, 0, 0)),
    (_made("I;16", 40_000), "png", (156, 156, 156)),
    (_made("I;16", 40_000), "tif", (156, 156, 156)),
    (_made("I", 40_000), "pgm", (156, 156, 156)),
    (_made("RGBA", (1, 2, 3, 255)), "png", (1, 2, 3)),
    (_made("RGBA", (255, 0, 0, 51)), "png", (255, 204, 204)),  # half transparent, on white
]


def test_every_kind_of_pixel_keeps_its_brightness(tmp_path):
    for k, (image, ending, _) in enumerate(MODES):
        image.save(tmp_path / f"{k:02}.{ending}")
    found = _read(tmp_path).images
    assert len(found) == len(MODES)
    # 40,000 of 65,535 is 155.6 of 255; either rounding will do.
    for image, (_, _, colour) in zip(found, MODES):
        np.testing.assert_allclose(image, np.full((8, 8, 3), colour), atol=1)


# Pictures without a pixel to be seen, whose hidden colour is magenta or white.
HIDDEN = {
    "RGBA": (_made("RGBA", (255, 0, 255, 0)), {}),
    "LA": (_made("LA", (255, 0)), {}),
    "P": (_made("P", 0), {"transparency": 0}),
    "RGB": (_made("RGB", (255, 0, 255)), {"transparency": (255, 0, 255)}),
}


@pytest.mark.parametrize("mode", HIDDEN)
def test_the_background_is_seen_through_transparent_pixels(tmp_path, mode):
    image, options = HIDDEN[mode]
    image.save(tmp_path / "0.png", **options)
    assert np.unique(_read_one(tmp_path)).tolist() == [255]  # white
    assert np.unique(_read_one(tmp_path, background="black")).tolist() == [0]


def test_one_channel_is_luminance(tmp_path):
    save(tmp_path / "0.png", np.full((8, 8, 3), [255, 0, 0], "uint8"))
    save(tmp_path / "1.png", noise(8, 8, channels=1))
    data = _read(tmp_path, channels=1)
    assert data.images.shape == (2, 8, 8, 1)
    assert np.unique(data.images[0]).tolist() == [76]  # 0.299 of 255, ITU-R 601
    np.testing.assert_array_equal(data.images[1], noise(8, 8, channels=1))


# Damaged files ------------------------------------------------------------------------------------


def test_skipped_files_are_listed_and_labels_stay_aligned(tmp_path):
    for k in range(9):
        save(tmp_path / "acd"[k % 3] / f"{k}.png", grey(k))
    (tmp_path / "b").mkdir()  # of it nothing is left
    bad = [_make(tmp_path / name) for name in ("a/cut.jpg", "b/text.gif", "c/empty.gif")]
    (tmp_path / "c" / "1.png").write_bytes(b"")  # the first of its class
    data = _read(tmp_path, corrupt="skip")
    named = sorted([*bad, tmp_path / "c" / "1.png"])
    assert len(data.skipped) == len(named)
    assert all(f"{path} cannot be read" in reason for path, (_, reason) in zip(named, data.skipped))
    levels = data.images[:, 0, 0, 0]
    assert sorted(levels) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert data.class_names == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(data.labels, np.array([0, 2, 3])[levels % 3])


@pytest.mark.parametrize(
    ("files", "options", "error", "words"),
    [
        (None, {}, FileNotFoundError, ["No folder at", "photos"]),
        ([], {}, FileNotFoundError, ["No image in", ".jpeg", ".png"]),
        (["notes.txt"], {}, FileNotFoundError, ["No image in"]),
        (["cat/0.png", "stray.png"], {}, ValueError, ["stray.png has no class", "labels=None"]),
        (["0.png", "cut.jpg"], {}, ValueError, ["cut.jpg cannot be read", 'corrupt="skip"']),
        (["0.png", "text.gif"], {}, ValueError, ["text.gif cannot be read", 'corrupt="skip"']),
        (["0.png", "empty.gif"], {}, ValueError, ["empty.gif cannot be read", 'corrupt="skip"']),
        (["depth.tif"], {}, ValueError, ["depth.tif cannot be read", "floats"]),
        (["deep.tif"], {}, ValueError, ["deep.tif cannot be read", "integers of 32 bits"]),
        (["0.png"], {"crop": (0, 0, 65, 64)}, ValueError, ["0.png", "(0, 0, 65, 64)"]),
        (["0.png"], {"crop": (-1, 0, 4, 4)}, ValueError, ["0.png", "(-1, 0, 4, 4)"]),
        (["0.png"], {"batch_size": 0}, ValueError, ["number of images, 1", "0"]),
        (["0.png"], {"batch_size": 2}, ValueError, ["number of images, 1", "2"]),
        (["0.png"], {"corrupt": "ignore"}, ValueError, ["corrupt", "ignore"]),
        (["0.png"], {"channels": 4}, ValueError, ["channels", "4"]),
        (["a/0.png"], {"labels": "folders"}, ValueError, ["labels", "folders"]),
        (["0.png"], {"image_size": 0}, ValueError, ["image_size", "0"]),
        (["0.png"], {"image_size": (8, 8, 3)}, ValueError, ["image_size", "8, 8, 3"]),
        (["0.png"], {"background": "grey"}, ValueError, ["background", "grey"]),
        (["0.png", "no.gif"], {"batch_size": 2, "corrupt": "skip"}, ValueError, ["Only 1 of 2"]),
    ],
)
def test_folders_and_arguments_that_do_not_fit_are_refused(tmp_path, files, options, error, words):
    path = tmp_path / "photos"
    if files is not None:
        path.mkdir()
        for name in files:
            (path / name).parent.mkdir(exist_ok=True)
            _make(path / name)
    refused(error, lambda: _read(path, **options), *words)


def test_more_images_than_fit_in_memory_are_refused_before_reading(numbered, monkeypatch):
    (numbered / "text.png").write_text("reading this would raise another error")
    monkeypatch.setattr(images, "MAX_BYTES", 11 * 8 * 8 * 3 - 1)
    refused(ValueError, lambda: _read(numbered), "11 images of 8x8x3", "write_images")
    monkeypatch.setattr(images, "MAX_BYTES", 11 * 8 * 8 * 3)
    assert len(_read(numbered, corrupt="skip").images) == 10


# Mirror images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False])
def test_flip_only_mirrors_left_to_right(tmp_path, flip):
    originals = [noise(8, 8, k) for k in range(10)]
    for k, image in enumerate(originals):
        save(tmp_path / f"{k}.png", image)
    data, fates = _read(tmp_path, batch_size=10, flip=flip), []
    for epoch in range(4):
        data.epoch, fate = epoch, {}
        for image in data[0]["image"]:
            for k, original in enumerate(originals):
                for mirrored, expected in enumerate((original, original[:, ::-1])):
                    if np.array_equal(image, expected):
                        fate[k] = mirrored
        assert len(fate) == 10  # each image is there, as it was or mirrored
        fates.append([fate[k] for k in range(10)])
    share = np.mean(fates)
    assert 0 < share < 1 if flip else share == 0
    assert len(set(map(tuple, fates))) > 1 or not flip  # anew each epoch
    np.testing.assert_array_equal(data.images, originals)  # reading changes nothing


def test_a_model_trains_on_a_folder(tmp_path):
    for k in range(8):
        save(tmp_path / "abc"[k % 3] / f"{k}.png", noise(10, 8, k))
    model = diffusion_model(dict(image_shape=(8, 8, 3), patch_size=4))
    losses = fit(model, _read(tmp_path, batch_size=2), batch_size=None, epochs=2)["loss"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
