"""Samples on disk: the ADM suite's `.npz`, pictures, grids and films to look at."""

import warnings
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from keras_uvit import io
from keras_uvit.data import pictures, sources
from keras_uvit.types import Array, PathLike

LOSSY = {".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif"}


def save_arrays(path: PathLike, content: dict[str, Array]) -> None:
    """Writes arrays as an `.npz`, whole or not at all."""
    with _ending(path, ".npz") as beside:
        np.savez(beside, **content)


def read_npz(path: PathLike, what: str, skip: Container[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by name; pickled objects are refused.

    Args:
        path: the file.
        what: what it should hold, for errors.
        skip: names that are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No {what} at {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files if name not in skip}
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise ValueError(f"{path} is damaged or no .npz file: {error}.") from error
    return {name: a for name, a in content.items() if isinstance(a, np.ndarray)}


def _ending(path, *suffixes):
    """`io.replacing`, for a file that must end so; its folder is made if need be."""
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path.name} must end in {' or '.join(suffixes)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return io.replacing(path)


def write_npz(path: PathLike, images: np.ndarray, labels: Array | None = None) -> None:
    """Images as the ADM suite's evaluator reads them: `arr_0`, and labels as `arr_1`.

    Args:
        path: ending in `.npz`.
        images: `(n, H, W, 3)` uint8.
        labels: `(n,)` ints, or None.
    """
    content = {"arr_0": images} | ({} if labels is None else {"arr_1": np.asarray(labels)})
    save_arrays(path, content)


def write_pngs(folder: PathLike, images: Iterable[np.ndarray], first: int = 0) -> None:
    """Images as `000000.png`, ... in a folder, numbered from `first`."""
    for k, image in enumerate(images):
        write_png(Path(folder) / f"{first + k:06d}.png", image)


def write_png(path: PathLike, image: np.ndarray) -> None:
    """One uint8 image `(H, W, 1 or 3)` as PNG."""
    with _ending(path, ".png") as beside:
        _picture(image).save(beside, format="PNG")


def _picture(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_film(path: PathLike, frames: np.ndarray, zoom: int = 1, milliseconds: int = 120) -> None:
    """How images came about: a strip as PNG, or an animated WebP.

    Args:
        path: ending in `.png`, a row for each image and a column for each frame, or in `.webp`, all
            images in a grid, whose last frame stays for a second.
        frames: `(k, n, H, W, C)` uint8, the second of what `generate(return_intermediates=True)`
            returns.
        zoom: int, each pixel repeated so often.
        milliseconds: int, how long a frame of a WebP is shown.

    Raises:
        ValueError: for another ending, or frames of another shape or dtype.

    Example:
        >>> import tempfile
        >>> frames = np.zeros((3, 2, 8, 8, 1), "uint8")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_film(f"{folder}/film.webp", frames)
    """
    frames = np.asarray(frames)
    if frames.ndim != 5 or not frames.size or frames.dtype != np.uint8:
        raise ValueError(
            "frames must have shape (k, n, H, W, C), uint8. "
            f"Received: {frames.shape} {frames.dtype}."
        )
    with _ending(path, ".png", ".webp") as beside:
        if Path(path).suffix == ".png":
            strip = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
            _picture(image_grid(strip, len(frames), zoom)).save(beside, format="PNG")
            return
        first, *rest = (_picture(image_grid(images, zoom=zoom)) for images in frames)
        duration = [*[milliseconds] * len(rest), 1000]
        first.save(beside, format="WEBP", save_all=True, append_images=rest, duration=duration,
                   loop=0, lossless=True)  # fmt: skip


def read_images(path: PathLike) -> np.ndarray:
    """`(n, H, W, C)` uint8 of an ADM `.npz`, or of all pictures in a folder, sorted, in colour.

    A folder is read by the code that training reads it with, and nothing is resized.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if the images differ in size, one is damaged, or the file holds none.

    Warns of pictures in formats that may lose pixels: distances contain what was lost.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    content = read_npz(path, "images")
    if "arr_0" not in content:
        raise ValueError(f'{path} holds no images: expected "arr_0". Received: {[*content]}.')
    return content["arr_0"]


def _read_folder(path):
    found = sources.list_pictures(path)
    files = [file for file in found if not file.name.startswith("tmp-")]  # of a killed process
    if not files:
        raise FileNotFoundError(f"No picture in {path}.")
    lossy = [file for file in files if file.suffix.lower() in LOSSY]
    if lossy:
        warnings.warn(
            f"{len(lossy)} of {len(files)} pictures in {path} are in a format that may lose "
            f"pixels, such as {lossy[0].name}: distances contain what was lost. Write samples as "
            "PNG.",
            stacklevel=3,
        )
    images = [pictures.read_file(file) for file in files]
    other = next((k for k, image in enumerate(images) if image.shape != images[0].shape), None)
    if other is not None:
        sizes = " and ".join(
            f"{files[k].name} of {images[k].shape[0]}x{images[k].shape[1]}" for k in (0, other)
        )
        raise ValueError(
            f"The images in {path} differ in size: {sizes} (height x width). Expected images of "
            "one size, that of the reference."
        )
    return np.stack(images)


def image_grid(
    images: np.ndarray, columns: int | None = None, zoom: int = 1, gap: int = 2
) -> np.ndarray:
    """Images side by side, row by row, on white.

    Args:
        images: `(n, H, W, C)` uint8.
        columns: int; `None` makes a square.
        zoom: int, each pixel repeated so often.
        gap: int, pixels between images.

    Returns:
        `(height, width, C)` uint8.
    """
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    height, width = height * zoom, width * zoom
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    grid = np.full(shape, 255, "uint8")
    for k, image in enumerate(images.repeat(zoom, 1).repeat(zoom, 2)):
        top, left = k // columns * (height + gap), k % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


FONT_SIZE = 13  # pixels
MAX_LINES = 8


def captioned_grid(
    images: np.ndarray, captions: Sequence[str], columns: int | None = None, zoom: int = 1
) -> np.ndarray:
    """Images side by side, row by row, each above its caption.

    Args:
        images: `(n, H, W, C)` uint8.
        captions: n strings.
        columns, zoom: see `image_grid`; a picture should be 100 pixels wide or more.

    Returns:
        `(height, width, 3)` uint8.
    """
    if isinstance(captions, str) or len(images) != len(captions) or not len(images):
        raise ValueError(f"Expected a list of {len(images)} captions. Received: {captions!r}.")
    from PIL import ImageDraw, ImageFont

    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    font, width = ImageFont.load_default(FONT_SIZE), images.shape[2]
    texts = [_wrapped(caption, font, width) for caption in captions]
    below = FONT_SIZE // 2 + max(text.count("\n") + 1 for text in texts) * (FONT_SIZE + 4)
    cells = np.full((len(images), images.shape[1] + below, width, 3), 255, "uint8")
    cells[:, : images.shape[1]] = images
    for k, text in enumerate(texts):
        cell = Image.fromarray(cells[k])
        ImageDraw.Draw(cell).text((0, images.shape[1] + 2), text, "black", font)
        cells[k] = np.asarray(cell)
    return image_grid(cells, columns, gap=10)


def _wrapped(text, font, width):
    """`text` in lines that are at most `width` pixels wide, as far as its words are."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "..."]
    return "\n".join(lines)
