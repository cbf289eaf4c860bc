"""Captioned pictures from COCO's files, a captions.jsonl, and pairs."""

import json

import numpy as np
import pytest
from caches import IMAGES, grey, noise, replace, save
from PIL import Image
from tiny import refused

from keras_uvit.data import captioned, sources

pytestmark = pytest.mark.once

TEXTS = {7: ["a dog", "a small dog "], 3: ["a cat"], 5: ["a bird", "birds", "a bird."]}


@pytest.fixture
def coco(tmp_path):
    """COCO as its zips unpack, three pictures."""
    images, annotations = [], []
    for k, (key, texts) in enumerate(TEXTS.items()):
        name = f"COCO_train2014_{key:012d}.jpg"
        save(tmp_path / "train2014" / name, grey(10 * key, 40, 30 + k))
        images.append({"id": key, "file_name": name, "height": 40, "width": 30 + k})
        annotations += [{"image_id": key, "id": 100 - j, "caption": t} for j, t in enumerate(texts)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    file = tmp_path / "annotations" / "captions_train2014.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    return tmp_path


def test_coco(coco):
    source = captioned.coco(coco, image_size=16)
    assert (source.name, len(source), source.shape) == ("coco/train2014", 3, (16, 16, 3))
    assert source.captions == [TEXTS[3], TEXTS[5], TEXTS[7]]  # in the order of ids
    for k, key in enumerate((3, 5, 7)):
        image = source.read(k)["image"]
        assert image.shape == (16, 16, 3)
        assert abs(int(image.mean()) - 10 * key) <= 2  # JPEG
    assert captioned.coco(coco).read(0)["image"].shape == (256, 256, 3)


def test_coco_is_fitted_by_lanczos(coco):
    file = save(coco / "train2014" / "COCO_train2014_000000000003.jpg", noise(40, 31))
    with Image.open(file) as image:
        square = image.crop((0, 4, 31, 35)).resize((16, 16), Image.Resampling.LANCZOS)
    found = captioned.coco(coco, image_size=16).read(0)["image"]
    np.testing.assert_array_equal(found, np.asarray(square))


def test_what_is_not_there_names_the_zip(coco, tmp_path):
    refused(ValueError, lambda: captioned.coco(coco, "train"), "'train2014'", "'train'")
    zips = "annotations_trainval2014.zip and val2014.zip"
    refused(FileNotFoundError, lambda: captioned.coco(tmp_path, "val2014"), zips)
    next((coco / "train2014").iterdir()).unlink()
    words = "1 of 3 pictures are missing", "train2014.zip"
    refused(FileNotFoundError, lambda: captioned.coco(coco), *words)


def _without(part, key):
    """COCO's content without the records of picture 5 in a part."""
    return lambda content: content.update({part: [r for r in content[part] if r[key] != 5]})


def _lacking(part, key):
    return lambda content: content[part][1].pop(key)


def _as_texts(content):
    for image in content["images"]:
        image["id"] = str(image["id"])


# What a file of annotations holds instead, or how its content is changed, and what is said of it.
ANNOTATIONS = [
    (b"", "damaged"),
    (b"{", "damaged"),
    (b"[]", "expected an object"),
    (b"{}", 'expected a list "images"'),
    (b'{"images": 3}', 'expected a list "images"'),
    (b'{"images": [], "annotations": []}', "no picture"),
    (b'{"images": [3], "annotations": []}', "record 0"),
    (b'{"images": [{"id": 1, "file_name": 7}], "annotations": []}', "record 0"),
    (b'{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}', "None"),
    (_without("images", "id"), "caption of image_id 5"),
    (_without("annotations", "image_id"), "000000000005.jpg has no caption"),
    (_lacking("images", "id"), 'record 1 of "images" lacks'),
    (_lacking("images", "file_name"), 'record 1 of "images" lacks'),
    (_lacking("annotations", "image_id"), 'record 1 of "annotations" lacks'),
    (_lacking("annotations", "caption"), 'record 1 of "annotations" lacks'),
    (_as_texts, "no record with this id among its 3"),
]


@pytest.mark.parametrize(("content", "word"), ANNOTATIONS)
def test_damaged_or_cut_down_annotations_are_named(coco, content, word):
    file = coco / "annotations" / "captions_train2014.json"
    replace(file, content)
    refused(ValueError, lambda: captioned.coco(coco), word)


@pytest.fixture
def folder(tmp_path):
    rows = []
    for k in range(4):
        save(tmp_path / "sub" / f"{k}.png", noise(12, 10, k))
        texts = [f"picture {k}", "another"] if k % 2 else f"picture {k}"
        rows.append(json.dumps({"file_name": f"sub/{k}.png", "captions": texts, "more": 1}))
    (tmp_path / captioned.CAPTIONS).write_text("\n".join([*rows, "", ""]))
    return tmp_path


def test_folder(folder):
    (folder / "sub" / "1.png").rename(folder.parent / "blob.png")
    (folder / "sub" / "1.png").symlink_to(folder.parent / "blob.png")  # as downloads may be
    source = captioned.captioned_folder(folder, 8)
    assert len(source) == 4
    assert source.captions[:2] == [["picture 0"], ["picture 1", "another"]]
    plain = sources.folder(folder, 8, labels=None)
    for k in range(4):
        np.testing.assert_array_equal(source.read(k)["image"], plain.read(k)["image"])
    thin = captioned.captioned_folder(folder, (8, 4), channels=1).read(0)["image"]
    assert thin.shape == (8, 4, 1)
    cut = captioned.captioned_folder(folder, 4, crop=(1, 2, 4, 4)).read(0)["image"]
    np.testing.assert_array_equal(cut, noise(12, 10)[1:5, 2:6])


def test_windows_line_ends_and_marks_are_read(folder):
    file = folder / captioned.CAPTIONS
    expected = captioned.captioned_folder(folder, 8).captions
    file.write_bytes(b"\xef\xbb\xbf" + file.read_text().replace("\n", "\r\n").encode())
    assert captioned.captioned_folder(folder, 8).captions == expected


def _line(name, captions):
    return json.dumps({"file_name": name, "captions": captions})


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        (b"\xff\xfe{", ValueError, ["captions.jsonl is no UTF-8 text"]),
        (b"{", ValueError, ["Line 2 of", "is damaged"]),
        (b"[" * 200_000, ValueError, ["Line 2 of", "is damaged"]),
        (b"[1]", ValueError, ["Line 2 of", "expected an object"]),
        (b'{"file_name": "sub/1.png"}', ValueError, ["Line 2", 'lacks "file_name" or "captions"']),
        (b'{"captions": ["a"]}', ValueError, ["Line 2", "lacks"]),
        (_line(3, ["a"]), ValueError, ["Line 2", "lacks"]),
        (_line("sub/1.png", []), ValueError, ["1.png has no caption"]),
        (_line("sub/1.png", "  "), ValueError, ["or an empty one"]),
        (_line("sub/1.png", [3]), TypeError, ["str or a list"]),
        (_line("sub/1.png", {"a": 1}), TypeError, ["str or a list"]),
        (_line("no.png", "a"), FileNotFoundError, ["the first is", "no.png"]),
        (_line("a\0.png", "a"), ValueError, ["line 2", "outside of"]),
        (_line("../no.png", "a"), ValueError, ["line 2", "outside of"]),
        (_line("/etc/hosts", "a"), ValueError, ["line 2", "outside of"]),
    ],
)
def test_a_damaged_line_is_named(folder, line, error, words):
    file = folder / captioned.CAPTIONS
    lines = file.read_bytes().split(b"\n")
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    refused(error, lambda: captioned.captioned_folder(folder, 8), *words)


def test_missing_captions_and_damaged_pictures_are_named(folder):
    (folder / "sub" / "2.png").write_bytes(b"no picture")
    source = captioned.captioned_folder(folder, 8)  # named when it is read
    refused(ValueError, lambda: source.read(2), "2.png cannot be read")
    read = lambda: captioned.captioned_folder(folder / "sub", 8)  # noqa: E731
    refused(FileNotFoundError, read, "captions.jsonl", '"file_name": "1.jpg"')
    (folder / "sub" / captioned.CAPTIONS).write_text(_line("0.png", ["a square"]))
    with pytest.warns(UserWarning, match=r"3 of 4 pictures .* left out, such as 1\.png"):
        assert len(captioned.captioned_folder(folder / "sub", 8)) == 1


def test_pairs_of_files_and_of_arrays(folder):
    pairs = [(folder / "sub" / "1.png", "one"), (str(folder / "sub" / "3.png"), ["three", "3"])]
    source = captioned.pairs(pairs, 8)
    assert source.captions == [["one"], ["three", "3"]]
    same = captioned.captioned_folder(folder, 8)
    np.testing.assert_array_equal(source.read(1)["image"], same.read(3)["image"])
    source = captioned.pairs(zip(IMAGES[:3], ["a", ["b", "c"], "d"]))
    assert source.captions == [["a"], ["b", "c"], ["d"]]
    np.testing.assert_array_equal(source.read(2)["image"], IMAGES[2])


@pytest.mark.parametrize(
    ("pairs", "size", "error", "word"),
    [
        ([], None, ValueError, "no pairs"),
        ([("a.png", "a")], None, ValueError, "which image_size"),
        ([("a.png", "a")], 8, FileNotFoundError, "a.png"),
        ([(IMAGES[0], "a")], 8, TypeError, "pictures are paths"),
        ([(IMAGES[0], [])], None, ValueError, "Sample 0 of pairs has no"),
        ([(IMAGES[0] / 2, "a")], None, TypeError, "uint8"),
        ([IMAGES[0]], None, TypeError, "Expected pairs"),
        ([(IMAGES[0], "a"), (IMAGES[0, 1:], "a")], None, ValueError, "one shape"),
    ],
)
def test_bad_pairs_are_refused(pairs, size, error, word):
    refused(error, lambda: captioned.pairs(pairs, size), word)


def test_random_prompts_are_one_each_of_different_pictures():
    captions = [[f"{k}-{j}" for j in range(1 + k % 5)] for k in range(200)]
    prompts = captioned.random_prompts(captions, 150, seed=1)
    assert len({prompt.split("-")[0] for prompt in prompts}) == 150
    assert all(prompt in captions[int(prompt.split("-")[0])] for prompt in prompts)
    assert {int(p.split("-")[1]) for p in prompts} == {0, 1, 2, 3, 4}
    assert prompts == captioned.random_prompts(captions, 150, seed=1)
    assert prompts != captioned.random_prompts(captions, 150, seed=2)
    assert sorted(captioned.random_prompts([["a"], ["b"]], 2)) == ["a", "b"]
    for count in (0, 3):
        with pytest.raises(ValueError, match="between 1 and 2"):
            captioned.random_prompts([["a"], ["b"]], count)
