"""How an array of a PyTorch file becomes a Keras weight, and back; exact inverses."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np


class Layout(NamedTuple):
    """Two functions of NumPy arrays, each undoing the other."""

    to_keras: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


Tensors = dict[str, np.ndarray]  # by their names in a file
Entry = tuple[str, keras.Variable, Layout]  # published name, weight, how one becomes the other

SAME = Layout(lambda a: a, lambda a: a)
# (out, in) -> (in, out)
LINEAR = Layout(np.transpose, np.transpose)
# (out, in, height, width) -> (height, width, in, out)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def linear(name: str, dense: keras.layers.Layer) -> Iterator[Entry]:
    """Entries of a `Dense` layer: (published name, Keras variable, layout)."""
    yield f"{name}.weight", dense.kernel, LINEAR
    if dense.use_bias:
        yield f"{name}.bias", dense.bias, SAME


def conv(name: str, layer: keras.layers.Layer) -> Iterator[Entry]:
    """Entries of a `Conv2D`."""
    yield f"{name}.weight", layer.kernel, CONV
    if layer.use_bias:
        yield f"{name}.bias", layer.bias, SAME


def norm(name: str, layer: keras.layers.Layer) -> Iterator[Entry]:
    """Entries of a layer or group norm."""
    yield f"{name}.weight", layer.gamma, SAME
    yield f"{name}.bias", layer.beta, SAME
