"""Guidance: which estimates of x0 a row of the sampler asks for, and how they become one."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend
from keras_uvit.diffusion.loop import DenoiseRow, Row
from keras_uvit.types import Tensor


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, D_u + w (D_c - D_u), and what every other guidance changes.

    D_c is the network's estimate of x0 with the condition, D_u the one without, both from one batch
    of double size (Ho and Salimans 2022, arXiv 2207.12598, Eq. 6, of x0). With a `weak_model` D_u
    is its estimate, with the same condition. w is `guidance_scale` of `generate`.

    A guidance of your own is a subclass, a frozen dataclass, with another `combine`.

    Args:
        weak_model: `DiffusionModel` of the same images, conditions and schedule, or None.
    """

    weak_model: Any = dataclasses.field(default=None, kw_only=True)

    def combine(self, strong: Tensor, weak: Tensor, scale: Tensor) -> Tensor:
        """The guided estimate.

        Args:
            strong: `(B, H, W, C)` float32, the estimate D_c to go towards.
            weak: the same of D_u, to go away from.
            scale: float32 scalar tensor, w at this row.

        Returns:
            `(B, H, W, C)`.
        """
        return weak + scale * (strong - weak)


@dataclasses.dataclass(frozen=True)
class AutoGuidance(Guidance):
    """Guides by a weaker version of the same model: D_weak + w (D - D_weak).

    The weak model is a smaller one, or an earlier checkpoint. It makes the same mistakes, but
    larger ones, and the network is led away from them; this works without conditions too (Karras
    et al. 2024, arXiv 2406.02507, Section 4).

    Args:
        weak_model: `DiffusionModel` of the same images, conditions and schedule.
    """

    weak_model: Any = None

    def __post_init__(self) -> None:
        if self.weak_model is None:
            raise ValueError("AutoGuidance needs a weak_model, a DiffusionModel.")


@dataclasses.dataclass(frozen=True)
class APG(Guidance):
    """Adaptive projected guidance: without most of what only raises contrast and saturation.

    d = D_c - D_u, shortened to norm `most`; d = d_parallel + d_orthogonal to D_c;
    D = D_c + (w - 1) (d_orthogonal + eta d_parallel)

    Sadat et al. 2024, arXiv 2410.02416, Algorithm 1, without its momentum. `APG(eta=1.0)` is
    classifier-free guidance.

    Args:
        eta: float >= 0, what is kept of the parallel part.
        most: float > 0, the largest Euclidean norm of d for one image; None does not shorten.
        weak_model: see `Guidance`.
    """

    eta: float = 0.0
    most: float | None = None

    def __post_init__(self) -> None:
        if not self.eta >= 0 or not (self.most is None or self.most > 0):
            raise ValueError(
                f"APG needs eta >= 0, most > 0 or None. Received: eta={self.eta}, most={self.most}."
            )

    def combine(self, strong: Tensor, weak: Tensor, scale: Tensor) -> Tensor:
        d = strong - weak
        if self.most is not None:
            d = d * ops.minimum(1.0, self.most * ops.rsqrt(_dot(d, d) + 1e-12))
        parallel = _dot(d, strong) / (_dot(strong, strong) + 1e-12) * strong
        return strong + (scale - 1.0) * (d - (1.0 - self.eta) * parallel)


@dataclasses.dataclass(frozen=True)
class Rescale(Guidance):
    """Classifier-free guidance whose estimate gets back the standard deviation of D_c.

    G = D_u + w (D_c - D_u);  D = phi G std(D_c) / std(G) + (1 - phi) G

    Lin et al. 2024, arXiv 2305.08891, Eq. 15 and 16, of x0 and for each image. `Rescale(phi=0.0)`
    is classifier-free guidance.

    Args:
        phi: float in [0, 1].
        weak_model: see `Guidance`.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise ValueError(f"Rescale needs phi in [0, 1]. Received: phi={self.phi}.")

    def combine(self, strong: Tensor, weak: Tensor, scale: Tensor) -> Tensor:
        guided = super().combine(strong, weak, scale)
        axes = tuple(range(1, len(guided.shape)))
        ratio = ops.std(strong, axes, keepdims=True) / (ops.std(guided, axes, keepdims=True) + 1e-6)
        return guided * (self.phi * ratio + (1.0 - self.phi))


def _dot(a, b):
    """`(B, 1, ...)`, the inner product of each image's numbers."""
    return ops.sum(a * b, axis=tuple(range(1, len(a.shape))), keepdims=True)


def check_guidance(model: Any, guidance: Any) -> None:
    """Raises unless `guidance` is one, and its weak model is a version of the model."""
    if not isinstance(guidance, Guidance):
        raise TypeError(
            "guidance is an object such as sampling.APG(). For its strength pass guidance_scale. "
            f"Received: {guidance!r}."
        )
    weak = guidance.weak_model
    if model.network.takes_guidance and guidance != Guidance():
        raise ValueError(
            "This network takes the guidance scale as an input, and is asked once a step, so there "
            f"are no two estimates to combine. Leave guidance out. Received: {guidance!r}."
        )
    if weak is None:
        return
    if not hasattr(weak, "ema_network"):
        raise TypeError(f"weak_model must be a DiffusionModel. Received: {weak!r}.")
    if weak.network.takes_guidance:
        raise ValueError(
            "The weak model takes the guidance scale as an input, so its estimate would be guided "
            "itself. Use one whose network has takes_guidance=False."
        )
    weak.check_weights()
    own, other = _facts(model), _facts(weak)
    unknown = [key for key in own if "encoder" in key and None in (own[key], other[key])]
    differ = [
        f"{key} {other[key]} instead of {own[key]}"
        for key in own
        if key not in unknown and own[key] != other[key]
    ]
    if differ:
        raise ValueError(
            "The weak model must be of the same images, conditions and schedule as the model. It "
            f"has {'; '.join(differ)}."
        )


def check_acts(guidance: Guidance, is_guided: bool, negative_prompts: Any) -> None:
    """Raises if a weak model would have no effect, or negative prompts beside it."""
    if guidance.weak_model is not None and not is_guided:
        raise ValueError(
            "A weak model acts through guidance_scale, which is 1.0, off. Pass one such as 2.0."
        )
    if guidance.weak_model is not None and negative_prompts is not None:
        raise ValueError(
            "This guidance leads away from its weak model, not from negative_prompts: pass one of "
            "the two."
        )


def _facts(model):
    """What a model and its weak version have in common."""
    network = model.network
    return {
        "image_shape": tuple(network.image_shape),
        "latent_scale": model.latent_scale,
        "latent_shift": model.latent_shift,
        "latent_encoder": model.latent_encoder,
        "num_classes": network.num_classes,
        "context_shape": network.context_shape,
        "context_encoder": model.context_encoder,
        "schedule": model.objective.schedule,
    }


@dataclasses.dataclass(frozen=True)
class Party:
    """A network that estimates x0.

    Attributes:
        model: `DiffusionModel`, whose `objective` says what an output means.
        network: the model's `network` or `ema_network`.
        weights: values of the network's variables, which may be traced.
    """

    model: Any
    network: keras.Model
    weights: Sequence[Tensor]

    def estimates(
        self, x: Tensor, row: Row, conditions: Sequence[dict[str, Tensor]]
    ) -> Sequence[Tensor]:
        """x0 by each of the conditions, from one batch.

        Args:
            x: `(B, H, W, C)` float32.
            row: of the sampler: its time, its span, and the scale for a network that takes it.
            conditions: dicts of the network's conditions, one row for each image.
        """
        count = len(conditions)
        given = {key: ops.concatenate([c[key] for c in conditions]) for key in conditions[0]}
        x = ops.concatenate([x] * count)
        times, spans, scales = (
            ops.broadcast_to(row[name], (x.shape[0],)) for name in ("t", "span", "guidance")
        )
        inputs = {**self.model.inputs(x, times, spans, scales), **given}
        with backend.holding(self.network, self.weights):
            output = ops.cast(self.network(inputs, training=False), "float32")
        return ops.split(self.model.objective.denoised(x, times, output), count)


Runs = tuple[tuple[bool, int], ...]  # whether so many rows, one after the other, are guided


def runs_of(guided: np.ndarray) -> Runs:
    """Of `(n,)` bool, a row each, how many in a row are alike.

    >>> runs_of(np.array([False, True, True]))
    ((False, 1), (True, 2))
    """
    return tuple((bool(on), len(list(rows))) for on, rows in itertools.groupby(guided))


def networks_of(model: Any, guidance: Guidance, use_ema: bool) -> list[tuple[Any, keras.Model]]:
    """(model, network) of who estimates x0: the model itself, and the weak one, if there is any."""
    models = [model, guidance.weak_model]
    return [(m, m.ema_network if use_ema else m.network) for m in models if m is not None]


def denoisers(
    runs: Runs,
    parties: Sequence[Party],
    condition: dict[str, Tensor],
    unconditional: dict[str, Tensor],
    guidance: Guidance,
) -> list[tuple[int, DenoiseRow]]:
    """What `diffusion.loop.advance` takes as its parts: a `denoiser` for each run of rows.

    Args:
        runs: of `runs_of`.
        parties: the network that draws, and that of the weak model, if `guidance` has one.
        condition, unconditional: see `denoiser`.
        guidance: how the estimates of guided rows are combined.
    """
    weak = parties[1] if len(parties) > 1 else None
    given = parties[0], weak, condition, unconditional
    return [(count, denoiser(*given, guidance if on else None)) for on, count in runs]


def denoiser(
    own: Party,
    weak: Party | None,
    condition: dict[str, Tensor],
    unconditional: dict[str, Tensor],
    guidance: Guidance | None,
) -> DenoiseRow:
    """The function `(x, row) -> x0` of a part of the sampler's loop.

    Args:
        own: the network that draws.
        weak: the one of the weak model, if `guidance` has one.
        condition: dict of the network's conditions, one row for each image.
        unconditional: the same for D_u; not used with a weak model.
        guidance: None where this part of the loop is not guided.
    """

    def denoise(x, row):
        if guidance is None:
            return own.estimates(x, row, [condition])[0]
        if weak is None:
            pair = own.estimates(x, row, [condition, unconditional])
        else:
            pair = [party.estimates(x, row, [condition])[0] for party in (own, weak)]
        return guidance.combine(*pair, row["guidance"])

    return denoise
