"""The ten published U-ViT checkpoints: every array has a place in its preset, and only there.

The files themselves are not needed: their names and shapes follow from the published program's
constructor, written down here a second time. Each array is one number repeated, so that ten files
of 1 GB and 90 wrong pairs take no memory, and an array in a wrong place is seen by its number.
"""

import functools
import json
import re
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_uvit import UViT, convert, presets
from keras_uvit.convert import load_torch_weights, uvit

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"

# The configurations of the published program, in its names. `num_classes` counts every row of the
# label table, the last of them "no label" where the model was trained for guidance.
COCO = {"img_size": 32, "patch_size": 2, "in_chans": 4, "clip_dim": 768, "num_clip_token": 77}
CHECKPOINTS = {
    "uvit_small_cifar10": {"img_size": 32, "patch_size": 2, "embed_dim": 512, "depth": 12},
    "uvit_small_celeba64": {"img_size": 64, "patch_size": 4, "embed_dim": 512, "depth": 12},
    "uvit_mid_imagenet64": {
        "img_size": 64, "patch_size": 4, "embed_dim": 768, "depth": 16, "num_classes": 1000,
    },
    "uvit_large_imagenet64": {
        "img_size": 64, "patch_size": 4, "embed_dim": 1024, "depth": 20, "num_classes": 1000,
    },
    "uvit_large_imagenet256": {
        "img_size": 32, "patch_size": 2, "in_chans": 4, "embed_dim": 1024, "depth": 20,
        "num_classes": 1001,
    },
    "uvit_huge_imagenet256": {
        "img_size": 32, "patch_size": 2, "in_chans": 4, "embed_dim": 1152, "depth": 28,
        "num_classes": 1001, "conv": False,
    },
    "uvit_large_imagenet512": {
        "img_size": 64, "patch_size": 4, "in_chans": 4, "embed_dim": 1024, "depth": 20,
        "num_classes": 1001,
    },
    "uvit_huge_imagenet512": {
        "img_size": 64, "patch_size": 4, "in_chans": 4, "embed_dim": 1152, "depth": 28,
        "num_classes": 1001, "conv": False,
    },
    "uvit_small_coco": {**COCO, "embed_dim": 512, "depth": 12},
    "uvit_small_deep_coco": {**COCO, "embed_dim": 512, "depth": 16},
}  # fmt: skip
PAIRS = [(file, preset) for file in CHECKPOINTS for preset in CHECKPOINTS if file != preset]


def _shapes(
    img_size, patch_size, embed_dim, depth, in_chans=3, num_classes=-1, clip_dim=None,
    num_clip_token=0, conv=True,
):  # fmt: skip
    """{name: shape}, in the order of the published program's state dict."""
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
    shapes = _shapes(**CHECKPOINTS[name])
    numbers = _numbers(shapes)
    return {k: np.broadcast_to(numbers[k].astype("float32"), shape) for k, shape in shapes.items()}


def _write(path, name):
    """A file of the checkpoint's names and shapes, a few kilobytes long."""
    shapes = _shapes(**CHECKPOINTS[name])
    torch.save(
        {k: torch.full((1,), float(a), dtype=torch.float16).reshape((1,) * len(shapes[k]))
         .expand(shapes[k]) for k, a in _numbers(shapes).items()},
        path,
    )  # fmt: skip
    return path


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
def test_the_list_of_published_names_is_the_golden_files(name):
    case = json.loads((GOLDEN / "cases.json").read_text())[name]
    case = {k: v for k, v in case.items() if k not in ("kind", "params", "num_heads")}
    stored = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    assert list(_shapes(**case).items()) == [(k, tuple(a.shape)) for k, a in stored.items()]


def test_every_published_preset_is_here():
    rows = {name for name in presets.names() if presets.get(name).reported_fid is not None}
    assert {name for name in rows if name.startswith("uvit_")} == set(CHECKPOINTS)


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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_published_heads_divide_the_width(name):
    # Heads leave no trace in a file; the published models have 64 numbers each, Huge 72.
    row, width = presets.get(name).network, CHECKPOINTS[name]["embed_dim"]
    assert width // row["num_heads"] == (72 if "huge" in name else 64)


@pytest.mark.parametrize(("file", "preset"), PAIRS, ids=lambda name: name.removeprefix("uvit_"))
def test_a_file_in_another_preset_is_refused_with_every_key_that_differs(file, preset):
    stored, expected = _shapes(**CHECKPOINTS[file]), _shapes(**CHECKPOINTS[preset])
    with pytest.raises(ValueError, match=r"^w\.pth does not fit this network") as error:
        convert._matched(list(uvit.entries(_network(preset))), _tensors(file), "w.pth")
    message = str(error.value)
    missing, extra = sorted(expected.keys() - stored), sorted(stored.keys() - expected)
    assert (f"missing: {missing}" in message) == bool(missing)
    assert (f"extra: {extra}" in message) == bool(extra)
    wrong = {key for key in stored.keys() & expected if stored[key] != expected[key]}
    assert set(re.findall(r"wrong shape: (\S+) is", message)) == wrong
    assert missing or extra or wrong


# Whole files --------------------------------------------------------------------------------------


def test_a_synthetic_file_takes_no_room_and_has_the_published_shapes(tmp_path):
    path = _write(tmp_path / "imagenet256_uvit_huge.pth", "uvit_huge_imagenet256")
    assert path.stat().st_size < 500_000
    stored = torch.load(path, weights_only=True)
    shapes = _shapes(**CHECKPOINTS["uvit_huge_imagenet256"])
    assert {k: tuple(a.shape) for k, a in stored.items()} == shapes
    assert {a.dtype for a in stored.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("file", "preset", "message"),
    [
        ("uvit_small_coco", "uvit_small_deep_coco", r"missing: \['in_blocks\.6\.attn\.proj\.bias'"),
        ("uvit_small_deep_coco", "uvit_small_coco", r"extra: \['in_blocks\.6\.attn\.proj\.bias'"),
        ("uvit_small_coco", "uvit_small_cifar10", r"extra: \['context_embed\.bias'"),
        ("uvit_small_cifar10", "uvit_small_celeba64", r"wrong shape: patch_embed\.proj\.weight"),
    ],
    ids=["too few blocks", "too many blocks", "text", "another patch size"],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, file, preset, message):
    path = _write(tmp_path / f"{file}.pth", file)
    with pytest.raises(ValueError, match=rf"^{file}\.pth does not fit this network.*{message}"):
        load_torch_weights(_network(preset), path)


def _as_published(variable, channels):
    """A weight as the published program would have it."""
    value, name = ops.convert_to_numpy(variable), _published_name(variable)
    if name == "pos_embed":
        return value[None]
    if name == "patch_embed.proj.weight":  # (row, column, channel) to (channel, row, column)
        size = round((len(value) / channels) ** 0.5)
        return np.moveaxis(value.reshape(size, size, channels, -1), (3, 2), (0, 1))
    if value.ndim == 4:
        return np.moveaxis(value, (3, 2), (0, 1))
    return value.T if value.ndim == 2 and "emb.weight" not in name else value


def test_cifar10_is_loaded_value_by_value(tmp_path):
    generator, path = torch.Generator().manual_seed(0), tmp_path / "cifar10_uvit_small.pth"
    tensors = {
        name: torch.randn(shape, generator=generator).half()
        for name, shape in _shapes(**CHECKPOINTS["uvit_small_cifar10"]).items()
    }
    torch.save(tensors, path)
    model = presets.load("uvit_small_cifar10", weights=path)
    for network in (model.network, model.ema_network):
        assert len(network.weights) == len(tensors)
        for variable in network.weights:
            expected = tensors[_published_name(variable)].float().numpy()
            np.testing.assert_array_equal(_as_published(variable, channels=3), expected)


def test_coco_is_loaded_number_by_number(tmp_path):
    path = _write(tmp_path / "mscoco_uvit_small.pth", "uvit_small_coco")
    model = presets.load("uvit_small_coco", weights=str(path))
    shapes = _shapes(**CHECKPOINTS["uvit_small_coco"])
    for network in (model.network, model.ema_network):
        assert len(network.weights) == len(shapes)
        for variable in network.weights:
            name, value = _published_name(variable), _as_published(variable, channels=4)
            assert value.shape == shapes[name]
            assert (value == _numbers(shapes)[name]).all(), name
