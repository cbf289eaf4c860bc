"""The recipe's optimizer."""

import json
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend
from keras_uvit.private import decays
from keras_uvit.types import Config, Tensor

MAX_RATE = 2e-3
RATE_TIMES_WIDTH = 0.25  # 2e-3 at width 128, 2e-4 at the published 1152: see docs/own_data.md
UNKNOWN_RUN = 1000  # steps that a run of unknown length is taken for


@keras.saving.register_keras_serializable("keras_uvit")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """rate min(k / warmup_steps, 1), then maybe half a cosine to 0; k counts optimizer steps.

    Both parts may be parts of the run, whose length `fit` tells (`learn_run`): then the rate is
    right for a run of any length.

    Keras' own `CosineDecay` is a branch, which TensorFlow traces again for each weight, a fifth
    of the time before the first step; and it counts the batches that are accumulated. Optimizer
    step k is made at batch (k + 1) n - 1 (from 0), not at batch k n: a schedule stretched n times
    would run ahead by up to one step.

    Args:
        learning_rate: float, after the warm-up.
        warmup_steps: int >= 0, or a float in (0, 1): this share of the run.
        decay_steps: steps from there to 0: an int; "run", all that the run has left; or None.
        batches: int n, batches per optimizer step.
        run_steps: int, optimizer steps of the run. `None`, where nobody has told: a warm-up of that
            share of 1,000 steps, and no decay to the end of the run.
    """

    def __init__(
        self,
        learning_rate: float,
        warmup_steps: float = 0,
        decay_steps: int | str | None = None,
        batches: int = 1,
        run_steps: int | None = None,
    ):
        super().__init__()
        if isinstance(decay_steps, str) and decay_steps != "run":
            raise ValueError(
                f'decay_steps must be an int, "run" or None. Received: {decay_steps!r}.'
            )
        self.config: Config = dict(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            batches=batches,
            run_steps=run_steps,
        )

    def learn_run(self, run_steps: int) -> bool:
        """Notes the run's length in optimizer steps; returns whether that changes the rates."""
        before = self.warmup, self.decay
        self.config["run_steps"] = run_steps
        return (self.warmup, self.decay) != before

    @property
    def warmup(self) -> int:
        """Optimizer steps of the warm-up."""
        steps = self.config["warmup_steps"]
        if not isinstance(steps, float) or steps >= 1:
            return steps
        return max(1, round(steps * (self.config["run_steps"] or UNKNOWN_RUN)))

    @property
    def decay(self) -> int | None:
        """Optimizer steps from there to a rate of 0, or None."""
        steps, run = self.config["decay_steps"], self.config["run_steps"]
        return steps if steps != "run" else run and max(1, run - self.warmup)

    def __call__(self, step: Tensor) -> Tensor:
        rate, batches = self.config["learning_rate"], self.config["batches"]
        warmup_steps, decay_steps = self.warmup, self.decay
        k = ops.cast(ops.convert_to_tensor(step) // batches, "float32")
        if warmup_steps:
            rate = rate * ops.minimum(k / warmup_steps, 1.0)
        if decay_steps:
            done = ops.clip((k - warmup_steps) / decay_steps, 0.0, 1.0)
            rate = rate * 0.5 * (1.0 + ops.cos(np.pi * done))
        return rate

    def get_config(self) -> Config:
        return dict(self.config)


@keras.saving.register_keras_serializable("keras_uvit")
class AdamW(backend.AdamW):
    """`keras.optimizers.AdamW`, under one name in files of all backends.

    Attributes:
        schedule: `WarmUp`, to which `fit` tells the length of the run; None with another rate.
    """

    def __init__(self, learning_rate: Any = 1e-3, **options: Any):
        super().__init__(learning_rate, **options)
        self.schedule = learning_rate if isinstance(learning_rate, WarmUp) else None


def adamw(
    learning_rate: float = 2e-4,
    beta_1: float = 0.99,
    beta_2: float = 0.999,
    weight_decay: float = 0.03,
    warmup_steps: float = 2500,
    decay_steps: int | str | None = None,
    gradient_accumulation_steps: int | None = None,
    clipnorm: float | None = None,
) -> "AdamW":
    """AdamW as in the published recipes: decay on every weight, linear warm-up from 0.

    Keras adds epsilon to sqrt(v), PyTorch (there the update is its own, fused) to the
    bias-corrected sqrt(v / (1 - beta_2^k)); at step k Keras' 1e-8 acts like PyTorch's 1e-8 /
    sqrt(1 - beta_2^k): 1e-7 at the first step for beta_2 = 0.99, equal later. Both are far below
    any gradient that matters, so 1e-8 it is.

    Args:
        learning_rate: float, after the warm-up.
        beta_1, beta_2: floats in [0, 1).
        weight_decay: float, decoupled: each step also subtracts learning_rate * weight_decay * w.
        warmup_steps: int. Optimizer step k (from 0) has learning_rate * min(k / warmup_steps, 1).
            A float in (0, 1) is this share of the run, whose length `fit` knows.
        decay_steps: int, "run" or None. Cosine decay to 0 over so many steps after the warm-up;
            "run" ends with the run; None keeps the rate constant, as published.
        gradient_accumulation_steps: int or None. Batches per optimizer step; all counts of steps
            here are optimizer steps.
        clipnorm: float or None. Largest norm of each weight's gradient.

    Returns:
        `AdamW`.
    """
    schedule = learning_rate
    if warmup_steps or decay_steps:
        batches = gradient_accumulation_steps or 1
        schedule = WarmUp(learning_rate, warmup_steps, decay_steps, batches)
    return AdamW(
        schedule,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=1e-8,
        weight_decay=weight_decay,
        gradient_accumulation_steps=gradient_accumulation_steps,
        clipnorm=clipnorm,
    )


def unscaled(optimizer: Any) -> Any:
    """The optimizer itself, where float16 has wrapped it in a loss scale."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def check_average(optimizer: Any) -> None:
    """Raises for an optimizer that would replace the weights by an average at the end of `fit`.

    Args:
        optimizer: of Keras, or its name.
    """
    if getattr(unscaled(optimizer), "use_ema", False):
        raise ValueError(
            "use_ema=True would put the optimizer's average in place of the weights. The model "
            "keeps one of its own beside them: leave use_ema out; ema_decay of DiffusionModel sets "
            "its decay."
        )


def without_decay(model: keras.Model) -> list[str]:
    """Paths of the weights that `exclude_from_weight_decay` has named to the model's optimizer."""
    optimizer = unscaled(model.optimizer)
    if not getattr(optimizer, "weight_decay", None):
        return []
    return [v.path for v in model.trainable_variables if not decays(optimizer, v)]


def exclude(model: keras.Model, optimizer: Any, paths: Collection[str]) -> None:
    """Names those weights to an optimizer that is not built yet."""
    weights = [weight for weight in model.trainable_variables if weight.path in paths]
    if weights:
        unscaled(optimizer).exclude_from_weight_decay(weights)


def settings(model: keras.Model) -> Config:
    """What the model's optimizer is, as JSON keeps it; without what Keras numbers.

    A learning rate that is a number is a variable, so it is the present one.
    """
    optimizer = model.optimizer
    config = {"class": type(optimizer).__name__, **optimizer.get_config()}
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        config["inner_optimizer"] = {"class": type(inner).__name__, **inner.get_config()}
    for part in (config, config.get("inner_optimizer", {})):
        part.pop("name", None)
        if isinstance(part.get("learning_rate"), dict):  # a schedule; a run may be prolonged
            part["learning_rate"]["config"].pop("run_steps", None)
    paths = without_decay(model)
    return json.loads(json.dumps(config | ({"without_decay": paths} if paths else {})))


def recommended_rate(network: keras.Model) -> float | None:
    """The learning rate for a network of this width, or None for one of unknown width."""
    config = network.get_config()
    width = config.get("hidden_dim")
    if width is None and "base_dim" in config:
        width = config["base_dim"] * max(config["multipliers"])
    return width and min(MAX_RATE, float(f"{RATE_TIMES_WIDTH / width:.1g}"))


def default_arguments(network: keras.Model) -> dict[str, Any]:
    """Arguments of `adamw` for a run of any length with this network."""
    return dict(
        learning_rate=recommended_rate(network) or 2e-4,
        beta_1=0.9,
        beta_2=0.99,
        warmup_steps=0.05,
        decay_steps="run",
    )
