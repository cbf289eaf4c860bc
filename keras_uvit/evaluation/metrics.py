"""Inception Score, precision and recall, as the ADM suite computes them."""

from collections.abc import Iterator

import numpy as np

from keras_uvit.types import Array

BLOCK = 2**25  # distances held at once


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of an image's class distribution to the mean one.

    Salimans et al. 2016, arXiv 1606.03498, Section 4; the mean over splits of the images.

    Args:
        logits: `(n, 1008)`, without the classifier's bias ("logits_unbiased").
        split_size: int, images a split; a last smaller split counts like the others.

    Returns:
        float in [1, 1008].
    """
    logits = np.asarray(logits, "float64")
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for first in range(0, len(log_p), split_size):
        part = log_p[first : first + split_size]
        p = np.exp(part)
        mean = np.maximum(p.mean(axis=0), np.finfo("float64").tiny)  # 0 log 0 is 0
        scores.append(np.exp((p * (part - np.log(mean))).sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(real: Array, generated: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, Eq. 1 and 2).

    A set's manifold is the union of balls around its features, each reaching to its k-th nearest
    neighbour. Precision: the share of generated features in the real manifold. Recall: the share
    of real features in the generated one.

    Args:
        real, generated: `(n, d)`, `(m, d)` features, more than k rows each.
        k: int.

    Returns:
        (precision, recall), floats in [0, 1].

    Raises:
        ValueError: if a set is too small or the widths differ.
    """
    real, generated = (np.asarray(x, "float64") for x in (real, generated))
    if (
        (real.ndim, generated.ndim) != (2, 2)
        or min(len(real), len(generated)) <= k
        or real.shape[1] != generated.shape[1]
    ):
        raise ValueError(
            f"Features have shapes (n, d) and (m, d), n and m above k={k}. "
            f"Received: {real.shape} and {generated.shape}."
        )
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def within_class_spread(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean standard deviation of a feature within a class, of features `(n, d)`."""
    return np.mean([features[labels == k].std(axis=0).mean() for k in np.unique(labels)])


def _share_inside(points, centres, k):
    """Share of `points` within the k-th neighbour's distance of at least one of `centres`."""
    radii = np.concatenate(
        # The nearest is the centre itself, at distance 0.
        [np.partition(d, k, axis=1)[:, k] for d in squared_distances(centres, centres)]
    )
    inside = [(d <= radii).any(axis=1) for d in squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of all pairs, `(block, len(b))` at a time."""
    norms = np.square(b).sum(axis=1)
    rows = max(1, BLOCK // len(b))
    for first in range(0, len(a), rows):
        part = a[first : first + rows]
        squares = np.square(part).sum(axis=1)[:, None] + norms - 2 * part @ b.T
        yield np.clip(squares, 0, None)
