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
from published import CASES, GOLDEN, network_of
from tiny import assert_equal, randomize, refused, uvit

from keras_uvit import DiffusionModel
from keras_uvit.convert import load_torch_weights, save_torch_weights
from keras_uvit.convert.files import read_tensors, write_tensors
from keras_uvit.encoders import AutoencoderKL

pytestmark = pytest.mark.once

FORMATS = ["w.pth", "w.safetensors"]
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def _copy(network):
    return [np.array(w) for w in network.get_weights()]


# There and back -----------------------------------------------------------------------------------

NETWORKS = {
    "label": lambda: uvit(image_shape=(4, 8, 3), num_layers=3, num_classes=5),
    "no skip": lambda: uvit(num_layers=3, skip=None),
    "all at once": lambda: uvit(
        image_shape=(8, 4, 2), patch_size=4, num_layers=3, num_classes=5, null_label=False,
        context_shape=(3, 10), time_mlp=True, qkv_bias=True, output_conv=False, mlp_dim=24,
    ),
    "autoencoder": lambda: AutoencoderKL(32, (1, 2), 1, image_channels=1, latent_channels=3),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_exactly(tmp_path, name):
    network, other = randomize(NETWORKS[name]()), NETWORKS[name]()
    saved = _copy(network)
    for k, file in enumerate(FORMATS):
        (tmp_path / file).write_bytes(b"x" * 100_000)  # which is replaced
        save_torch_weights(network, tmp_path / file)
        assert_equal(network.get_weights(), saved)  # saving changes nothing
        randomize(other, scale=1 + k)
        load_torch_weights(other, tmp_path / file)
        assert_equal(other.get_weights(), saved)
        assert sorted(os.listdir(tmp_path)) == FORMATS[: k + 1]  # nothing beside them


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_diffusion_model_the_moving_average_is_written(tmp_path, name):
    saved, loaded = DiffusionModel(uvit(num_classes=3)), DiffusionModel(uvit(num_classes=3))
    randomize(saved.ema_network)
    network, average = _copy(saved.network), _copy(saved.ema_network)
    save_torch_weights(saved, tmp_path / name)
    load_torch_weights(loaded, tmp_path / name)
    for found in (loaded.network, loaded.ema_network, saved.ema_network):
        assert_equal(found.get_weights(), average)
    assert_equal(saved.network.get_weights(), network)  # saving changes nothing
    save_torch_weights(saved.ema_network, tmp_path / f"ema_{name}")
    first, second = (read_tensors(tmp_path / file) for file in (name, f"ema_{name}"))
    assert list(first) == list(second)
    assert_equal(first.values(), second.values())


def test_every_ending_holds_arrays_of_any_type_and_order_of_memory(tmp_path):
    a = np.arange(24, dtype="float32").reshape(2, 3, 4)
    half = ops.convert_to_numpy(ops.cast(a, "bfloat16"))  # a network of dtype="bfloat16" has these
    tensors = {"a": a.transpose(2, 0, 1), "b": a[:, ::-1, ::2], "c": half}
    for ending in ENDINGS:
        write_tensors(tensors, str(tmp_path / f"w{ending}"))
        read = read_tensors(tmp_path / f"w{ending}")
        assert_equal([read[name] for name in "abc"], [tensors["a"], tensors["b"], a])


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_changes_after_loading_does_not_change_the_network(tmp_path, name):
    path, network = tmp_path / name, randomize(uvit())
    save_torch_weights(network, path)
    load_torch_weights(network, path)
    loaded = _copy(network)
    with open(path, "r+b") as file:  # in place, as a copy or a download to the same name does
        file.write(bytes(path.stat().st_size))
    assert_equal(network.get_weights(), loaded)


# As the published program writes it ---------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_golden_checkpoint_is_written_as_it_was(tmp_path, name):
    network = network_of(name)
    load_torch_weights(network, GOLDEN / f"{name}.pth")
    save_torch_weights(network, tmp_path / "w.pth")
    ours = torch.load(tmp_path / "w.pth", weights_only=True)
    theirs = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    assert list(ours) == list(theirs)  # the order is theirs too
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
        assert ours[key].is_contiguous()
        assert torch.equal(ours[key].view(torch.int32), value.view(torch.int32)), key  # every bit


def test_the_golden_autoencoder_is_written_as_it_was(tmp_path):
    arguments = {"base_dim": 32, "multipliers": (1, 1, 2, 2), "num_res_blocks": 1}
    network = AutoencoderKL.from_file(GOLDEN / "autoencoder_kl.pth", **arguments)
    save_torch_weights(network, tmp_path / "w.pth")
    ours = torch.load(tmp_path / "w.pth", weights_only=True)
    theirs = torch.load(GOLDEN / "autoencoder_kl.pth", weights_only=True)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():  # stored as float16, which float32 holds exactly
        assert ours[key].dtype == torch.float32
        assert torch.equal(ours[key], value.float()), key


# What is refused, and writing that fails ----------------------------------------------------------


@pytest.mark.parametrize("act", [save_torch_weights, load_torch_weights])
@pytest.mark.parametrize("network", [keras.Sequential([keras.Input((2,))]), {}])
def test_a_network_nobody_published_is_named(tmp_path, network, act):
    words = "There are published weights for ['UViT',", f"Received: {type(network).__name__}"
    refused(TypeError, lambda: act(network, tmp_path / "w.pth"), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [(name, ValueError, (f"{name}: unknown kind", ".safetensors", ".pth"))
     for name in ("w.weights.h5", "w", "w.pth.gz", "pth")]
    + [("missing/w.pth", FileNotFoundError, ("missing", "no folder"))],
)  # fmt: skip
def test_another_ending_and_a_missing_folder_are_refused(tmp_path, name, error, words):
    refused(error, lambda: save_torch_weights(uvit(), tmp_path / name), *words)
    assert os.listdir(tmp_path) == []


def full_disk(*args):
    path = next(a for a in args if isinstance(a, str | os.PathLike))
    Path(path).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def interrupted(source, target):
    assert Path(source).stat().st_size > 1000  # all is written by then
    assert Path(source).parent == Path(target).parent  # so that renaming is atomic
    raise KeyboardInterrupt


@pytest.mark.parametrize("existing", [None, b"what was there"])
@pytest.mark.parametrize(
    ("name", "module", "function", "failure", "error"),
    [
        ("w.pth", torch, "save", full_disk, OSError),
        ("w.safetensors", safetensors.numpy, "save_file", full_disk, OSError),
        ("w.pth", os, "replace", interrupted, KeyboardInterrupt),
    ],
)
def test_writing_that_fails_leaves_what_was_there(
    tmp_path, monkeypatch, name, module, function, failure, error, existing
):
    if existing:
        (tmp_path / name).write_bytes(existing)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, failure)
        refused(error, lambda: save_torch_weights(uvit(), tmp_path / name))
    assert os.listdir(tmp_path) == ([name] if existing else [])
    if existing:
        assert (tmp_path / name).read_bytes() == existing
