"""Captioned pictures without a download: two shapes, drawn from a sentence and read back.

"a small red circle left of a large blue square" is drawn on 32 x 32 pixels by whole pixels, so
that `read_back` recovers the sentence exactly, and measures what a text-to-image model has drawn.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from keras_uvit.data.sources import Source
from keras_uvit.optional import optional
from keras_uvit.types import Array

SIDE = 32  # pixels
SIZES = {"small": 7, "large": 11}  # pixels across
COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 180, 80),
    "blue": (60, 100, 230),
    "yellow": (240, 210, 60),
}
SHAPES = ("circle", "square", "triangle")
# Each relation and its inverse; those in the first column are what `read_back` answers in.
INVERSE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
BACKGROUND = (28, 28, 36)
CENTRES = (8, 24)  # of the two things along the direction of the relation; across it, the middle
JITTER = (1, 2)  # pixels at most from there, along and across
HELD_OUT = 0.1  # share of pairs of things that no training picture has
MIN_PIXELS = 12  # what is smaller is no thing
MIN_OVERLAP = 0.6  # of a thing with the shape that it is read as, intersection over union


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One shape: `size` of `SIZES`, `colour` of `COLOURS`, `shape` of `SHAPES`."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Two things and where the first stands from the second: what a caption says."""

    first: Thing
    relation: str
    second: Thing

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    def inverse(self) -> "Scene":
        """The same picture, told from the other thing."""
        return Scene(self.second, INVERSE[self.relation], self.first)


THINGS = [Thing(*parts) for parts in itertools.product(SIZES, COLOURS, SHAPES)]


def parse(caption: str) -> Scene:
    """The `Scene` of a caption.

    Raises:
        ValueError: if it is none that this module makes.

    Example:
        >>> parse("a small red circle above a large blue square").relation
        'above'
    """
    for relation in INVERSE:
        parts = caption.split(f" {relation} ")
        things = [thing for part in parts for thing in THINGS if str(thing) == part]
        if len(parts) == len(things) == 2:
            return Scene(things[0], relation, things[1])
    raise ValueError(
        "Expected a caption such as 'a small red circle left of a large blue square'. "
        f"Received: {caption!r}."
    )


@functools.cache
def _pairs(split):
    """The pairs of things of a split, ordered."""
    every = list(itertools.combinations_with_replacement(THINGS, 2))
    order = np.random.default_rng(0).permutation(len(every))
    held = round(HELD_OUT * len(every))
    return [every[i] for i in (order[held:] if split == "train" else order[:held])]


def scenes(count: int, split: str = "train", seed: int = 0) -> list[Scene]:
    """Random scenes.

    Args:
        count: int.
        split: "train", or "test" for pairs of things that no training scene has.
        seed: int.

    Returns:
        list of `Scene`.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test". Received: {split!r}.')
    random, pairs = np.random.default_rng([seed, split == "test"]), _pairs(split)
    drawn = []
    for _ in range(count):
        first, second = pairs[random.integers(len(pairs))]
        relation = list(INVERSE)[random.integers(len(INVERSE))]
        drawn.append(Scene(first, relation, second))
    return drawn


def source(count: int, split: str = "train", seed: int = 0) -> Source:
    """A `Source` of captioned pictures: scene k, drawn each time it is read, always the same.

    Args:
        count, split, seed: see `scenes`.

    Returns:
        `Source` of images `(32, 32, 3)` uint8, with two captions each, one from either thing.
    """
    told = scenes(count, split, seed)
    return Source(
        f"shapes/{split}/{seed}",
        count,
        (SIDE, SIDE, 3),
        lambda k: {"image": draw(told[k], seed=[seed, k])},
        captions=[[str(scene), str(scene.inverse())] for scene in told],
    )


def draw(scene: Scene, seed: int | Sequence[int] = 0) -> np.ndarray:
    """`(32, 32, 3)` uint8 of a scene; the seed places it.

    Example:
        >>> scene = parse("a small red circle above a large blue square")
        >>> str(read_back(draw(scene)))
        'a small red circle above a large blue square'
    """
    if scene.relation in ("right of", "below"):
        scene = scene.inverse()
    random = np.random.default_rng(seed)
    image = np.full((SIDE, SIDE, 3), BACKGROUND, "uint8")
    for thing, centre in zip((scene.first, scene.second), CENTRES):
        size = SIZES[thing.size]
        along, across = (random.integers(-most, most + 1) for most in JITTER)
        place = [centre + along - size // 2, SIDE // 2 + across - size // 2]
        left, top = place if scene.relation == "left of" else place[::-1]
        mask = _mask(thing.shape, size)
        image[top : top + size, left : left + size][mask] = COLOURS[thing.colour]
    return image


@functools.cache
def _mask(shape, size):
    """`(size, size)` bool: the pixels of a shape."""
    half = size // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    if shape == "circle":
        return x**2 + y**2 <= (half + 0.3) ** 2
    if shape == "square":
        return np.ones((size, size), bool)
    return 2 * np.abs(x) <= y + half


def read_back(image: np.ndarray) -> Scene | None:
    """What a picture shows: the inverse of `draw`, and tolerant of a model's uneven strokes.

    Args:
        image: `(32, 32, 3)` uint8.

    Returns:
        `Scene`, its relation "left of" or "above"; None unless there are just two things, each
        overlapping with a shape by at least 0.6.

    Raises:
        ImportError: without SciPy; `pip install "keras-uvit[data]"`.
        ValueError: for another shape or dtype.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"Expected ({SIDE}, {SIDE}, 3) uint8. Received: {image.shape} {image.dtype}."
        )
    palette = np.array([BACKGROUND, *COLOURS.values()], "float32")
    nearest = ((image[:, :, None] - palette) ** 2).sum(axis=-1).argmin(axis=-1)  # 0: background
    ndimage = optional("scipy.ndimage", "data", "Reading shapes back needs SciPy")
    parts, number = ndimage.label(nearest > 0)
    masks = [parts == k for k in range(1, number + 1)]
    masks = [mask for mask in masks if mask.sum() >= MIN_PIXELS]
    if len(masks) != 2:
        return None
    found = [(_centre(mask), _thing(mask, nearest)) for mask in masks]
    (y0, x0), (y1, x1) = found[0][0], found[1][0]
    sideways = abs(x1 - x0) > abs(y1 - y0)
    found.sort(key=lambda item: item[0][int(sideways)])
    first, second = (thing for _, thing in found)
    if first is None or second is None:
        return None
    return Scene(first, "left of" if sideways else "above", second)


def _centre(mask):
    return np.argwhere(mask).mean(axis=0)


def _thing(mask, nearest):
    """The `Thing` that covers a mask best, or None."""
    colour = list(COLOURS)[np.bincount(nearest[mask]).argmax() - 1]
    overlaps = {
        (size, shape): _overlap(mask, _mask(shape, SIZES[size]))
        for size, shape in itertools.product(SIZES, SHAPES)
    }
    size, shape = max(overlaps, key=overlaps.get)
    return Thing(size, colour, shape) if overlaps[size, shape] >= MIN_OVERLAP else None


def _overlap(mask, template):
    """Largest intersection over union of a mask with a template, centred on it up to a pixel."""
    rows, columns = np.nonzero(mask)
    size = len(template)
    top = (rows.min() + rows.max() + 1 - size) // 2
    left = (columns.min() + columns.max() + 1 - size) // 2
    padded = np.pad(mask, size)
    best = 0.0
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        y, x = top + dy + size, left + dx + size
        common = (padded[y : y + size, x : x + size] & template).sum()
        best = max(best, common / (mask.sum() + template.sum() - common))
    return best


def score(images: Array, captions: Sequence[str]) -> dict[str, float]:
    """How much of the captions the images show.

    Of the two things in a picture, the first of the caption is the one that agrees with it more.
    In a picture that cannot be read nothing is right.

    Args:
        images: `(n, 32, 32, 3)` uint8.
        captions: n captions.

    Returns:
        dict of shares in [0, 1]: "shape", "colour", "size" (of all things), "relation",
        "attributes" (the mean of these four), "scene" (all of a picture right), "readable".
    """
    if len(images) != len(captions) or not len(captions):
        raise ValueError(
            f"Expected an image a caption. Received: {len(images)} images, {len(captions)} captions"
        )
    found = [read_back(image) for image in images]
    rows = [_right(scene, parse(text)) for scene, text in zip(found, captions)]
    names = ("shape", "colour", "size", "relation")
    shares = {name: float(np.mean([row[name] for row in rows])) for name in names}
    shares["attributes"] = float(np.mean([shares[name] for name in names]))
    shares["scene"] = float(np.mean([min(row.values()) == 1 for row in rows]))
    shares["readable"] = float(np.mean([scene is not None for scene in found]))
    return shares


def _right(found, asked):
    """Share of each attribute of one picture that is right."""
    if found is None:
        return dict.fromkeys(("shape", "colour", "size", "relation"), 0.0)

    def compared(found):
        things = list(zip((found.first, found.second), (asked.first, asked.second)))
        right = {
            name: np.mean([getattr(a, name) == getattr(b, name) for a, b in things])
            for name in ("shape", "colour", "size")
        }
        return {**right, "relation": float(found.relation == asked.relation)}

    either = [compared(found), compared(found.inverse())]
    return max(either, key=lambda right: sum(right.values()))
