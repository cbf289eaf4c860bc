"""Flow maps: a network learns the mean velocity between two times, to draw in one to four steps.

On the linear path z_t = (1 - t) x0 + t noise, u(z, t, r) is the mean of the velocity on the way
from t to r, so that z_r = z_t - (t - r) u(z_t, t, r) is one step, however long. At r = t it is the
velocity of flow matching, v = noise - x0.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_uvit.checks import as_int
from keras_uvit.diffusion.predictions import column
from keras_uvit.types import Tensor

# The later and the earlier time of a step: sigmoids of these normal variables (mean, deviation);
# the larger of the two is t. Those of SoFlow.
LATER, EARLIER = (0.2, 0.8), (-1.0, 0.8)
# Guidance fades to none between these times.
FULL_UNTIL, NONE_FROM = 0.8, 1.0
FLOOR = 1e-2  # keeps images that are nearly right from counting without bound
Velocity = Callable[..., Tensor]  # see `FlowMap.loss`


@keras.saving.register_keras_serializable("keras_uvit")
@dataclasses.dataclass(frozen=True)
class FlowMap:
    """The loss of a flow map, for `DiffusionModel(flow_map=...)`.

    Most images of a batch train the velocity at r = t, as flow matching does. Each `every`-th image
    trains a step from t to r < t: with s = t - a (t - r) and z_s = z_t - (t - s) v,

        e = u(z_t, t, r) - [a v + (1 - a) stopped(u(z_s, s, r))],    loss = mean(e^2) / a

    The target is exact for the map that is sought when a tends to 0, and plain flow matching at
    a = 1 (AlphaFlow, arXiv 2510.20771; e / a is the difference quotient of SoFlow, arXiv
    2512.15657, and tends to MeanFlow's residual, arXiv 2505.13447, without its derivative along
    the path, which fused attention lacks). a falls from `alpha[0]` to `alpha[1]`, by the same
    factor at each step.

    Args:
        steps: int >= 1, the training step at which a arrives at `alpha[1]`, where it stays.
        alpha: pair of floats in (0, 1], the first and the last a.
        every: int >= 1. One image of so many trains a step. Each of them costs another evaluation.
        power: float in [0, 1]. The loss of an image is divided by (its size + FLOOR)^power, size
            being mean(e^2) / a^2: 1 is the literature's choice for latents (arXiv 2505.13447,
            Eq. 22), and 0 is better on small images here.
        guidance: pair of floats, the least and the largest guidance scale, or None. The network
            then learns guided velocities at any scale w between them, which `generate` chooses: one
            evaluation a step instead of two (after improved MeanFlow, arXiv 2512.02012). For half
            of the images v is v + (w - 1) (v - u without condition), and e is divided by w.

    Raises:
        ValueError: if an argument is out of range.
    """

    steps: int
    alpha: tuple[float, float] = (1.0, 0.05)
    every: int = 4
    power: float = 0.0
    guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("every", 1)):
            object.__setattr__(self, key, as_int(getattr(self, key), f"FlowMap.{key}", least))
        for key in ("alpha", "guidance"):
            if isinstance(getattr(self, key), list):  # of a saved config
                object.__setattr__(self, key, tuple(getattr(self, key)))
        if not _is_pair(self.alpha) or not 0 < self.alpha[1] <= self.alpha[0] <= 1:
            raise ValueError(
                "FlowMap.alpha is (first, last) with 0 < last <= first <= 1. Received: "
                f"{self.alpha}."
            )
        if not 0 <= self.power <= 1:
            raise ValueError(f"FlowMap.power is in [0, 1]. Received: {self.power}.")
        guidance = self.guidance
        if guidance is not None and not (
            _is_pair(guidance) and 1 <= guidance[0] < guidance[1] < np.inf
        ):
            raise ValueError(
                "FlowMap.guidance is (least, largest) scale with 1 <= least < largest, or None. "
                f"Received: {self.guidance}."
            )

    def get_config(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "FlowMap":
        return cls(**config)

    def alpha_at(self, step: Tensor) -> Tensor:
        """a at a training step, a float32 scalar."""
        first, last = self.alpha
        part = ops.minimum(ops.cast(step, "float32") / self.steps, 1.0)
        return first * ops.exp(part * float(np.log(last / first)))

    def times(self, t: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """The time t of each image and its span t - r, `(B,)` each.

        Args:
            t: `(B,)`, the times of flow matching, which most images keep.
            normal: `(B, 2)` standard normal, from which the others have theirs.
        """
        two = [ops.sigmoid(m + d * normal[:, k]) for k, (m, d) in enumerate((LATER, EARLIER))]
        later, earlier = ops.maximum(*two), ops.minimum(*two)
        is_step = _every(self.every, t)
        return ops.where(is_step, later, t), ops.where(is_step, later - earlier, 0.0)

    def scales(self, uniform: Tensor) -> Tensor:
        """The guidance scale of each image, `(B,)`, from uniform numbers in [0, 1).

        Every second image has one between `guidance`, uniform in its logarithm; the others have 1.
        """
        least, largest = self.guidance or (1.0, 1.0)
        drawn = least * ops.exp(uniform * float(np.log(largest / least)))
        return ops.where(_every(2, uniform), drawn, 1.0)

    def loss(
        self,
        u: Velocity,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        span: Tensor,
        alpha: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """The loss of a batch, a float32 scalar.

        Args:
            u: the network, as `(z, t, span, scale, rows, conditional) -> (b, ...)` float32. `rows`
                is the slice of the batch whose images z has; without `conditional` it is asked
                without their conditions.
            x0: `(B, ...)`, data.
            noise: like x0, standard normal.
            t, span: `(B,)` each, from `times`.
            alpha: a, a scalar, from `alpha_at`.
            scale: `(B,)`, from `scales`.
        """
        z = column(1.0 - t, x0) * x0 + column(t, x0) * noise
        v, stretch = noise - x0, ops.ones_like(t)
        if self.guidance:
            stretch = 1.0 + (scale - 1.0) * _fading(t)
            v = v + column(stretch - 1.0, x0) * (v - self._unconditional(u, z, t))
        rows = slice(None, None, self.every)  # of the images that train a step
        way = alpha * span[rows]
        ahead = u(
            z[rows] - column(way, x0) * v[rows], t[rows] - way, span[rows] - way, scale[rows], rows
        )
        target = alpha * v[rows] + (1.0 - alpha) * ahead
        is_step = _every(self.every, t)
        target = ops.where(column(is_step, x0), _placed(target, self.every, x0), v)
        error = ops.square(u(z, t, span, scale, slice(None)) - ops.stop_gradient(target))
        part = ops.where(is_step, alpha, 1.0)
        weight = 1.0 / (part * ops.square(stretch))
        if self.power:
            size = ops.mean(error, axis=tuple(range(1, len(x0.shape))))
            size = size / ops.square(part * stretch)
            weight = weight / ops.stop_gradient(size + FLOOR) ** self.power
        return ops.mean(column(weight, x0) * error)

    def _unconditional(self, u, z, t):
        """The velocity u without condition and guidance, where images are guided."""
        rows = slice(None, None, 2)
        zero, one = ops.zeros_like(t[rows]), ops.ones_like(t[rows])
        return ops.stop_gradient(
            _placed(u(z[rows], t[rows], zero, one, rows, conditional=False), 2, z)
        )


def _is_pair(value):
    return isinstance(value, tuple) and len(value) == 2


def _fading(t):
    """How much of guidance is left at t: near pure noise it drives images apart."""
    return ops.clip((NONE_FROM - t) / (NONE_FROM - FULL_UNTIL), 0.0, 1.0)


def _every(count, like):
    """`(B,)` bool, True for the first image of each `count`."""
    return ops.arange(ops.shape(like)[0]) % count == 0


def _placed(rows, count, like):
    """`rows` of every `count`-th image at their places in a batch like `like`, repeated between."""
    return ops.repeat(rows, count, axis=0)[: ops.shape(like)[0]]
