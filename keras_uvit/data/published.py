"""The published program's latents: one pickled `.npy` file a sample."""

import pickle
import re
from pathlib import Path

import numpy as np

from keras_uvit.data.sources import Source


def _plain_dtype(name, *_):
    """A dtype of numbers or objects as NumPy has it: the file's word on its insides is not taken.

    (A pickled state could declare pointers to be plain bytes; NumPy's own dtypes ignore it.)
    """
    if not re.fullmatch(r"[biufO]\d+", name):
        raise pickle.UnpicklingError(f"it asks for the dtype {name!r}")
    return np.dtype(name)


# All that NumPy's own pickles of arrays and scalars name, in its versions 1 and 2. Nothing here
# can run code or open files.
ALLOWED = {
    **{
        (f"numpy.{core}.multiarray", name): getattr(np._core.multiarray, name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _plain_dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # bytes, in protocol 2
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def published_pickles(path, num_classes=1000):
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
            version = np.lib.format.read_magic(stream)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            _, _, dtype = header(stream)
            if not dtype.hasobject:
                raise ValueError("no pickled pair")
            moments, label = _ArraysOnly(stream).load()
        moments, label = np.asarray(moments, "float32"), int(label)
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
