"""The network as a whole: tokens, switches, configs, errors. Parity is in tests/convert."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import UViT

TINY = dict(image_shape=(4, 6, 3), patch_size=2, hidden_dim=16, num_layers=5, num_heads=2)
# One value per argument that is not the default.
OTHER = dict(
    mlp_dim=24, num_classes=7, null_label=False, context_shape=(3, 5), skip="add_project",
    time="adaln", time_mlp=True, qkv_bias=True, output_conv=False, position="sinusoidal",
    patch_embed="conv", qk_norm=True, skip_norm=True, norm="rms", mlp="swiglu", remat=True,
    dtype="mixed_bfloat16", name="other",
)  # fmt: skip
ROTARY = [{"position": "rotary"}, {**OTHER, "position": "rotary"}]


def inputs_for(network, count=2):
    rng = np.random.default_rng(0)
    values = {
        "image": rng.standard_normal((count, *network.image_shape)),
        "timestep": np.linspace(1, 999, count),
    }
    if network.context_shape:
        values["context"] = rng.standard_normal((count, *network.context_shape))
    values = {key: value.astype("float32") for key, value in values.items()}
    if network.num_classes:
        values["label"] = np.arange(count) % network.num_classes
    return values


@pytest.mark.parametrize(
    "switch",
    [
        {},
        *[pytest.param({key: value}, marks=pytest.mark.once) for key, value in OTHER.items()],
        OTHER,
        *[pytest.param(switch, marks=pytest.mark.once) for switch in ROTARY],
        {"output_conv": "before"},
    ],
)
def test_every_switch_runs_and_survives_its_config(switch):
    network = UViT(**{**TINY, **switch})
    x = inputs_for(network)
    out = ops.convert_to_numpy(network(x))
    assert out.shape == (2, 4, 6, 3)
    assert out.dtype == "float32"
    assert np.isfinite(out).all()
    config = keras.saving.serialize_keras_object(network)
    copy = keras.saving.deserialize_keras_object(config)
    copy.set_weights(network.get_weights())
    np.testing.assert_array_equal(ops.convert_to_numpy(copy(x)), out)
    assert copy.get_config() == network.get_config()


def test_no_argument_is_left_out_of_the_switch_test():
    arguments = set(inspect.signature(UViT).parameters)
    assert arguments == {*TINY, *OTHER}


def test_a_config_saved_before_there_were_more_switches_still_loads():
    network = UViT(**TINY)
    config = network.get_config()
    new = ("qk_norm", "skip_norm", "norm", "mlp")
    old = {key: value for key, value in config.items() if key not in new}
    copy = UViT.from_config(old)
    assert copy.get_config() == config
    assert [w.path for w in copy.weights] == [w.path for w in network.weights]
    assert not [w.path for w in copy.weights if "query_norm" in w.path or "skip_0/norm" in w.path]


@pytest.mark.parametrize("skip", ["add", "project_sum", None])
def test_other_skips_build(skip):
    network = UViT(**TINY, skip=skip)
    assert network.output_shape == (None, 4, 6, 3)
    names = [layer.name for layer in network.layers]
    assert ("skip_0" in names) == (skip is not None)


def test_tokens_come_label_time_context_patches():
    network = UViT(**TINY, num_classes=7, context_shape=(3, 5), position=None)
    tap = keras.Model(network.inputs, network.get_layer("tokens").output)
    x = inputs_for(network)
    tokens = ops.convert_to_numpy(tap(x))
    assert tokens.shape == (2, 1 + 1 + 3 + 6, 16)
    parts = {
        "label": (slice(0, 1), network.get_layer("label_embed")(x["label"])[:, None]),
        "timestep": (slice(1, 2), network.get_layer("time_embed")(x["timestep"])[:, None]),
        "context": (slice(2, 5), network.get_layer("context_embed")(x["context"])),
        "image": (slice(5, 11), network.get_layer("patch_embed")(x["image"])),
    }
    for rows, expected in parts.values():
        np.testing.assert_allclose(
            tokens[:, rows], ops.convert_to_numpy(expected), atol=1e-6
        )  # the same products, perhaps fused otherwise


def test_long_skips_join_first_with_last():
    network = UViT(**TINY)
    for i, shallow in enumerate(["in_block_1", "in_block_0"]):
        node = network.get_layer(f"skip_{i}")._inbound_nodes[0]
        sources = [tensor._keras_history.operation.name for tensor in node.input_tensors]
        assert sources == [("mid_block", "out_block_0")[i], shallow]


def test_layer_names_have_no_dots_because_torch_forbids_them():
    assert not [layer.name for layer in UViT(**TINY)._flatten_layers() if "." in layer.name]


def test_published_sizes_of_the_initial_weights():
    network = UViT((32, 32, 3), 2, 256, 3, 4, num_classes=500)
    block = network.get_layer("mid_block")
    # Sample deviations of at least 8,000 numbers are within 3 % of the true ones.
    std = {
        "qkv": (block.attention.qkv.kernel, 0.02),
        "position": (network.get_layer("position").embeddings, 0.02),
        "label": (network.get_layer("label_embed").embeddings, 1.0),
        "head": (network.get_layer("head").kernel, 0.02),
        # uniform in +-1/sqrt(fan in) has deviation 1/sqrt(3 fan in)
        "patch": (network.get_layer("patch_embed").proj.kernel, 1 / np.sqrt(3 * 12)),
    }
    for name, (weight, expected) in std.items():
        assert np.std(ops.convert_to_numpy(weight)) == pytest.approx(expected, rel=0.04), name
    assert not ops.convert_to_numpy(block.mlp_in.bias).any()


@pytest.mark.parametrize("dim", [512, 768, 1024, 1152])
def test_later_switches_leave_the_number_of_weights_nearly_as_it_was(dim):
    later = dict(norm="rms", mlp="swiglu", position="rotary")
    sizes = dict(image_shape=(32, 32, 4), hidden_dim=dim, num_layers=3)
    with keras.StatelessScope(initialize_variables=False):  # shapes only
        plain, other = (UViT(**sizes, **more).count_params() for more in ({}, later))
    # 0.2 %: of the MLP's width rounded to 8, of the norms' biases. (2.5 %: the learned positions.)
    positions = 257 * dim
    assert other + positions == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_shape=(4, 6)), r"\(height, width, channels\)"),
        (dict(image_shape=28), r"\(height, width, channels\).*Received: 28"),
        (dict(patch_size=4), r"patch_size=4 does not divide.*that do: \[1, 2\].*\(4, 8\)"),
        (dict(num_layers=4), "odd.*Received: 4; use 3 or 5"),
        (dict(num_heads=3), r"num_heads=3 does not divide hidden_dim=16.*\[1, 2, 4, 8, 16\]"),
        (dict(skip="concatenate"), "skip must be one of .*'concatenate'"),
        (dict(time="film"), "time must be one of"),
        (dict(position="relative"), "position must be one of .*'rotary'"),
        (dict(position="rotary", num_heads=8), "hidden_dim / num_heads = 2; .* multiple of 4"),
        (dict(norm="batch"), "norm must be one of"),
        (dict(mlp="relu"), "mlp must be one of"),
        (dict(patch_embed="mlp"), "patch_embed must be one of"),
        (dict(skip_norm=True, skip=None), "skip_norm=True .* skip=None has none"),
        (dict(num_classes=0), "num_classes must be at least 1"),
        (dict(context_shape=(77,)), r"context_shape must be \(length, width\)"),
        (dict(image_shape=(6, 6, 3), patch_size=3, patch_embed="conv"), "power of two"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        UViT(**{**TINY, **change})
