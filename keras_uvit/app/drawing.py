"""What a model can draw from, and how the fields of a page become images."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_uvit import sampling
from keras_uvit.data import pictures
from keras_uvit.diffusion.samplers import SAMPLERS

# One person's drawing must not keep the others waiting for ever.
MOST = {"number": 64, "num_steps": 1000, "resamples": 20}
TRIED_STEPS = 4  # a number of steps that every sampler can make
CHOICES = ("num_steps", "guidance_scale", "sampler", "seed")  # as `generate` has them


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What a model can, and so which fields its page has.

    Attributes:
        num_classes: int, classes to choose from; 0 without.
        prompts: bool. It draws from text.
        negative_prompts: bool. Guidance can lead away from a text.
        guidance: bool. It can be guided.
        learned_scales: (least, largest) guidance scale that it has learned; None for any scale.
        samplers: tuple of names.
        picture_size: (height, width) in pixels of a picture to start from; None where the model
            cannot read one.
        channels: int, of such a picture.
    """

    num_classes: int
    prompts: bool
    negative_prompts: bool
    guidance: bool
    learned_scales: tuple[float, float] | None
    samplers: tuple[str, ...]
    picture_size: tuple[int, int] | None
    channels: int


def abilities(model: Any) -> Abilities:
    """The `Abilities` of a `DiffusionModel`."""
    network, autoencoder = model.network, model.encoders.autoencoder
    reads_text, inside = network.context_shape is not None, network.takes_guidance
    height, width, channels = network.image_shape
    size = None
    if model.latent_scale is None:
        size = height, width
    elif hasattr(autoencoder, "encode"):
        size, channels = (height * autoencoder.factor, width * autoencoder.factor), 3
    return Abilities(
        num_classes=network.num_classes or 0,
        prompts=reads_text,
        negative_prompts=reads_text and not inside,
        guidance=reads_text or network.null_label is not None,
        learned_scales=model.flow_map.guidance if inside else None,
        samplers=tuple(name for name in SAMPLERS if _fits(model, name)),
        picture_size=size,
        channels=channels,
    )


def _fits(model, sampler):
    try:
        sampling.resolve(model, sampler, TRIED_STEPS)
    except ValueError:
        return False
    return True


def arguments(can: Abilities, wishes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`.

    Args:
        can: of the model.
        wishes: dict of the page's fields, None or "" where one is empty. "number" of images;
            "classes", ints, and "prompts", lines, of which the images are drawn in turn;
            "negative_prompts"; "image" and "mask", files; "strength", "resamples"; and what is
            called as in `generate`.

    Raises:
        ValueError: for what `generate` would not say as well.
    """
    given = {key: value for key, value in wishes.items() if value not in (None, "")}
    for key, most in MOST.items():
        if given.get(key, 0) > most:
            raise ValueError(f"{key} is at most {most} on this page. Received: {given[key]}.")
    number = given.get("number")
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"The number of images is at least 1. Received: {wishes.get('number')}.")
    return {
        **_conditions(can, given, number),
        **{key: given[key] for key in CHOICES if key in given},
        **_edit(can, given),
    }


def _conditions(can, given, number):
    if not can.num_classes and not can.prompts:
        return {"num_images": number}
    made = {}
    if can.num_classes:
        made["labels"] = _in_turn(given.get("classes"), number, "Choose a class, or several.")
    if can.prompts:
        lines = [line.strip() for line in given.get("prompts", "").splitlines() if line.strip()]
        made["prompts"] = _in_turn(lines, number, "Type a prompt, or several, one in each line.")
    if "negative_prompts" in given:
        made["negative_prompts"] = given["negative_prompts"]
    return made


def _in_turn(choices, number, otherwise):
    if not choices:
        raise ValueError(otherwise)
    return list(itertools.islice(itertools.cycle(choices), number))


def _edit(can, given):
    """Files of any size become pictures of the model's."""
    if not {"image", "mask"} & given.keys():
        return {}  # the other fields have values that are not meant
    edit = {key: given[key] for key in ("strength", "resamples") if key in given}
    if "image" in given:
        edit["image"] = pictures.read_file(given["image"], can.picture_size, can.channels)
    if "mask" in given:
        edit["mask"] = pictures.read_file(given["mask"], can.picture_size, 1)[..., 0] > 127
    return edit


def draw(
    model: Any, can: Abilities, wishes: dict[str, Any], watch: Callable[[float], Any]
) -> np.ndarray:
    """The images `(n, H, W, C)` uint8 that the fields of a page ask for.

    Args:
        model: `DiffusionModel`.
        can: its abilities.
        wishes: see `arguments`.
        watch: called with the share of the work that is done, after each step.

    Raises:
        ValueError, TypeError: as `generate`, before anything is drawn.
    """
    done = 0

    def on_step(step, t, denoised):
        nonlocal done
        done += len(denoised)
        watch(done / (job.total * job.options.steps.nfe))

    job = sampling.prepare(model, **arguments(can, wishes), on_step=on_step)
    return sampling.draw(model, job, verbose=0)
