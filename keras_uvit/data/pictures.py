"""A picture of any kind to an array: bits, transparency, then its size."""

import math

import numpy as np
from PIL import Image, ImageOps

from keras_uvit.types import PathLike

BACKGROUNDS = ("white", "black")
# Formats of at most 16 bits, for which Pillow takes the mode of 32 bits, on the scale of 16.
SIXTEEN_BITS = ("PNG", "PPM")
MODES = {"I": "integers of 32 bits", "F": "floats"}


def read_file(
    file: PathLike,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    crop: tuple[int, int, int, int] | None = None,
    method: str = "adm",
    background: str = "white",
) -> np.ndarray:
    """`fitted` of an image file, `opaque`, upright by its EXIF tag.

    Raises:
        ValueError: if the file cannot be read; it is named.
    """
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            picture = opaque(upright, background, image.format)
            return fitted(picture, size, channels, crop, method)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}). Mend or remove it, or pass "
            'corrupt="skip".'
        ) from error


def opaque(image: Image.Image, background: str = "white", kind: str | None = None) -> Image.Image:
    """A PIL image of 8 bits a channel without transparency.

    16 bits are divided by 256, where Pillow would clip them at 255. Pixels that are transparent
    have a colour too, which nobody was meant to see: the background is seen instead.

    Args:
        image: PIL image of any mode.
        background: "white" or "black".
        kind: str, the format of the file, or None.

    Raises:
        ValueError: for floats and integers of 32 bits, whose white could be any number.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in SIXTEEN_BITS):
        return Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are {MODES[image.mode]}, which may mean any range of brightness: convert "
            "it to 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))


def fitted(
    image: Image.Image,
    size: tuple[int, int] | None,
    channels: int = 3,
    crop: tuple[int, int, int, int] | None = None,
    method: str = "adm",
) -> np.ndarray:
    """`(H, W, C)` uint8 of a PIL image that covers `size`, cut at the centre.

    Args:
        image: PIL image.
        size: (height, width) in pixels, or None to leave the size.
        channels: 3 or 1.
        crop: (top, left, height, width) to cut out first, in pixels, or None.
        method: "adm", halved by box filter as long as it stays larger, then bicubic (Dhariwal and
            Nichol 2021, arXiv 2105.05233); or "lanczos", cut first, then resized at once (the
            published program's for COCO).

    Raises:
        ValueError: if the crop is not in the image.
    """
    image = image.convert("RGB" if channels == 3 else "L")
    if crop is not None:
        top, left, height, width = crop
        if min(top, left) < 0 or top + height > image.height or left + width > image.width:
            raise ValueError(f"crop={crop} is not in the image, {image.height} x {image.width}")
        image = image.crop((left, top, left + width, top + height))
    if size is not None:
        image = FITS[method](image, size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _adm(image, size):
    height, width = size
    image = _without_ends(image, size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covered = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covered, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _without_ends(image, size, most=16):
    """A very long picture, cut to `most` times what its centre needs: all would be enlarged."""
    height, width = size
    columns = min(image.width, most * math.ceil(image.height * width / height))
    rows = min(image.height, most * math.ceil(image.width * height / width))
    left, top = (image.width - columns) // 2, (image.height - rows) // 2
    return image.crop((left, top, left + columns, top + rows))


def _lanczos(image, size):
    height, width = size
    scale = min(image.height / height, image.width / width)
    rows, columns = round(scale * height), round(scale * width)
    top, left = (image.height - rows) // 2, (image.width - columns) // 2
    image = image.crop((left, top, left + columns, top + rows))
    return image.resize((width, height), Image.Resampling.LANCZOS)


FITS = {"adm": _adm, "lanczos": _lanczos}
