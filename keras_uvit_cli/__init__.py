"""`keras-uvit`: the package from a shell.

This is a package beside `keras_uvit`, because importing that one starts Keras and its backend,
which takes seconds. The modules here import click and the standard library, and a command imports
`keras_uvit` when it runs: help, shell completion and usage errors answer at once. Only `inputs.py`
and `costs.py`, which commands import in their turn, need the library themselves.
"""

import runpy
import warnings
from pathlib import Path
from typing import Any

import click

from keras_uvit_cli.app import app
from keras_uvit_cli.conversions import convert_weights, encode
from keras_uvit_cli.measures import evaluate, report, statistics
from keras_uvit_cli.models import generate, train
from keras_uvit_cli.sharing import share
from keras_uvit_cli.tables import show_cost, show_presets

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
VERSION_FILE = Path(__file__).parents[1] / "keras_uvit" / "version.py"


class Group(click.Group):
    """Turns errors that a user can act on into one line; `--traceback` shows where they were."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except USER_ERRORS as error:
            if context.params.get("traceback"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="To complete commands with the Tab key in bash, run "
    'eval "$(_KERAS_UVIT_COMPLETE=bash_source keras-uvit)"; zsh and fish have zsh_source and '
    "fish_source.",
)
@click.version_option(
    runpy.run_path(str(VERSION_FILE))["__version__"], help="Show the version and exit."
)
@click.option("--traceback", is_flag=True, help="Show where in the program an error was raised.")
def main(traceback: bool) -> None:
    """U-ViT diffusion transformers: encode data, train, sample and evaluate.

    The environment variable KERAS_BACKEND=jax, tensorflow or torch chooses the backend.

    \b
    Pictures of your own, in a folder:
      keras-uvit train my_photos runs/photos
      keras-uvit report runs/photos/model.keras my_photos runs/photos/report

    \b
    From images to FID:
      keras-uvit encode photos cache --autoencoder autoencoder_kl.pth --image-size 256
      keras-uvit train cache runs/a --preset uvit_large_imagenet256
      keras-uvit generate runs/a/model.keras grid.png --labels 207,360 --autoencoder ...
      keras-uvit statistics photos reference.npz --image-size 256 --inception ...
      keras-uvit evaluate runs/a/model.keras --reference reference.npz --inception ...
    """
    # Here options set the encoders: --autoencoder and --text, which each command asks for.
    warnings.filterwarnings("ignore", ".*is no part of (a model's file|the folder)")


for command in (
    show_presets,
    show_cost,
    encode,
    convert_weights,
    train,
    generate,
    app,
    statistics,
    evaluate,
    report,
    share,
):
    main.add_command(command)
