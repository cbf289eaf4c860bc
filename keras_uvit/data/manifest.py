"""The format of a cache folder: what is in it, and how a reader knows that it is whole.

    plan.json               what is being made, written first; a second process must agree with it
    00000-moments.npy       samples of shard 0, `(count, *shape)`; or 00000-image.npy
    00000-label.npy         their labels, int32, where there are any
    00000-context.npy       with captions, `(1 + captions, length, width)`: first the empty prompt's
    00000-captions.npy      and `(count, 2)` int32, each sample's first row in it and its captions
    00000.json              written last: count and SHA-256 of the shard's files, and the plan's
                            digest; a shard without it does not exist
    manifest.json           the plan and all shards' records, written when none is missing

Each file is written beside its name, synchronized, and renamed: none is ever half there.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keras_uvit import io
from keras_uvit.types import PathLike

FORMAT = "keras_uvit cache"
VERSION = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
KEYS = [
    "version",
    "keras_uvit",
    "source",
    "source_length",
    "field",
    "shape",
    "dtype",
    "image_size",
    "autoencoder",
    "num_classes",
    "class_names",
    "flip",
    "shard_size",
    "num_shards",
    "count",
    "shards",
]
AGAIN = "Run the same `write_latents` or `keras-uvit encode` again: it rebuilds just that shard."


class CacheError(ValueError):
    """A cache that is unfinished, damaged or not what was asked for."""


def shard_name(index: int) -> str:
    return f"{index:05d}"


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write(file)` on a file beside `path`, synchronizes it, renames it."""
    with io.replacing(path, synchronized=True) as beside, open(beside, "wb") as file:
        write(file)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file of a cache; raises a CacheError if the file is damaged."""
    return io.read_json(path, CacheError, "Delete it and run the same again.")


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """An `.npy` file. (`np.save` can lose the end of an array on a full disk without an error.)"""
    array = np.ascontiguousarray(array)
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.view("uint8").reshape(-1).data if array.size else b"")


def digest(plan: dict[str, Any]) -> str:
    """16 hexadecimal digits that tell plans apart, whatever version made them."""
    content = {key: value for key, value in plan.items() if key != "keras_uvit"}
    return io.digest(content)[:16]


def write_shard(
    folder: Path, index: int, arrays: dict[str, np.ndarray], **more: Any
) -> dict[str, Any]:
    """Writes a shard's arrays, then its record, and returns the record."""
    files = {}
    for field, array in arrays.items():
        path = folder / f"{shard_name(index)}-{field}.npy"
        write_file(path, functools.partial(write_array, array=array))
        files[field] = {"file": path.name, "sha256": io.sha256(path), "count": len(array)}
    record = {"count": len(next(iter(arrays.values()))), "files": files, **more}
    write_json(folder / f"{shard_name(index)}.json", record)
    return record


def damage(folder: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a shard's files by their checksums, or None."""
    for entry in record["files"].values():
        path = folder / entry["file"]
        if not path.is_file():
            return f"{path.name} is missing"
        if io.sha256(path) != entry["sha256"]:
            return f"{path.name} is damaged: its checksum is not the recorded one"
    return None


def open_shard(
    folder: Path, record: dict[str, Any], field: str, shape: Sequence[int], dtype: np.dtype
) -> np.ndarray:
    """One array of a shard, mapped into memory; its size is checked, its checksum not.

    Raises:
        CacheError: if the file is missing, truncated, or not of this shape and dtype.
    """
    if field not in record.get("files", {}):
        raise CacheError(f"{folder / MANIFEST} is damaged: a shard has no {field}. {AGAIN}")
    path = folder / record["files"][field]["file"]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing. {AGAIN}") from None
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        raise CacheError(f"{path} is truncated or damaged ({error}). {AGAIN}") from None
    expected = (record["files"][field].get("count", record["count"]), *shape)
    if path.stat().st_size != array.offset + array.nbytes:
        raise CacheError(f"{path} is not of the size that its header says. {AGAIN}")
    if array.shape != expected or array.dtype != dtype:
        raise CacheError(
            f"{path} holds {array.dtype} {array.shape}; the manifest says {dtype} {expected}. "
            f"{AGAIN}"
        )
    return array


def read_manifest(folder: PathLike) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        FileNotFoundError: if there is no such folder, or no cache in it.
        CacheError: if the cache is unfinished, damaged, or of a later version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder at {folder}. `keras-uvit encode --help` makes a cache.")
    if not (folder / MANIFEST).is_file():
        if not (folder / PLAN).is_file():
            raise FileNotFoundError(
                f"No cache in {folder}: it has no {MANIFEST}. `keras-uvit encode --help` makes one."
            )
        count = read_json(folder / PLAN).get("num_shards")
        if not isinstance(count, int):
            raise CacheError(
                f"{folder / PLAN} is damaged: it lacks 'num_shards'. Delete it and run the same "
                "again."
            )
        done = sum((folder / f"{shard_name(i)}.json").is_file() for i in range(count))
        raise CacheError(
            f"The cache in {folder} is unfinished: {done} of {count} shards are "
            "there. Run the same `write_latents` or `keras-uvit encode` again; it resumes there."
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CacheError(f"{folder / MANIFEST} is no manifest of a {FORMAT}.")
    if manifest.get("version", 0) > VERSION:
        raise CacheError(
            f"The cache in {folder} has version {manifest['version']}, made by keras_uvit "
            f"{manifest.get('keras_uvit')}; this one reads up to {VERSION}. Upgrade keras_uvit."
        )
    missing = [key for key in KEYS if key not in manifest]
    if missing:
        raise CacheError(
            f"{folder / MANIFEST} is damaged: it lacks {missing}. Delete it and run the same again."
        )
    return manifest
