"""A model for pictures of one's own: `presets.for_data`.

What it chooses stands in the tables below. The numbers behind them are in docs/own_data.md and were
measured by `benchmarks/own_data.py`.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from keras_uvit import backend, distribution, io, progress
from keras_uvit.diffusion.schedules import LinearPath, VPCosine
from keras_uvit.networks import UViT
from keras_uvit.pixels import PerChannel
from keras_uvit.training import DiffusionModel
from keras_uvit.training.optimizers import default_arguments
from keras_uvit.types import PathLike

FEWEST = 10  # pictures
FEW = 1000  # pictures of which a network of this kind learns many by heart

# What is learned, and how it is said. A velocity has the noise in it, and a patch of k numbers
# carries noise of k dimensions, for which a token must have room; else the picture itself, which
# has fewer, is predicted.
OBJECTIVES = {
    "flow": (
        dict(schedule=LinearPath(), prediction="velocity", time_sampling="logit_normal"),
        "flow matching, with most training in the middle of the path",
    ),
    "x0": (
        dict(schedule=VPCosine(), prediction="x0"),
        "the clean picture is predicted, from noise of a cosine schedule",
    ),
}
FLOW_NUMBERS_PER_WIDTH = 0.5  # of a patch, for each dimension of a token, that learn as a flow
# Per device: the network, the most patches of an image, the steps of a run; and the longest side of
# pictures that the command line chooses. On a CPU many cheap steps with large patches draw better
# than few steps with small ones (clothes of 28 pixels: 16 patches and 49 at equal time), as long as
# the network is wide enough for a patch; where it is not, the second number of patches holds.
SIZES = {
    "cpu": (dict(hidden_dim=128, num_layers=5, num_heads=4), (32, 64), 5_000),
    "accelerator": (dict(hidden_dim=512, num_layers=13, num_heads=8), (256, 256), 20_000),
}
NUMBERS_PER_WIDTH = 2  # at most so many numbers of a patch for each dimension of a token
SIDES = {"cpu": 64, "accelerator": 128}
CONDITION_DROPOUT = 0.1
SAMPLING = dict(sampler="dpm_solver_pp_2m", num_steps=25)
GUIDANCE = {"nothing": 1.0, "classes": 1.5, "captions": 2.0}
TIMED_STEPS = 8
PLAN = "planned.json"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a choice depends on.

    Attributes:
        image_shape: (H, W, C) of the pictures or latents.
        num_images: int.
        batch_size: int.
        num_classes: int, or None.
        context_shape: (length, width) of the captions' contexts, or None.
        latent_scale: float or one per channel, or None for pixels.
        latent_shift: float or one per channel.
        counts: pictures of each class, or None where they are not known.
        flip: whether the pictures are mirrored left to right at random.
    """

    image_shape: tuple[int, int, int]
    num_images: int
    batch_size: int = 64
    num_classes: int | None = None
    context_shape: tuple[int, int] | None = None
    latent_scale: PerChannel | None = None
    latent_shift: PerChannel = 0.0
    counts: tuple | None = None
    flip: bool = False


def for_data(
    dataset: Any,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    folder: PathLike | None = None,
    size: str | None = None,
    network: dict[str, Any] | None = None,
    seed: int = 0,
    verbose: int = 1,
    **options: Any,
) -> DiffusionModel:
    """A compiled `DiffusionModel` that suits a data set, with a run of the right length.

    The choice is printed in five lines, and each part of it can be overridden; `model.fit(dataset)`
    then trains for as long as was planned.

    Args:
        dataset: what `data.image_folder`, `data.LatentDataset`, `data.image_shards` or
            `data.images.in_memory` return, or a dict of arrays: "image" uint8 and maybe "label".
        steps: int, optimizer steps of the run; `None` is the table's, 5,000 on a CPU.
        minutes: float, duration of the run instead of `steps`: a few steps are timed first.
        folder: path of the run. The steps that `minutes` came to are kept there, so that a run that
            is resumed has as many.
        size: "cpu" or "accelerator", the row of `SIZES`; `None` is what this machine has.
        network: dict of arguments of `UViT` to change, such as `dict(hidden_dim=256)`.
        seed: int.
        verbose: 0 or 1, whether to say what was chosen.
        **options: arguments of `DiffusionModel` to change, such as `prediction="v"`.

    Returns:
        `DiffusionModel`, compiled, whose `planned_steps` is the length of the run.

    Raises:
        ValueError: for fewer than ten pictures, pictures that are all alike, sides without a patch
            size, both `steps` and `minutes`, or `minutes` in a job of several processes.
        TypeError: for data whose size is not known.

    Example:
        >>> from keras_uvit import data, presets
        >>> model = presets.for_data(data.digits(), verbose=0)
        >>> patch = model.network.get_config()["patch_size"]
        >>> patch, model.objective.prediction, model.planned_steps
        (2, 'velocity', 5000)
    """
    facts = facts_of(dataset)
    if steps is not None and minutes is not None:
        raise ValueError("Pass steps or minutes, not both.")
    if minutes is not None and distribution.process()[1] > 1:
        raise ValueError("Processes of a job would time different runs: pass steps, not minutes.")
    size = size or machine()
    if size not in SIZES:
        raise ValueError(f"size must be one of {list(SIZES)}. Received: {size!r}.")
    widths, most_patches, usual_steps = SIZES[size]
    network = dict(network or {})
    if "patch_size" not in network:
        width = network.get("hidden_dim", widths["hidden_dim"])
        network["patch_size"] = suitable_patch(facts.image_shape, width, *most_patches)
    arguments = {
        "image_shape": facts.image_shape,
        **widths,
        "position": "sinusoidal",
        "init": "balanced",
        "num_classes": facts.num_classes,
        "context_shape": facts.context_shape,
        **network,
    }

    def make(steps):
        net = UViT(**arguments)
        chosen = {
            **OBJECTIVES[objective_of(facts, net)][0],
            "latent_scale": facts.latent_scale,
            "latent_shift": facts.latent_shift,
            "condition_dropout": CONDITION_DROPOUT if has_condition(facts) else 0.0,
            "ema_decay": ema_decay(steps),
            **SAMPLING,
            "guidance_scale": GUIDANCE[condition_of(facts)],
            "planned_steps": steps,
            "seed": seed,
            **options,
            "optimizer": {**default_arguments(net), **options.get("optimizer", {})},
        }
        model = DiffusionModel(net, **chosen)
        model.compile()
        return model

    kept = Path(folder) / PLAN if folder else None
    if minutes is not None and kept and kept.is_file():
        steps = json.loads(kept.read_text(encoding="utf-8"))["steps"]
    elif minutes is not None:
        steps = max(1, int(60 * minutes / seconds_per_step(make(usual_steps), facts)))
        if kept:
            io.write_json(kept, {"minutes": minutes, "steps": steps})
    model = make(steps or usual_steps)
    if verbose:
        progress.say("\n".join([*lines(model, facts), *warnings_of(model, facts)]))
    return model


def machine() -> str:
    """The key of `SIZES` for this machine."""
    return "accelerator" if backend.has_accelerator() else "cpu"


def ema_decay(steps: int) -> float:
    """The average looks back on about a tenth of the run, at most on 10,000 steps."""
    return float(np.clip(1 - 10 / steps, 0.9, 0.9999))


def objective_of(facts: Facts, network: Any) -> str:
    """The key of `OBJECTIVES`."""
    config = network.get_config()
    numbers = config["patch_size"] ** 2 * facts.image_shape[-1]
    return "flow" if numbers <= FLOW_NUMBERS_PER_WIDTH * config["hidden_dim"] else "x0"


def has_condition(facts: Facts) -> bool:
    return condition_of(facts) != "nothing"


def condition_of(facts: Facts) -> str:
    if facts.context_shape is not None:
        return "captions"
    return "nothing" if facts.num_classes is None else "classes"


def suitable_patch(image_shape: tuple[int, int, int], width: int, few: int, many: int) -> int:
    """The patch size that leaves at most `few` patches, or `many` if those would be too large."""
    patch = patch_size(image_shape, few)
    if patch**2 * image_shape[-1] > NUMBERS_PER_WIDTH * width:
        patch = patch_size(image_shape, many)
    return patch


def patch_size(image_shape: tuple[int, int, int], most_patches: int) -> int:
    """The smallest patch, of 2 pixels or more, that cuts an image into at most so many.

    Raises:
        ValueError: if no size from 2 to the shorter side divides both sides into so few.
    """
    height, width, _ = image_shape
    for size in range(2, min(height, width) + 1):
        fits = height % size == width % size == 0
        if fits and height // size * (width // size) <= most_patches:
            if size == min(height, width) and size > 2:
                break
            return size
    near = 8 * max(1, round(min(height, width) / 8))
    raise ValueError(
        f"Images of {height}x{width} cannot be cut into 2 to {most_patches} equal patches. Choose "
        f"sides that divide by 4 or 8, such as image_size={near}, or pass "
        "network=dict(patch_size=...)."
    )


def facts_of(dataset: Any) -> Facts:
    """The `Facts` of a data set."""
    arrays: Any = dataset if isinstance(dataset, dict) else getattr(dataset, "arrays", None)
    key = next((k for k in ("image", "moments", "latent") if k in (arrays or {})), None)
    if key is None:
        raise TypeError(
            "Expected a data set of known size: data.image_folder(...), data.LatentDataset(...) or "
            f'a dict of arrays with "image". Received: {type(dataset).__name__}.'
        )
    pictures = arrays[key]
    *sides, channels = pictures.shape[1:]
    labels = arrays.get("label")
    classes = getattr(dataset, "num_classes", None)
    if labels is not None:
        labels = np.asarray(labels)
        classes = classes or int(labels.max()) + 1
    contexts = getattr(dataset, "contexts", None)
    context_shape = None if contexts is None else contexts.context_shape
    if "context" in arrays:
        context_shape = arrays["context"].shape[1:]
    scale = None if key == "image" else (getattr(dataset, "scale", None) or 1.0)
    if len(pictures) < FEWEST:
        raise ValueError(
            f"{len(pictures)} pictures are too few to learn from: expected at least {FEWEST}, "
            "better a few hundred."
        )
    if key == "image":
        _check_variety(pictures)
    return Facts(
        image_shape=(*sides, channels // 2 if key == "moments" else channels),
        num_images=len(pictures),
        batch_size=getattr(dataset, "batch_size", None) or min(64, len(pictures)),
        num_classes=classes if labels is not None else None,
        context_shape=context_shape and tuple(context_shape),
        latent_scale=scale,
        latent_shift=getattr(dataset, "shift", None) or 0.0,
        counts=None if labels is None else tuple(np.bincount(labels, minlength=classes or 0)),
        flip=getattr(dataset, "flip", False),
    )


def _check_variety(pictures):
    few = np.asarray(pictures[: min(len(pictures), 256)])
    if (few == few[:1]).all():
        raise ValueError(
            f"The first {len(few)} pictures are all the same: there is nothing to learn. Expected "
            "pictures that differ; look at the files."
        )


def lines(model: DiffusionModel, facts: Facts) -> list[str]:
    """What was chosen, in five lines."""
    config = model.network.get_config()
    height, width, channels = facts.image_shape
    patch = config["patch_size"]
    patches = height // patch * (width // patch)
    what = "pictures" if facts.latent_scale is None else "latents"
    condition = {
        "nothing": "",
        "classes": f", {facts.num_classes} classes",
        "captions": ", with captions",
    }[condition_of(facts)]
    steps = model.planned_steps or 0
    visits = steps * facts.batch_size / facts.num_images
    optimizer = model.optimizer_config
    choices, objective = OBJECTIVES[objective_of(facts, model.network)]
    if any(getattr(model.objective, key) != value for key, value in choices.items()):
        objective = f"prediction {model.objective.prediction!r}"
    mirrored = ", mirrored at random" if facts.flip else ""
    dropped = (
        f"; the condition is left out {model.condition_dropout:.0%} of the time"
        if model.condition_dropout
        else ""
    )
    return [
        f"Data:     {facts.num_images:,} {what} of {height}x{width}x{channels}{condition}"
        f"{mirrored}",
        f"Network:  U-ViT of {model.network.count_params() / 1e6:.2g} million weights: {patches} "
        f"patches of {patch}x{patch}, {config['num_layers']} layers, {config['hidden_dim']} wide, "
        f"{config['position']} positions",
        f"Learning: {objective}; AdamW, learning rate {optimizer['learning_rate']:.2g}{dropped}",
        f"Run:      {steps:,} steps of {facts.batch_size}, {visits:,.3g} visits to "
        f"each of the {what}; average over about the last {1 / (1 - model.ema_decay):,.0f} steps",
        f"Sampling: {model.num_steps} steps of {model.sampler}, guidance "
        f"{model.guidance_scale:.2g}",
    ]


def warnings_of(model: DiffusionModel, facts: Facts) -> list[str]:
    """What no choice of settings can mend, one line each."""
    said = []
    visits = (model.planned_steps or 0) * facts.batch_size / facts.num_images
    if facts.num_images < FEW and visits > 100:
        said.append(
            f"Note:     {facts.num_images} pictures are few: after {visits:,.0f} visits to each, "
            "samples may be copies of them. `evaluation.report` shows the nearest ones."
        )
    counts = facts.counts or ()
    rare = [k for k, count in enumerate(counts) if count < FEWEST]
    if rare:
        said.append(
            f"Note:     {len(rare)} of {facts.num_classes} classes have fewer than {FEWEST} "
            f"pictures, such as class {rare[0]} with {counts[rare[0]]}: expect copies, or "
            "merge classes."
        )
    return said


def seconds_per_step(
    model: DiffusionModel, facts: Facts, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a training step here by `clock`, without its compilation."""
    # Values that the checks of a first batch find right, of pixels and of latents.
    shape = facts.batch_size, *facts.image_shape
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")
    batch: dict[str, np.ndarray] = {"image" if facts.latent_scale is None else "latent": images}
    if facts.num_classes is not None:
        batch["label"] = np.zeros(facts.batch_size, "int32")
    if facts.context_shape is not None:
        batch["context"] = np.zeros((facts.batch_size, *facts.context_shape), "float32")
    model.train_on_batch(batch)
    model.train_on_batch(batch)
    start = clock()
    for _ in range(TIMED_STEPS):
        ops.convert_to_numpy(model.train_on_batch(batch)[0])
    return (clock() - start) / TIMED_STEPS
