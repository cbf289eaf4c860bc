"""Pictures to start from, and masks: checked, as the network sees them, and pasted at the end."""

import dataclasses
from typing import Any

import numpy as np

from keras_uvit.pixels import from_unit_range, scaled, to_unit_range
from keras_uvit.types import Array


@dataclasses.dataclass(frozen=True)
class Edit:
    """What of a picture is kept.

    Attributes:
        pictures: `(n, H, W, C)` float32 in [-1, 1]; n is 1 where all images start from one.
        mask: `(n, H, W, 1)` bool, True where images are drawn; None where all of them is. n is 1
            where all images have the same.
    """

    pictures: np.ndarray
    mask: np.ndarray | None

    def seen(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """`(B, h, w, c)` float32: pictures as the network sees them, of latents the mean."""
        pictures = _at(self.pictures, rows)
        if model.latent_scale is None:
            return pictures
        autoencoder = model.encoders.autoencoder
        moments = np.asarray(autoencoder.encode(pictures, verbose=0), "float32")
        mean = np.split(moments, 2, axis=-1)[0]
        # An encoder of one's own may have no shift.
        return scaled(mean, autoencoder.scale, getattr(autoencoder, "shift", 0.0))

    def drawn(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """`(B, h, w, 1)` float32: 1 where the network draws. A latent is drawn if any of its
        pixels is.
        """
        height, width = model.network.image_shape[:2]
        mask = _at(self.mask, rows)
        cells = mask.reshape(len(mask), height, mask.shape[1] // height, width, -1)
        return cells.any(axis=(2, 4))[..., None].astype("float32")

    def pasted(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """uint8 images with the known pixels of the pictures."""
        if self.mask is None:
            return images
        return np.where(_at(self.mask, rows), images, from_unit_range(_at(self.pictures, rows)))


def _at(array, rows):
    return array[rows % len(array)]


def edit_of(
    model: Any, image: Array | None, mask: Array | None, strength: float | None, resamples: int
) -> Edit | None:
    """The checked arguments of `generate` that change a picture; None without one.

    Raises:
        TypeError, ValueError: if they do not fit the model or each other.
    """
    if image is None:
        alone = {"mask": mask, "strength": strength, "resamples": None if resamples == 1 else 1}
        for name, value in alone.items():
            if value is not None:
                raise ValueError(f"{name} goes with image=, the picture to start from.")
        return None
    if mask is None and strength is None:
        raise ValueError(
            "image= needs strength, such as 0.6, to draw all of the picture again, or a mask of "
            "the part to draw."
        )
    if mask is None and resamples != 1:
        raise ValueError("resamples goes with a mask: without one, there is no known part.")
    pictures = _pictures(model, image)
    return Edit(pictures, None if mask is None else _mask(mask, pictures.shape[1:3]))


def _pictures(model, image):
    """`(n, H, W, C)` float32 in [-1, 1] of one picture or several, checked against the model."""
    autoencoder, shape = model.encoders.autoencoder, tuple(model.network.image_shape)
    is_latent = model.latent_scale is not None
    if is_latent and (autoencoder is None or not hasattr(autoencoder, "encode")):
        raise ValueError(
            "This model works on latents, and image is encoded by its autoencoder: call "
            "`model.set_encoders(autoencoder=...)` with one that has an encoder."
        )
    pictures = np.asarray(image)
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    factor = autoencoder.factor if is_latent else 1
    size = (shape[0] * factor, shape[1] * factor)
    channels = pictures.shape[-1] if is_latent and pictures.ndim == 4 else shape[-1]
    if pictures.ndim != 4 or pictures.shape[1:] != (*size, channels) or not len(pictures):
        raise ValueError(
            f"image must have shape {(*size, 'C' if is_latent else channels)}, or (n, ...) of "
            f"several. Received: {np.shape(image)}. Resize pictures first, such as by "
            f"np.asarray(PIL.Image.open(path).resize({size[::-1]}))."
        )
    if is_latent and autoencoder.moments_shape(pictures.shape[1:]) != (*shape[:2], 2 * shape[2]):
        raise ValueError(
            f"image of {pictures.shape[1:]} has latents of another shape than {shape}."
        )
    return to_unit_range(pictures)


def _mask(mask, size):
    """`(n, H, W, 1)` bool."""
    mask = np.asarray(mask)
    given = mask.shape
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask[..., None] if mask.ndim == 3 else mask
    if mask.ndim != 4 or mask.shape[1:] != (*size, 1) or not len(mask):
        raise ValueError(
            f"mask must have shape {size}, the picture's, or (n, {size[0]}, {size[1]}) of "
            f"several. Received: {given}."
        )
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(
            "mask is 1 (or True) where the image is drawn, and 0 (or False) where the picture is "
            f"kept. Received values from {mask.min()} to {mask.max()}; for a grey picture pass "
            "mask > 127."
        )
    mask = mask.astype(bool)
    for one in mask:
        if one.all() or not one.any():
            raise ValueError(
                "mask is 1 everywhere: nothing of the picture is kept. Leave image and mask out."
                if one.all()
                else "mask is 0 everywhere: there is nothing to draw."
            )
    return mask
