"""CKA: how similar two representations of the same images are, whatever their widths.

Features become centred Gram matrices, n x n for n images, and CKA is the cosine of the angle
between two of them. It is the same for rotated, scaled or shifted features, but not for all linear
maps of them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_uvit.inference import Frozen
from keras_uvit.networks.layers import LongSkip, TransformerBlock
from keras_uvit.pixels import scaled
from keras_uvit.training import batches
from keras_uvit.types import Array

if TYPE_CHECKING:
    from keras_uvit.training import DiffusionModel

MIN_SAMPLES = 4  # of the unbiased estimate, which divides by n - 3


def linear_cka(x: Array, y: Array, unbiased: bool = False) -> float:
    """Linear CKA, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = x x^T, L = y y^T.

    HSIC(K, L) = tr(K H L H) / (n - 1)^2, H = 1 - 1/n: Kornblith et al. 2019, arXiv 1905.00414,
    Eq. 3 and 4. It is biased upwards where n is not far above the widths: independent features do
    not get 0. The unbiased HSIC is that of `CKA`.

    Args:
        x, y: `(n, p)`, `(n, q)`: features of the same n samples. Memory is that of n x n numbers.
        unbiased: bool.

    Returns:
        float, 1 for equal features; in [0, 1], unbiased in [-1, 1].

    Raises:
        ValueError: for different n, n below 4 if `unbiased`, NaN or infinity, or features that are
            the same for all samples, which are similar to nothing.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(10, 3))
        >>> round(linear_cka(x, 5 - 2 * x[:, ::-1]), 6)
        1.0
    """
    x, y = _grams([x, y], unbiased)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


class CKA:
    """Unbiased CKA of layers by layers, of any number of samples in batches.

    HSIC_1(K, L) = (tr(K L) + 1^T K 1 1^T L 1 / ((n-1) (n-2)) - 2 1^T K L 1 / (n-2)) / (n (n-3)),
    K and L with zero diagonals: Song et al. 2012, JMLR 13, Eq. 5. Its means over the batches take
    the place of HSIC in CKA: Nguyen et al. 2021, arXiv 2010.15327, Eq. 2 and 3. So the result does
    not depend on the batch size, up to noise.

    Example:
        >>> rng, cka = np.random.default_rng(0), CKA()
        >>> for _ in range(3):
        ...     x = rng.normal(size=(8, 5))
        ...     cka.update([x, 2 * x, x[:, :2]])
        >>> cka.result().shape
        (3, 3)
    """

    def __init__(self) -> None:
        self._sums: list[np.ndarray] | None = None

    def update(
        self, features_a: Sequence[Array], features_b: Sequence[Array] | None = None
    ) -> None:
        """Takes one batch of `n` samples.

        Args:
            features_a: list of `(n, p)`, one of each layer; p may differ.
            features_b: the same of the layers to compare with; `None` compares `features_a` with
                themselves.

        Raises:
            ValueError: see `linear_cka`; or if the number of layers changes.
        """
        first = len(features_a)
        grams = _grams([*features_a, *([] if features_b is None else features_b)], unbiased=True)
        a, b = grams[:first], grams if features_b is None else grams[first:]
        n = round(np.sqrt(a.shape[1]))
        # HSIC_1 of every pair, then of each layer with itself.
        new = [x / (n * (n - 3)) for x in (a @ b.T, np.square(a).sum(1), np.square(b).sum(1))]
        if self._sums is not None and self._sums[0].shape != new[0].shape:
            raise ValueError(
                f"Batches are of the same layers. Received {new[0].shape[0]} by {new[0].shape[1]} "
                f"layers after {self._sums[0].shape[0]} by {self._sums[0].shape[1]}."
            )
        self._sums = new if self._sums is None else [x + y for x, y in zip(self._sums, new)]

    def result(self) -> np.ndarray:
        """`(layers of a, layers of b)` float64, in [-1, 1]."""
        if self._sums is None:
            raise ValueError("There is no similarity before the first `update`.")
        pairs, a, b = self._sums
        return pairs / np.sqrt(np.outer(a, b))


def _grams(features, unbiased):
    """Centred Gram matrices, one a row, `(layers, n * n)`: HSIC is the scalar product of two."""
    shapes = [np.shape(x) for x in features]
    if {len(shape) for shape in shapes} != {2} or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"Features have shapes (n, p) and (n, q), of the same n samples. Received: {shapes}."
        )
    n = shapes[0][0]
    if unbiased and n < MIN_SAMPLES:
        raise ValueError(
            f"The unbiased estimate needs {MIN_SAMPLES} samples in each batch. Received: {n}."
        )
    return np.stack([_gram(np.asarray(x, "float64"), unbiased).ravel() for x in features])


def _gram(x, unbiased):
    n = len(x)
    if not np.isfinite(x).all():
        raise ValueError("Features hold NaN or infinity: look at the model that made them.")
    if (x == x[:1]).all():
        raise ValueError("Features are the same for all samples: they are similar to nothing.")
    x = x - x.mean(axis=0)  # H x; what follows would do without, and round more
    gram = x @ x.T
    if unbiased:
        # HSIC_1 as a scalar product: off the diagonal rows and columns are made to sum to 0
        # (U-centring, Székely and Rizzo 2014, arXiv 1310.2926).
        np.fill_diagonal(gram, 0.0)
        means = gram.sum(axis=0) / (n - 2)
        gram += means.sum() / (n - 1) - means - means[:, None]
        np.fill_diagonal(gram, 0.0)
    return gram


# Of models ----------------------------------------------------------------------------------------


def block_names(network: keras.Model) -> list[str]:
    """Names of a `UViT`'s blocks and long skips, in the order in which they run."""
    return [x.name for x in network.layers if isinstance(x, TransformerBlock | LongSkip)]


def layer_outputs(
    model: "DiffusionModel",
    data: dict[str, Array],
    t: float,
    layers: Sequence[str] | None = None,
    *,
    seed: int = 0,
    use_ema: bool = True,
    batch_size: int = 64,
) -> Iterator[list[np.ndarray]]:
    """What layers give for noised images, x_t = alpha(t) x0 + sigma(t) noise.

    Args:
        model: `DiffusionModel`.
        data: dict of arrays as for `fit`: "image", or "latent", or "moments" (of which the means
            are taken), and what the model is conditioned on: "label", "context".
        t: float in [0, 1].
        layers: names of layers of the network; `None` is `block_names(network)`.
        seed: int >= 0. The noise of image k depends on `seed` and k alone.
        use_ema: bool. The moving average of the weights, or the weights themselves.
        batch_size: int.

    Returns:
        Iterator over batches: lists of `(batch_size, L * D)` arrays, one of each layer; the last
        batch may be smaller.

    Raises:
        ValueError, TypeError: if `data`, `t` or `layers` do not fit, before anything is compiled.
    """
    batches.check_batch(model, data)
    if not 0 <= t <= 1:
        raise ValueError(f"t is in [0, 1], 0 is data. Received: {t}.")
    network = model.ema_network if use_ema else model.network
    names = block_names(network) if layers is None else list(layers)
    if not names:
        raise ValueError(f"{network.name} is no U-ViT, or `layers` is empty: name some layers.")
    taps = keras.Model(network.input, [network.get_layer(name).output for name in names])
    x0 = _clean(model, data)
    conditions = {k: ops.convert_to_numpy(v) for k, v in model.condition(data).items()}
    schedule = model.objective.schedule
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))

    def inputs(rows):
        generators = [np.random.default_rng([seed, k]) for k in rows]
        noise = np.stack([g.standard_normal(x0.shape[1:], "float32") for g in generators])
        return {
            **model.inputs(alpha * x0[rows] + sigma * noise, np.full(len(rows), t, "float32")),
            **{key: value[rows] for key, value in conditions.items()},
        }

    outputs = Frozen(taps).batches(np.arange(len(x0)), batch_size, inputs)
    return ([x.reshape(len(x), -1) for x in batch] for batch in outputs)


def _clean(model, data):
    if "moments" in data:
        mean, _ = np.split(np.asarray(data["moments"], "float32"), 2, axis=-1)
        return scaled(mean, model.latent_scale, model.latent_shift)
    return ops.convert_to_numpy(model.clean(data))


def cka_of_layers(
    model: "DiffusionModel",
    data: dict[str, Array],
    t: float,
    layers: Sequence[str] | None = None,
    *,
    other: "DiffusionModel | None" = None,
    batch_size: int = 64,
    **options: Any,
) -> np.ndarray:
    """Similarity of every layer to every layer, of one model or of two.

    Args:
        model, data, t, layers, batch_size: see `layer_outputs`.
        other: `DiffusionModel` to compare with, which takes the same data; `None` compares `model`
            with itself.
        **options: `seed` and `use_ema` of `layer_outputs`.

    Returns:
        `(La, Lb)` float64 in [-1, 1]: `CKA` over the batches, rows of `model`, columns of `other`.

    Raises:
        ValueError, TypeError: see `layer_outputs`; or if a batch has fewer than 4 images.
    """
    models = [model] if other is None else [model, other]
    features = [layer_outputs(m, data, t, layers, batch_size=batch_size, **options) for m in models]
    count = len(next(iter(data.values())))
    last = (count - 1) % max(batch_size, 1) + 1
    if last < MIN_SAMPLES:
        raise ValueError(
            f"{count} images in batches of {batch_size} leave {last} for the last one, which needs "
            f"{MIN_SAMPLES}: choose another batch_size, or leave {last} images out."
        )
    cka = CKA()
    for batch in zip(*features):
        cka.update(*batch)
    return cka.result()
