"""Flags of all examples about how a run is made: its numbers, its devices, its going on."""

import keras

from keras_uvit import distribution

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
RESUME = {"auto": "auto", "yes": True, "no": False}  # as typed, and as `fit` takes it


def add_to(parser, devices=distribution.DEVICES, resume="auto", off=()):
    """Adds them.

    Args:
        devices: choices of --devices.
        resume: default of --resume.
        off: more choices of --resume.
    """
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of weights, noise, order (%(default)s)")
    add(
        "--precision",
        default="float32",
        choices=PRECISIONS,
        help="mixed_bfloat16 on accelerators that have it (%(default)s)",
    )
    add(
        "--devices",
        default="one",
        choices=devices,
        help="all: those of this machine; job: of several processes (%(default)s)",
    )
    add(
        "--layout",
        default="data",
        choices=["data", *distribution.LAYOUTS],
        help="what several devices divide: only data, or weights too (%(default)s)",
    )
    add("--model-devices", type=int, help="that share one copy of the weights, with tensor")
    add(
        "--resume",
        default=resume,
        choices=[*RESUME, *off],
        help="resume the run in --out: if there is one, always, or never (%(default)s)",
    )
    add("--save-every", type=int, default=1000, help="steps between checkpoints (%(default)s)")


def apply(options):
    """What they mean for all models made from now on."""
    distribution.choose(options.devices, options.layout, options.model_devices)
    keras.config.set_dtype_policy(options.precision)
    keras.utils.set_random_seed(options.seed)
