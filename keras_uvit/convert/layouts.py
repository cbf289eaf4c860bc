"""How an array of a PyTorch file becomes a Keras weight, and back; exact inverses."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Two functions of NumPy arrays, each undoing the other."""

    to_keras: Callable
    to_torch: Callable


SAME = Layout(lambda a: a, lambda a: a)
# (out, in) -> (in, out)
LINEAR = Layout(np.transpose, np.transpose)
# (out, in, height, width) -> (height, width, in, out)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def linear(name, dense):
    """Entries of a `Dense` layer: (published name, Keras variable, layout)."""
    yield f"{name}.weight", dense.kernel, LINEAR
    if dense.use_bias:
        yield f"{name}.bias", dense.bias, SAME


def conv(name, layer):
    """Entries of a `Conv2D`."""
    yield f"{name}.weight", layer.kernel, CONV
    if layer.use_bias:
        yield f"{name}.bias", layer.bias, SAME


def norm(name, layer):
    """Entries of a layer or group norm."""
    yield f"{name}.weight", layer.gamma, SAME
    yield f"{name}.bias", layer.beta, SAME
