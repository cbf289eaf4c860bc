"""Fréchet distance between two sets of features."""

import numpy as np


def frechet_distance(a, b):
    """Distance of two Gaussians fitted to feature sets, squared as in FID.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Heusel et al. 2017, arXiv 1706.08500, Eq. 6. The trace of the root comes from a symmetric
    eigenvalue problem, always real, where `sqrtm` fails on singular covariances.

    Args:
        a, b: `(n, d)`, `(m, d)` features; at least two rows each.

    Returns:
        float >= 0.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.
    """
    a, b = (np.asarray(x, "float64") for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "Feature sets have shapes (n, d) and (m, d), n and m at least 2. "
            f"Received: {a.shape} and {b.shape}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("The features hold NaN or infinity.")
    s_a, s_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    shift = a.mean(axis=0) - b.mean(axis=0)
    distance = shift @ shift + np.trace(s_a) + np.trace(s_b) - 2 * _root_trace(s_a, s_b)
    return max(float(distance), 0.0)


def _root_trace(s_a, s_b):
    """tr((S_a S_b)^(1/2)) = sum of roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2)."""
    values, vectors = np.linalg.eigh(s_a)
    half = vectors * np.sqrt(np.clip(values, 0, None))
    return np.sqrt(np.clip(np.linalg.eigvalsh(half.T @ s_b @ half), 0, None)).sum()
