"""Published checkpoints: the same answers, and files that are refused with nothing changed."""

import pickle
import sys

import numpy as np
import pytest
import torch
from published import CASES, GOLDEN, answer_of, network_of
from safetensors import torch as torch_safetensors
from tiny import assert_equal, refused, uvit

from keras_uvit import DiffusionModel, convert, evaluation
from keras_uvit.convert import load_torch_weights, save_torch_weights
from keras_uvit.convert.files import TORCH, read_tensors

pytestmark = pytest.mark.once


def _tensors(name="uvit_uncond"):
    return torch.load(GOLDEN / f"{name}.pth", weights_only=True)


def _save(tensors, path):
    (torch_safetensors.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return path


def _copy(weights):
    return [np.array(w) for w in weights]


# Parity -------------------------------------------------------------------------------------------


@pytest.mark.each_backend
@pytest.mark.parametrize("name", CASES)
def test_answers_and_parameter_counts_are_the_published_programs(name):
    network = network_of(name)
    load_torch_weights(network, GOLDEN / f"{name}.pth")
    ours, theirs = answer_of(name, network)
    # 1e-5 of the largest value: float32 sums of a hundred terms in another order, five blocks deep.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    params = CASES[name]["params"]
    assert network.count_params() == evaluation.count_parameters(network) == params


@pytest.mark.each_backend
def test_a_diffusion_model_gets_the_weights_and_their_moving_average():
    model, expected = DiffusionModel(network_of("uvit_uncond")), network_of("uvit_uncond")
    load_torch_weights(expected, GOLDEN / "uvit_uncond.pth")
    load_torch_weights(model, GOLDEN / "uvit_uncond.pth")
    assert_equal(model.network.get_weights(), expected.get_weights())
    assert_equal(model.ema_network.get_weights(), expected.get_weights())


def test_optional_parts_have_the_published_names():
    network = uvit(num_layers=3, time_mlp=True, qkv_bias=True)
    entries = list(convert.uvit.entries(network))
    names = [name for name, _, _ in entries]
    assert {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")} <= {*names}
    assert {f"{b}.attn.qkv.bias" for b in ("in_blocks.0", "mid_block", "out_blocks.0")} <= {*names}
    assert len(set(names)) == len(names)
    assert {v.path for _, v, _ in entries} == {v.path for v in network.weights}  # none left out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_kind_of_file_and_precision_is_read(tmp_path, dtype):
    expected = "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    tensors = {
        "a": torch.tensor([[1.5, -2.0]], dtype=dtype),
        "b": torch.nn.Parameter(torch.ones(2)),
    }
    for suffix in (*TORCH, ".safetensors"):
        read = read_tensors(_save(tensors, tmp_path / f"w{suffix}"))
        assert read["a"].dtype == expected
        assert_equal([read["a"], read["b"]], [np.array([[1.5, -2.0]]), np.ones(2)])


# Files that do not fit ----------------------------------------------------------------------------


def test_every_problem_is_named_at_once_and_nothing_changes(tmp_path):
    model, tensors = DiffusionModel(network_of("uvit_uncond")), _tensors()
    del tensors["norm.weight"], tensors["in_blocks.1.attn.qkv.weight"]
    tensors |= {"optimizer": torch.ones(1), "head.extra": torch.ones(2)}
    tensors["mid_block.mlp.fc1.bias"] = torch.ones(7)
    tensors["decoder_pred.weight"] = torch.ones(5, 4)
    tensors["final_layer.weight"] = torch.ones(3)  # another number of axes
    path, before = _save(tensors, tmp_path / "w.pth"), _copy(model.get_weights())
    message = refused(
        ValueError,
        lambda: load_torch_weights(model, path),
        "w.pth does not fit this network",
        "missing: ['in_blocks.1.attn.qkv.weight', 'norm.weight']",
        "extra: ['head.extra', 'optimizer']",
        "wrong shape: mid_block.mlp.fc1.bias is (7,)",
        "wrong shape: decoder_pred.weight is (5, 4), which becomes (4, 5)",
        "wrong shape: final_layer.weight is (3,)",
    )
    assert message.count("wrong shape") == 3
    assert_equal(model.get_weights(), before)


LABELS = "label_emb.weight", "check num_classes and null_label"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_classes=11, null_label=True), LABELS),  # a label table off by one
        (dict(num_classes=9, null_label=True), LABELS),
        # 8x8 patches of one channel have the 64 numbers of 4x4 patches of four.
        (dict(image_shape=(32, 32, 1), patch_size=8), ("wrong shape: patch_embed.proj.weight",)),
    ],
)
def test_a_checkpoint_of_a_similar_network_is_refused(changes, words):
    path, network = GOLDEN / "uvit_class.pth", network_of("uvit_class", **changes)
    refused(ValueError, lambda: load_torch_weights(network, path), *words)
    eleven = network_of("uvit_class", num_classes=10, null_label=True)  # with the null row
    load_torch_weights(eleven, path)


@pytest.mark.parametrize(
    "switch",
    [
        {"skip": "add"}, {"skip": "add_project"}, {"skip": "project_sum"}, {"skip_norm": True},
        {"time": "adaln"}, {"position": "sinusoidal"}, {"position": "rotary"}, {"position": None},
        {"patch_embed": "conv"}, {"qk_norm": True}, {"norm": "rms"}, {"mlp": "swiglu"},
    ],
    ids=str,
)  # fmt: skip
def test_a_network_that_was_never_published_is_neither_read_nor_written(tmp_path, switch):
    network, path = network_of("uvit_uncond", **switch), tmp_path / "w.pth"
    before = _copy(network.get_weights())
    ((key, value),) = switch.items()
    words = "Published checkpoints have none of", key, str(value)
    refused(ValueError, lambda: load_torch_weights(network, GOLDEN / "uvit_uncond.pth"), *words)
    assert_equal(network.get_weights(), before)
    for writer in (network, DiffusionModel(network)):
        refused(ValueError, lambda w=writer: save_torch_weights(w, path), *words)
    assert not path.exists()


# Unsafe, damaged and foreign files ----------------------------------------------------------------


class Evil:
    """Unpickled by a reader that runs what it reads, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, kind):
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"norm.weight": torch.ones(2), "norm.bias": Evil(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    refused(ValueError, lambda: read_tensors(path), "w.pth was refused", "would run code")
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "w.safetensors"])
def test_truncated_files_and_texts_are_named(tmp_path, kind):
    path = tmp_path / kind
    tensors = {"a": torch.ones(20), "b": torch.ones(3, 3)}
    if kind == "legacy.pth":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        _save(tensors, path)
    whole = path.read_bytes()
    cut = [whole[: len(whole) * kept // 100] for kept in (0, 1, 10, 40, 70, 99)]
    for content in (*cut, b"<!DOCTYPE html>", b"version https://", b"Read me", b"a", b"0"):
        path.write_bytes(content)
        message = refused(ValueError, lambda: read_tensors(path), kind)
        assert "damaged" in message or "no " in message or "more than" in message, content


FOREIGN = {
    "a dict in a dict": ({"step": {"a": 1}}, ("w.pth is no state dict", "['step']")),
    "a list": ([torch.ones(1)], ("w.pth is no state dict", "list")),
    "numbers": ({"a": 1}, ("w.pth is no state dict", "['a']")),
    "a method": ({}.keys, ("w.pth was refused",)),
    "parts": (
        {"model": _tensors(), "ema": _tensors(), "step": 5},
        ("w.pth", "the parts ['ema', 'model']", 'key="ema"'),
    ),
    "NaN": ({"a": torch.tensor([1, np.nan])}, ("w.pth holds NaN or infinity", "['a']")),
    "infinity": ({"b": torch.tensor([np.inf])}, ("w.pth holds NaN or infinity", "['b']")),
    "float8": ({"a": torch.ones(2).to(torch.float8_e5m2)}, ("w.pth", "float8", "Convert the")),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_of_numbers_is_refused(tmp_path, kind):
    content, words = FOREIGN[kind]
    path = _save(content, tmp_path / "w.pth")
    refused(ValueError, lambda: read_tensors(path), *words)
    if kind in ("NaN", "infinity", "float8"):  # so it is in the other format
        path, words = _save(content, tmp_path / "w.safetensors"), [words[-1]]
        refused(ValueError, lambda: read_tensors(path), "w.safetensors", *words)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nothing.pth", FileNotFoundError, ("No weight file at", "nothing.pth")),
        (".", FileNotFoundError, ("No weight file at",)),
        ("w.h5", ValueError, ("w.h5: unknown kind", ".safetensors", ".pth")),
        ("w", ValueError, ("w: unknown kind", ".safetensors", ".pth")),
    ],
)
def test_a_missing_file_and_another_extension_are_named(tmp_path, name, error, words):
    if name.startswith("w"):
        (tmp_path / name).write_bytes(b"x")
    refused(error, lambda: read_tensors(tmp_path / name), *words)


def _named(prefix, tensors):
    return {f"{prefix}{name}": a for name, a in tensors.items()}


def _changed(tensors):
    return {name: a + 1 for name, a in tensors.items()}


# How training programs wrap a state dict, and the keys that choose it.
WRAPPED = {
    "DataParallel": (lambda s: _named("module.", s), [None, "module"]),
    "DataParallel and torch.compile": (lambda s: _named("module._orig_mod.", s), [None]),
    "one part": (lambda s: {"state_dict": s, "epoch": 3}, [None, "state_dict"]),
    "one part, DataParallel": (lambda s: {"model": _named("module.", s), "step": 5}, [None]),
    "two parts": (lambda s: {"model": _changed(s), "ema": s, "optimizer": {"state": 1}}, ["ema"]),
    "two prefixes": (lambda s: _named("model.", _changed(s)) | _named("ema.", s), ["ema"]),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_state_dicts_are_found_in_what_wraps_them(tmp_path, kind):
    wrap, keys = WRAPPED[kind]
    tensors = _tensors()
    path = _save(wrap(tensors), tmp_path / "w.pth")
    for key in keys:
        found = read_tensors(path, key)
        assert {*found} == {*tensors}
        assert all(np.array_equal(found[name], tensors[name]) for name in found)


def test_an_unknown_part_and_names_that_begin_otherwise_are_told_how_to_choose(tmp_path):
    network, path = network_of("uvit_uncond"), tmp_path / "w.pth"
    _save(FOREIGN["parts"][0], path)
    words = "the parts ['ema', 'model']", "key='emma'"
    refused(ValueError, lambda: load_torch_weights(network, path, "emma"), *words)
    _save(_named("model.", _tensors()) | _named("ema.", _tensors()), path)
    words = "begin with ['ema', 'model']", "key= chooses"
    refused(ValueError, lambda: load_torch_weights(network, path), *words)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("torch", "w.pth", "torch"), ("safetensors", "w.safetensors", "latent")],
)
def test_a_missing_library_names_the_pip_line(tmp_path, module, name, extra):
    (tmp_path / name).write_bytes(b"x")
    # Only inside the call: on the torch backend everything else needs torch.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        words = name, f'pip install "keras-uvit[{extra}]"'
        refused(ImportError, lambda: read_tensors(tmp_path / name), *words)
