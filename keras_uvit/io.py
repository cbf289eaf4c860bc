"""Files that are whole or not there: written beside and renamed, with checksums, JSON."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_uvit.types import PathLike


@contextlib.contextmanager
def replacing(path: PathLike, synchronized: bool = False) -> Iterator[Path]:
    """Yields the path of a file beside `path`, which takes its place when the block ends well.

    It may be a folder too, where there is none at `path`.

    Args:
        path: the file to write.
        synchronized: bool. Wait until the content is on the disk before the file is renamed.

    Raises:
        PermissionError: if `path` cannot be replaced, as on Windows while a program reads it.
    """
    path = Path(path)
    beside = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        yield beside
        if synchronized:
            synchronize(beside)
        _rename(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


def _rename(beside, path):
    try:
        os.replace(beside, path)
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"{path} cannot be replaced ({error.strerror}). On Windows a file cannot be replaced "
            "while a program reads it: close the programs that use it, then run the same command "
            "again.",
        ) from error


@contextlib.contextmanager
def replacing_folder(path: PathLike) -> Iterator[Path]:
    """Yields the path of an empty folder beside `path`, which takes its place when the block ends
    well, all its files on the disk.

    Args:
        path: the folder to write; the one it is in is made if need be.
    """
    path = Path(path).absolute()
    beside = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    beside.mkdir(parents=True)
    try:
        yield beside
        for part in beside.rglob("*"):
            synchronize(part)
        replace_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(beside: Path, path: Path) -> None:
    """Renames a folder, also where there is one of that name: a folder can only replace none."""
    before = path.with_name(f"tmp-before-{path.name}")
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)  # of a process that was killed below
        os.replace(path, before)
    os.replace(beside, path)
    synchronize(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def synchronize(path: Path) -> None:
    """Waits until a file is on the disk, or what a folder says of its files."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and does this by itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: PathLike, content: dict[str, Any], synchronized: bool = False) -> None:
    """Writes JSON, whole or not at all; nothing where the file says so already."""
    path, text = Path(path), json.dumps(content, indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, synchronized) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: PathLike, error: type[ValueError] = ValueError, advice: str = "") -> dict:
    """The object in a JSON file.

    Args:
        path: the file.
        error: what is raised for a damaged file.
        advice: a sentence for its message that says what to do.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged: {cause}. {advice}".strip()) from cause
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: expected an object. {advice}".strip())
    return content


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file, in 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: PathLike) -> dict[str, Any]:
    """What a record keeps of a file, to find it damaged later: its "bytes" and "sha256"."""
    return {"bytes": Path(path).stat().st_size, "sha256": sha256(path)}


def damage(path: Path, about: dict[str, Any]) -> str | None:
    """What is wrong with a file of which a record has `described`, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != about["bytes"] or sha256(path) != about["sha256"]:
        return f"{path.name} does not have the recorded checksum"
    return None


def digest(content: Any) -> str:
    """The SHA-256 of JSON, whatever the order of its keys, in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
