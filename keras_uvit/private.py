"""Private names of Keras for which it has no public ones; tests/test_private.py pins each."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras


def layers_in(layer: keras.Layer) -> Iterator[keras.Layer]:
    """The layer and all layers inside it, from the outside in: `Model.layers` goes one deep."""
    return layer._flatten_layers()


def built_for(optimizer: Any) -> Sequence[keras.Variable]:
    """The weights that an optimizer has slots for: no public attribute has them."""
    return optimizer._trainable_variables


def decays(optimizer: Any, weight: keras.Variable) -> bool:
    """Whether weight decay applies: `exclude_from_weight_decay` can be set but not read."""
    return optimizer._use_weight_decay(weight)


def loss_mean(model: keras.Model) -> keras.metrics.Metric:
    """The mean of the loss that Keras resets and shows: a metric of our own would be a second."""
    return model._loss_tracker
