"""Networks of 8-bit integers, for sampling: smaller files, the same call.

Keras' own dynamic int8: of each dense layer the kernel is kept as int8 with a scale for each
output, and its input is rounded to int8 with a scale for each token when it is called. What is not
a dense layer or a table of labels stays as it is.
"""

import gc
import warnings
from typing import Any

import keras

MODES = ("int8",)


def check_mode(network: Any, mode: Any) -> None:
    """Raises unless the network can be quantized so; changes nothing.

    Raises:
        ValueError: for another mode, a network that is quantized already, has low-rank pairs, or
            computes in float16.
    """
    if mode not in MODES:
        raise ValueError(
            f"quantize takes 'int8', the only mode that is kept in a file and read back. "
            f"Received: {mode!r}."
        )
    if is_quantized(network):
        raise ValueError(
            f"{network.name!r} is quantized already, to {network.config.quantization}."
        )
    if getattr(network.config, "lora", None):
        raise ValueError(
            f"{network.name!r} has low-rank pairs, which are not quantized. Merge them first: "
            "`training.merge_lora(model)`."
        )
    if network.compute_dtype == "float16":
        raise ValueError(
            f"{network.name!r} computes in float16, which overflows where integers are scaled "
            "back. Make it in float32 or mixed_bfloat16."
        )


def is_quantized(network: Any) -> bool:
    """Whether the network's kernels are integers."""
    return getattr(getattr(network, "config", None), "quantization", None) is not None


def check_whole(network: Any, what: str) -> None:
    """Raises for a quantized network, with `what` needs one that is not: "Training"."""
    if is_quantized(network):
        raise ValueError(
            f"{what} needs the network before it was quantized: its kernels are integers now. Load "
            "the model that was saved before `quantize`."
        )


def quantize_layers(network: keras.Model, mode: str) -> None:
    """Quantizes what Keras can quantize of a functional network, and freezes it."""
    # Keras collects all garbage after each kernel that it takes away, seconds each time where a
    # backend is loaded: what is there now is out of its sight for so long.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # Keras names each layer that it leaves as it is.
            warnings.filterwarnings("ignore", message=".*quantiz")
            keras.Model.quantize(network, mode, type_check=False)
    finally:
        gc.unfreeze()
    network.trainable = False
