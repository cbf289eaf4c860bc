"""A model's folder on the Hugging Face Hub: `hf://user/name`, read and written by their library.

The library keeps what it has downloaded, resumes a download that was interrupted, and reads the
variables HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from keras_uvit.optional import optional
from keras_uvit.presets import folders
from keras_uvit.types import PathLike
from keras_uvit.version import __version__

PREFIX = "hf://"
NAME = r"[\w-][\w.-]*"
URI = re.compile(rf"{PREFIX}({NAME}/{NAME})(?:@([\w./-]+))?")


def is_on_hub(source: PathLike) -> bool:
    """Whether this is meant as a model on the Hub."""
    return str(source).startswith(PREFIX)


def download(uri: str) -> Path:
    """The folder of a model on the Hub, in the cache of the library.

    Of the repository only the files of a model are downloaded, those that are not there already.

    Args:
        uri: "hf://user/name", or "hf://user/name@revision" for a branch, a tag or a commit.

    Raises:
        FileNotFoundError: if there is no such model, or it is not in the cache and HF_HUB_OFFLINE
            forbids to look for it.
        ImportError: without `pip install "keras-uvit[hub]"`.
        OSError: if the download fails.
        ValueError: for another address, or a repository of something else.
    """
    repository, revision = _parsed(uri)
    hub = _library(uri)
    with _named(uri, "read"):
        record = Path(hub.hf_hub_download(repository, folders.RECORD, revision=revision))
        folder = record.parent
        # The files of this commit, whatever is uploaded in the meantime: the folder has its name.
        for name in folders.read_record(folder)["files"]:
            hub.hf_hub_download(repository, name, revision=folder.name)
    return folder


def check_target(uri: str, overwrite: bool) -> str:
    """Raises for an address that is not written to; returns the name of the repository."""
    repository, revision = _parsed(uri)
    if revision is not None:
        raise ValueError(f"A model is uploaded without a revision. Received: {uri}.")
    hub = _library(uri)
    with _named(uri, "written"):
        if not overwrite and hub.HfApi().file_exists(repository, folders.RECORD):
            raise FileExistsError(
                f"{uri} has a model. Choose another name, or pass overwrite=True (--overwrite)."
            )
    return repository


def upload(uri: str, folder: PathLike, overwrite: bool = False) -> str:
    """Uploads a model's folder, as `presets.upload_preset` says; returns its address."""
    record = folders.check(folder)
    repository, hub = check_target(uri, overwrite), _library(uri)
    names = {folders.RECORD, folders.README, *record["files"]}
    with _named(uri, "written"):
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        old = ({*api.list_repo_files(repository)} & folders.FILES) - names
        changes = [hub.CommitOperationDelete(name) for name in sorted(old)]
        for name in sorted(names):
            changes.append(hub.CommitOperationAdd(name, Path(folder) / name))
        message = f"A model of keras_uvit {__version__}"
        info = api.create_commit(repository, changes, commit_message=message)
    return str(info.repo_url)


def _parsed(uri):
    match = URI.fullmatch(str(uri))
    if match is None:
        raise ValueError(
            f"A model on the Hugging Face Hub is hf://user/name, or hf://user/name@revision to "
            f"read an older one. Received: {uri}."
        )
    return match.groups()


def _library(uri) -> ModuleType:
    return optional("huggingface_hub", "hub", f"{uri} needs huggingface_hub")


@contextlib.contextmanager
def _named(uri: str, what: str) -> Iterator[None]:
    """Inside, an error of the library or of the network says in words what failed."""
    errors = optional("huggingface_hub.errors", "hub", f"{uri} needs huggingface_hub")
    access = "It does not exist, or you have no access: `hf auth login`, or set HF_TOKEN."
    reasons = {  # the first that fits
        errors.LocalEntryNotFoundError: "It is not in the cache, and the Hub cannot be reached, or "
        "HF_HUB_OFFLINE forbids to ask it.",
        errors.RepositoryNotFoundError: access,
        errors.RevisionNotFoundError: "It has no such revision.",
        errors.EntryNotFoundError: "It is no model of keras_uvit, or lacks a file of one.",
    }
    try:
        yield
    except tuple(reasons) as error:
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise FileNotFoundError(f"{uri} cannot be {what}. {reason}") from error
    except (FileExistsError, ImportError):
        raise
    except ValueError as error:  # of `folders`, whose message names a folder of the cache
        raise ValueError(f"{uri}: {error}") from error
    except Exception as error:  # of the network or the disk; what it is depends on the version
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"{uri} could not be {what}: {reason}. Do the same again; files that have arrived are "
            "kept."
        ) from error
