"""Reads foreign weight files without ever running what is in them, and writes them."""

import pickle
import zipfile
from pathlib import Path

import numpy as np

from keras_uvit import io
from keras_uvit.convert.layouts import Tensors
from keras_uvit.optional import optional
from keras_uvit.types import PathLike

TORCH = (".pth", ".pt", ".bin", ".ckpt")


# What training programs put in front of every name: data parallelism, torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
CONVERT = "Convert the file to float16 or float32 first, with the program that wrote it."


def read_tensors(path: PathLike, key: str | None = None) -> Tensors:
    """The named arrays of a PyTorch checkpoint or a safetensors file.

    PyTorch files are pickles, which can run code when read. They are opened with `weights_only`,
    which admits tensors and plain containers and refuses the rest.

    Args:
        path: `.safetensors`, or `.pth`, `.pt`, `.bin`, `.ckpt`.
        key: str, which part of the file to read, where it holds several, such as "ema": a state
            dict of this name, or the names that begin with "ema.".

    Returns:
        dict of name to NumPy array in the precision of the file (bfloat16 becomes float32), mapped
        from the file where its format allows: a float16 file of a large network takes 1 GB.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the library that reads this kind is missing.
        ValueError: if the file is damaged, has the wrong format, holds more than tensors, or
            holds several parts of which none is chosen.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weight file at {path}.")
    if path.suffix == ".safetensors":
        content, array = _read_safetensors(path), _standard
    elif path.suffix in TORCH:
        content, array = _read_torch(path), _from_torch
    else:
        raise ValueError(
            f"{path.name}: unknown kind of weight file. Expected .safetensors or one of {TORCH}."
        )
    tensors = _unwrapped(_part(content, key, path.name))
    tensors = {name: _array(array, name, a, path.name) for name, a in tensors.items()}
    bad = sorted(name for name, a in tensors.items() if not np.isfinite(a).all())
    if bad:
        raise ValueError(f"{path.name} holds NaN or infinity in {bad[:5]}: the file is damaged.")
    return tensors


def _read_safetensors(path):
    safetensors = _safetensors(path)
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}.") from error
    except (AttributeError, TypeError) as error:  # for a type that NumPy lacks
        raise ValueError(f"{path.name}: {error}. {CONVERT}") from error


def _read_torch(path):
    torch = _torch(path)
    try:
        content = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(path),
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} was refused: it is damaged, or holds more than tensors and would run "
            "code when read. Ask its author for a state dict or a .safetensors file."
        ) from error
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise ValueError(f"{path.name} is truncated or no PyTorch checkpoint: {error}.") from error
    return content


def _part(content, key, file_name):
    """The dict of tensors that a file is, or that `key` chooses among its parts."""
    parts = _parts(content)
    if not parts:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{file_name} is no state dict: expected tensors by name. Received: {found}."
        )
    if key is None and len(parts) == 1:
        (key,) = parts
    if key not in parts:
        names = sorted(name for name in parts if name)
        raise ValueError(
            f"{file_name} holds the parts {names}: choose one, such as "
            f'`convert.load_torch_weights(network, {file_name!r}, key="{names[0]}")`. '
            f"Received: key={key!r}."
        )
    return parts[key]


def _parts(content):
    """Dicts of tensors by the key that chooses them; None is the whole of a flat file.

    Training programs wrap them, {"state_dict": ...} or {"model": ..., "ema": ..., "step": 5}, or
    put the name of a part in front of those of its tensors.
    """
    if not _is_flat(content):
        inside = content.items() if isinstance(content, dict) else ()
        return {name: part for name, part in inside if part and _is_flat(part)}
    parts = {None: content}
    for name, a in content.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = a
    return parts


def _is_flat(content):
    return isinstance(content, dict) and all(
        isinstance(name, str) and hasattr(a, "shape") and hasattr(a, "dtype")
        for name, a in content.items()
    )


def _unwrapped(tensors):
    """Without what is in front of every name."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): a for name, a in tensors.items()}
    return tensors


def _array(convert, name, a, file_name):
    try:
        return convert(a)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file_name} holds {name} in {a.dtype}, which NumPy lacks. {CONVERT}"
        ) from error


def _from_torch(a):
    return (a.float() if str(a.dtype) == "torch.bfloat16" else a).detach().numpy()


def _standard(a):
    return a.astype("float32") if a.dtype.name == "bfloat16" else a


def write_tensors(tensors: Tensors, path: PathLike) -> None:
    """Writes named arrays as a PyTorch state dict or a safetensors file, whole or not at all.

    Args:
        tensors: dict of name to NumPy array.
        path: ending in `.safetensors` or in `.pth`, `.pt`, `.bin`, `.ckpt`.

    Raises:
        ValueError: for another ending.
        FileNotFoundError: if the folder is missing.
        ImportError: if the library that writes this kind is missing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is missing: no folder to write {path.name} into.")
    tensors = {name: np.ascontiguousarray(_standard(a)) for name, a in tensors.items()}
    if path.suffix not in (".safetensors", *TORCH):
        raise ValueError(
            f"{path.name}: unknown kind of weight file. Expected .safetensors or one of {TORCH}."
        )
    with io.replacing(path) as beside:
        if path.suffix == ".safetensors":
            _safetensors(path).numpy.save_file(tensors, beside)
        else:
            torch = _torch(path)
            torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, beside)


def _safetensors(path):
    purpose = f"{path.name} needs safetensors"
    optional("safetensors.numpy", "latent", purpose)
    return optional("safetensors", "latent", purpose)


def _torch(path):
    purpose = f"{path.name} needs PyTorch on any Keras backend (convert it to .safetensors once)"
    return optional("torch", "torch", purpose)
