"""The published U-ViT checkpoints: their names, and where each array goes.

Channels come first there, and a linear layer stores (out, in). `depth` is `num_layers - 1`,
`num_classes` counts every row of the label table.
"""

import warnings

import numpy as np
from keras import ops


def entries(network):
    """(published name, Keras variable, how to turn the array) for every weight of a `UViT`.

    Raises:
        ValueError: if the network has a switch that no published checkpoint has.
    """
    c = network.config
    published = {"skip": ("concat", None), "time": ("token",), "position": ("learned",)}
    published["patch_embed"] = ("linear",)
    other = {key: c[key] for key, allowed in published.items() if c[key] not in allowed}
    if other:
        raise ValueError(
            f"Published checkpoints have none of {other}. Build the network with {published}."
        )
    layer = network.get_layer
    yield "pos_embed", layer("position").embeddings, _positions(network)
    yield "patch_embed.proj.weight", layer("patch_embed").proj.kernel, _patch_kernel(network)
    yield "patch_embed.proj.bias", layer("patch_embed").proj.bias, _same
    if c["time_mlp"]:
        yield from _linear("time_embed.0", layer("time_mlp_in"))
        yield from _linear("time_embed.2", layer("time_mlp_out"))
    if c["num_classes"] is not None:
        yield "label_emb.weight", layer("label_embed").embeddings, _same
    if c["context_shape"]:
        yield from _linear("context_embed", layer("context_embed"))
    half = c["num_layers"] // 2
    for i in range(half):
        yield from _block(f"in_blocks.{i}", layer(f"in_block_{i}"))
    yield from _block("mid_block", layer("mid_block"))
    for i in range(half):
        yield from _block(f"out_blocks.{i}", layer(f"out_block_{i}"))
        if c["skip"]:
            yield from _linear(f"out_blocks.{i}.skip_linear", layer(f"skip_{i}").proj)
    yield from _norm("norm", layer("norm"))
    yield from _linear("decoder_pred", layer("head"))
    if c["output_conv"]:
        conv = layer("output_conv")
        yield "final_layer.weight", conv.kernel, lambda a: a.transpose(2, 3, 1, 0)
        yield "final_layer.bias", conv.bias, _same


def _block(name, block):
    yield from _norm(f"{name}.norm1", block.norm_1)
    yield from _linear(f"{name}.attn.qkv", block.attention.qkv)
    yield from _linear(f"{name}.attn.proj", block.attention.proj)
    yield from _norm(f"{name}.norm2", block.norm_2)
    yield from _linear(f"{name}.mlp.fc1", block.mlp_in)
    yield from _linear(f"{name}.mlp.fc2", block.mlp_out)


def _linear(name, dense):
    yield f"{name}.weight", dense.kernel, np.transpose
    if dense.use_bias:
        yield f"{name}.bias", dense.bias, _same


def _norm(name, norm):
    yield f"{name}.weight", norm.gamma, _same
    yield f"{name}.bias", norm.beta, _same


def _same(a):
    return a


def _patch_kernel(network):
    """(D, C, P, P) of a convolution to (P P C, D) of a dense layer on (row, column, channel)."""
    patch, channels = network.config["patch_size"], network.image_shape[-1]

    def turn(a):
        if a.shape[1:] != (channels, patch, patch):
            raise ValueError("another patch size or number of channels")
        return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

    return turn


def _positions(network):
    """(1, L, D) to (L, D); patch positions of another, square size are resized, with a warning."""
    height, width, _ = network.image_shape
    patch = network.config["patch_size"]
    grid = (height // patch, width // patch)
    extras = network.get_layer("position").embeddings.shape[0] - grid[0] * grid[1]

    def turn(a):
        a = a[0] if a.ndim == 3 else a
        old = round((len(a) - extras) ** 0.5) if len(a) > extras else 0
        if (old, old) == grid or old**2 != len(a) - extras:
            return a  # fits, or no square grid: the caller compares shapes
        warnings.warn(
            f"Position embeddings resized from {old}x{old} to {grid[0]}x{grid[1]} patches; quality "
            "at a size the network was not trained for is not promised.",
            stacklevel=2,
        )
        patches = a[extras:].reshape(1, old, old, -1)
        patches = ops.image.resize(patches, grid, "bilinear", data_format="channels_last")
        patches = ops.convert_to_numpy(patches).reshape(grid[0] * grid[1], -1)
        return np.concatenate([a[:extras], patches])

    return turn
