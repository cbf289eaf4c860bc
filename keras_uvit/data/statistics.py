"""The shift and the scale of latents, channel by channel, from a cache."""

from typing import Any

import numpy as np

from keras_uvit.checks import as_int

BLOCK = 256  # samples in memory at a time


def latent_statistics(
    cache: Any, num_samples: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, ...]]:
    """What brings each channel of latents to mean 0 and variance 1: scale (z - shift).

    Nothing is encoded again: a cache keeps moments without scale and shift. Open it again with what
    this returns, `LatentDataset(path, **statistics)`, and make the autoencoder with it too,
    `AutoencoderKL.from_file(path, **statistics)`.

    Args:
        cache: `LatentDataset`, or moments `(n, h, w, 2 C)`.
        num_samples: int, how many of them are read, chosen at random.
        seed: int.

    Returns:
        dict of "scale" and "shift", C floats each.

    Raises:
        ValueError: for a channel that does not vary.

    Example:
        >>> mean = np.random.default_rng(0).normal([1.0, -2.0], [0.5, 2.0], (500, 4, 4, 2))
        >>> found = latent_statistics(np.concatenate([mean, np.full_like(mean, -30.0)], axis=-1))
        >>> print(*(round(x, 1) for x in (*found["scale"], *found["shift"])))
        2.0 0.5 1.0 -2.0
    """
    moments = cache.arrays["moments"] if hasattr(cache, "arrays") else cache
    count = min(len(moments), as_int(num_samples, "num_samples", 1))
    rows = np.sort(np.random.default_rng(seed).permutation(len(moments))[:count])
    sums = np.zeros((3, moments.shape[-1] // 2))  # of means, of their squares, of the noise
    for first in range(0, count, BLOCK):
        some = np.stack([moments[int(k)] for k in rows[first : first + BLOCK]]).astype("float64")
        mean, log_variance = np.split(some, 2, axis=-1)
        noise = np.exp(np.clip(log_variance, -30.0, 20.0))
        sums += [part.mean(axis=(1, 2)).sum(axis=0) for part in (mean, mean**2, noise)]
    shift, square, noise = sums / count
    variance = square - shift**2 + noise
    if not (variance > 1e-9).all():
        raise ValueError(
            f"Channel {int(variance.argmin())} of the latents does not vary: expected the moments "
            "of pictures that differ."
        )
    scale = [float(f"{x:.6g}") for x in variance**-0.5]
    return {"scale": tuple(scale), "shift": tuple(float(f"{x:.6g}") for x in shift)}
