"""Pictures with captions: COCO's own files, a folder with captions.jsonl, pairs of your own."""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_uvit.data import pictures, sources
from keras_uvit.types import PathLike

CAPTIONS = "captions.jsonl"
COCO_SPLITS = ("train2014", "val2014", "train2017", "val2017")


def coco(
    path: PathLike, split: str = "train2014", image_size: int | tuple[int, int] = 256
) -> sources.Source:
    """A source of COCO pictures, each with its five or more captions.

    Cut to the central square and resized by Lanczos, as the paper's program does.

    Args:
        path: folder in which COCO's zips were unpacked: `annotations/captions_<split>.json` and
            the pictures in `<split>/`.
        split: "train2014" (82,783 pictures, the paper's for training), "val2014" (40,504, for
            FID), or those of 2017.
        image_size: int or (height, width) in pixels.

    Returns:
        `Source` with captions, in the order of COCO's image ids.

    Raises:
        FileNotFoundError: if annotations or pictures are missing; the message says which zip has
            them.
        ValueError: for another split, or damaged annotations.
    """
    path, year = Path(path), split[-4:]
    if split not in COCO_SPLITS:
        raise ValueError(f"split must be one of {COCO_SPLITS}. Received: {split!r}.")
    file = path / "annotations" / f"captions_{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"No {file}. Unpack annotations_trainval{year}.zip and {split}.zip (cocodataset.org) "
            f"in {path}."
        )
    content = _json(file, _text(file))
    names = dict(_records(content, "images", ("id", "file_name"), file))
    texts: dict[Any, list[str]] = {
        key: [] for key in sorted(names, key=lambda key: (str(type(key)), key))
    }
    for key, caption in _records(content, "annotations", ("image_id", "caption"), file):
        if key not in texts:
            raise ValueError(
                f"{file} has a caption of image_id {key!r}, {caption!r}, and no record with this "
                f'id among its {len(names)} "images", such as {next(iter(names), None)!r}. A file '
                "that was cut down must lose the captions of the pictures that it lost."
            )
        texts[key].append(caption)
    files = [_inside(path / split, names[key], file) for key in texts]
    _check_files(files, f"Unpack {split}.zip in {path}.")
    return _source(f"coco/{split}", files, list(texts.values()), image_size, 3, method="lanczos")


def _records(content, part, keys, file):
    """The values of `keys` in each record of a part of COCO's annotations."""
    if not isinstance(content.get(part), list):
        raise ValueError(f'{file} is damaged or no COCO captions: expected a list "{part}".')
    for number, record in enumerate(content[part]):
        values = [record.get(key) for key in keys] if isinstance(record, dict) else [None]
        if not isinstance(values[0], int | str) or not isinstance(values[-1], str):
            raise ValueError(
                f'{file} is damaged or no COCO captions: record {number} of "{part}" lacks one of '
                f"{keys}, or it has the wrong type: {str(record)[:200]}."
            )
        yield values


def captioned_folder(
    path: PathLike,
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    crop: tuple[int, int, int, int] | None = None,
    background: str = "white",
) -> sources.Source:
    """A source of the pictures in a folder with `captions.jsonl`.

    Each line of that file is an object such as
    `{"file_name": "dogs/1.jpg", "captions": ["a dog", "a small dog on grass"]}`.

    Args:
        path: the folder.
        image_size: int or (height, width) in pixels; see `pictures.fitted`.
        channels: 3 (RGB) or 1 (grey).
        crop: see `pictures.fitted`.
        background: "white" or "black", what is seen through transparent pixels.

    Raises:
        FileNotFoundError: if the file or a picture is missing.
        ValueError: if a line is damaged; it is named.
    """
    path = Path(path)
    file = path / CAPTIONS
    if not file.is_file():
        raise FileNotFoundError(
            f'No {file}. Expected a line for each picture, {{"file_name": "1.jpg", "captions": '
            '["a dog"]}.'
        )
    files, texts = [], []
    lines = _text(file).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            content = _json(f"Line {number} of {file}", line)
            if not isinstance(content.get("file_name"), str) or "captions" not in content:
                raise ValueError(f'Line {number} of {file} lacks "file_name" or "captions".')
            files.append(_inside(path, content["file_name"], f"line {number} of {file}"))
            texts.append(content["captions"])
    _check_files(files, f"{file} names it.")
    there = sources.list_pictures(path, beside=[CAPTIONS])
    without = sorted(set(there) - set(files))
    if without:
        warnings.warn(
            f"{len(without)} of {len(there)} pictures in {path} have no line in {CAPTIONS} and are "
            f"left out, such as {without[0].name}.",
            stacklevel=2,
        )
    about = dict(crop=crop, background=background)
    return _source(f"folder:{path.name}", files, texts, image_size, channels, **about)


def pairs(
    content: Iterable[tuple[str | Path | np.ndarray, str | Sequence[str]]],
    image_size: int | tuple[int, int] | None = None,
    *,
    channels: int = 3,
    background: str = "white",
    name: str = "pairs",
) -> sources.Source:
    """A source of (picture, captions) pairs.

    Args:
        content: list of (path or `(H, W, C)` uint8 array, str or list of str).
        image_size: int or (height, width) in pixels; `None` for arrays of one size, which are
            taken as they are.
        channels: 3 (RGB) or 1 (grey), of paths.
        background: "white" or "black", what is seen through transparent pixels, of paths.
        name: see `Source`.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError, TypeError: if pictures or captions do not fit.
    """
    content = list(content)
    if not content:
        raise ValueError("There are no pairs.")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in content):
        raise TypeError("Expected pairs of a picture and its captions.")
    images, texts = zip(*content)
    if image_size is None:
        if any(isinstance(image, str | Path) for image in images):
            raise ValueError("Pictures in files differ in size: say which image_size you want.")
        if len({np.shape(image) for image in images}) > 1:
            raise ValueError("Pictures in arrays must be of one shape.")
        return sources.arrays({"image": np.stack(images), "captions": list(texts)}, name)
    if not all(isinstance(image, str | Path) for image in images):
        raise TypeError("With image_size, pictures are paths. Arrays are taken as they are.")
    files = [Path(image) for image in images]
    _check_files(files, "Mend the pairs.")
    return _source(name, files, list(texts), image_size, channels, background=background)


def random_prompts(captions: list[list[str]], count: int, seed: int = 0) -> list[str]:
    """One random caption of each of `count` different pictures: the paper's COCO prompts.

    Args:
        captions: list of lists of str, such as `coco(...).captions`.
        count: int, at most the number of pictures; 30,000 in the paper.
        seed: int.

    Returns:
        list of str.
    """
    if not 1 <= count <= len(captions):
        raise ValueError(f"count must be between 1 and {len(captions)}. Received: {count}.")
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(captions))[:count]
    return [captions[k][random.integers(len(captions[k]))] for k in chosen]


def _source(name, files, texts, image_size, channels, **options):
    size = sources.checked_size(image_size)
    sources.check_options("auto", channels, options.get("background", "white"))
    return sources.Source(
        name,
        len(files),
        (*size, channels),
        lambda i: {"image": pictures.read_file(files[i], size, channels, **options)},
        captions=sources.checked_captions(texts, [str(file) for file in files]),
    )


def _text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}.") from error


def _json(what, text):
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} is damaged: expected an object.")
    return content


def _inside(folder, name, where):
    # By its name: where links lead is the user's affair (downloads are often folders of links).
    parts = Path(os.path.normpath(name)).parts
    if os.path.isabs(name) or ".." in parts or "\0" in name:
        raise ValueError(f"{where} names {name!r}, which is outside of {folder}.")
    return folder / name


def _check_files(files, advice):
    if not files:
        raise ValueError(f"There is no picture. {advice}")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} pictures are missing, the first is {missing[0]}. "
            f"{advice}"
        )
