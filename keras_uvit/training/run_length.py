"""The length of a run: told to the learning rate, and to the user where the two do not fit."""

import math
import warnings
from typing import Any

from keras import ops

from keras_uvit.training.optimizers import AdamW, recommended_rate, unscaled

EPOCHS = 8  # in which a run of less than so many is divided
SHORT_RUN = 20_000  # optimizer steps
ADVICE = (
    '`DiffusionModel(optimizer=dict(learning_rate=..., warmup_steps=0.05, decay_steps="run"))` '
    "fits both to the run; without `optimizer=` that is the default."
)


def epoch_of(batches: int, length: int) -> int | None:
    """`steps_per_epoch` of a run of so many batches: None, all of the data, where it is long.

    A run that goes through the data a few times, or not once, is divided into equal parts instead:
    then it is as long as was asked, and shows how it goes.

    Args:
        batches: int, of the run.
        length: int, batches of the data.
    """
    return None if batches >= EPOCHS * length else math.ceil(batches / EPOCHS)


def tell(model: Any, batches: int | None) -> None:
    """Tells the optimizer's schedule that `batches` are still to come.

    Rates that are parts of the run are right then. Warns of a run that ends inside its warm-up, and
    of a short run at a learning rate that was meant for a much wider network.

    Args:
        model: `DiffusionModel`, compiled.
        batches: int, or None where the data have no length.
    """
    optimizer = unscaled(model.optimizer)
    if batches is None or not isinstance(optimizer, AdamW):  # of others nothing is known
        return
    done, skipped = (
        int(ops.convert_to_numpy(v)) for v in (optimizer.iterations, model.skipped_steps)
    )
    # Skipped steps do not count in `iterations`: a run that is resumed has the same length.
    run = done + (skipped + batches) // (optimizer.gradient_accumulation_steps or 1)
    if optimizer.schedule is None:
        rate, warmup = float(ops.convert_to_numpy(optimizer.learning_rate)), 0
    else:
        if optimizer.schedule.learn_run(max(run, 1)):
            model.train_function = None  # the rates are constants of the compiled program
        rate, warmup = optimizer.schedule.config["learning_rate"], optimizer.schedule.warmup
        if isinstance(optimizer.schedule.config["warmup_steps"], float):  # a part of any run
            warmup = 0
    if run < 2 * warmup:
        warnings.warn(
            f"This run ends after {run} optimizer steps, of which the learning rate spends "
            f"{min(run, warmup)} rising: it reaches {rate * min(run / warmup, 1.0):.2g} of "
            f"{rate:.2g}. {ADVICE}",
            stacklevel=5,
        )
    usual = recommended_rate(model.network)
    if usual and rate < usual / 4 and run < SHORT_RUN:
        warnings.warn(
            f"A learning rate of {rate:.2g} is meant for wider networks or longer runs: for this "
            f"width and {run} steps about {usual:.2g} is usual. {ADVICE}",
            stacklevel=5,
        )
