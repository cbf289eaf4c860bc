"""How images are drawn: the sampler's table and its guidance, resolved and checked once."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from keras_uvit.diffusion import samplers


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What `generate` does, and what the record of a FID says of it.

    Attributes:
        steps: `Steps`, the sampler's table, one row for each network evaluation.
        sampler: str, the sampler's name; a hash of the table where the caller made it.
        num_steps: int, or None where the caller made the table.
        guidance_scale: float w, D_u + w (D_c - D_u); 1.0 is off.
        guidance_interval: (low, high) in [0, 1], the times at which guidance is on.
        guided_inside: bool. Whether the network takes the scale as an input, so that a guided
            evaluation needs no second one.
    """

    steps: samplers.Steps
    sampler: str
    num_steps: int | None
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guided_inside: bool = False

    @property
    def guided(self) -> np.ndarray:
        """`(n,)` bool, the rows of `steps` whose guidance asks the network twice."""
        if self.guided_inside:
            return np.zeros(len(self.steps), bool)
        low, high = self.guidance_interval
        t = self.steps.t
        return (t >= low) & (t <= high) & (self.guidance_scale != 1.0)

    def record(self) -> dict[str, Any]:
        """What JSON keeps of it."""
        return {
            "sampler": self.sampler,
            "num_steps": self.num_steps,
            "nfe": self.steps.nfe,
            "guidance_scale": float(self.guidance_scale),
            "guidance_interval": [float(t) for t in self.guidance_interval],
        }


def resolve(
    model: Any,
    sampler: str | samplers.Steps | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> SamplingOptions:
    """The options of one call, with the model's own where they are None.

    Raises:
        ValueError: if one of them does not fit the model.
    """
    sampler = model.sampler if sampler is None else sampler
    if isinstance(sampler, samplers.Steps):
        _check_steps(model, sampler, num_steps)
        steps, name = sampler, f"Steps {hashlib.sha256(sampler.packed().data).hexdigest()[:8]}"
    else:
        num_steps = model.num_steps if num_steps is None else num_steps
        steps, name = samplers.named(sampler, model.objective.schedule, num_steps), sampler
        num_steps = int(num_steps)
    low, high = guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval is (low, high) in [0, 1]. Received: {guidance_interval}."
        )
    scale, inside = _scale(model, guidance_scale), model.network.takes_guidance
    if inside and (low, high) != (0.0, 1.0):
        raise ValueError(
            "This network has learned guided steps, over which guidance is on as a whole: leave "
            f"guidance_interval out. Received: {guidance_interval}."
        )
    if steps.span.any() and model.flow_map is None:
        raise ValueError(
            f"The sampler {name!r} needs a model that was trained with a flow map: "
            '`DiffusionModel(flow_map=...)`. Choose another sampler, such as "heun".'
        )
    return SamplingOptions(steps, name, num_steps, scale, (low, high), inside)


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


def _scale(model, given):
    """The guidance scale; 1.0, off, where the model's own is meant for another kind of network."""
    scale, network = model.guidance_scale if given is None else given, model.network
    if not isinstance(scale, int | float | np.number) or not np.isfinite(scale) or scale < 0:
        raise ValueError(f"guidance_scale must be finite and >= 0. Received: {scale!r}.")
    if scale != 1.0 and network.null_label is None and network.context_shape is None:
        if given is not None:
            raise ValueError(
                f"guidance_scale={scale} needs a network that knows 'no label': num_classes with "
                "null_label=True, trained with condition_dropout > 0. Use guidance_scale=1.0."
            )
        return 1.0
    if network.takes_guidance and scale != 1.0:
        least, largest = model.flow_map.guidance
        if not least <= scale <= largest:
            raise ValueError(
                f"This model has learned guidance scales from {least} to {largest}, and 1.0. "
                f"Received: guidance_scale={scale}."
            )
    return scale
