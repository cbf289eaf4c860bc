"""Where a model's folder is: on this machine, or on the Hugging Face Hub."""

import tempfile
from pathlib import Path

from keras_uvit import progress
from keras_uvit.presets import folders, hub
from keras_uvit.presets.card import Card
from keras_uvit.training import DiffusionModel
from keras_uvit.types import PathLike


def save(
    model: DiffusionModel,
    destination: PathLike,
    card: Card,
    include_encoders: bool = True,
    overwrite: bool = False,
    verbose: int = 1,
) -> None:
    """Writes a model to a folder or to `hf://user/name`: see `DiffusionModel.save_to_preset`."""
    if not hub.is_on_hub(destination):
        folders.write(model, destination, card, include_encoders, overwrite, verbose=verbose)
        return
    uri = str(destination)
    hub.check_target(uri, overwrite)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model"
        folders.write(model, written, card, include_encoders, source=uri, verbose=verbose)
        upload_preset(uri, written, overwrite, verbose)


def upload_preset(uri: str, preset: PathLike, overwrite: bool = False, verbose: int = 1) -> None:
    """Uploads a folder that `DiffusionModel.save_to_preset` wrote to the Hugging Face Hub.

    The repository is made if need be, and gets all files in one commit. Log in first, by
    `hf auth login` or the variable HF_TOKEN. A new repository is public, unless your organization
    says otherwise: for a private one, make it on the site first.

    Args:
        uri: "hf://user/name".
        preset: the folder; its checksums are compared first.
        overwrite: bool. Replace the model that is there.
        verbose: 0 or 1, whether to print the address.

    Raises:
        FileExistsError: if there is a model, and `overwrite` is false.
        FileNotFoundError, ValueError: if the folder is damaged or no model's, or the address wrong.
        ImportError: without `pip install "keras-uvit[hub]"`.
        OSError: if the upload fails.
    """
    address = hub.upload(uri, preset, overwrite)
    if verbose:
        progress.say(f"{uri}: {address}")


def is_preset(source: PathLike) -> bool:
    """Whether this is meant as a model's folder, here or on the Hub."""
    return hub.is_on_hub(source) or folders.is_folder(source)


def find(source: PathLike) -> Path:
    """The path of a model's folder, which is downloaded if it is on the Hub.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: see `hub.download`.
    """
    return hub.download(str(source)) if hub.is_on_hub(source) else Path(source)
