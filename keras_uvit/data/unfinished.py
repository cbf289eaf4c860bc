"""A cache's folder while it is being written: whose it is, what is there, and when it is whole."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from keras_uvit.data import manifest
from keras_uvit.data.latents import ShardedArray
from keras_uvit.data.manifest import CacheError
from keras_uvit.data.statistics import latent_statistics
from keras_uvit.pixels import listed

OWN_FILE = re.compile(r"\d{5}-\w+\.npy|manifest\.json")
LEFT_OVER = re.compile(r"tmp-\d+-(\d{5}(-\w+)?|plan|manifest)\.(npy|json)")


def copies(plan: dict[str, Any]) -> int:
    """How many samples the cache has of each image: two where mirror images are stored."""
    return 2 if plan["flip"] == "stored" else 1


def label_fields(plan: dict[str, Any]) -> list[str]:
    """The arrays of labels that a shard has."""
    return [] if plan["num_classes"] is None else ["label"]


def caption_fields(plan: dict[str, Any]) -> list[str]:
    """The arrays of captions that a shard has."""
    return ["context", "captions"] if "text" in plan else []


def agree(folder: Path, plan: dict[str, Any]) -> None:
    """Writes the plan, or raises CacheError where the folder has another one."""
    path = folder / manifest.PLAN
    if not path.is_file():
        foreign = _foreign(folder, plan)
        if not path.is_file():  # another process may have begun meanwhile: its plan came first
            if foreign:
                raise CacheError(
                    f"{folder} holds .npy files of something else, or .json files, such as "
                    f"{foreign[0].name}. Choose an empty one."
                )
            manifest.write_json(path, plan)
    there = manifest.read_json(path)
    other = [key for key in plan if key != "keras_uvit" and there.get(key) != plan[key]]
    if other:
        changed = "; ".join(f"{key} was {there.get(key)}, is {plan[key]}" for key in other)
        raise CacheError(
            f"{folder} holds a cache made in another way: {changed}. Choose another folder, or "
            "delete this one."
        )


def _foreign(folder, plan):
    """Files in a folder without a plan that are not of this plan's shards."""
    records = list(folder.glob("[0-9]*.json"))
    ours = {file.stem for file in records if _record(file).get("plan") == manifest.digest(plan)}
    return [
        file
        for file in [*records, *folder.glob("*.npy"), *folder.glob(manifest.MANIFEST)]
        if file.stem not in ours
        and not LEFT_OVER.fullmatch(file.name)
        and not (ours and OWN_FILE.fullmatch(file.name))  # of a shard that was not finished
    ]


def _record(path):
    """A shard's record; an empty dict for one that is damaged or missing."""
    try:
        return manifest.read_json(path)
    except (CacheError, OSError):
        return {}


def is_whole(folder: Path, index: int, plan: dict[str, Any], images: int) -> bool:
    """Whether the shard of so many images is there, made by this plan, by its checksums."""
    record = _record(folder / f"{manifest.shard_name(index)}.json")
    try:
        return (
            record["plan"] == manifest.digest(plan)
            and record["count"] == (images - len(record["skipped"])) * copies(plan)
            and {*record["files"]} == {plan["field"], *label_fields(plan), *caption_fields(plan)}
            and manifest.damage(folder, record) is None
        )
    except (KeyError, TypeError, AttributeError):  # a damaged record
        return False


def finish(folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Writes the manifest and returns it, or None while a shard is missing.

    Of several processes the last one does it.
    """
    records = [folder / f"{manifest.shard_name(i)}.json" for i in range(plan["num_shards"])]
    if not all(path.is_file() for path in records):
        return None
    shards = [manifest.read_json(path) for path in records]
    count = sum(shard["count"] for shard in shards)
    if not count:
        raise CacheError(f"Not one image of {plan['source']} could be read.")
    content = {**manifest.read_json(folder / manifest.PLAN), "count": count, "shards": shards}
    if plan["field"] == "moments":
        content["statistics"] = _statistics(folder, plan, shards)
    try:
        manifest.write_json(folder / manifest.MANIFEST, content)
    except FileNotFoundError:  # another process finished, and cleared ours away
        if not (folder / manifest.MANIFEST).is_file():
            raise
    for left in folder.glob("tmp-*"):  # of killed processes
        if LEFT_OVER.fullmatch(left.name):
            left.unlink(missing_ok=True)
    return content


def _statistics(folder, plan, shards):
    """What `latent_statistics` finds; None for latents that do not vary."""
    about = plan["field"], plan["shape"], np.dtype(plan["dtype"])
    parts = [manifest.open_shard(folder, shard, *about) for shard in shards]
    try:
        found = latent_statistics(ShardedArray(parts))
        return {key: listed(value) for key, value in found.items()}
    except ValueError:
        return None
