"""How images are drawn: the sampler's table and its guidance, resolved and checked once."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_uvit.checks import as_int
from keras_uvit.diffusion import samplers, tables
from keras_uvit.inference import fingerprint
from keras_uvit.sampling.guidance import Guidance

CLASSIFIER_FREE = Guidance()
# Arguments of `generate` of which the options of a call are made, and which records name.
ARGUMENTS = ("sampler", "num_steps", "guidance_scale", "guidance_interval", "guidance")
Scale = float | Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What `generate` does, and what the record of a FID says of it.

    Attributes:
        steps: `Steps`, the sampler's table, one row for each network evaluation.
        sampler: str, the sampler's name; a hash of the table where the caller made it.
        num_steps: int, or None where the caller made the table.
        guidance_scale: float w, D_u + w (D_c - D_u); 1.0 is off. Or a function of t.
        guidance_interval: (low, high) in [0, 1], the times at which guidance is on.
        strength: float in [0, 1], the time at which a picture's noise begins to be removed.
        guidance: `Guidance`, how two estimates of x0 become one.
        guided_inside: bool. Whether the network takes the scale as an input, so that a guided
            evaluation needs no second one.
    """

    steps: samplers.Steps
    sampler: str
    num_steps: int | None
    guidance_scale: Scale
    guidance_interval: tuple[float, float]
    strength: float
    guidance: Guidance
    guided_inside: bool

    @property
    def guided(self) -> np.ndarray:
        """`(n,)` bool, the rows of `steps` that are guided."""
        return self.asks_twice(self.steps)

    def asks_twice(self, steps: samplers.Steps) -> np.ndarray:
        """`(n,)` bool, the rows of a table at which guidance needs a second estimate."""
        return steps.guided & (not self.guided_inside)

    def record(self) -> dict[str, Any]:
        """What JSON keeps of it; of a scale that is a function, its values at the rows."""
        scale, own = self.guidance_scale, self.guidance
        weak = own.weak_model and fingerprint(own.weak_model)
        kind = {"kind": type(own).__name__, **vars(own), "weak_model": weak}
        return {
            "sampler": self.sampler,
            "num_steps": self.num_steps,
            "nfe": self.steps.nfe,
            "guidance_scale": self.steps.guidance.tolist() if callable(scale) else float(scale),
            "guidance_interval": [float(t) for t in self.guidance_interval],
            **({} if own == CLASSIFIER_FREE else {"guidance": kind}),
        }


def resolve(
    model: Any,
    sampler: str | samplers.Steps | None = None,
    num_steps: int | None = None,
    guidance_scale: Scale | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    strength: float = 1.0,
    resamples: int = 1,
    guidance: Guidance = CLASSIFIER_FREE,
) -> SamplingOptions:
    """The options of one call, with the model's own where they are None.

    Raises:
        ValueError: if one of them does not fit the model.
    """
    schedule = model.objective.schedule
    _check_strength(strength, schedule)
    start = strength or 1.0  # 0 takes no steps
    sampler = model.sampler if sampler is None else sampler
    if isinstance(sampler, samplers.Steps):
        _check_steps(model, sampler, num_steps)
        name = f"Steps {hashlib.sha256(sampler.packed().data).hexdigest()[:8]}"
        steps = tables.beginning_at(sampler, start)
    else:
        num_steps = model.num_steps if num_steps is None else num_steps
        steps, name = samplers.named(sampler, schedule, num_steps, start), sampler
        num_steps = int(num_steps)
    steps = tables.resampled(steps, schedule, as_int(resamples, "resamples", 1))
    steps = tables.with_known(steps, schedule)
    low, high = guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval is (low, high) in [0, 1]. Received: {guidance_interval}."
        )
    scale = _scale(model, guidance_scale, guidance.weak_model is not None)
    scales = np.where((steps.t >= low) & (steps.t <= high), _at(scale, steps.t), 1.0)
    steps = dataclasses.replace(steps, guidance=scales)
    if steps.span.any() and model.flow_map is None:
        raise ValueError(
            f"The sampler {name!r} needs a model that was trained with a flow map: "
            '`DiffusionModel(flow_map=...)`. Choose another sampler, such as "heun".'
        )
    inside = model.network.takes_guidance
    if inside:
        _check_learned(model, scales)
    return SamplingOptions(steps, name, num_steps, scale, (low, high), strength, guidance, inside)


def _check_learned(model, scales):
    least, largest = model.flow_map.guidance
    others = scales[(scales != 1.0) & ((scales < least) | (scales > largest))]
    if len(others):
        raise ValueError(
            f"This model has learned guidance scales from {least} to {largest}, and 1.0. Received: "
            f"guidance_scale={others[0]}."
        )


def _check_strength(strength, schedule):
    numbers = int | float | np.number
    if not isinstance(strength, numbers) or not (strength == 0 or schedule.t_min < strength <= 1):
        raise ValueError(
            "strength is 0, which returns the picture, or the time in "
            f"({schedule.t_min}, 1] to which noise is added. Received: {strength!r}."
        )


def _check_steps(model, steps, num_steps):
    if num_steps is not None:
        raise ValueError("`Steps` already has its number of steps; leave `num_steps` out.")
    schedule = model.objective.schedule
    if steps.t.max() > schedule.t_start:
        raise ValueError(
            f"These `Steps` start at t = {steps.t.max()}, but {type(schedule).__name__}, the "
            f"schedule of this model, at {schedule.t_start} at most. Make them by "
            "`model.objective.schedule`."
        )


def _scale(model, given, by_weak_model):
    """The guidance scale; 1.0, off, where the model's own is meant for another kind of network."""
    scale, network = model.guidance_scale if given is None else given, model.network
    if not callable(scale):
        _check_scale(scale, "")
    knows_none = network.null_label is not None or network.context_shape is not None
    if scale != 1.0 and not knows_none and not by_weak_model:
        if given is not None:
            raise ValueError(
                f"guidance_scale={scale} needs a network that knows 'no label': num_classes with "
                "null_label=True, trained with condition_dropout > 0. Use guidance_scale=1.0."
            )
        return 1.0
    return scale


def _check_scale(scale, where):
    if not isinstance(scale, int | float | np.number) or not np.isfinite(scale) or scale < 0:
        raise ValueError(f"guidance_scale must be finite and >= 0. Received: {scale!r}{where}.")


def _at(scale, times):
    """`(n,)` the scale at each time."""
    if not callable(scale):
        return np.full(len(times), scale, "float64")
    values = [scale(float(t)) for t in times]
    for t, value in zip(times, values):
        _check_scale(value, f" at t = {t:.4g}")
    return np.array(values, "float64")
