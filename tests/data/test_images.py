"""Folders of images: classes, the crop, odd files, order, and training on one."""

import numpy as np
import pytest
from PIL import Image

from keras_uvit import DiffusionModel, UViT
from keras_uvit.data import image_folder, images, pictures

pytestmark = pytest.mark.once


def _noise(height, width, seed=0, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype="uint8")


def _save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.squeeze()).save(path, **options)


def _read(path, image_size=8, **options):
    return image_folder(path, image_size, **{"batch_size": 1, "verbose": 0, **options})


def _read_one(path, image_size=8, **options):
    return _read(path, image_size, **options).images[0]


@pytest.fixture
def numbered(tmp_path):
    """Ten images, each of one grey level, its number; no classes."""
    for k in range(10):
        _save(tmp_path / f"{k}.png", np.full((8, 8, 3), k, "uint8"))
    return tmp_path


def _numbers(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def _epoch(data, epoch):
    data.epoch = epoch
    return [_numbers(data[i]) for i in range(len(data))]


def _damage(path, kind):
    """Writes a file that is no image, though its name says so."""
    if kind == "truncated.jpg":
        _save(path / kind, _noise(64, 64))
        whole = (path / kind).read_bytes()
        (path / kind).write_bytes(whole[: len(whole) // 2])
    elif kind == "text.png":
        (path / kind).write_text("not an image")
    else:
        (path / kind).write_bytes(b"")
    return path / kind


DAMAGED = ["truncated.jpg", "text.png", "empty.gif"]


# Classes ------------------------------------------------------------------------------------------


def test_sub_folders_are_classes_in_sorted_order(tmp_path):
    for name, level in (("zebra", 30), ("ant", 10), ("bee", 20)):
        for k in range(2):
            _save(tmp_path / name / f"{k}.png", np.full((8, 8, 3), level + k, "uint8"))
    data = _read(tmp_path)
    assert data.class_names == ["ant", "bee", "zebra"]
    assert data.num_classes == 3
    assert data.labels.dtype == np.int32
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.images[:, 0, 0, 0].tolist() == [10, 11, 20, 21, 30, 31]


def test_a_class_holds_the_images_of_its_inner_folders_too(tmp_path):
    _save(tmp_path / "cat" / "deep" / "er" / "0.png", _noise(8, 8))
    _save(tmp_path / "dog" / "0.png", _noise(8, 8))
    assert _read(tmp_path).class_names == ["cat", "dog"]


def test_a_flat_folder_has_no_labels(numbered):
    data = _read(numbered)
    assert data.labels is None
    assert data.class_names is None
    assert data.num_classes is None
    assert sorted(data[0]) == ["image"]


@pytest.mark.parametrize("beside", [True, False])
def test_labels_none_ignores_sub_folders(tmp_path, beside):
    _save(tmp_path / "cat" / "0.png", _noise(8, 8))
    _save(tmp_path / ("0.png" if beside else "dog/0.png"), _noise(8, 8))
    data = _read(tmp_path, labels=None)
    assert data.labels is None
    assert len(data.images) == 2


def test_other_files_are_passed_over_and_capital_extensions_are_not(tmp_path):
    _save(tmp_path / "a.PNG", _noise(8, 8))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert len(_read(tmp_path).images) == 1


def test_a_batch_has_the_shapes_and_types_that_fit_takes(tmp_path):
    for k in range(4):
        _save(tmp_path / "ab"[k % 2] / f"{k}.png", _noise(9, 12, k))
    batch = _read(tmp_path, batch_size=3)[0]
    assert batch["image"].shape == (3, 8, 8, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (3,)
    assert batch["label"].dtype == np.int32


# The crop -----------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_passes_through_unchanged(tmp_path):
    image = _noise(8, 8)
    _save(tmp_path / "0.png", image)
    np.testing.assert_array_equal(_read_one(tmp_path), image)


@pytest.mark.parametrize(("height", "width"), [(8, 14), (14, 8), (8, 9), (11, 8)])
def test_a_longer_side_keeps_its_middle(tmp_path, height, width):
    image = _noise(height, width)
    _save(tmp_path / "0.png", image)
    top, left = (height - 8) // 2, (width - 8) // 2
    np.testing.assert_array_equal(_read_one(tmp_path), image[top : top + 8, left : left + 8])


@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_a_size_need_not_be_square(tmp_path, size):
    image = _noise(8, 8)
    _save(tmp_path / "0.png", image)
    top, left = (8 - size[0]) // 2, (8 - size[1]) // 2
    cut = image[top : top + size[0], left : left + size[1]]
    np.testing.assert_array_equal(_read_one(tmp_path, size), cut)


def test_halving_averages_blocks(tmp_path):
    image = _noise(8, 8)
    _save(tmp_path / "0.png", np.repeat(np.repeat(image, 4, axis=0), 4, axis=1))
    np.testing.assert_array_equal(_read_one(tmp_path), image)


def test_a_small_image_is_enlarged(tmp_path):
    halves = np.zeros((3, 4, 3), "uint8")
    halves[:, 2:] = 200
    _save(tmp_path / "0.png", halves)
    image = _read_one(tmp_path, (6, 8)).astype(int)
    # The outermost columns are away from the edge between the halves: bicubic overshoots less than
    # a tenth of its height there.
    np.testing.assert_allclose(image[:, 0], 0, atol=20)
    np.testing.assert_allclose(image[:, -1], 200, atol=20)
    np.testing.assert_array_equal(image, np.broadcast_to(image[:1], image.shape))


@pytest.mark.parametrize("shape", [(37, 50), (100, 65), (5, 7), (16, 16), (8, 33)])
def test_the_crop_is_adms(tmp_path, shape):
    _save(tmp_path / "0.png", _noise(*shape))
    # The crop of Dhariwal and Nichol's program, for square sizes.
    image = Image.open(tmp_path / "0.png")
    while min(*image.size) >= 2 * 8:
        image = image.resize(tuple(n // 2 for n in image.size), Image.Resampling.BOX)
    scale = 8 / min(*image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), Image.Resampling.BICUBIC)
    image = np.asarray(image)
    top, left = (image.shape[0] - 8) // 2, (image.shape[1] - 8) // 2
    np.testing.assert_array_equal(_read_one(tmp_path), image[top : top + 8, left : left + 8])


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


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright_by_their_exif_tag(tmp_path, orientation):
    image, exif = _noise(6, 8), Image.Exif()
    exif[0x0112] = orientation
    _save(tmp_path / "0.png", np.ascontiguousarray(STORED[orientation](image)), exif=exif)
    np.testing.assert_array_equal(_read_one(tmp_path, (6, 8)), image)


def test_grey_images_get_three_equal_channels(tmp_path):
    grey = _noise(8, 8, channels=1)
    _save(tmp_path / "0.png", grey)
    np.testing.assert_array_equal(_read_one(tmp_path), np.repeat(grey, 3, axis=2))


def test_palette_images_get_their_colours(tmp_path):
    palette, index = _noise(1, 4)[0], _noise(8, 8, channels=1)[..., 0] % 4
    image = Image.fromarray(index).convert("P")
    image.putdata(index.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "0.png")
    np.testing.assert_array_equal(_read_one(tmp_path), palette[index])


def _made(mode, value, ending):
    """A picture in a mode of Pillow, all of it of one value, and the ending of its file."""
    image = Image.new(mode, (8, 8), value)
    if mode == "P":
        image.putpalette([200, 100, 0])
    return image, ending


# What 8-bit colour each picture has.
MODES = {
    "1": (_made("1", 1, "png"), (255, 255, 255)),
    "L": (_made("L", 77, "png"), (77, 77, 77)),
    "P": (_made("P", 0, "gif"), (200, 100, 0)),
    "RGB": (_made("RGB", (1, 2, 3), "png"), (1, 2, 3)),
    "CMYK": (_made("CMYK", (0, 255, 255, 0), "tif"), (255, 0, 0)),
    "16 bits, PNG": (_made("I;16", 40_000, "png"), (156, 156, 156)),
    "16 bits, TIFF": (_made("I;16", 40_000, "tif"), (156, 156, 156)),
    "16 bits, PGM": (_made("I", 40_000, "pgm"), (156, 156, 156)),
    "opaque RGBA": (_made("RGBA", (1, 2, 3, 255), "png"), (1, 2, 3)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_pixel_keeps_its_brightness(tmp_path, name):
    (image, ending), colour = MODES[name]
    image.save(tmp_path / f"0.{ending}")
    # 40,000 of 65,535 is 155.6 of 255; either rounding will do.
    np.testing.assert_allclose(_read_one(tmp_path), np.full((8, 8, 3), colour), atol=1)


@pytest.mark.parametrize(("mode", "kind"), [("F", "floats"), ("I", "integers of 32 bits")])
def test_pixels_whose_white_is_not_known_are_refused_by_name(tmp_path, mode, kind):
    Image.new(mode, (8, 8)).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match=rf"depth\.tif cannot be read .*{kind}"):
        _read_one(tmp_path)


# Pictures without a pixel to be seen, whose hidden colour is magenta or white.
HIDDEN = {
    "RGBA": (Image.new("RGBA", (8, 8), (255, 0, 255, 0)), {}),
    "LA": (Image.new("LA", (8, 8), (255, 0)), {}),
    "P": (_made("P", 0, "png")[0], {"transparency": 0}),
    "RGB": (Image.new("RGB", (8, 8), (255, 0, 255)), {"transparency": (255, 0, 255)}),
}


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", HIDDEN)
def test_the_background_is_seen_through_transparent_pixels(tmp_path, mode, background, value):
    image, options = HIDDEN[mode]
    image.save(tmp_path / "0.png", **options)
    assert np.unique(_read(tmp_path, background=background).images).tolist() == [value]
    assert background == "black" or np.unique(_read_one(tmp_path)).tolist() == [255]  # the default


def test_half_transparent_pixels_mix_with_the_background(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(tmp_path / "0.png")
    np.testing.assert_array_equal(_read_one(tmp_path)[0, 0], [255, 204, 204])
    with pytest.raises(ValueError, match="background must be one of"):
        _read(tmp_path, background="grey")


def test_one_channel_is_luminance(tmp_path):
    _save(tmp_path / "0.png", np.full((8, 8, 3), [255, 0, 0], "uint8"))
    _save(tmp_path / "1.png", _noise(8, 8, channels=1))
    data = _read(tmp_path, channels=1)
    assert data.images.shape == (2, 8, 8, 1)
    assert np.unique(data.images[0]).tolist() == [76]  # 0.299 of 255, ITU-R 601
    np.testing.assert_array_equal(data.images[1], _noise(8, 8, channels=1))


# Damaged files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named(numbered, kind):
    _damage(numbered, kind)
    with pytest.raises(ValueError, match=rf"{kind} cannot be read.*corrupt=\"skip\""):
        _read(numbered)


def test_skipped_files_are_listed_and_labels_stay_aligned(tmp_path):
    for k in range(9):
        _save(tmp_path / "abc"[k % 3] / f"{k}.png", np.full((8, 8, 3), k, "uint8"))
    bad = [_damage(tmp_path / name, kind) for name, kind in zip("abc", DAMAGED)]
    (tmp_path / "b" / "1.png").write_bytes(b"")  # the first of its class
    data = _read(tmp_path, corrupt="skip")
    named = sorted([*bad, tmp_path / "b" / "1.png"])
    assert len(data.skipped) == len(named)
    assert all(f"{path} cannot be read" in reason for path, (_, reason) in zip(named, data.skipped))
    levels = data.images[:, 0, 0, 0]
    assert sorted(levels) == [0, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(data.labels, levels % 3)


def test_a_class_of_damaged_files_keeps_its_number(tmp_path):
    for name in "ac":
        _save(tmp_path / name / "0.png", _noise(8, 8))
    (tmp_path / "b").mkdir()
    _damage(tmp_path / "b", "text.png")
    data = _read(tmp_path, corrupt="skip")
    assert data.class_names == ["a", "b", "c"]
    assert data.labels.tolist() == [0, 2]


def test_nothing_is_skipped_in_a_sound_folder(numbered):
    assert _read(numbered, corrupt="skip").skipped == []


def test_too_few_readable_images_are_counted(tmp_path):
    _save(tmp_path / "0.png", _noise(8, 8))
    _damage(tmp_path, "text.png")
    with pytest.raises(ValueError, match="Only 1 of 2 images could be read.*batch_size=2"):
        _read(tmp_path, batch_size=2, corrupt="skip")


# Order --------------------------------------------------------------------------------------------


def test_an_epoch_has_full_batches_without_repeats(numbered):
    data, seen = _read(numbered, batch_size=3), set()
    for epoch in range(6):
        batches = _epoch(data, epoch)
        assert [len(batch) for batch in batches] == [3, 3, 3]
        assert len({k for batch in batches for k in batch}) == 9
        seen.update(k for batch in batches for k in batch)
    assert seen == set(range(10))  # what one epoch leaves out, another brings


def test_order_is_a_function_of_seed_and_epoch(numbered):
    first, second = (_read(numbered, batch_size=3, seed=5) for _ in range(2))
    epochs = [_epoch(first, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    second.epoch = 2  # without the two epochs before, and from its last batch to its first
    assert [_numbers(second[i]) for i in (2, 1, 0)] == epochs[2][::-1]
    assert _epoch(_read(numbered, batch_size=3, seed=6), 0) != epochs[0]


def test_flip_only_mirrors_left_to_right(tmp_path):
    originals = [_noise(8, 8, k) for k in range(10)]
    for k, image in enumerate(originals):
        _save(tmp_path / f"{k}.png", image)
    data, fates = _read(tmp_path, batch_size=10), []
    for epoch in range(4):
        data.epoch, fate = epoch, {}
        for image in data[0]["image"]:
            for k, original in enumerate(originals):
                for mirrored, expected in enumerate((original, original[:, ::-1])):
                    if np.array_equal(image, expected):
                        fate[k] = mirrored
        assert len(fate) == 10  # each image is there, as it was or mirrored
        fates.append([fate[k] for k in range(10)])
    assert 0 < sum(map(sum, fates)) < 40
    assert len(set(map(tuple, fates))) > 1  # anew each epoch
    np.testing.assert_array_equal(data.images, originals)  # reading changes nothing


def test_without_flip_images_stay_as_they_are(tmp_path):
    for k in range(4):
        _save(tmp_path / f"{k}.png", _noise(8, 8, k))
    data = _read(tmp_path, batch_size=4, flip=False)
    for epoch in range(3):
        data.epoch = epoch
        batch = {image.tobytes() for image in data[0]["image"]}
        assert batch == {_noise(8, 8, k).tobytes() for k in range(4)}


# Training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs of four batches: their losses, and (epoch, index) of each batch read."""
    path, read = tmp_path_factory.mktemp("classes"), []
    for k in range(8):
        _save(path / "ab"[k % 2] / f"{k}.png", _noise(10, 8, k))
    data = _read(path, batch_size=2)
    model = DiffusionModel(
        UViT((8, 8, 3), patch_size=4, hidden_dim=16, num_layers=3, num_heads=2, num_classes=2)
    )
    model.compile()
    get = images.ImageDataset.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            images.ImageDataset,
            "__getitem__",
            lambda self, i: read.append((self.epoch, i)) or get(self, i),
        )
        history = model.fit(data, epochs=2, verbose=0)
    return history.history["loss"], read


def test_a_model_trains_on_a_folder(trained):
    losses, _ = trained
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_fit_takes_the_epochs_one_by_one_each_in_its_own_order(trained):
    _, read = trained
    # Before training, the first batches are read once more, to look at their shapes.
    visits = [visit for i, visit in enumerate(read) if visit not in read[:i]]
    assert visits == [(epoch, i) for epoch in range(2) for i in range(4)]


# Errors -------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder at .*nowhere"):
        _read(tmp_path / "nowhere")


def test_a_folder_without_images_says_what_it_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"No image in .*\.jpeg.*\.png"):
        _read(tmp_path)


def test_images_beside_and_inside_sub_folders_are_refused(tmp_path):
    _save(tmp_path / "cat" / "0.png", _noise(8, 8))
    _save(tmp_path / "stray.png", _noise(8, 8))
    with pytest.raises(ValueError, match=r"stray\.png has no class.*labels=None"):
        _read(tmp_path)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_size_must_fit_the_number_of_images(numbered, batch_size):
    with pytest.raises(ValueError, match=f"number of images, 10.*Received: {batch_size}"):
        _read(numbered, batch_size=batch_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupt": "ignore"}, 'corrupt must be "raise" or "skip".*ignore'),
        ({"channels": 4}, "channels must be 1 or 3.*4"),
        ({"labels": "folders"}, 'labels must be "auto" or None.*folders'),
        ({"image_size": 0}, "image_size.*0"),
        ({"image_size": (8, 8, 3)}, "image_size.*8, 8, 3"),
    ],
)
@pytest.mark.parametrize("folder", ["flat", "classes"])
def test_arguments_that_mean_nothing_are_refused(tmp_path, folder, options, message):
    _save(tmp_path / ("0.png" if folder == "flat" else "a/0.png"), _noise(8, 8))
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, **options)


def test_more_images_than_fit_in_memory_are_refused_before_reading(numbered, monkeypatch):
    (numbered / "text.png").write_text("reading this would raise another error")
    monkeypatch.setattr(images, "MAX_BYTES", 11 * 8 * 8 * 3 - 1)
    with pytest.raises(ValueError, match="11 images of 8x8x3 need .* GiB"):
        _read(numbered)
    monkeypatch.setattr(images, "MAX_BYTES", 11 * 8 * 8 * 3)
    assert len(_read(numbered, corrupt="skip").images) == 10


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
