"""The Stable Diffusion autoencoder's files: the published program's names and diffusers'.

Channels come first there. The decoder's levels are stored lowest resolution last, so their index
runs backwards.
"""

import re
from collections.abc import Iterator

import keras

from keras_uvit.convert.layouts import Entry, Tensors, conv, norm

# Parts of the attention in diffusers' names.
ATTENTION_PARTS = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # before diffusers 0.13
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def entries(autoencoder: keras.Model) -> Iterator[Entry]:
    """(published name, Keras variable, layout) for every weight of an `AutoencoderKL`."""
    c = autoencoder.config
    levels = len(c["multipliers"])
    encoder, decoder = autoencoder.encoder.get_layer, autoencoder.decoder.get_layer
    yield from conv("encoder.conv_in", encoder("conv_in"))
    for i in range(levels):
        for j in range(c["num_res_blocks"]):
            yield from _block(f"encoder.down.{i}.block.{j}", encoder(f"block_{i}_{j}"))
        if i + 1 < levels:
            yield from conv(f"encoder.down.{i}.downsample.conv", encoder(f"downsample_{i}").conv)
    yield from _ends("encoder", encoder)
    yield from conv("quant_conv", encoder("quant_conv"))
    yield from conv("post_quant_conv", decoder("post_quant_conv"))
    yield from conv("decoder.conv_in", decoder("conv_in"))
    for i in reversed(range(levels)):
        for j in range(c["num_res_blocks"] + 1):
            yield from _block(f"decoder.up.{i}.block.{j}", decoder(f"block_{i}_{j}"))
        if i:
            yield from conv(f"decoder.up.{i}.upsample.conv", decoder(f"upsample_{i}").conv)
    yield from _ends("decoder", decoder)


def _ends(side, layer):
    yield from _block(f"{side}.mid.block_1", layer("mid_block_1"))
    attention = layer("mid_attention")
    yield from norm(f"{side}.mid.attn_1.norm", attention.norm)
    for name in ("q", "k", "v", "proj_out"):
        yield from conv(f"{side}.mid.attn_1.{name}", getattr(attention, name))
    yield from _block(f"{side}.mid.block_2", layer("mid_block_2"))
    yield from norm(f"{side}.norm_out", layer("norm_out"))
    yield from conv(f"{side}.conv_out", layer("conv_out"))


def _block(name, block):
    yield from norm(f"{name}.norm1", block.norm_1)
    yield from conv(f"{name}.conv1", block.conv_1)
    yield from norm(f"{name}.norm2", block.norm_2)
    yield from conv(f"{name}.conv2", block.conv_2)
    if block.shortcut is not None:
        yield from conv(f"{name}.nin_shortcut", block.shortcut)


def normalized(tensors: Tensors, network: keras.Model) -> Tensors:
    """diffusers' names to the published program's; others stay.

    Raises:
        ValueError: if two arrays of the file have the same place.
    """
    top = 1 + max((int(i) for i in re.findall(r"up_blocks\.(\d+)", " ".join(tensors))), default=-1)
    new = {}
    for name, a in tensors.items():
        published = _published(name, top)
        if published in new:
            raise ValueError(f"The file holds {published} under two names, one is {name}.")
        new[published] = _as_conv(name, a)
    return new


def _published(name, levels):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(
        r"mid_block\.attentions\.0\.(.+)\.(weight|bias)$",
        lambda m: f"mid.attn_1.{ATTENTION_PARTS.get(m[1], m[1])}.{m[2]}",
        name,
    )
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    return re.sub(
        r"up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)",
        lambda m: f"up.{levels - 1 - int(m[1])}." + (f"block.{m[3]}" if m[3] else "upsample"),
        name,
    )


def _as_conv(name, a):
    """diffusers' attention has matrices where the published program has 1x1 convolutions."""
    is_matrix = a.ndim == 2 and "attentions" in name and name.endswith("weight")
    return a[:, :, None, None] if is_matrix else a
