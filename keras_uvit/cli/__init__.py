"""`keras-uvit`: the package from a shell."""

import click

import keras_uvit
from keras_uvit.cli.files import convert_weights, encode
from keras_uvit.cli.measures import evaluate, statistics
from keras_uvit.cli.models import generate, train
from keras_uvit.cli.tables import show_cost, show_presets

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


class Group(click.Group):
    """Turns errors that a user can act on into one line; `--traceback` shows where they were."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except USER_ERRORS as error:
            if context.params.get("traceback"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(keras_uvit.__version__)
@click.option("--traceback", is_flag=True, help="Show where an error was raised.")
def main(traceback):
    """U-ViT diffusion transformers: encode data, train, sample, evaluate.

    KERAS_BACKEND=jax, tensorflow or torch chooses the backend.

    \b
    From images to FID:
      keras-uvit encode photos cache --autoencoder autoencoder_kl.pth --image-size 256
      keras-uvit train uvit_large_imagenet256 cache runs/a
      keras-uvit generate runs/a/model.keras grid.png --labels 207,360 --autoencoder ...
      keras-uvit statistics photos reference.npz --image-size 256 --inception ...
      keras-uvit evaluate runs/a/model.keras --reference reference.npz --inception ...
    """


for command in (
    show_presets,
    show_cost,
    encode,
    convert_weights,
    train,
    generate,
    statistics,
    evaluate,
):
    main.add_command(command)
