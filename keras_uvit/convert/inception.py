"""The Inception network's file of pytorch-fid and torch-fidelity: its names."""

from collections.abc import Iterator
from typing import Any

from keras_uvit.convert.layouts import CONV, LINEAR, SAME, Entry, Tensors


def entries(inception: Any) -> Iterator[Entry]:
    """(published name, Keras variable, layout) for every weight of an `InceptionFeatures`."""
    for layer in inception.network.layers:
        if hasattr(layer, "conv"):
            name = layer.name.replace("_branch", ".branch")
            yield f"{name}.conv.weight", layer.conv.kernel, CONV
            yield f"{name}.bn.weight", layer.norm.gamma, SAME
            yield f"{name}.bn.bias", layer.norm.beta, SAME
            yield f"{name}.bn.running_mean", layer.norm.moving_mean, SAME
            yield f"{name}.bn.running_var", layer.norm.moving_variance, SAME
    classifier = inception.network.get_layer("fc")
    yield "fc.weight", classifier.kernel, LINEAR
    yield "fc.bias", classifier.bias, SAME


def normalized(tensors: Tensors, network: Any) -> Tensors:
    """Without the 94 counters of training batches, which inference does not need."""
    return {k: a for k, a in tensors.items() if not k.endswith(".num_batches_tracked")}
