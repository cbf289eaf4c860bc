"""How each row of a sampler asks the network: all of it or less, once, twice or not for guidance.

Guidance is D_u + w (D_c - D_u), D_c with the condition and D_u without (Ho and Salimans 2022,
arXiv 2207.12598). Two things change so slowly from row to row that they may be kept:

* the difference D_c - D_u, which is half of the work;
* what the middle of a U-ViT hands to its last blocks (`networks.halves`), most of the rest.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_uvit import backend
from keras_uvit.networks import halves
from keras_uvit.process import predictions


class Plan(NamedTuple):
    """The choices of `generate` that say what is evaluated, checked."""

    scale: float  # of guidance; 1.0 is off
    interval: tuple  # (low, high): times at which guidance is on
    guidance_every: int
    middle_every: int
    outer_blocks: int

    def kinds(self, t):
        """The `Kind` of each row, for the times `t` of the rows."""
        low, high = self.interval
        difference = conditional = unconditional = np.inf  # rows since each was evaluated
        kinds = []
        for on in (t >= low) & (t <= high) & (self.scale != 1.0):
            difference, conditional, unconditional = (
                age + 1 for age in (difference, conditional, unconditional)
            )
            if not on:
                guidance, difference = "off", np.inf
            elif difference < self.guidance_every:
                guidance = "kept"
            else:
                guidance, difference = "new", 0
            doubled = guidance == "new"
            whole = max(conditional, unconditional if doubled else 0) >= self.middle_every
            if whole:
                conditional, unconditional = 0, 0 if doubled else unconditional
            kinds.append(Kind(guidance, whole))
        return kinds


class Kind(NamedTuple):
    """One row's evaluation."""

    guidance: str  # "off", "new": a doubled batch, "kept": the difference of an earlier row
    whole: bool  # all blocks, or the outer ones and what is kept of the middle


def work(plan, t, num_layers):
    """Blocks that run for one image, over those of as many evaluations without guidance.

    50 guided steps are 100 evaluations, so `len(t) * work` compares any two plans.
    """
    part = 2 * plan.outer_blocks / num_layers
    return np.mean(
        [(1 + (kind.guidance == "new")) * (1 if kind.whole else part) for kind in plan.kinds(t)]
    )


class Evaluations:
    """Functions (x, t, memory) -> (x0 estimate, memory), one of each `Kind`.

    Args:
        model: `DiffusionModel`.
        network: its `network` or `ema_network`, whose weights are asked.
        plan: `Plan`.
        kinds: the kinds that will be asked for.
    """

    def __init__(self, model, network, plan, kinds):
        self.model, self.network = model, network
        self.keeps_middle = not all(kind.whole for kind in kinds)
        self.keeps_difference = any(kind.guidance == "kept" for kind in kinds)
        self.doubles = any(kind.guidance == "new" for kind in kinds)
        if self.keeps_middle:
            self.whole, self.outer = halves.with_middle(self.network, plan.outer_blocks)

    def start(self, x):
        """A memory of the right shapes, which no row reads."""
        memory = {}
        if self.keeps_difference:
            memory["difference"] = ops.zeros_like(x)
        if self.keeps_middle:
            shape, dtype = self.whole.output[1].shape, self.whole.output[1].dtype
            for half in ("conditional", "unconditional")[: 1 + self.doubles]:
                memory[half] = ops.zeros((x.shape[0], *shape[1:]), dtype)
        return memory

    def of(self, kind, weights, condition, unconditional, scale):
        """The function for this kind, the weights given and a scale that may be traced."""
        sides = {"conditional": condition}
        if kind.guidance == "new":
            sides["unconditional"] = unconditional

        def evaluate(x, t, memory):
            estimates, memory = self._ask(kind.whole, weights, x, t, sides, dict(memory))
            if kind.guidance == "off":
                return estimates[0], memory
            if kind.guidance == "kept":
                return estimates[0] + (scale - 1.0) * memory["difference"], memory
            with_condition, without = estimates
            difference = with_condition - without
            if self.keeps_difference:
                memory["difference"] = difference
            return without + scale * difference, memory

        return evaluate

    def _ask(self, whole, weights, x, t, sides, memory):
        """x0 estimates, one for each side, from one batch of all of them."""
        model, count = self.model, len(sides)
        both = {
            key: ops.concatenate([side[key] for side in sides.values()])
            for key in next(iter(sides.values()))
        }
        x = ops.concatenate([x] * count)
        times = ops.repeat(t, x.shape[0])
        inputs = {"image": x, "timestep": model.time_scale * times, **both}
        with backend.holding(self.network, weights):
            if not self.keeps_middle:
                out = self.network(inputs, training=False)
            elif whole:
                out, middle = self.whole(inputs, training=False)
                memory |= zip(sides, ops.split(middle, count))
            else:
                middle = ops.concatenate([memory[side] for side in sides])
                out = self.outer((inputs, middle), training=False)
        out = ops.cast(out, "float32")
        x0 = predictions.denoised(model.prediction, model.schedule, times, x, out)
        return ops.split(x0, count), memory
