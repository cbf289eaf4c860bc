"""Checkpoints written here: what was read comes back bit by bit, and the published names."""

import errno
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
import torch
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.convert import load_torch_weights, save_torch_weights
from keras_uvit.convert.files import read_tensors, write_tensors
from keras_uvit.encoders import AutoencoderKL

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"hidden_dim": 16, "num_layers": 3, "num_heads": 2}
UVITS = {
    "unconditional": {"image_shape": (4, 4, 3)},
    "label": {"image_shape": (4, 8, 3), "num_classes": 5},
    "text": {"image_shape": (4, 4, 3), "context_shape": (3, 10)},
    "time_mlp": {"image_shape": (4, 4, 3), "time_mlp": True},
    "qkv_bias": {"image_shape": (4, 4, 3), "qkv_bias": True},
    "no output_conv": {"image_shape": (4, 4, 3), "output_conv": False},
    "no skip": {"image_shape": (4, 4, 3), "skip": None},
    "all at once": {
        "image_shape": (8, 4, 2), "patch_size": 4, "num_classes": 5, "null_label": False,
        "context_shape": (3, 10), "time_mlp": True, "qkv_bias": True, "output_conv": False,
        "mlp_dim": 24,
    },
}  # fmt: skip
# The golden checkpoints' networks.
PUBLISHED = {
    "uvit_uncond": {"image_shape": (8, 8, 3), "num_heads": 4, "hidden_dim": 48},
    "uvit_class": {
        "image_shape": (16, 16, 4), "patch_size": 4, "num_heads": 3, "hidden_dim": 48,
        "num_classes": 10, "output_conv": False,
    },
    "uvit_text": {
        "image_shape": (8, 8, 4), "num_heads": 4, "hidden_dim": 32, "context_shape": (7, 24),
    },
}  # fmt: skip
FORMATS = ["w.pth", "w.safetensors"]


def _randomize(network, seed=0):
    """Every weight another one: equal ones (norms, biases) could be mixed up unseen."""
    rng = np.random.default_rng(seed)
    network.set_weights([rng.standard_normal(w.shape, "float32") for w in network.weights])
    return network


def _uvit(seed=0, **arguments):
    return _randomize(UViT(**{**SMALL, **arguments}), seed)


def _assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def _written(network, path):
    save_torch_weights(network, path)
    return torch.load(path, weights_only=True)


# There and back -----------------------------------------------------------------------------------


def _assert_comes_back(network, path):
    for i, name in enumerate(FORMATS):
        saved = [np.array(w) for w in _randomize(network, seed=2 * i).get_weights()]
        save_torch_weights(network, path / name)
        _assert_equal(network.get_weights(), saved)  # saving changes nothing
        _randomize(network, seed=2 * i + 1)
        assert not np.array_equal(network.get_weights()[0], saved[0])
        load_torch_weights(network, path / name)
        _assert_equal(network.get_weights(), saved)
        assert sorted(os.listdir(path)) == FORMATS[: i + 1]  # nothing beside them


@pytest.mark.parametrize("case", UVITS)
def test_a_uvit_comes_back_exactly(tmp_path, case):
    _assert_comes_back(UViT(**{**SMALL, **UVITS[case]}), tmp_path)


@pytest.mark.parametrize("change", [{}, {"image_channels": 1, "latent_channels": 3}], ids=str)
def test_an_autoencoder_comes_back_exactly(tmp_path, change):
    arguments = {"base_dim": 32, "multipliers": (1, 2), "num_res_blocks": 1, **change}
    _assert_comes_back(AutoencoderKL(**arguments), tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_the_moving_average_of_a_diffusion_model_is_written(tmp_path, name):
    saved, loaded = (DiffusionModel(_uvit(seed, image_shape=(4, 4, 3))) for seed in (1, 2))
    average = _randomize(saved.ema_network, seed=3).get_weights()
    network = [np.array(w) for w in saved.network.get_weights()]
    save_torch_weights(saved, tmp_path / name)
    load_torch_weights(loaded, tmp_path / name)
    _assert_equal(loaded.network.get_weights(), average)
    _assert_equal(loaded.ema_network.get_weights(), average)
    assert not np.array_equal(network[0], average[0])
    _assert_equal(saved.network.get_weights(), network)  # saving changes nothing
    _assert_equal(saved.ema_network.get_weights(), average)


@pytest.mark.parametrize("name", FORMATS)
def test_a_diffusion_model_and_its_average_write_the_same_file(tmp_path, name):
    model = DiffusionModel(_uvit(image_shape=(4, 4, 3), num_classes=3))
    _randomize(model.ema_network, seed=3)
    save_torch_weights(model, tmp_path / name)
    save_torch_weights(model.ema_network, tmp_path / f"ema_{name}")
    first, second = (read_tensors(tmp_path / file) for file in (name, f"ema_{name}"))
    assert list(first) == list(second)
    _assert_equal(first.values(), second.values())


def test_both_formats_and_every_ending_hold_the_same(tmp_path):
    network = _uvit(**UVITS["label"])
    files = [tmp_path / f"w{e}" for e in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")]
    for path in files:
        save_torch_weights(network, str(path))
    first, *others = (read_tensors(path) for path in files)
    for other in others:
        assert other.keys() == first.keys()
        _assert_equal(other.values(), [first[name] for name in other])


# As the published program writes it ---------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_golden_checkpoint_is_written_as_it_was(tmp_path, name):
    network = UViT(**{**SMALL, "num_layers": 5, **PUBLISHED[name]})
    load_torch_weights(network, GOLDEN / f"{name}.pth")
    ours = _written(network, tmp_path / "w.pth")
    theirs = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    assert list(ours) == list(theirs)  # the order is theirs too
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert ours[key].shape == value.shape
        assert ours[key].is_contiguous()
        assert torch.equal(ours[key].view(torch.int32), value.view(torch.int32)), key  # every bit


def test_the_golden_autoencoder_is_written_as_it_was(tmp_path):
    arguments = {"base_dim": 32, "multipliers": (1, 1, 2, 2), "num_res_blocks": 1}
    network = AutoencoderKL.from_file(GOLDEN / "autoencoder_kl.pth", **arguments)
    ours = _written(network, tmp_path / "w.pth")
    theirs = torch.load(GOLDEN / "autoencoder_kl.pth", weights_only=True)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == torch.float32  # stored as float16, which float32 holds exactly
        assert torch.equal(ours[key].half(), value), key
        assert torch.equal(ours[key], value.float()), key


def test_the_published_programs_reader_takes_the_file(tmp_path):
    """`torch.load` and a strict `load_state_dict`, here of the shapes of a linear layer."""
    network = _uvit(image_shape=(4, 4, 3))
    tensors = _written(network, tmp_path / "w.pth")
    module = torch.nn.Linear(16, 48, bias=False)
    module.load_state_dict({"weight": tensors["in_blocks.0.attn.qkv.weight"]})
    x = np.random.default_rng(0).standard_normal((2, 16), "float32")
    ours = network.get_layer("in_block_0").attention.qkv(x)
    with torch.no_grad():
        theirs = module(torch.tensor(x)).numpy()
    # Float32 sums of 16 terms of size 1.
    np.testing.assert_allclose(ops.convert_to_numpy(ours), theirs, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_weights_come_back_exactly(tmp_path, name):
    # What a network of dtype="bfloat16" has.
    a = ops.convert_to_numpy(ops.cast(ops.arange(24, dtype="float32"), "bfloat16"))
    write_tensors({"a": a}, tmp_path / name)
    np.testing.assert_array_equal(read_tensors(tmp_path / name)["a"], np.arange(24))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "switch",
    [
        {"skip": "add"},
        {"skip": "add_project"},
        {"skip": "project_sum"},
        {"time": "adaln"},
        {"position": "sinusoidal"},
        {"position": None},
        {"patch_embed": "conv"},
        {"qk_norm": True},
        {"skip_norm": True},
        {"position": "rotary"},
        {"norm": "rms"},
        {"mlp": "swiglu"},
    ],
    ids=str,
)
def test_a_network_without_a_published_form_is_not_written(tmp_path, switch, name):
    network = UViT((4, 4, 3), **SMALL, **switch)
    ((key, value),) = switch.items()
    message = f"Published checkpoints have none of.*{key}.*{value}"
    with pytest.raises(ValueError, match=message):
        save_torch_weights(network, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        save_torch_weights(DiffusionModel(network), tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("act", [save_torch_weights, load_torch_weights])
@pytest.mark.parametrize(
    "network", [lambda: keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), dict]
)
def test_a_network_nobody_published_is_named(tmp_path, network, act):
    path, network = tmp_path / "w.pth", network()
    expected = rf"There are published weights for \['UViT',.*Received: {type(network).__name__}"
    with pytest.raises(TypeError, match=expected):
        act(network, path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["w.npz", "w.h5", "w.weights.h5", "w", "w.pth.gz", "pth"])
def test_another_ending_is_refused_with_those_that_are_written(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}: unknown kind.*\.safetensors.*\.pth"):
        save_torch_weights(_uvit(image_shape=(4, 4, 3)), tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_folder_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="missing.*no folder"):
        save_torch_weights(_uvit(image_shape=(4, 4, 3)), tmp_path / "missing" / name)


# Writing that fails -------------------------------------------------------------------------------


def _full_disk(*args, **kwargs):
    path = next(a for a in args if isinstance(a, str | os.PathLike))
    Path(path).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("existing", [None, b"what was there"])
@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("w.pth", torch, "save"), ("w.safetensors", safetensors.numpy, "save_file")],
)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, name, module, function, existing):
    if existing:
        (tmp_path / name).write_bytes(existing)
    monkeypatch.setattr(module, function, _full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_torch_weights(_uvit(image_shape=(4, 4, 3)), tmp_path / name)
    assert os.listdir(tmp_path) == ([name] if existing else [])
    if existing:
        assert (tmp_path / name).read_bytes() == existing


@pytest.mark.parametrize("name", FORMATS)
def test_an_interrupted_rename_leaves_what_was_there(tmp_path, monkeypatch, name):
    def interrupted(source, target):
        assert Path(source).stat().st_size > 1000  # all is written by then
        assert Path(source).parent == Path(target).parent  # so that renaming is atomic
        raise KeyboardInterrupt

    (tmp_path / name).write_bytes(b"what was there")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_torch_weights(_uvit(image_shape=(4, 4, 3)), tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"what was there"


@pytest.mark.parametrize("name", FORMATS)
def test_an_existing_file_is_replaced(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 100_000)
    network = _uvit(image_shape=(4, 4, 3))
    save_torch_weights(network, tmp_path / name)
    loaded = _uvit(seed=1, image_shape=(4, 4, 3))
    load_torch_weights(loaded, tmp_path / name)
    _assert_equal(loaded.get_weights(), network.get_weights())


def test_arrays_of_any_memory_order_are_written_in_theirs(tmp_path):
    a = np.arange(24, dtype="float32").reshape(2, 3, 4)
    for name in FORMATS:
        write_tensors({"a": a.transpose(2, 0, 1), "b": a[:, ::-1, ::2]}, tmp_path / name)
        read = read_tensors(tmp_path / name)
        np.testing.assert_array_equal(read["a"], a.transpose(2, 0, 1))
        np.testing.assert_array_equal(read["b"], a[:, ::-1, ::2])


# The file and the network are apart ---------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_changes_after_loading_does_not_change_the_network(tmp_path, name):
    path, network = tmp_path / name, _uvit(image_shape=(4, 4, 3))
    save_torch_weights(network, path)
    load_torch_weights(network, path)
    loaded = [np.array(w) for w in network.get_weights()]
    with open(path, "r+b") as file:  # in place, as a copy or a download to the same name does
        file.write(bytes(path.stat().st_size))
    _assert_equal(network.get_weights(), loaded)
