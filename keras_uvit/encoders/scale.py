"""The factor that brings latents to variance 1, from the data."""

from typing import Any

import numpy as np

from keras_uvit.pixels import moments_std


def fitting_scale(
    autoencoder: Any,
    images: Any,
    *,
    num_images: int = 200,
    batch_size: int = 8,
    seed: int = 0,
    verbose: int = 1,
) -> float:
    """The `scale` that suits latents of these images: 1 over their standard deviation.

    Call it before encoding, and make the autoencoder with what it returns.

    Args:
        autoencoder: `encoders.AutoencoderKL`, or any with its `encode`.
        images: `(n, H, W, C)` uint8, or a `data.sources.Source`.
        num_images: int, how many of them are encoded, chosen at random.
        batch_size, verbose: of `encode`.
        seed: int.

    Returns:
        float, with four significant digits.

    Raises:
        ValueError: for latents that do not vary.

    Example:
        >>> from keras_uvit.encoders import SpaceToDepth
        >>> images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype("uint8")
        >>> 1.6 < fitting_scale(SpaceToDepth(2, scale=1.0), images, verbose=0) < 1.9
        True
    """
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
    if hasattr(images, "read"):
        images = np.stack([images.read(int(k))["image"] for k in chosen])
    else:
        images = np.asarray(images)[np.sort(chosen)]
    moments = autoencoder.encode(images, batch_size=batch_size, verbose=verbose)
    std = moments_std(moments)
    if not std > 1e-6:  # what the smallest log-variance that is used leaves
        raise ValueError(
            f"The latents of {len(images)} images are all equal: expected pictures that differ."
        )
    return float(f"{1 / std:.4g}")
