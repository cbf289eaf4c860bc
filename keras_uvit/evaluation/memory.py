"""What training takes of memory: estimates from a network's arguments, nothing is built."""

from typing import NamedTuple

import keras

from keras_uvit.networks.uvit import UViTConfig
from keras_uvit.types import Config


def state_memory(params: int, dtype: str = "float32") -> dict[str, int]:
    """Bytes that training holds for its weights, which are float32 in mixed precision too.

    Args:
        params: int, the network's weights.
        dtype: policy of the network.

    Returns:
        dict of ints: 20 bytes a weight in all; in mixed precision, with the copies that layers
        multiply by, 22.

    Example:
        >>> sum(state_memory(1000).values())
        20000
    """
    size = _size(dtype)
    state = {"weights": 4, "gradients": 4, "AdamW's two moments": 8, "moving average": 4}
    if size < 4:
        state["weights in half precision"] = size
    return {name: count * params for name, count in state.items()}


class Activations(NamedTuple):
    """Bytes that the backward pass needs of the forward pass."""

    tokens: int
    attention: int  # only where attention is not fused: on CPUs


def activation_memory(config: Config, batch_size: int = 1) -> Activations:
    """What a training step of a `UViT` keeps for its backward pass.

    For each token of a block, width D, MLP M, values of b bytes (float32 4, mixed precision 2):

        4 (2 D)        inputs of the norms, which are float32
        b (6 D + 2 M)  their outputs, query, key, value, output of attention, before and after GELU

    of a long skip b 2 D ("concat"), b D ("add_project") or nothing. Attention that is not fused
    keeps for each token its weights, 4 N L, in mixed precision 6 N L, and query and key in float32.
    With `remat` only the input of each block and "concat" is kept, b D.

    Embeddings, head, AdaLN, gates and norms beyond those two are left out. PyTorch keeps just
    this; what XLA makes of it on a CPU is up to half more.

    Args:
        config: dict, arguments of `UViT`, such as `network.get_config()` or a preset's `network`.
        batch_size: int, images on one device.

    Returns:
        `Activations`.

    Example:
        >>> kept = activation_memory(dict(image_shape=(32, 32, 4), remat=True))
        >>> kept.tokens == 19 * 257 * 512 * 4  # 13 blocks and 6 long skips, with a time token
        True
    """
    c = UViTConfig(**config)
    dim, blocks, length, size = c.hidden_dim, c.num_layers, c.num_tokens, _size(c.dtype)
    skips, count = blocks // 2, batch_size * length
    if c.remat:
        inputs = blocks + skips * (c.skip == "concat")
        return Activations(count * inputs * size * dim, 0)
    mlp_dim = c.mlp_dim or 4 * dim
    block = 4 * 2 * dim + size * (6 * dim + 2 * mlp_dim)
    skip = size * dim * {"concat": 2, "add_project": 1}.get(c.skip or "", 0)
    copies = 4 - size  # mixed precision: weights in both sizes; query and key in the larger one
    attention = c.num_heads * length * (4 + copies) + 2 * dim * copies
    return Activations(count * (blocks * block + skips * skip), count * blocks * attention)


def _size(dtype):
    """Bytes of a value that layers of this policy compute with."""
    return 4 if keras.dtype_policies.get(dtype).compute_dtype == "float32" else 2
