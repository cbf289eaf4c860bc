"""The ten published U-ViT checkpoints: every array has a place in its preset, and only there.

The files themselves are not needed: their names and shapes follow from the published program's
constructor, written down here a second time. Each array is one number repeated, so that ten files
of 1 GB and 90 wrong pairs take no memory, and an array in a wrong place is seen by its number.
"""

import functools
import re
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from tiny import numpy, refused

from keras_uvit import UViT, convert, presets
from keras_uvit.convert import uvit

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"

CHECKPOINTS = [
    name
    for name in presets.names()
    if name.startswith("uvit_") and presets.get(name).reported_fid is not None
]


def _shapes(name):
    """Of a checkpoint; presets/test_presets.py compares the sizes with the paper's."""
    default = dict(num_classes=None, null_label=True, context_shape=None, output_conv=True)
    c = {**default, **presets.get(name).network}
    tokens, width = c["context_shape"] or (0, None)
    rows = -1 if c["num_classes"] is None else c["num_classes"] + c["null_label"]
    return _published_shapes(
        img_size=c["image_shape"][0],
        patch_size=c["patch_size"],
        embed_dim=c["hidden_dim"],
        depth=c["num_layers"] - 1,
        in_chans=c["image_shape"][2],
        num_classes=rows,
        clip_dim=width,
        num_clip_token=tokens,
        conv=c["output_conv"],
    )


def _published_shapes(
    img_size, patch_size, embed_dim, depth, in_chans=3, num_classes=-1, clip_dim=None,
    num_clip_token=0, conv=True,
):  # fmt: skip
    """{name: shape}, in the order of the published program's state dict, by its own arguments.

    `num_classes` counts every row of the label table, the last of them "no label" where the model
    was trained for guidance.
    """
    d, extras = embed_dim, 1 + (num_classes > 0) + num_clip_token

    def linear(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name):
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    def block(name, skip=False):
        return {
            **norm(f"{name}.norm1"),
            f"{name}.attn.qkv.weight": (3 * d, d),
            **linear(f"{name}.attn.proj", d, d),
            **norm(f"{name}.norm2"),
            **linear(f"{name}.mlp.fc1", 4 * d, d),
            **linear(f"{name}.mlp.fc2", d, 4 * d),
            **(linear(f"{name}.skip_linear", d, 2 * d) if skip else {}),
        }

    shapes = {
        "pos_embed": (1, extras + (img_size // patch_size) ** 2, d),
        "patch_embed.proj.weight": (d, in_chans, patch_size, patch_size),
        "patch_embed.proj.bias": (d,),
    }
    if num_classes > 0:
        shapes["label_emb.weight"] = (num_classes, d)
    if clip_dim:
        shapes |= linear("context_embed", d, clip_dim)
    for i in range(depth // 2):
        shapes |= block(f"in_blocks.{i}")
    shapes |= block("mid_block")
    for i in range(depth // 2):
        shapes |= block(f"out_blocks.{i}", skip=True)
    shapes |= norm("norm") | linear("decoder_pred", patch_size**2 * in_chans, d)
    if conv:
        shapes |= {
            "final_layer.weight": (in_chans, in_chans, 3, 3),
            "final_layer.bias": (in_chans,),
        }
    return shapes


def _numbers(shapes):
    """{name: its number}, exact in float16."""
    return {name: np.float16(i + 1) for i, name in enumerate(shapes)}


def _tensors(name):
    """What a reader makes of a checkpoint, without its memory."""
    shapes = _shapes(name)
    numbers = _numbers(shapes)
    return {k: np.broadcast_to(numbers[k].astype("float32"), shape) for k, shape in shapes.items()}


@functools.cache
def _network(name):
    """A preset's network, names and shapes only."""
    with keras.StatelessScope(initialize_variables=False):
        return UViT(**presets.get(name).network)


# Published names of the parts of a weight's path in the network.
PARTS = {
    "position/embeddings": "pos_embed",
    "label_embed/embeddings": "label_emb.weight",
    "output_conv/": "final_layer/",
    "head/": "decoder_pred/",
    "norm_1/": "norm1/",
    "norm_2/": "norm2/",
    "attention/": "attn/",
    "mlp_in/": "mlp/fc1/",
    "mlp_out/": "mlp/fc2/",
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
}


def _published_name(variable):
    path = re.sub(r"skip_(\d+)/proj/", r"out_blocks.\1/skip_linear/", variable.path)
    path = re.sub(r"(in|out)_block_(\d+)/", r"\1_blocks.\2/", path)
    for ours, theirs in PARTS.items():
        path = path.replace(ours, theirs)
    return path.replace("/", ".")


@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_class", "uvit_text"])
def test_the_list_of_published_names_is_the_golden_files(golden_cases, name):
    case = {k: v for k, v in golden_cases[name].items() if k not in ("kind", "params", "num_heads")}
    stored = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    assert list(_published_shapes(**case).items()) == [
        (k, tuple(a.shape)) for k, a in stored.items()
    ]


# Files and their presets --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_array_has_its_place_and_every_weight_its_array(name):
    network, tensors = _network(name), _tensors(name)
    entries = list(uvit.entries(network))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no positions are resized
        matched = convert._matched(entries, tensors, "w.pth")
    assert len(matched) == len(entries) == len(tensors) == len(network.weights)
    assert {id(variable) for variable, _ in matched} == {id(w) for w in network.weights}
    numbers = _numbers(tensors)
    for variable, value in matched:
        assert tuple(value.shape) == tuple(variable.shape)
        assert value.flat[0] == value.flat[-1] == numbers[_published_name(variable)], variable.path
    assert sum(a.size for a in tensors.values()) == presets.get(name).params


@pytest.mark.parametrize("preset", CHECKPOINTS)
def test_a_file_in_another_preset_is_refused_with_every_key_that_differs(preset):
    expected, entries = _shapes(preset), list(uvit.entries(_network(preset)))
    for file in {*CHECKPOINTS} - {preset}:
        stored, tensors = _shapes(file), _tensors(file)
        words = "w.pth does not fit this network"
        match = functools.partial(convert._matched, entries, tensors, "w.pth")
        message = refused(ValueError, match, words)
        missing, extra = sorted(expected.keys() - stored), sorted(stored.keys() - expected)
        assert (f"missing: {missing}" in message) == bool(missing)
        assert (f"extra: {extra}" in message) == bool(extra)
        wrong = {key for key in stored.keys() & expected if stored[key] != expected[key]}
        assert set(re.findall(r"wrong shape: (\S+) is", message)) == wrong
        assert missing or extra or wrong


# Whole files --------------------------------------------------------------------------------------


def _as_published(variable, channels):
    """A weight as the published program would have it."""
    value, name = numpy(variable), _published_name(variable)
    if name == "pos_embed":
        return value[None]
    if name == "patch_embed.proj.weight":  # (row, column, channel) to (channel, row, column)
        size = round((len(value) / channels) ** 0.5)
        return np.moveaxis(value.reshape(size, size, channels, -1), (3, 2), (0, 1))
    if value.ndim == 4:
        return np.moveaxis(value, (3, 2), (0, 1))
    return value.T if value.ndim == 2 and "emb.weight" not in name else value


def test_a_whole_file_is_loaded_value_by_value(tmp_path):
    generator, path = torch.Generator().manual_seed(0), tmp_path / "mscoco_uvit_small.pth"
    tensors = {
        name: torch.randn(shape, generator=generator).half()
        for name, shape in _shapes("uvit_small_coco").items()
    }
    torch.save(tensors, path)
    model = presets.load("uvit_small_coco", weights=path)
    for network in (model.network, model.ema_network):
        assert len(network.weights) == len(tensors)
        for variable in network.weights:
            name, value = _published_name(variable), _as_published(variable, channels=4)
            np.testing.assert_array_equal(value, tensors[name].float().numpy(), err_msg=name)
