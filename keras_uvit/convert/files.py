"""Reads foreign weight files without ever running what is in them."""

import pickle
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
        dict of name to float32 NumPy array.

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
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            f'Reading {path.name} needs safetensors: pip install "keras-uvit[latent]".'
        ) from error
    try:
        return {name: _as_float32(a) for name, a in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}.") from error


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"Reading {path.name} needs PyTorch, on any Keras backend: "
            'pip install "keras-uvit[torch]" (or convert the file to .safetensors once).'
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
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
    return {name: _as_float32(a.detach().to(torch.float32).numpy()) for name, a in content.items()}


def _as_float32(a):
    return np.asarray(a, "float32")
