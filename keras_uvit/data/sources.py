"""Images at random access, one at a time: what caches and in-memory sets are made from."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keras_uvit.checks import as_int
from keras_uvit.data.pictures import BACKGROUNDS, read_file
from keras_uvit.types import Array, PathLike

ORIENTATION = 274  # the EXIF tag; from 5 on height and width change places
# Formats that Pillow knows by name, but are no pictures, or need another program to be read.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What systems leave beside the user's files; parts that begin with a dot are left out as well.
LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A finite set of samples, each read when it is asked for.

    Attributes:
        name: what the samples are, kept in manifests.
        length: number of samples.
        shape: of one image (H, W, C), or of its moments (h, w, 2 C).
        read: function of an index in [0, length): a dict of one sample, `field` (an image in uint8,
            moments in float) and "label" (int) or not. Several threads call it. Raises ValueError
            for a sample that is damaged.
        num_classes: int, or None without labels.
        class_names: list of str, or None.
        field: "image" or "moments".
        captions: list of lists of str, those of each sample; or None.
    """

    name: str
    length: int
    shape: tuple[int, ...]
    read: Callable[[int], dict[str, Any]]
    num_classes: int | None = None
    class_names: list[str] | None = None
    field: str = "image"
    captions: list[list[str]] | None = None

    def __post_init__(self) -> None:
        if self.captions is not None:
            names = [f"Sample {k} of {self.name}" for k in range(self.length)]
            object.__setattr__(self, "captions", checked_captions(self.captions, names))

    def __len__(self) -> int:
        return self.length

    def batches(
        self, rows: Array, batch_size: int, corrupt: str = "raise"
    ) -> Iterator[list[tuple[int, Any]]]:
        """Reads samples with several threads, one batch ahead of the caller.

        Args:
            rows: indices.
            batch_size: int, samples at a time.
            corrupt: "raise", or "skip" to hand damaged samples out as the reason, a string.

        Yields:
            lists of (index, sample or str).
        """

        def read(row):
            try:
                return row, self.read(row)
            except ValueError as error:
                if corrupt == "raise":
                    raise
                return row, str(error)

        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                ahead: Iterator[tuple[int, Any]] | None = None
                for group in groups:
                    current, ahead = ahead, pool.map(read, map(int, group))
                    if current is not None:
                        yield list(current)
                if ahead is not None:
                    yield list(ahead)
            finally:
                pool.shutdown(cancel_futures=True)


def arrays(data: dict[str, Array] | Array, name: str = "arrays") -> Source:
    """A source of images in memory.

    Args:
        data: "image" `(n, H, W, C)` uint8 and maybe "label" `(n,)` or "captions" (a str or a list
            of them, each) in a dict, or the images alone.
        name: see `Source`.

    Raises:
        ValueError, TypeError: if the arrays do not fit.
    """
    data = data if isinstance(data, dict) else {"image": data}
    if "image" not in data or not {*data} <= {"image", "label", "captions"}:
        raise ValueError(
            f'Expected the keys "image" and maybe "label", "captions". Received: {[*data]}.'
        )
    texts = data.get("captions")
    data = {key: np.asarray(value) for key, value in data.items() if key != "captions"}
    images, labels = data["image"], data.get("label")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"Images have shape (n, H, W, C), n >= 1. Received: {images.shape}.")
    if images.dtype != np.uint8:
        raise TypeError(f"Images are uint8 in [0, 255]. Received: dtype {images.dtype}.")
    if labels is None:
        return Source(
            name, len(images), images.shape[1:], lambda i: {"image": images[i]}, captions=texts
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Labels are {len(images)} integers, one an image. Received: shape {labels.shape}, "
            f"dtype {labels.dtype}."
        )
    if labels.min() < 0:
        raise ValueError(f"Labels count from 0. Received: {labels.min()}.")
    return Source(
        name,
        len(images),
        images.shape[1:],
        lambda i: {"image": images[i], "label": int(labels[i])},
        num_classes=int(labels.max()) + 1,
        captions=texts,
    )


def checked_captions(texts: Sequence[str | Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    """Captions as a list of lists of str; `names` say whose, in errors.

    Raises:
        ValueError: if there are not as many as images, or an image has none, or an empty one.
        TypeError: if one is no text.
    """
    if len(texts) != len(names):
        raise ValueError(f"{len(names)} images need as many captions. Received: {len(texts)}.")
    texts = [[own] if isinstance(own, str) else own for own in texts]
    for own, name in zip(texts, names):
        if not isinstance(own, list | tuple) or not all(isinstance(text, str) for text in own):
            raise TypeError(f"{name}: captions are a str or a list of them. Received: {own!r}.")
        try:
            "".join(own).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: half of a surrogate pair is no text: {own!r}.") from error
        if not own or not all(text.strip() for text in own):
            raise ValueError(
                f"{name} has no caption, or an empty one. (Training leaves captions out by itself, "
                "by condition_dropout.)"
            )
    return [list(own) for own in texts]


def folder(
    path: PathLike,
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    labels: str | None = "auto",
    crop: tuple[int, int, int, int] | None = None,
    background: str = "white",
) -> Source:
    """A source of image files: class sub-folders, or just images.

    Each image is read as `pictures.read_file` says.

    Args:
        path: the folder. With sub-folders that hold images, each is a class, in sorted order.
        image_size: int or (height, width) in pixels.
        channels: 3 (RGB) or 1 (grey).
        labels: "auto" takes sub-folders as classes where there are any; None gives no labels.
        crop: see `pictures.fitted`.
        background: "white" or "black", what is seen through transparent pixels.

    Raises:
        FileNotFoundError: if there is no such folder or no image in it.
        ValueError: for images both beside and inside sub-folders, or bad arguments.
    """
    size = checked_size(image_size)
    check_options(labels, channels, background)
    path = Path(path)
    files, classes = _files(path, labels)
    names = classes and sorted(set(classes))
    ids = classes and [names.index(c) for c in classes]

    def read(i):
        sample = {"image": read_file(files[i], size, channels, crop, background=background)}
        return {**sample, "label": ids[i]} if ids else sample

    return Source(
        f"folder:{path.name}",
        len(files),
        (*size, channels),
        read,
        num_classes=len(names) if names else None,
        class_names=names,
    )


SIDES = (8, 16, 28, 32, 48, 64, 96, 128, 256, 512)  # pixels, which patches divide well
SURVEYED = 500  # files of a folder whose headers are read for a survey


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the files of a folder are, by their headers alone.

    Attributes:
        total: int, number of image files.
        sizes: list of (height, width) in pixels, of those that were looked at.
        grey: int, how many of them are grey.
    """

    total: int
    sizes: list[tuple[int, int]]
    grey: int

    def suitable_side(self, limit: int) -> int:
        """A side for training in pixels: that of the smaller pictures, at most `limit`."""
        side = min(limit, np.percentile([min(size) for size in self.sizes], 25))
        return max([SIDES[0], *(k for k in SIDES if k <= side)])

    def all_of(self, shape: Sequence[int]) -> bool:
        """Whether all are of this (H, W, C)."""
        return set(self.sizes) == {tuple(shape[:2])}

    def text(self) -> str:
        """A line or more on what there is, and what reading it will do."""
        sides = sorted(self.sizes, key=np.prod)
        (low, high) = ("x".join(map(str, size)) for size in (sides[0], sides[-1]))
        among = f" of {len(self.sizes)} looked at" if self.total > len(self.sizes) else ""
        lines = [
            f"{self.total:,} pictures of {low} pixels (height x width)"
            if low == high
            else f"{self.total:,} pictures of {low} to {high} pixels (height x width)"
        ]
        if 0 < self.grey < len(self.sizes):
            lines.append(f"{self.grey}{among} are grey, the others in colour: all are read alike.")
        long = [size for size in self.sizes if max(size) > 2 * min(size)]
        if long:
            lines.append(
                f"{len(long)}{among} are more than twice as long as wide: cutting a square out of "
                "their middle loses more than half of them. Cut them up before, to keep it."
            )
        return "\n".join(lines)


def survey(path: PathLike) -> Survey:
    """The `Survey` of a folder of images: at most 500 files are opened, no pixel is read.

    Raises:
        FileNotFoundError: if there is no such folder or no image in it.
    """
    files, _ = _files(Path(path), None, warn=False)  # whoever reads the pictures warns
    chosen = files[:: max(1, len(files) // SURVEYED)][:SURVEYED]
    sizes, grey = [], 0
    for file in chosen:
        try:
            with Image.open(file) as image:
                turned = image.getexif().get(ORIENTATION, 1) >= 5
                sizes.append(image.size if turned else image.size[::-1])
                grey += image.mode in ("1", "L", "LA", "I;16", "I")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # a damaged file is named when it is read
    if not sizes:
        raise ValueError(f"None of the {len(files)} image files in {path} can be opened.")
    return Survey(len(files), sizes, grey)


def check_options(labels: str | None, channels: int, background: str = "white") -> None:
    if labels not in ("auto", None):
        raise ValueError(f'labels must be "auto" or None. Received: {labels!r}.')
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3. Received: {channels}.")
    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {BACKGROUNDS}. Received: {background!r}.")


def checked_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an int or a pair."""
    given: Any = image_size
    size = (given, given) if np.ndim(given) == 0 else tuple(given)
    if len(size) != 2:
        raise ValueError(f"image_size must be an int or (height, width). Received: {image_size}.")
    height, width = (as_int(side, "image_size", 1) for side in size)
    return height, width


def _files(path, labels, warn=True):
    """Image files in sorted order, and the class of each or None; see `list_pictures`."""
    if not path.is_dir():
        raise FileNotFoundError(f"No folder at {path}.")
    found = list_pictures(path, warn=warn)
    if not found:
        raise FileNotFoundError(
            f"No image in {path}. Looked for the endings of all formats that Pillow reads, such as "
            ".jpeg, .png and .webp, and not in hidden folders."
        )
    classes = [p.relative_to(path).parts[0] if p.parent != path else None for p in found]
    if labels is None or not any(classes):
        return found, None
    if not all(classes):
        stray = found[classes.index(None)].name
        raise ValueError(
            f"{path} has images both beside and inside sub-folders ({stray} has no class). "
            "Move them, or pass labels=None."
        )
    return found, classes


def extensions() -> set[str]:
    """Those of all formats that Pillow reads, such as ".jpg"; with its plugins."""
    known = Image.registered_extensions()  # which reads the plugins
    return {end for end, name in known.items() if name in Image.OPEN and name not in NO_PICTURES}


def list_pictures(path: Path, beside: Iterable[str] = (), warn: bool = True) -> list[Path]:
    """All image files below a folder, sorted. Links are followed, but not in circles.

    Args:
        path: the folder.
        beside: names of files that are no pictures and are read all the same.
        warn: bool. Whether a warning counts and names what is left out: files of other kinds,
            hidden ones, links in a circle.
    """
    ends = extensions()
    found: list[Path] = []
    others: list[Path] = []
    hidden: list[Path] = []
    circles: list[Path] = []
    for folder, folders, files in os.walk(path, followlinks=True):
        names = {*folders, *files}
        litter = {name for name in names if name.startswith(".") or name in LITTER}
        links = {name for name in folders if _leads_above(Path(folder, name), path)}
        hidden += [Path(folder, name) for name in litter]
        circles += [Path(folder, name) for name in links]
        folders[:] = set(folders) - litter - links
        for name in set(files) - litter - set(beside):
            file = Path(folder, name)
            is_picture = file.suffix.lower() in ends and file.is_file()
            (found if is_picture else others).append(file)
    left_out = {"no pictures": others, "hidden": hidden, "links to a folder above": circles}
    words = [f"{len(them)} {why} ({_named(path, them)})" for why, them in left_out.items() if them]
    if warn and found and words:
        warnings.warn(f"Left out of {path}: {'; '.join(words)}.", stacklevel=2)
    return sorted(found)


def _leads_above(folder, top):
    """Whether it is a link to a folder that holds it, below `top` or `top` itself."""
    if not folder.is_symlink():
        return False
    above = [parent for parent in folder.parents if parent == top or top in parent.parents]
    return any(os.path.samefile(folder, parent) for parent in above)


def _named(path, files):
    names = [str(file.relative_to(path)) for file in sorted(files)[:3]]
    return ", ".join(names) + (", ..." if len(files) > 3 else "")
