"""The published program's latents: one pickled `.npy` file a sample."""

import pickle
import re
from pathlib import Path

import numpy as np

from keras_uvit.data.sources import Source
from keras_uvit.types import PathLike


class _Dtype:
    """What a pickle says of a dtype: a plain number or "object", and its byte order."""

    def __init__(self, name, *_):
        if not re.fullmatch(r"[biufO]\d+", name):
            raise pickle.UnpicklingError(f"it asks for the dtype {name!r}")
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "="

    def read(self, data):
        return np.frombuffer(data, np.dtype(self.name).newbyteorder(self.order))


class _Array:
    """What a pickle says of an array, read without NumPy's own unpickling, which trusts it."""

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        if dtype.name.startswith("O"):
            self.value = list(data)
        else:
            self.value = dtype.read(data).reshape(shape, order="F" if is_fortran else "C")


def _value(x):
    return x.value if isinstance(x, _Array) else x


# All that NumPy's own pickles of arrays and scalars name, in its versions 1 and 2.
ALLOWED = {
    **{(f"numpy.{c}.multiarray", "_reconstruct"): lambda *_: _Array() for c in ("core", "_core")},
    **{
        (f"numpy.{c}.multiarray", "scalar"): lambda dtype, data: dtype.read(data)[0]
        for c in ("core", "_core")
    },
    ("numpy", "ndarray"): None,  # named, never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # bytes, in protocol 2
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def published_pickles(path: PathLike, num_classes: int = 1000) -> Source:
    """A source of the published program's ImageNet features, to convert them once.

    A folder of `0.npy`, `1.npy`, ...: each a pickled pair of the moments, `(2 C, h, w)` float32,
    and the label. Pickles can run code when read; here they can name nothing but NumPy arrays, and
    a file that asks for more is refused.

    Args:
        path: the folder.
        num_classes: int.

    Returns:
        `Source` of "moments" `(h, w, 2 C)` and "label", for `write_latents`. The files do not say
        which autoencoder made them.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: for files that are missing in between, damaged, or hold anything else.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"No folder at {path}.")
    numbers = sorted(int(p.stem) for p in path.glob("*.npy") if p.stem.isdigit())
    if not numbers:
        raise FileNotFoundError(f"No 0.npy, 1.npy, ... in {path}.")
    if numbers != list(range(len(numbers))):
        gap = next(i for i, n in enumerate(numbers) if i != n)
        raise ValueError(f"{path / f'{gap}.npy'} is missing, though there are later ones.")

    shape = _read(path / "0.npy", num_classes)["moments"].shape

    def read(i):
        sample = _read(path / f"{i}.npy", num_classes)
        if sample["moments"].shape != shape:
            raise ValueError(
                f"{path / f'{i}.npy'} has moments of shape {sample['moments'].shape}, 0.npy of "
                f'{shape}. Remove it, or pass corrupt="skip".'
            )
        return sample

    return Source(
        f"published:{path.name}",
        len(numbers),
        shape,
        read,
        num_classes=num_classes,
        field="moments",
    )


def _read(file, num_classes):
    try:
        with open(file, "rb") as stream:
            # By hand: NumPy's header parser is not safe in several threads before Python 3.11.8.
            wide = np.lib.format.read_magic(stream) >= (2, 0)
            length = int.from_bytes(stream.read(4 if wide else 2), "little")
            if b"'|O'" not in stream.read(length):
                raise ValueError("no pickled pair")
            moments, label = _value(_ArraysOnly(stream).load())
        moments, label = np.asarray(_value(moments), "float32"), int(_value(label))
        if moments.ndim != 3 or moments.shape[0] % 2:
            raise ValueError(f"moments of shape {moments.shape}")
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label}, outside [0, {num_classes})")
    except FileNotFoundError:
        raise
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise ValueError(
            f"{file} is not a pickled pair of moments and label ({type(error).__name__}: {error}). "
            'Remove it, or pass corrupt="skip".'
        ) from error
    return {"moments": moments.transpose(1, 2, 0), "label": label}
