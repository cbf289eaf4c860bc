"""Published checkpoints: the same answers, and files that are refused with nothing changed."""

import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from keras import ops
from published import CASES, GOLDEN, answer_of, network_of
from safetensors import torch as torch_safetensors
from safetensors.numpy import save_file

from keras_uvit import DiffusionModel, UViT, evaluation
from keras_uvit.convert import load_torch_weights, uvit
from keras_uvit.convert.files import read_tensors

pytestmark = pytest.mark.once


def _tensors(name):
    return torch.load(GOLDEN / f"{name}.pth", weights_only=True)


def _copy(weights):
    return [np.array(w) for w in weights]


def _assert_unchanged(network, before):
    for old, new in zip(before, network.get_weights()):
        np.testing.assert_array_equal(old, new)


# Parity -------------------------------------------------------------------------------------------


@pytest.mark.each_backend
@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_published_programs(name):
    network = network_of(name)
    load_torch_weights(network, GOLDEN / f"{name}.pth")
    ours, theirs = answer_of(name, network)
    # 1e-5 of the largest value: float32 sums of a hundred terms in another order, five blocks deep.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_parameter_counts_are_the_published_programs(name):
    network = network_of(name)
    assert network.count_params() == CASES[name]["params"]
    assert evaluation.count_parameters(network) == CASES[name]["params"]


@pytest.mark.parametrize("name", CASES)
def test_safetensors_gives_bitwise_the_same_network(tmp_path, name):
    from_torch, from_safetensors = network_of(name), network_of(name)
    load_torch_weights(from_torch, GOLDEN / f"{name}.pth")
    save_file({k: a.numpy() for k, a in _tensors(name).items()}, tmp_path / "w.safetensors")
    load_torch_weights(from_safetensors, tmp_path / "w.safetensors")
    _assert_unchanged(from_safetensors, from_torch.get_weights())
    np.testing.assert_array_equal(
        answer_of(name, from_torch)[0], answer_of(name, from_safetensors)[0]
    )


@pytest.mark.each_backend
def test_a_diffusion_model_gets_the_weights_and_their_moving_average():
    model, expected = DiffusionModel(network_of("uvit_uncond")), network_of("uvit_uncond")
    load_torch_weights(expected, GOLDEN / "uvit_uncond.pth")
    load_torch_weights(model, GOLDEN / "uvit_uncond.pth")
    _assert_unchanged(model.network, expected.get_weights())
    _assert_unchanged(model.ema_network, expected.get_weights())


def test_optional_parts_have_the_published_names():
    network = UViT(
        (8, 8, 3), hidden_dim=16, num_layers=3, num_heads=2, time_mlp=True, qkv_bias=True
    )
    entries = list(uvit.entries(network))
    names = [name for name, _, _ in entries]
    assert {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")} <= {*names}
    assert {f"{b}.attn.qkv.bias" for b in ("in_blocks.0", "mid_block", "out_blocks.0")} <= {*names}
    assert len(set(names)) == len(names)
    assert {v.path for _, v, _ in entries} == {v.path for v in network.weights}  # none left out


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_kind_of_file_and_precision_is_read(tmp_path, suffix, dtype):
    path, values = tmp_path / f"w{suffix}", {"a": torch.tensor([[1.5, -2.0]], dtype=dtype)}
    if suffix == ".safetensors":
        from safetensors.torch import save_file as save

        save(values, path)
    else:
        torch.save(values, path)
    read = read_tensors(path)
    expected = "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    assert read["a"].dtype == expected
    np.testing.assert_array_equal(read["a"], [[1.5, -2.0]])


def test_parameters_that_ask_for_gradients_are_read_like_tensors(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "w.pth")
    np.testing.assert_array_equal(read_tensors(tmp_path / "w.pth")["a"], [1, 1])


# Files that do not fit ----------------------------------------------------------------------------


def test_every_problem_is_named_at_once_and_nothing_changes(tmp_path):
    model, tensors = DiffusionModel(network_of("uvit_uncond")), _tensors("uvit_uncond")
    del tensors["norm.weight"], tensors["in_blocks.1.attn.qkv.weight"]
    tensors |= {"optimizer": torch.ones(1), "head.extra": torch.ones(2)}
    tensors["mid_block.mlp.fc1.bias"] = torch.ones(7)
    tensors["decoder_pred.weight"] = torch.ones(5, 4)
    tensors["final_layer.weight"] = torch.ones(3)  # another number of axes
    torch.save(tensors, tmp_path / "w.pth")
    before = _copy(model.get_weights())
    with pytest.raises(ValueError, match=r"w\.pth does not fit this network") as error:
        load_torch_weights(model, tmp_path / "w.pth")
    message = str(error.value)
    assert "missing: ['in_blocks.1.attn.qkv.weight', 'norm.weight']" in message
    assert "extra: ['head.extra', 'optimizer']" in message
    assert "wrong shape: mid_block.mlp.fc1.bias is (7,)" in message
    assert "wrong shape: decoder_pred.weight is (5, 4), which becomes (4, 5)" in message
    assert "wrong shape: final_layer.weight is (3,)" in message
    assert message.count("wrong shape") == 3
    _assert_unchanged(model, before)


@pytest.mark.parametrize(("num_classes", "null_label"), [(11, True), (9, True)])
def test_a_label_table_off_by_one_says_what_to_check(num_classes, null_label):
    network = network_of("uvit_class", num_classes=num_classes, null_label=null_label)
    with pytest.raises(ValueError, match=r"label_emb\.weight.*check num_classes and null_label"):
        load_torch_weights(network, GOLDEN / "uvit_class.pth")


def test_ten_classes_and_the_null_row_are_eleven_published_ones():
    load_torch_weights(network_of("uvit_class", num_classes=10, null_label=True),
                       GOLDEN / "uvit_class.pth")  # fmt: skip


def test_patches_of_another_size_are_refused_even_with_as_many_numbers():
    # 8x8 patches of one channel have the 64 numbers of 4x4 patches of four.
    network = network_of("uvit_class", image_shape=(32, 32, 1), patch_size=8)
    with pytest.raises(ValueError, match=r"wrong shape: patch_embed\.proj\.weight"):
        load_torch_weights(network, GOLDEN / "uvit_class.pth")


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
def test_a_network_that_was_never_published_is_refused(switch):
    network = network_of("uvit_uncond", **switch)
    before = _copy(network.get_weights())
    ((key, value),) = switch.items()
    with pytest.raises(ValueError, match=f"Published checkpoints have none of.*{key}.*{value}"):
        load_torch_weights(network, GOLDEN / "uvit_uncond.pth")
    _assert_unchanged(network, before)


# Position embeddings of another size --------------------------------------------------------------


def _loaded_positions(network, path, match):
    with pytest.warns(UserWarning, match=match):
        load_torch_weights(network, path)
    return ops.convert_to_numpy(network.get_layer("position").embeddings)


def _ramp(tmp_path):
    """The unconditional checkpoint with position vectors equal to their column, 0 to 3."""
    tensors = _tensors("uvit_uncond")
    columns = np.tile(np.arange(4.0), 4)[:, None]
    tensors["pos_embed"][0, 1:] = torch.tensor(np.repeat(columns, 48, axis=1))
    torch.save(tensors, tmp_path / "ramp.pth")
    return tmp_path / "ramp.pth"


def test_positions_that_fit_are_unchanged_and_nobody_is_warned():
    network = network_of("uvit_uncond")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_torch_weights(network, GOLDEN / "uvit_uncond.pth")
    loaded = ops.convert_to_numpy(network.get_layer("position").embeddings)
    np.testing.assert_array_equal(loaded, _tensors("uvit_uncond")["pos_embed"][0].numpy())


@pytest.mark.parametrize(
    ("name", "extras", "size", "grids"),
    [
        ("uvit_uncond", 1, (16, 16), "4x4 to 8x8"),
        ("uvit_uncond", 1, (4, 4), "4x4 to 2x2"),
        ("uvit_class", 2, (16, 32), "4x4 to 4x8"),
        ("uvit_class", 2, (8, 32), "4x4 to 2x8"),  # as many patches, in other places
        ("uvit_text", 8, (12, 12), "4x4 to 6x6"),
    ],
)
def test_another_image_size_resizes_positions_with_a_warning(name, extras, size, grids):
    network = network_of(name, image_shape=(*size, CASES[name].get("in_chans", 3)))
    loaded = _loaded_positions(network, GOLDEN / f"{name}.pth", f"resized from {grids} patches")
    stored = _tensors(name)["pos_embed"][0].numpy()
    np.testing.assert_array_equal(loaded[:extras], stored[:extras])  # label, time, text
    assert np.isfinite(loaded).all()


def test_resized_positions_keep_rows_and_columns_apart(tmp_path):
    network = network_of("uvit_uncond", image_shape=(8, 16, 3))
    loaded = _loaded_positions(network, _ramp(tmp_path), "4x4 to 4x8")[1:].reshape(4, 8, 48)
    # Float32 rounding of numbers below 4.
    np.testing.assert_allclose(loaded, np.broadcast_to(loaded[:1, :, :1], (4, 8, 48)), atol=1e-5)
    assert (np.diff(loaded[0, :, 0]) > 0).all()


def test_resizing_is_the_same_on_every_backend(tmp_path):
    network = network_of("uvit_uncond", image_shape=(8, 16, 3))
    loaded = _loaded_positions(network, _ramp(tmp_path), "4x4 to 4x8")[1:].reshape(4, 8, 48)
    # A ramp stays a ramp away from the edges; 1e-5 is float32 rounding of numbers below 4.
    np.testing.assert_allclose(loaded[:, 3:5, 0], np.tile([1.25, 1.75], (4, 1)), atol=1e-5)


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
    with pytest.raises(ValueError, match=r"w\.pth was refused.*would run code"):
        read_tensors(path)
    assert not trace.exists()


def _legacy(path):
    torch.save({"a": torch.ones(20), "b": torch.ones(3, 3)}, path,
               _use_new_zipfile_serialization=False)  # fmt: skip


@pytest.mark.parametrize("kept", [0, 1, 10, 40, 70, 99])
@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "w.safetensors"])
def test_truncated_files_are_named(tmp_path, kind, kept):
    path = tmp_path / kind
    if kind == "legacy.pth":
        _legacy(path)
    elif kind == "zip.pth":
        path.write_bytes((GOLDEN / "uvit_uncond.pth").read_bytes())
    else:
        save_file({"a": np.ones((3, 4), "float32"), "b": np.ones(3, "float32")}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * kept // 100])
    with pytest.raises(ValueError, match=kind):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://", "Read me", "a", "0"])
def test_a_text_file_with_a_weight_files_name_is_refused(tmp_path, suffix, text):
    path = tmp_path / f"w{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"w\{suffix}.*(damaged|no)"):
        read_tensors(path)


@pytest.mark.parametrize("content", [{"step": {"a": 1}}, [torch.ones(1)], {"a": 1}, {}.keys])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth (is no state dict|was refused)"):
        read_tensors(tmp_path / "w.pth")


def _named(prefix, tensors):
    return {f"{prefix}{name}": a for name, a in tensors.items()}


# How training programs wrap a state dict, and the keys that choose it.
WRAPPED = {
    "flat": (lambda s: s, [None]),
    "DataParallel": (lambda s: _named("module.", s), [None, "module"]),
    "torch.compile": (lambda s: _named("_orig_mod.", s), [None]),
    "both": (lambda s: _named("module._orig_mod.", s), [None]),
    "one part": (lambda s: {"state_dict": s, "epoch": 3}, [None, "state_dict"]),
    "one part, DataParallel": (lambda s: {"model": _named("module.", s), "step": 5}, [None]),
    "two parts": (lambda s: {"model": _changed(s), "ema": s, "optimizer": {"state": 1}}, ["ema"]),
    "two prefixes": (lambda s: _named("model.", _changed(s)) | _named("ema.", s), ["ema"]),
}


def _changed(tensors):
    return {name: a + 1 for name, a in tensors.items()}


@pytest.mark.parametrize("kind", WRAPPED)
def test_state_dicts_are_found_in_what_wraps_them(tmp_path, kind):
    wrap, keys = WRAPPED[kind]
    tensors = _tensors("uvit_uncond")
    torch.save(wrap(tensors), tmp_path / "w.pth")
    for key in keys:
        found = read_tensors(tmp_path / "w.pth", key)
        assert {*found} == {*tensors}
        assert all(np.array_equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize("key", [None, "emma"])
def test_parts_are_named_where_none_is_chosen(tmp_path, key):
    network, tensors = network_of("uvit_uncond"), _tensors("uvit_uncond")
    torch.save({"model": tensors, "ema": tensors, "step": 5}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth.*the parts \['ema', 'model'\].*key=\"ema\""):
        load_torch_weights(network, tmp_path / "w.pth", key)


def test_names_that_begin_otherwise_are_told_how_to_choose(tmp_path):
    network, tensors = network_of("uvit_uncond"), _tensors("uvit_uncond")
    torch.save(_named("model.", tensors) | _named("ema.", tensors), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"begin with \['ema', 'model'\], of which key= chooses"):
        load_torch_weights(network, tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_that_numpy_lacks_are_refused_by_the_files_name(tmp_path, suffix, dtype):
    path = tmp_path / f"w{suffix}"
    tensors = {"a": torch.ones(2).to(dtype)}
    (torch.save if suffix == ".pth" else torch_safetensors.save_file)(tensors, path)
    with pytest.raises(ValueError, match=rf"w\{suffix}.*float8.*Convert the file"):
        read_tensors(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_numbers_that_are_not_finite_are_refused_before_loading(tmp_path, suffix, value):
    network, tensors = network_of("uvit_uncond"), _tensors("uvit_uncond")
    before = _copy(network.get_weights())
    tensors["norm.bias"][3] = value
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file({k: a.numpy() for k, a in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"holds NaN or infinity in \['norm.bias'\]"):
        load_torch_weights(network, path)
    _assert_unchanged(network, before)


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.safetensors", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"No weight file at .*{(tmp_path / name).name}"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["w.h5", "w", "w.pkl"])
def test_another_extension_is_refused_with_those_that_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name}: unknown kind.*\.safetensors.*\.pth"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("torch", "w.pth", "torch"), ("safetensors", "w.safetensors", "latent")],
)
def test_a_missing_library_names_the_pip_line(tmp_path, module, name, extra):
    (tmp_path / name).write_bytes(b"x")
    # Only inside the call: on the torch backend everything else needs torch.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf'{name}.*pip install "keras-uvit\[{extra}\]"'):
            read_tensors(tmp_path / name)
