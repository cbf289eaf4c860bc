"""An autoencoder without weights, for where no trained one is at hand."""

import numpy as np
from keras import ops

from keras_uvit.checks import as_int
from keras_uvit.pixels import (
    PerChannel,
    check_latents,
    check_rank,
    from_unit_range,
    per_channel,
    scaled,
    to_unit_range,
    unscaled_tensor,
)
from keras_uvit.types import Array, Tensor


class SpaceToDepth:
    """Each block of pixels becomes one latent, exactly and without noise.

    Has the methods and attributes of `AutoencoderKL`, so that the whole path of latent diffusion,
    cache, training, sampling and decoding, runs on small data in seconds. It compresses nothing.

    Args:
        factor: int, side of a block in pixels.
        scale: float, what latents (pixels in [-1, 1]) are multiplied by to have variance 1;
            or one for each channel of the latents.
        shift: float, what is subtracted before, or one for each channel.

    Example:
        >>> SpaceToDepth().encode(np.zeros((1, 8, 8, 1), "uint8")).shape
        (1, 4, 4, 8)
    """

    def __init__(self, factor: int = 2, scale: PerChannel = 1.0, shift: PerChannel = 0.0) -> None:
        self.factor = as_int(factor, "factor", 1)
        self.scale = per_channel(scale, "scale", positive=True)
        self.shift = per_channel(shift, "shift")
        self.id = self.fingerprint = f"space-to-depth-{factor}"

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(h, w, 2 factor^2 C) of images (H, W, C); ValueError where `factor` does not divide."""
        height, width, channels = image_shape
        f = self.factor
        if height % f or width % f:
            raise ValueError(
                f"Height and width must be multiples of {f}. Received: {height} x {width}."
            )
        return (height // f, width // f, 2 * f * f * channels)

    def encode(self, images: Array, batch_size: int | None = None, verbose: int = 0) -> np.ndarray:
        """Moments `(n, H / factor, W / factor, 2 factor^2 C)` float32 of `(n, H, W, C)` images."""
        check_rank(images, "images")
        self.moments_shape(images.shape[1:])
        n, height, width, channels = images.shape
        f = self.factor
        blocks = to_unit_range(images).reshape(n, height // f, f, width // f, f, channels)
        mean = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // f, width // f, -1)
        return np.concatenate([mean, np.full_like(mean, -30.0)], axis=-1)

    def sample(self, moments: Array, seed: int = 0) -> np.ndarray:
        """Latents scale (mean - shift), float32: there is no noise."""
        check_rank(moments, "moments")
        mean, _ = np.split(np.asarray(moments, "float32"), 2, axis=-1)
        return scaled(mean, self.scale, self.shift)

    def decode(self, latents: Array, batch_size: int | None = None, verbose: int = 0) -> np.ndarray:
        """Images `(n, factor h, factor w, C)` uint8 of latents as models make them."""
        check_rank(latents, "latents")
        check_latents(latents)
        depth, f = latents.shape[-1], self.factor
        if depth % f**2:
            raise ValueError(
                f"latents must have shape (n, h, w, c), c a multiple of {f**2}. "
                f"Received: c={depth}."
            )
        return from_unit_range(ops.convert_to_numpy(self.decode_tensor(latents)))

    def decode_tensor(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents, a tensor by `keras.ops`, not checked."""
        latents = ops.convert_to_tensor(latents, "float32")
        n, height, width, _ = latents.shape
        f = self.factor
        blocks = ops.reshape(
            unscaled_tensor(latents, self.scale, self.shift), (n, height, width, f, f, -1)
        )
        return ops.reshape(
            ops.transpose(blocks, (0, 1, 3, 2, 4, 5)), (n, height * f, width * f, -1)
        )
