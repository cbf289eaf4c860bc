"""Reads foreign weight files without ever running what is in them, and writes them."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np

TORCH = (".pth", ".pt", ".bin", ".ckpt")


def read_tensors(path):
    """The named arrays of a PyTorch checkpoint or a safetensors file.

    PyTorch files are pickles, which can run code when read. They are opened with `weights_only`,
    which admits tensors and plain containers and refuses the rest.

    Args:
        path: `.safetensors`, or `.pth`, `.pt`, `.bin`, `.ckpt`.

    Returns:
        dict of name to NumPy array in the precision of the file (bfloat16 becomes float32), mapped
        from the file where its format allows: a float16 file of a large network takes 1 GB.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the library that reads this kind is missing.
        ValueError: if the file is damaged, of another kind, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weight file at {path}.")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in TORCH:
        tensors = _read_torch(path)
    else:
        raise ValueError(
            f"{path.name}: unknown kind of weight file. Expected .safetensors or one of {TORCH}."
        )
    bad = sorted(name for name, a in tensors.items() if not np.isfinite(a).all())
    if bad:
        raise ValueError(f"{path.name} holds NaN or infinity in {bad[:5]}: the file is damaged.")
    return tensors


def _read_safetensors(path):
    load_file = _safetensors(path).load_file
    from safetensors import SafetensorError

    try:
        return {name: _standard(a) for name, a in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}.") from error


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
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and torch.is_tensor(a) for name, a in content.items()
    ):
        raise ValueError(f"{path.name} is no state dict: expected a flat dict of tensors by name.")
    return {
        name: (a.float() if a.dtype == torch.bfloat16 else a).detach().numpy()
        for name, a in content.items()
    }


def _standard(a):
    return a.astype("float32") if a.dtype.name == "bfloat16" else a


def write_tensors(tensors, path):
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
    beside = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        if path.suffix == ".safetensors":
            _safetensors(path).save_file(tensors, beside)
        elif path.suffix in TORCH:
            torch = _torch(path)
            torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, beside)
        else:
            raise ValueError(
                f"{path.name}: unknown kind of weight file. Expected .safetensors or one of "
                f"{TORCH}."
            )
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _safetensors(path):
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f'{path.name} needs safetensors: pip install "keras-uvit[latent]".'
        ) from error
    return safetensors.numpy


def _torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path.name} needs PyTorch, on any Keras backend: "
            'pip install "keras-uvit[torch]" (or convert the file to .safetensors once).'
        ) from error
    return torch
