"""`share`: a model as one folder, or on the Hugging Face Hub."""

from typing import Any

import click

from keras_uvit_cli.options import MODEL_OPTIONS, gathered

CARD_OPTIONS = gathered(
    "card",
    data=dict(help="What the model was trained on, in words."),
    license=dict(help="Licence of the weights, such as apache-2.0."),
    fid=dict(
        type=click.Path(exists=True, dir_okay=False),
        help="JSON file that `evaluate --out` wrote of this model.",
    ),
)


@click.command()
@click.argument("model")
@click.argument("target")
@MODEL_OPTIONS
@CARD_OPTIONS
@click.option(
    "--num-images",
    type=click.IntRange(min=0),
    default=16,
    help="Number of images in the README's picture; 0 draws none.",
)
@click.option(
    "--prompt",
    multiple=True,
    help="Prompt for one image of that picture, for a text-to-image model; can be repeated.",
)
@click.option(
    "--no-encoders",
    is_flag=True,
    help="Leave the autoencoder and the text encoder out; their fingerprints are kept.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model that TARGET has.")
def share(
    model: str,
    target: str,
    parts: dict[str, Any],
    card: dict[str, Any],
    num_images: int,
    prompt: tuple[str, ...],
    no_encoders: bool,
    overwrite: bool,
) -> None:
    """Write MODEL as one folder that others can load.

    MODEL is what `generate` takes. TARGET is a folder, or hf://user/name, to upload it to the
    Hugging Face Hub. The folder has the moving average of the weights, the configuration, the
    encoders, a checksum of each file and a README. All commands take it as a MODEL. Such a folder
    is uploaded as it is, with what was changed in its README.

    \b
    Examples:
      keras-uvit share runs/photos/model.keras photos_model --data "my photos" --license cc-by-4.0
      keras-uvit share photos_model hf://user/photos
      keras-uvit share uvit_tiny_shapes shapes_model --weights pretrained --prompt "a red circle"
    """
    from keras_uvit.presets import folders, hub, upload_preset
    from keras_uvit_cli.inputs import open_model

    if hub.is_on_hub(target) and folders.is_folder(model):
        if prompt or no_encoders or any({**parts, **card}.values()):
            raise click.UsageError(f"{model} is uploaded as it is: --overwrite is all it takes.")
        upload_preset(target, model, overwrite)
        return
    opened = open_model(model, **parts)
    opened.save_to_preset(
        target,
        include_encoders=not no_encoders,
        overwrite=overwrite,
        samples=list(prompt) or num_images,
        **card,
    )
