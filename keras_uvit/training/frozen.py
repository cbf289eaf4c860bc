"""Frozen layers, of which a network's config says nothing: files of a model keep their names."""

import fnmatch
import itertools
from collections.abc import Collection, Sequence

import keras

from keras_uvit.private import built_for, layers_in
from keras_uvit.training.optimizers import unscaled


def frozen(network: keras.Model) -> list[str]:
    """Paths of the layers and weights that are not trained."""
    return [part.path for part in _parts(network) if not part.trainable]


def freeze(network: keras.Model, paths: Collection[str]) -> None:
    """Makes all layers and weights trainable but those of `frozen`."""
    for part in _parts(network):
        part.trainable = part.path not in paths


def freeze_matching(network: keras.Model, patterns: Sequence[str]) -> None:
    """Makes the layers whose names match a pattern untrainable; the others stay as they are.

    Raises:
        ValueError: for a pattern that no layer of the network matches.
    """
    layers = {layer.name: layer for layer in network.layers if layer.weights}
    matches = {pattern: fnmatch.filter(layers, pattern) for pattern in patterns}
    for pattern, names in matches.items():
        if not names:
            raise ValueError(
                f"No layer of the network matches {pattern!r}. Its layers are "
                f"{', '.join(layers)}; * stands for any characters."
            )
    for name in itertools.chain(*matches.values()):
        layers[name].trainable = False


def _parts(network):
    """From the outside in, because a layer passes on to its parts what is set on it."""
    parts = [*layers_in(network), *network.weights]
    return [part for part in parts if part.path]  # such as inputs have none


def check_compiled(model: keras.Model) -> None:
    """Raises unless the optimizer was built for the weights that are trained now."""
    built = built_for(unscaled(model.optimizer))
    if [v.path for v in built] != [v.path for v in model.trainable_variables]:
        raise ValueError(
            f"The optimizer was built for {len(built)} weights, and the model now trains "
            f"{len(model.trainable_variables)}: layers were frozen or unfrozen since. Call "
            "compile() again, with a new optimizer."
        )
