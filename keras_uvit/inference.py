"""Frozen networks, run over any number of inputs, and what tells their weights apart."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import ops

from keras_uvit import backend, progress
from keras_uvit.checks import as_int
from keras_uvit.types import Array, PathLike

# What Keras raises for a weight file that is damaged or belongs to a different network.
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError)


@contextlib.contextmanager
def naming_missing_classes(path: PathLike) -> Iterator[None]:
    """Inside, a class that Keras does not know is named, instead of blaming the file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        missing = re.search(r"Could not locate (?:class|function) '(\w+)'", str(error))
        if missing is None:
            raise
        raise ImportError(
            f"{path} needs {missing[1]!r}, which is not known here: import the module that defines "
            "it, decorated by keras.saving.register_keras_serializable, before you load the file."
        ) from error


class Frozen:
    """A network as a fixed function of arrays: compiled once, run in batches.

    Memory is that of one batch. The weights are arguments of the compiled program, so that weights
    loaded later are the ones used.

    Args:
        network: Keras model of one input.
    """

    def __init__(self, network: keras.Model) -> None:
        self.network = network
        self._program = backend.compiled(self._call)

    def _call(self, weights, x):
        with backend.holding(self.network, weights):
            return self.network(x, training=False)

    def __call__(
        self,
        inputs: Array,
        batch_size: int,
        prepare: Callable[[Any], Any] | None = None,
        verbose: int = 0,
        unit_name: str = "image",
    ) -> Any:
        """The network's output for all inputs.

        Args:
            inputs: `(n, ...)` array.
            batch_size: int. A ragged last batch is filled up, so that nothing is compiled again.
            prepare: function of a batch to what the network takes, such as a change of range;
                `None` leaves it.
            verbose: 0 or 1. Progress bar.
            unit_name: what the bar counts.

        Returns:
            NumPy array, or the nested arrays that the network gives, `n` rows each.
        """
        parts = self.batches(inputs, batch_size, prepare, verbose, unit_name)
        return keras.tree.map_structure(lambda *a: np.concatenate(a), *parts)

    def batches(
        self,
        inputs: Array,
        batch_size: int,
        prepare: Callable[[Any], Any] | None = None,
        verbose: int = 0,
        unit_name: str = "image",
    ) -> Iterator[Any]:
        """As calling it, but yields the output batch by batch: memory is that of one."""
        batch_size = as_int(batch_size, "batch_size", 1)
        if ops.is_tensor(inputs):
            inputs = ops.convert_to_numpy(inputs)
        # Processes of one job run it each on its own: they may have other inputs.
        weights = [backend.alone(w.value) for w in self.network.variables]
        total, size = len(inputs), min(batch_size, len(inputs))
        bar = progress.bar(total, verbose, unit_name)
        for first in range(0, total, size):
            rows = np.minimum(np.arange(first, first + size), total - 1)
            x = inputs[first : first + size] if rows[-1] == first + size - 1 else inputs[rows]
            x = prepare(x) if prepare else x
            x = keras.tree.map_structure(lambda a: backend.spread(a, together=False), x)
            out = self._program(weights, x)
            kept = min(size, total - first)
            yield keras.tree.map_structure(lambda a: ops.convert_to_numpy(a)[:kept], out)  # noqa: B023
            bar.update(first + kept)


@contextlib.contextmanager
def own_defaults(policy: str | keras.DTypePolicy) -> Iterator[None]:
    """What is made inside has this dtype policy, float32 inputs, metrics and counters, and channels
    last, whatever Keras is set to.
    """
    config = keras.config
    before = config.dtype_policy(), config.floatx(), config.image_data_format()
    _set_defaults(policy, "float32", "channels_last")
    try:
        yield
    finally:
        _set_defaults(*before)


def _set_defaults(policy, floatx, data_format):
    keras.config.set_dtype_policy(policy)
    keras.config.set_floatx(floatx)
    keras.config.set_image_data_format(data_format)


def load_keras_weights(network: keras.Model, path: PathLike, name: str | None = None) -> None:
    """As `network.load_weights`, but strict: Keras passes over arrays it has no place for.

    Args:
        network: Keras model.
        path: of `.weights.h5`.
        name: what to call the network in errors; its own name.

    Raises:
        ValueError: if the file is damaged or belongs to a different network.
    """
    try:
        arrays: list[Any] = []
        with h5py.File(path) as file:
            file.visititems(lambda _, item: arrays.append(item) if hasattr(item, "shape") else None)
        network.load_weights(path)
        if len(arrays) != len(network.weights):
            raise ValueError(
                f"the file has {len(arrays)} arrays, the network {len(network.weights)} weights"
            )
    except DAMAGE as error:
        # Without the values of the weights, which Keras quotes.
        reason = str(error).partition("Target variable")[0].partition("List of objects")[0]
        reason = " ".join(reason.split())
        raise ValueError(
            f"{Path(path).name} is damaged or does not fit {name or repr(network.name)}: {reason}"
        ) from error


def fingerprint(network: keras.Model) -> str:
    """16 hexadecimal digits of the SHA-256 of a network's weights, shapes included.

    Equal weights have equal fingerprints on every backend.
    """
    return fingerprint_of(network.weights)


def fingerprint_of(weights: Iterable[keras.Variable]) -> str:
    """The fingerprint of some weights of a network."""
    digest = hashlib.sha256()
    for weight in weights:
        value = np.ascontiguousarray(ops.convert_to_numpy(weight), "<f4")
        digest.update(str(value.shape).encode())
        digest.update(value.data)
    return digest.hexdigest()[:16]
