"""Fréchet distance between feature sets, and the reference statistics it is taken to."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Self

import numpy as np

from keras_uvit import progress
from keras_uvit.evaluation.files import read_npz, save_arrays
from keras_uvit.evaluation.inception import InceptionFeatures
from keras_uvit.types import Array, PathLike

MIN_IMAGES = 2049  # of 2048 features: fewer make every covariance singular
USUAL = 50_000  # what published FIDs are of


def gaussian(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(d,)` and covariance `(d, d)` of features `(n, d)`, float64.

    Raises:
        ValueError: for another shape, fewer than two rows, or values that are not finite.
    """
    features = np.asarray(features, "float64")
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Features have shape (n, d), n at least 2. Received: {features.shape}.")
    if not np.isfinite(features).all():
        raise ValueError("The features hold NaN or infinity.")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(
    a: Array | tuple[np.ndarray, np.ndarray], b: Array | tuple[np.ndarray, np.ndarray]
) -> float:
    """Distance of two Gaussians fitted to feature sets, squared as in FID.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Heusel et al. 2017, arXiv 1706.08500, Eq. 6. The trace of the root comes from a symmetric
    eigenvalue problem, always real, where `sqrtm` fails on singular covariances.

    Args:
        a, b: features `(n, d)`, at least two rows, or (mean, covariance) as `gaussian` gives them.

    Returns:
        float >= 0.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.
    """
    (mu_a, s_a), (mu_b, s_b) = (
        _checked("Statistics", *x) if isinstance(x, tuple) else gaussian(x) for x in (a, b)
    )
    if mu_a.shape != mu_b.shape:
        raise ValueError(f"Features differ in number: {mu_a.shape[0]} and {mu_b.shape[0]}.")
    shift = mu_a - mu_b
    distance = shift @ shift + np.trace(s_a) + np.trace(s_b) - 2 * _root_trace(s_a, s_b)
    return max(float(distance), 0.0)


def _root_trace(s_a, s_b):
    """tr((S_a S_b)^(1/2)) = sum of roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2)."""
    values, vectors = np.linalg.eigh(s_a)
    half = vectors * np.sqrt(np.clip(values, 0, None))
    return np.sqrt(np.clip(np.linalg.eigvalsh(half.T @ s_b @ half), 0, None)).sum()


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images, which generated ones are compared with.

    Attributes:
        pool: (mean `(2048,)`, covariance) of pool3 features, for FID.
        spatial: the same of the 2023 spatial features, for sFID, or None.
        features: `(m, 2048)` pool features for precision and recall, or None.
        count, image_size, resize, inception: number of images, (height, width), resize convention
            and fingerprint of the Inception weights; None where a file does not say.
    """

    pool: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    features: np.ndarray | None = None
    count: int | None = None
    image_size: tuple[int, int] | None = None
    resize: str | None = None
    inception: str | None = None

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of mean and covariance."""
        digest = hashlib.sha256()
        for a in self.pool:
            digest.update(np.ascontiguousarray(a, "<f8").data)
        return digest.hexdigest()[:16]

    def save(self, path: PathLike) -> None:
        """Writes an `.npz` with the keys "mu" and "sigma" that other FID tools read too."""
        content = {"mu": self.pool[0], "sigma": self.pool[1]}
        if self.spatial is not None:
            content |= {"mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        for key in ("features", "count", "image_size", "resize", "inception"):
            if getattr(self, key) is not None:
                content[key] = np.asarray(getattr(self, key))
        save_arrays(path, content)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Reads an `.npz` of this class, of pytorch-fid or the published program ("mu", "sigma"),
        of the ADM suite (also "mu_s", "sigma_s"), or of raw features ("pool_3").

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or holds no statistics.
        """
        # "arr_0" of the ADM suite's files is gigabytes of images that are not needed.
        content = read_npz(path, "reference statistics", skip=("arr_0",))
        features = content.get("features", content.get("pool_3"))
        if features is not None and "pool_3" in content:
            try:
                pool = gaussian(features)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            return cls(pool, features=features, count=len(features))
        for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if pair[0] == "mu" or pair[0] in content:
                _check_pair(path, content, *pair)
        _check_facts(path, content)
        size = content.get("image_size")
        if features is not None and features.shape[1:] != content["mu"].shape:
            raise ValueError(
                f"{path}: features have shape (m, {len(content['mu'])}). "
                f"Received: {features.shape}."
            )
        return cls(
            pool=(content["mu"], content["sigma"]),
            spatial=(content["mu_s"], content["sigma_s"]) if "mu_s" in content else None,
            features=features,
            count=int(content["count"]) if "count" in content else None,
            image_size=None if size is None else (int(size[0]), int(size[1])),
            resize=str(content["resize"]) if "resize" in content else None,
            inception=str(content["inception"]) if "inception" in content else None,
        )


# What a file says beside the statistics: shape and kinds of NumPy types.
FACTS = {
    "count": ((), "iu"),
    "image_size": ((2,), "iu"),
    "resize": ((), "U"),
    "inception": ((), "U"),
}


def _check_facts(path, content):
    for name, (shape, kinds) in FACTS.items():
        value = content.get(name)
        if value is not None and (value.shape != shape or value.dtype.kind not in kinds):
            raise ValueError(
                f'{path}: "{name}" has shape {shape} and a type of kind {" or ".join(kinds)}. '
                f"Received: {value!r:.100}."
            )


def _check_pair(path, content, mean, covariance):
    """Checks one pair of statistics in a file, and makes it float64."""
    if not {mean, covariance} <= content.keys():
        raise ValueError(
            f'{path} holds no statistics: expected "{mean}" and "{covariance}". '
            f"Received: {[*content]}."
        )
    pair = _checked(f"{path}: {mean} and {covariance}", content[mean], content[covariance])
    content[mean], content[covariance] = pair


def _checked(what, mean, covariance):
    mean, covariance = (np.asarray(a, "float64") for a in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{what} have shapes (d,) and (d, d). Received: {mean.shape}, {covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{what} hold NaN or infinity.")
    return mean, covariance


def reference_statistics(
    images: Array | Iterable[np.ndarray],
    inception: InceptionFeatures,
    *,
    total: int | None = None,
    keep_features: int = 10_000,
    verbose: int = 1,
) -> Reference:
    """Statistics of real images, by the same resize and network that generated ones will meet.

    Args:
        images: `(n, H, W, 3)` uint8, or an iterable of such batches.
        inception: `InceptionFeatures`.
        total: int, number of images in an iterable, for the progress bar.
        keep_features: int, pool features kept for precision and recall.
        verbose: 0 or 1. Progress bar.

    Returns:
        `Reference`.

    Raises:
        ValueError, TypeError: if the images do not fit or differ in size.
    """
    pools, spatials, sizes = [], [], set()
    batches: Iterable[Array] = [images] if hasattr(images, "shape") else images
    total = images.shape[0] if hasattr(images, "shape") else total
    bar = progress.bar(total, verbose, "image")
    for batch in batches:
        sizes.add(tuple(batch.shape[1:3]))
        features = inception(batch, verbose=0)
        pools.append(features["pool"])
        spatials.append(features["spatial"])
        bar.add(len(batch))
    if not pools:
        raise ValueError("There are no images to make reference statistics of.")
    if len(sizes) != 1:
        raise ValueError(f"Reference images are of one size. Received: {sorted(sizes)}.")
    pool, spatial = np.concatenate(pools), np.concatenate(spatials)
    # At random: the first would be of a few classes, where images are sorted by class.
    order = np.random.default_rng(0).permutation(len(pool))
    return Reference(
        gaussian(pool),
        gaussian(spatial),
        features=pool[np.sort(order[:keep_features])],
        count=len(pool),
        image_size=sizes.pop(),
        resize=inception.resize,
        inception=inception.fingerprint,
    )
