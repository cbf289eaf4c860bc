"""The published U-ViT checkpoints: their names, and where each array goes.

Channels come first there, and a linear layer stores (out, in). `depth` is `num_layers - 1`,
`num_classes` counts every row of the label table.
"""

from collections.abc import Iterator

import keras

from keras_uvit.convert.layouts import SAME, Entry, Layout, Tensors, conv, linear, norm

# (1, L, D) to (L, D); a file may have either.
POSITIONS = Layout(lambda a: a[0] if a.ndim == 3 else a, lambda a: a[None])


def entries(network: keras.Model) -> Iterator[Entry]:
    """(published name, Keras variable, layout) for every weight of a `UViT`.

    Raises:
        ValueError: if the network has a switch that no published checkpoint has.
    """
    c = network.config
    published: dict[str, tuple[object, ...]] = {"skip": ("concat", None), "time": ("token",)}
    published.update(
        position=("learned",), patch_embed=("linear",), qk_norm=(False,), skip_norm=(False,)
    )
    published.update(norm=("layer",), mlp=("gelu",), lora=(None,))
    published.update(output_conv=(True, False))
    used = {key: getattr(c, key) for key in published}
    other = {key: value for key, value in used.items() if value not in published[key]}
    if other:
        raise ValueError(
            f"Published checkpoints have none of {other}. Build the network with {published}."
        )
    layer = network.get_layer
    yield "pos_embed", layer("position").embeddings, POSITIONS
    yield "patch_embed.proj.weight", layer("patch_embed").proj.kernel, _patch_kernel(network)
    yield "patch_embed.proj.bias", layer("patch_embed").proj.bias, SAME
    if c.time_mlp:
        yield from linear("time_embed.0", layer("time_mlp_in"))
        yield from linear("time_embed.2", layer("time_mlp_out"))
    if c.num_classes is not None:
        yield "label_emb.weight", layer("label_embed").embeddings, SAME
    if c.context_shape:
        yield from linear("context_embed", layer("context_embed"))
    half = c.num_layers // 2
    for i in range(half):
        yield from _block(f"in_blocks.{i}", layer(f"in_block_{i}"))
    yield from _block("mid_block", layer("mid_block"))
    for i in range(half):
        yield from _block(f"out_blocks.{i}", layer(f"out_block_{i}"))
        if c.skip:
            yield from linear(f"out_blocks.{i}.skip_linear", layer(f"skip_{i}").proj)
    yield from norm("norm", layer("norm"))
    yield from linear("decoder_pred", layer("head"))
    if c.output_conv:
        yield from conv("final_layer", layer("output_conv"))


def normalized(tensors: Tensors, network: keras.Model) -> Tensors:
    """Published files have just these names."""
    return tensors


def _block(name, block):
    yield from norm(f"{name}.norm1", block.norm_1)
    yield from linear(f"{name}.attn.qkv", block.attention.qkv)
    yield from linear(f"{name}.attn.proj", block.attention.proj)
    yield from norm(f"{name}.norm2", block.norm_2)
    yield from linear(f"{name}.mlp.fc1", block.mlp_in)
    yield from linear(f"{name}.mlp.fc2", block.mlp_out)


def _patch_kernel(network):
    """(D, C, P, P) of a convolution to (P P C, D) of a dense layer on (row, column, channel)."""
    patch, channels = network.config.patch_size, network.image_shape[-1]

    def to_keras(a):
        if a.shape[1:] != (channels, patch, patch):
            raise ValueError("another patch size or number of channels")
        return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

    def to_torch(a):
        return a.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)

    return Layout(to_keras, to_torch)
