"""Every weight has its place on every device. That they train is in test_distribution.py."""

import math
import re

import keras
import pytest
from tiny import refused

from keras_uvit import UNet, UViT, backend
from keras_uvit.distribution import LAYOUTS, RULES, check_layouts, layout_map, model_parallel

TINY = dict(image_shape=(8, 8, 3), patch_size=2, hidden_dim=16, num_layers=3, num_heads=4)
TINY_UNET = dict(image_shape=(4, 4, 3), base_dim=8, multipliers=(1, 2), num_blocks=1, head_dim=4)
TINY_UNET |= dict(attention_levels=(0,))
NETWORKS = [
    (make, {**size, **more})
    for make, size, variants in (
        (
            UViT,
            TINY,
            [
                dict(num_classes=5, qkv_bias=True, output_conv="before", patch_embed="conv"),
                dict(skip="add_project", time="adaln", context_shape=(4, 6), mlp_dim=24),
                dict(skip=None, time_mlp=True, position="rotary", norm="rms", mlp="swiglu", lora=2),
                dict(skip="project_sum", position="sinusoidal", qk_norm=True, skip_norm=True),
                dict(patch_embed="conv", patch_size=4, num_layers=1, qkv_bias=True, time="adaln"),
            ],
        ),
        (UNet, TINY_UNET, [dict(num_classes=5), dict(context_shape=(4, 6), lora=2)]),
    )
    for more in variants
]
jax_only = pytest.mark.skipif(backend.NAME != "jax", reason="weights are split on JAX only")


@pytest.fixture(autouse=True)
def _no_distribution_after():
    yield
    keras.distribution.set_distribution(None)


def devices(count):
    """That nobody asks for anything."""
    return [f"cpu:{i}" for i in range(count)]


def layout(name, *shape, mesh=None):
    axes = list(LAYOUTS[mesh or name])
    return layout_map(keras.distribution.DeviceMesh(shape, axes, devices(math.prod(shape))), name)


def test_every_weight_has_exactly_one_rule_and_every_rule_a_weight():
    weights = {w.path: w for make, arguments in NETWORKS for w in make(**arguments).weights}
    used = set()
    for path, weight in weights.items():
        rules = [rule for rule in RULES if re.fullmatch(rule, path)]
        assert len(rules) == 1 if len(weight.shape) > 1 else len(rules) <= 1, path
        used.update(rules)
        for dimension in (dimension for rule in rules for dimension in RULES[rule]):
            assert dimension is None or dimension < len(weight.shape), path
    assert used == RULES.keys()


def test_kernels_are_split_by_columns_then_rows():
    fsdp, tensor = layout("fsdp", 8), layout("tensor", 2, 4)
    for first, second in (("attention/qkv", "attention/proj"), ("mlp_in", "mlp_out")):
        assert tensor[f"mid_block/{first}/kernel"].axes == (None, "model")
        assert tensor[f"in_block_12/{second}/kernel"].axes == ("model",)
    assert tensor["down_0_1/conv_1/kernel"].axes == (None, None, None, "model")
    assert tensor["up_12_double/conv_2/kernel"].axes == (None, None, "model")
    for name in ("mid_0_attention", "up_3_0_context"):
        assert tensor[f"{name}/key_value/kernel"].axes == (None, "model")
        assert tensor[f"{name}/proj/kernel"].axes == ("model",)
    assert tensor["mid_block/mlp_in/bias"].axes == ("model",)
    assert tensor["mid_block/mlp_out/bias"] is None  # added once, after the sum over devices
    assert fsdp["mid_block/attention/qkv/kernel"].axes == (None, "batch")
    assert fsdp["mid_block/attention/qkv/bias"].axes == ()
    assert fsdp["mid_0/conv_1/kernel"].axes == (None, None, None, "batch")
    assert fsdp["mid_0_attention/proj/kernel"].axes == ("batch",)


# Refusals -----------------------------------------------------------------------------------------


def test_a_mesh_with_other_axes_is_refused():
    refused(ValueError, lambda: layout("tensor", 4, mesh="fsdp"), "axes ('batch', 'model')")


@jax_only
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(layout="zero"), "one of ['fsdp', 'tensor']"),
        (dict(layout="fsdp", model_devices=2), "is for layout"),
        (dict(layout="tensor", model_devices=3), "[1, 2, 4, 8]. Received: 3; the nearest is 2"),
        (dict(layout="tensor", model_devices=16), "the nearest is 8"),
        (dict(layout="tensor"), "needs model_devices"),
    ],
)
def test_meshes_that_cannot_be_are_refused(arguments, words):
    refused(ValueError, lambda: model_parallel(**arguments, devices=devices(8)), words)


@jax_only
def test_weights_without_a_rule_or_with_two_are_refused():
    network = UViT(**TINY)
    other = keras.Model(network.inputs, keras.layers.Dense(3, name="invented")(network.output))
    check_layouts(other)  # nothing is checked without a distribution
    distribution = model_parallel("fsdp")
    check_layouts(network)
    refused(ValueError, lambda: check_layouts(other), "No rule", "'invented/kernel'")
    distribution._layout_map["mid_block/.*/kernel"] = ("batch",)
    refused(ValueError, lambda: check_layouts(network), "matches multiple layout")


@jax_only
@pytest.mark.parametrize(
    ("make", "arguments", "count", "words"),
    [  # 2 heads; in the U-Net 2 in level 0, 4 in level 1; 3 D = 48 columns could be
        (UViT, {**TINY, "num_heads": 2}, 4, ["num_heads=2 cannot", "=4. Choose", "[1, 2]"]),
        (UNet, TINY_UNET, 4, ["num_heads=2 cannot", "=4. Choose", "[1, 2]"]),
        (UViT, TINY, 5, ["'in_block_0/attention/qkv/kernel' of shape (16, 48)", "[1, 2, 3, 4, 6,"]),
    ],
)
def test_heads_and_widths_that_cannot_be_divided_are_named(make, arguments, count, words):
    network = make(**arguments)
    model_parallel("tensor", count, devices=devices(count))
    refused(ValueError, lambda: check_layouts(network), *words)


@jax_only
def test_fsdp_leaves_whole_what_it_cannot_divide():
    network = UViT(**TINY)
    distribution = model_parallel("fsdp", devices=devices(32))
    axes = {w.path: distribution.get_variable_layout(w).axes for w in network.weights}
    assert axes["mid_block/mlp_in/kernel"] == (None, "batch")  # (16, 64)
    assert axes["mid_block/attention/qkv/kernel"] == (None, None)  # (16, 48)
    check_layouts(network)
