"""Captioned pictures from COCO's files, a captions.jsonl, pairs, TensorFlow Datasets."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_uvit.data import captioned, pictures, sources

pytestmark = pytest.mark.once

RANDOM = np.random.default_rng(0)
TEXTS = {7: ["a dog", "a small dog "], 3: ["a cat"], 5: ["a bird", "birds", "a bird."]}


def picture(path, size=(12, 10), colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (*size, 3), "uint8")
    if colour is not None:
        pixels[:] = colour
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def coco_folder(tmp_path):
    """COCO as its zips unpack, three pictures."""
    images, annotations = [], []
    for k, (key, texts) in enumerate(TEXTS.items()):
        name = f"COCO_train2014_{key:012d}.jpg"
        picture(tmp_path / "train2014" / name, (40, 30 + k), (10 * key, 0, 0))
        images.append({"id": key, "file_name": name, "height": 40, "width": 30 + k})
        annotations += [{"image_id": key, "id": 100 - j, "caption": t} for j, t in enumerate(texts)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    file = tmp_path / "annotations" / "captions_train2014.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    return tmp_path


def test_coco(coco_folder):
    source = captioned.coco(coco_folder, image_size=16)
    assert source.name == "coco/train2014"
    assert len(source) == 3
    assert source.shape == (16, 16, 3)
    assert source.captions == [TEXTS[3], TEXTS[5], TEXTS[7]]  # in the order of ids
    for k, key in enumerate((3, 5, 7)):
        image = source.read(k)["image"]
        assert image.shape == (16, 16, 3)
        assert abs(int(image[..., 0].mean()) - 10 * key) <= 2  # JPEG


def test_coco_is_256_pixels_unless_told(coco_folder):
    assert captioned.coco(coco_folder).read(0)["image"].shape == (256, 256, 3)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 20)])
def test_the_central_square_is_resized_by_lanczos(size):
    pixels = RANDOM.integers(0, 256, (*size, 3), "uint8")
    ours = pictures.fitted(Image.fromarray(pixels), (16, 16), method="lanczos")
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cut = Image.fromarray(pixels[top : top + side, left : left + side])
    np.testing.assert_array_equal(ours, np.asarray(cut.resize((16, 16), Image.Resampling.LANCZOS)))


def test_lanczos_fits_what_is_not_square():
    pixels = RANDOM.integers(0, 256, (40, 40, 3), "uint8")
    ours = pictures.fitted(Image.fromarray(pixels), (8, 16), method="lanczos")
    cut = Image.fromarray(pixels[10:30])
    np.testing.assert_array_equal(ours, np.asarray(cut.resize((16, 8), Image.Resampling.LANCZOS)))


def test_missing_annotations_name_the_zips(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations_trainval2014.zip and val2014.zip"):
        captioned.coco(tmp_path, "val2014")


def test_another_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of .*'train2014'.*Received: 'train'"):
        captioned.coco(tmp_path, "train")


def test_missing_pictures_name_the_zip(coco_folder):
    next((coco_folder / "train2014").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 pictures are missing.*train2014.zip"):
        captioned.coco(coco_folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"images": [], "annotations": []}',
        '{"images": 3}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": 7}], "annotations": []}',
        '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}',
    ],
)
def test_damaged_annotations_are_named(coco_folder, content):
    (coco_folder / "annotations" / "captions_train2014.json").write_text(content)
    with pytest.raises(ValueError, match="damaged|no picture"):
        captioned.coco(coco_folder)


def _without(part, key):
    """COCO's content without the records of picture 5 in a part."""
    return lambda content: content.update(
        {part: [record for record in content[part] if record[key] != 5]}
    )


def _lacking(part, key):
    return lambda content: content[part][1].pop(key)


CUT_DOWN = {
    "a picture": (_without("images", "id"), "caption of image_id 5.*no record with this id"),
    "its captions": (_without("annotations", "image_id"), "000000000005.jpg has no caption"),
    "ids": (_lacking("images", "id"), 'record 1 of "images" lacks'),
    "names": (_lacking("images", "file_name"), 'record 1 of "images" lacks'),
    "image_ids": (_lacking("annotations", "image_id"), 'record 1 of "annotations" lacks'),
    "texts": (_lacking("annotations", "caption"), 'record 1 of "annotations" lacks'),
    "numbers of ids": (
        lambda content: [image.update(id=str(image["id"])) for image in content["images"]],
        "caption of image_id .*no record with this id among its 3 .*, such as '",
    ),
}


@pytest.mark.parametrize("what", CUT_DOWN)
def test_files_that_were_cut_down_name_the_record(coco_folder, what):
    change, message = CUT_DOWN[what]
    file = coco_folder / "annotations" / "captions_train2014.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        captioned.coco(coco_folder)


# captions.jsonl -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rows = []
    for k in range(4):
        picture(tmp_path / "sub" / f"{k}.png")
        texts = [f"picture {k}", "another"] if k % 2 else f"picture {k}"
        rows.append(json.dumps({"file_name": f"sub/{k}.png", "captions": texts, "more": 1}))
    (tmp_path / captioned.CAPTIONS).write_text("\n".join([*rows, "", ""]))
    return tmp_path


def test_folder(folder):
    source = captioned.captioned_folder(folder, 8)
    assert len(source) == 4
    assert source.captions[:2] == [["picture 0"], ["picture 1", "another"]]
    plain = sources.folder(folder, 8, labels=None)
    for k in range(4):
        np.testing.assert_array_equal(source.read(k)["image"], plain.read(k)["image"])
    assert captioned.captioned_folder(folder, (8, 4), channels=1).read(0)["image"].shape == (
        8,
        4,
        1,
    )


def rewrite(folder, line):
    file = folder / captioned.CAPTIONS
    lines = file.read_text().split("\n")
    file.write_text("\n".join([lines[0], line, *lines[2:]]))


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", ValueError, "Line 2 of .*is damaged"),
        ("[" * 200_000, ValueError, "Line 2 of .*is damaged"),
        ('{"file_name": "a\\u0000.png", "captions": "a"}', ValueError, "line 2 .*outside of"),
        ("[1]", ValueError, "Line 2 of .*expected an object"),
        ('{"file_name": "sub/1.png"}', ValueError, 'Line 2 .*lacks "file_name" or "captions"'),
        ('{"captions": ["a"]}', ValueError, "Line 2 .*lacks"),
        ('{"file_name": 3, "captions": ["a"]}', ValueError, "Line 2 .*lacks"),
        ('{"file_name": "sub/1.png", "captions": []}', ValueError, "1.png has no caption"),
        ('{"file_name": "sub/1.png", "captions": "  "}', ValueError, "or an empty one"),
        ('{"file_name": "sub/1.png", "captions": [3]}', TypeError, "str or a list"),
        ('{"file_name": "sub/1.png", "captions": {"a": 1}}', TypeError, "str or a list"),
        ('{"file_name": "no.png", "captions": "a"}', FileNotFoundError, "first is .*no.png"),
        ('{"file_name": "../no.png", "captions": "a"}', ValueError, "outside of"),
        ('{"file_name": "/etc/hosts", "captions": "a"}', ValueError, "outside of"),
    ],
)
def test_a_damaged_line_is_named(folder, line, error, message):
    rewrite(folder, line)
    with pytest.raises(error, match=message):
        captioned.captioned_folder(folder, 8)


def test_pictures_may_be_links(folder):
    (folder / "sub" / "1.png").rename(folder.parent / "blob.png")
    (folder / "sub" / "1.png").symlink_to(folder.parent / "blob.png")
    assert captioned.captioned_folder(folder, 8).read(1)["image"].shape == (8, 8, 3)


def test_windows_line_ends_and_marks_are_read(folder):
    file = folder / captioned.CAPTIONS
    expected = captioned.captioned_folder(folder, 8).captions
    file.write_bytes(b"\xef\xbb\xbf" + file.read_text().replace("\n", "\r\n").encode())
    assert captioned.captioned_folder(folder, 8).captions == expected
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="captions.jsonl is no UTF-8 text"):
        captioned.captioned_folder(folder, 8)


def test_pictures_are_cropped(folder):
    cut = captioned.captioned_folder(folder, 4, crop=(1, 2, 4, 4)).read(0)["image"]
    whole = np.asarray(Image.open(folder / "sub" / "0.png"))
    np.testing.assert_array_equal(cut, whole[1:5, 2:6])


def test_a_folder_without_captions_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'captions.jsonl.*"file_name": "1.jpg"'):
        captioned.captioned_folder(tmp_path, 8)


def test_a_damaged_picture_is_named_when_it_is_read(folder):
    (folder / "sub" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="2.png cannot be read"):
        captioned.captioned_folder(folder, 8).read(2)


# Pairs --------------------------------------------------------------------------------------------


def test_pairs_of_files(folder):
    pairs = [(folder / "sub" / "1.png", "one"), (str(folder / "sub" / "3.png"), ["three", "3"])]
    source = captioned.pairs(pairs, 8)
    assert source.captions == [["one"], ["three", "3"]]
    same = captioned.captioned_folder(folder, 8)
    np.testing.assert_array_equal(source.read(1)["image"], same.read(3)["image"])


def test_pairs_of_arrays():
    images = RANDOM.integers(0, 256, (3, 4, 4, 3), "uint8")
    source = captioned.pairs(zip(images, ["a", ["b", "c"], "d"]))
    assert source.captions == [["a"], ["b", "c"], ["d"]]
    np.testing.assert_array_equal(source.read(2)["image"], images[2])


@pytest.mark.parametrize(
    ("pairs", "size", "error", "message"),
    [
        ([], None, ValueError, "no pairs"),
        ([("a.png", "a")], None, ValueError, "which image_size"),
        ([("a.png", "a")], 8, FileNotFoundError, "a.png"),
        ([(np.zeros((4, 4, 3), "uint8"), "a")], 8, TypeError, "pictures are paths"),
        (
            [(np.zeros((4, 4, 3), "uint8"), [])],
            None,
            ValueError,
            "Sample 0 of pairs has no",
        ),
        ([(np.zeros((4, 4, 3)), "a")], None, TypeError, "uint8"),
        ([np.zeros((4, 4, 3), "uint8")], None, TypeError, "Expected pairs"),
        ([(np.zeros((4, 4, 3)), "a"), (np.zeros((4, 5, 3)), "a")], None, ValueError, "one shape"),
    ],
)
def test_bad_pairs_are_refused(pairs, size, error, message):
    with pytest.raises(error, match=message):
        captioned.pairs(pairs, size)


def test_captions_are_one_an_image():
    images = np.zeros((3, 4, 4, 3), "uint8")
    with pytest.raises(ValueError, match="3 images need as many captions. Received: 2"):
        sources.arrays({"image": images, "captions": ["a", "b"]})
    source = sources.arrays({"image": images, "captions": ["a", "b", "c"], "label": [0, 1, 0]})
    assert source.num_classes == 2
    assert source.captions == [["a"], ["b"], ["c"]]


# Prompts ------------------------------------------------------------------------------------------


def test_random_prompts_are_one_each_of_different_pictures():
    captions = [[f"{k}-{j}" for j in range(1 + k % 5)] for k in range(200)]
    prompts = captioned.random_prompts(captions, 150, seed=1)
    assert len({prompt.split("-")[0] for prompt in prompts}) == 150
    assert all(prompt in captions[int(prompt.split("-")[0])] for prompt in prompts)
    assert {int(p.split("-")[1]) for p in prompts} == {0, 1, 2, 3, 4}
    assert prompts == captioned.random_prompts(captions, 150, seed=1)
    assert prompts != captioned.random_prompts(captions, 150, seed=2)
    assert sorted(captioned.random_prompts([["a"], ["b"]], 2)) == ["a", "b"]


@pytest.mark.parametrize("count", [0, 3, -1])
def test_there_are_as_many_prompts_as_pictures_at_most(count):
    with pytest.raises(ValueError, match="between 1 and 2"):
        captioned.random_prompts([["a"], ["b"]], count)


def test_pictures_without_captions_are_counted_and_named(tmp_path):
    for k in range(4):
        Image.fromarray(np.zeros((8, 8, 3), "uint8")).save(tmp_path / f"{k}.png")
    line = json.dumps({"file_name": "0.png", "captions": ["a square"]})
    (tmp_path / "captions.jsonl").write_text(line, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"3 of 4 pictures .* left out, such as 1\.png"):
        assert len(captioned.captioned_folder(tmp_path, 8)) == 1
