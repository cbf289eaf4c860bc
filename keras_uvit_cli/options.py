"""Options that several commands share, and checks that need only the command line itself.

Names that the library has in tables stand here once more, so that help and completion can list them
without importing it; the tests compare both.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SAMPLERS = (
    *("ddim", "ddpm", "euler", "heun", "flow_map", "euler_maruyama"),
    *("dpm_solver", "dpm_solver_pp", "dpm_solver_pp_2m", "dpm_solver_pp_3m"),
)
DEVICES = ("one", "all", "job")
LAYOUTS = ("data", "fsdp", "tensor")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
COUNT = click.IntRange(min=1)
SEED = click.IntRange(min=0)
WEIGHTS = (".pth", ".safetensors", ".weights.h5")  # endings of files of weights, to be written


class Target(click.Path):
    """A path to write, checked before hours of work: its ending, and whether it can be written.

    Args:
        *endings: what the name may end in; anything, without them.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__()
        self.endings = endings

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        if self.endings and not value.endswith(self.endings):
            self.fail(f"expected a name ending in {' or '.join(self.endings)}. Received: {value}.")
        path = Path(value).absolute()
        folder = path if path.is_dir() else next(p for p in path.parents if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            self.fail(f"{value} cannot be written: {folder} is not a folder to write into.")
        return super().convert(value, param, context)


def gathered(
    name: str, **options: dict[str, Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command several options, as one dict called `name`.

    Args:
        name: the command's argument for the dict.
        **options: the arguments of `click.option`, by the option's name with underscores.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gather(**values: Any) -> Any:
            values[name] = {key: values.pop(key) for key in options}
            return command(**values)

        for key in reversed(options):
            gather = click.option(f"--{key.replace('_', '-')}", **options[key])(gather)
        return gather

    return decorate


SOURCE_OPTIONS = gathered(
    "reading",
    image_size=dict(
        type=COUNT,
        help="Height and width in pixels; images are resized to it and cropped at their centre.",
    ),
    split=dict(default="train", help="Split of a tfds: or coco: source to read."),
    channels=dict(
        type=click.Choice(["1", "3"]), default="3", help="Read images in grey (1) or colour (3)."
    ),
    crop=dict(
        type=int,
        nargs=4,
        metavar="TOP LEFT HEIGHT WIDTH",
        help="Rectangle in pixels to cut out of every image before it is resized.",
    ),
    background=dict(
        type=click.Choice(["white", "black"]),
        default="white",
        help="Colour behind the transparent pixels of a folder's images.",
    ),
    data_dir=dict(type=click.Path(), help="Folder in which TensorFlow data sets are kept."),
)
ENCODERS: dict[str, dict[str, Any]] = dict(
    autoencoder=dict(
        type=click.Path(exists=True),
        help="Weights of the autoencoder, for a model of latents: a file or a diffusers folder.",
    ),
    text=dict(
        help="CLIP text encoder, for a text-to-image model: a Hugging Face or keras-hub folder, or "
        "clip_vit_large_patch14, which is downloaded.",
    ),
)
ENCODER_OPTIONS = gathered("parts", **ENCODERS)
MODEL_OPTIONS = gathered(
    "parts",
    weights=dict(
        show_default="random weights",
        help='Weights of a preset: "pretrained" for those that ship with the package, or a file '
        "(.weights.h5, .keras, .pth or .safetensors).",
    ),
    **ENCODERS,
)
SAMPLING_OPTIONS = gathered(
    "sampling",
    sampler=dict(
        type=click.Choice(SAMPLERS),
        show_default="the model's own",
        help="Method that turns noise into images.",
    ),
    num_steps=dict(
        type=COUNT, show_default="the model's own", help="Number of steps that the sampler takes."
    ),
    guidance_scale=dict(
        type=float,
        show_default="the model's own",
        help="Strength of classifier-free guidance; 1.0 turns it off.",
    ),
    fast=dict(
        is_flag=True,
        help="Sample in 12 steps of dpm_solver_pp_2m, guided only up to t = 0.8; --sampler and the "
        "other options take precedence.",
    ),
    seed=dict(type=SEED, default=0, help="Seed of the noise; equal seeds give equal images."),
    batch_size=dict(
        type=COUNT,
        show_default="what is fast on this machine",
        help="Number of images that are drawn at a time; it does not change the images.",
    ),
    raw=dict(
        is_flag=True,
        help="Sample with the raw weights instead of their exponential moving average.",
    ),
)
INCEPTION_OPTIONS = gathered(
    "network",
    inception=dict(
        required=True,
        type=click.Path(exists=True),
        help="Weights of the Inception network: pt_inception-2015-12-05-6726825d.pth, a file of "
        "pytorch-fid, or the same converted to .safetensors.",
    ),
    resize=dict(
        type=click.Choice(["half_pixel", "tf1"]),
        default="half_pixel",
        help="How images are resized for Inception: half_pixel like pytorch-fid and the paper, tf1 "
        "like torch-fidelity and the ADM suite.",
    ),
)


def given_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DiffusionModel.generate` that --sampler, --fast, ... stand for."""
    from keras_uvit import presets

    names = ("sampler", "num_steps", "guidance_scale")
    return {
        **(presets.FAST if options["fast"] else {}),
        **{name: options[name] for name in names if options[name] is not None},
        "seed": options["seed"],
        "batch_size": options["batch_size"],
        "use_ema": not options["raw"],
    }


def class_numbers(
    context: click.Context, option: click.Parameter, text: str | None
) -> list[int] | None:
    """A click callback: the list of ints in "1,2,3"."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"expected class numbers such as 207,360. Received: {text}.")
    return [int(part) for part in parts]


def share(context: click.Context, option: click.Parameter, text: str) -> tuple[int, int]:
    """A click callback: "K/N" as (K, N)."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"expected K/N with K below N, such as 0/4. Received: {text}.")
    return int(index), int(count)
