"""What a network learns: the added noise, its target, its loss, and what its output means."""

import dataclasses
from collections.abc import Collection

from keras import ops

from keras_uvit.diffusion import predictions, weighting
from keras_uvit.diffusion.schedules import Schedule, VPLinear
from keras_uvit.types import Tensor

CHOICES: dict[str, Collection[str]] = {
    "prediction": predictions.PREDICTIONS,
    "time_sampling": weighting.TIME_SAMPLINGS,
    "loss_weighting": weighting.LOSS_WEIGHTINGS,
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The mathematics of a diffusion model, without its network and its random numbers.

    Shapes: x0, x, noise and output are `(B, ...)`, t is `(B,)` in [0, 1], 0 is data, 1 is noise.

    Attributes:
        schedule: alpha and sigma of x_t = alpha(t) x0 + sigma(t) noise; see `diffusion.schedules`.
        prediction: "epsilon", "x0", "v" or "velocity": what the network predicts.
        time_scale: float. The network gets `time_scale * t`; `None` is the published value, 1000
            for `VPDiscrete` and 999 for the others.
        time_sampling: "uniform", "logit_normal" or "cosmap": how often training draws each t.
        loss_weighting: "uniform" or "min_snr": how much an error at t counts; for both see
            `diffusion.weighting`.
    """

    schedule: Schedule = dataclasses.field(default_factory=VPLinear)
    prediction: str = "epsilon"
    time_scale: float | None = None
    time_sampling: str = "uniform"
    loss_weighting: str = "uniform"

    def __post_init__(self) -> None:
        if not hasattr(self.schedule, "half_log_snr"):
            raise TypeError(
                "schedule must be such as diffusion.schedules.VPLinear(). "
                f"Received: {self.schedule!r}."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {list(known)}. Received: {getattr(self, name)!r}."
                )
        if self.time_scale is None:
            object.__setattr__(self, "time_scale", self.schedule.time_scale)

    def for_validation(self) -> "Objective":
        """The same with uniform times and no weights, so that two models can be compared."""
        return dataclasses.replace(self, time_sampling="uniform", loss_weighting="uniform")

    def times(self, u: Tensor) -> Tensor:
        """t `(B,)` of training from u `(B,)`, uniform in [0, 1)."""
        return self.schedule.training_time(weighting.TIME_SAMPLINGS[self.time_sampling](u))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        return predictions.add_noise(self.schedule, t, x0, noise)

    def denoised(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The estimate of x0 from the noisy x and the network's output."""
        return predictions.denoised(self.prediction, self.schedule, t, x, output)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted mean squared error of the network's output, a float32 scalar.

        Ho et al. 2020, arXiv 2006.11239, Eq. 14, for "epsilon".
        """
        target = predictions.target(self.prediction, self.schedule, t, x0, noise)
        weight = weighting.loss_weight(self.loss_weighting, self.prediction, self.schedule, t)
        return ops.mean(predictions.column(weight, x0) * ops.square(output - target))
