"""What a network costs: parameters and multiply-accumulates."""

import math

import keras

from keras_uvit.networks import lora
from keras_uvit.networks.layers import Attention
from keras_uvit.networks.patches import ConvPatchEmbedding
from keras_uvit.networks.unet_layers import UNetAttention
from keras_uvit.private import layers_in


def count_parameters(network: keras.Model) -> int:
    """Number of weights."""
    return sum(math.prod(weight.shape) for weight in network.weights)


def count_macs(network: keras.Model) -> int:
    """Multiply-accumulates of one image's forward pass: matrix products, convolutions, attention.

    The "GFLOPs" of the U-ViT and DiT papers are these, in units of 1e9. A training step costs
    about 6 floating-point operations per MAC.

    Args:
        network: `UViT` or `UNet`.

    Returns:
        int.
    """
    total = 0
    for layer in network.layers:
        if isinstance(layer, ConvPatchEmbedding):
            total += _conv_stack(layer, network.image_shape)
            continue
        places = math.prod(layer.output.shape[1:-1])  # tokens or pixels: each meets the kernel once
        keys = _attended(layer, places)
        others = {"modulation": 1, "key_value": keys}  # once an image, once a token attended to
        for weight in layer.weights:
            if weight.name in ("kernel", *lora.KERNELS):
                times = others.get(weight.path.split("/")[-2], places)
                total += times * math.prod(weight.shape)
        for part in layers_in(layer):
            if isinstance(part, Attention | UNetAttention):
                total += 2 * places * keys * layer.output.shape[-1]  # Q K^T and weights V
    return total


def _attended(layer, places):
    """How many tokens attention looks at: those of the text, or the layer's own."""
    is_cross = isinstance(layer, UNetAttention) and isinstance(layer.input, list)
    return layer.input[1].shape[1] if is_cross else places


def _conv_stack(layer, image_shape):
    shape, total = (None, *image_shape), 0
    for conv in layer.convs:
        shape = conv.compute_output_shape(shape)
        total += shape[1] * shape[2] * math.prod(conv.kernel.shape)
    return total
