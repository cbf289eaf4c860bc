"""Frozen layers, of which a network's config says nothing: files of a model keep their names."""

from collections.abc import Collection

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
