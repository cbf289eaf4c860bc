"""A U-ViT in two parts: the outer blocks, and the middle that they enclose."""

import keras

from keras_uvit.checks import as_int


def with_middle(network, outer_blocks):
    """`network`, and what its middle hands to the last `outer_blocks` deep blocks.

    Long skips let those blocks see the input through the first blocks too, so what the middle
    adds changes slowly from one sampling step to the next, and may be kept: DeepCache, Ma et al.
    2023, arXiv 2312.00858, for U-Nets.

    Args:
        network: `UViT` with long skips.
        outer_blocks: int in [1, num_layers // 2].

    Returns:
        Two Keras models of `network`'s own layers: `whole(inputs) -> (output, middle)` and
        `outer((inputs, middle)) -> output`, middle `(B, L, D)`.
    """
    middle = network.get_layer(f"skip_{_first_skip(network, outer_blocks)}").input[0]
    whole = keras.Model(network.input, (network.output, middle))
    outer = keras.Model((network.input, middle), network.output)
    return whole, outer


def check_outer_blocks(network, outer_blocks):
    """Raises a ValueError unless `with_middle` can be had."""
    config = getattr(network, "config", {})
    half = config.get("num_layers", 0) // 2
    if not half or config.get("skip") is None:
        raise ValueError(
            "middle_every needs a U-ViT with long skips (skip is not None, num_layers >= 3): they "
            "join what is kept with what is new. Leave middle_every out."
        )
    if not 1 <= as_int(outer_blocks, "outer_blocks", 0) <= half:
        raise ValueError(
            f"outer_blocks counts the blocks on each side that always run: 1 to {half} here. "
            f"Received: {outer_blocks!r}."
        )


def _first_skip(network, outer_blocks):
    return network.config["num_layers"] // 2 - outer_blocks
