"""Every weight has its place on every device, and many devices compute what one does."""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import pytest

from keras_uvit import UNet, UViT, backend
from keras_uvit.distribution import LAYOUTS, RULES, check_layouts, layout_map, model_parallel

ROOT = Path(__file__).parents[1]
TINY = dict(image_shape=(8, 8, 3), patch_size=2, hidden_dim=16, num_layers=3, num_heads=4)
VARIANTS = [
    {},
    dict(skip="add"),
    dict(skip="add_project"),
    dict(skip="project_sum"),
    dict(skip=None),
    dict(time="adaln"),
    dict(time_mlp=True),
    dict(patch_embed="conv"),
    dict(patch_embed="conv", patch_size=4),
    dict(position="sinusoidal"),
    dict(position=None, output_conv=False),
    dict(num_classes=5, qkv_bias=True, output_conv="before"),
    dict(context_shape=(4, 6), mlp_dim=24),
    dict(num_layers=1, num_classes=5, null_label=False),
    dict(position="rotary", norm="rms", mlp="swiglu"),
]
TINY_UNET = dict(image_shape=(4, 4, 3), base_dim=8, multipliers=(1, 2), num_blocks=1, head_dim=4)
TINY_UNET |= dict(attention_levels=(0,))
NETWORKS = [(UViT, {**TINY, **variant}) for variant in VARIANTS]
NETWORKS += [(UNet, {**TINY_UNET, **more}) for more in ({}, dict(num_classes=5))]
NETWORKS += [(UNet, {**TINY_UNET, "context_shape": (4, 6)})]
jax_only = pytest.mark.skipif(backend.NAME != "jax", reason="weights are split on JAX only")


@pytest.fixture(autouse=True)
def _no_distribution_after():
    yield
    keras.distribution.set_distribution(None)


def mesh(layout, *shape):
    """Of devices that nobody asks for anything."""
    names = devices(math.prod(shape))
    return keras.distribution.DeviceMesh(shape, list(LAYOUTS[layout]), names)


def devices(count):
    return [f"cpu:{i}" for i in range(count)]


@pytest.mark.parametrize(("make", "arguments"), NETWORKS)
def test_every_weight_has_exactly_one_rule(make, arguments):
    network = make(**arguments)
    for weight in network.weights:
        rules = [rule for rule in RULES if re.fullmatch(rule, weight.path)]
        assert len(rules) == 1 if len(weight.shape) > 1 else len(rules) <= 1, weight.path
        for rule in rules:
            for dimension in RULES[rule]:
                assert dimension is None or dimension < len(weight.shape), weight.path


def test_every_rule_is_of_a_weight():
    everything = [make(**arguments) for make, arguments in NETWORKS]
    everything.append(UViT(**{**TINY, "qkv_bias": True, "time": "adaln"}))
    paths = {weight.path for network in everything for weight in network.weights}
    for rule in RULES:
        assert any(re.fullmatch(rule, path) for path in paths), rule


def test_kernels_are_split_by_columns_then_rows():
    fsdp = layout_map(mesh("fsdp", 8), "fsdp")
    tensor = layout_map(mesh("tensor", 2, 4), "tensor")
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


def test_a_mesh_with_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"needs a mesh with the axes \('batch', 'model'\)"):
        layout_map(mesh("fsdp", 4), "tensor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layout="zero"), r"one of \['fsdp', 'tensor'\]"),
        (dict(layout="fsdp", model_devices=2), "is for layout"),
        (dict(layout="tensor", model_devices=3), r"\[1, 2, 4, 8\]. Received: 3; the nearest is 2"),
        (dict(layout="tensor", model_devices=16), "the nearest is 8"),
        (dict(layout="tensor"), "needs model_devices"),
    ],
)
@jax_only
def test_errors_of_the_mesh(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_parallel(**arguments, devices=devices(8))


@pytest.mark.skipif(backend.NAME == "jax", reason="the others")
def test_other_backends_refuse():
    with pytest.raises(RuntimeError, match="needs the JAX backend"):
        model_parallel()


@jax_only
def test_an_unknown_weight_is_an_error():
    model_parallel("fsdp")
    network = UViT(**TINY)
    check_layouts(network)
    x = keras.layers.Dense(3, name="invented")(network.output)
    with pytest.raises(ValueError, match="No rule says how to split the weight 'invented/kernel'"):
        check_layouts(keras.Model(network.inputs, x))


@jax_only
def test_two_rules_for_a_weight_are_an_error():
    distribution = model_parallel("fsdp")
    network = UViT(**TINY)
    distribution._layout_map["mid_block/.*/kernel"] = ("batch",)
    with pytest.raises(ValueError, match="matches multiple layout"):
        check_layouts(network)


@jax_only
@pytest.mark.parametrize(
    ("make", "arguments"),
    [(UViT, {**TINY, "num_heads": 2}), (UNet, TINY_UNET)],  # 2 heads; 2 in level 0, 4 in level 1
)
def test_heads_that_cannot_be_divided(make, arguments):
    network = make(**arguments)
    model_parallel("tensor", 4, devices=devices(4))  # 3 D = 48 columns could be
    with pytest.raises(ValueError, match=r"num_heads=2 cannot .*=4. Choose .* from \[1, 2\]"):
        check_layouts(network)


@jax_only
def test_a_dimension_that_cannot_be_divided_is_named():
    network = UViT(**TINY)
    model_parallel("tensor", 5, devices=devices(5))
    message = r"'in_block_0/attention/qkv/kernel' of shape \(16, 48\) .* from \[1, 2, 3, 4, 6, 8"
    with pytest.raises(ValueError, match=message):
        check_layouts(network)


@jax_only
def test_fsdp_leaves_whole_what_it_cannot_divide():
    network = UViT(**TINY)
    distribution = model_parallel("fsdp", devices=devices(32))
    axes = {w.path: distribution.get_variable_layout(w).axes for w in network.weights}
    assert axes["mid_block/mlp_in/kernel"] == (None, "batch")  # (16, 64)
    assert axes["mid_block/attention/qkv/kernel"] == (None, None)  # (16, 48)
    check_layouts(network)


@jax_only
def test_without_a_distribution_nothing_is_checked():
    network = UViT(**TINY)
    x = keras.layers.Dense(3, name="invented")(network.output)
    check_layouts(keras.Model(network.inputs, x))


# Trains in turn on one device and on eight, and prints losses and the shapes of one device's parts:
# of some kernels, and of the last one's average and optimizer slot.
TRAINING = """
    import json

    import keras
    import numpy as np

    from keras_uvit import DiffusionModel, UNet, UViT
    from keras_uvit.distribution import check_layouts, model_parallel

    rng = np.random.default_rng(0)
    data = {"image": rng.uniform(-1, 1, (48, 8, 8, 1)).astype("float32")}
    data["label"] = np.arange(48) % 5
    result = {}

    class Losses(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(logs["loss"]))

    choices = {
        "one": lambda: keras.distribution.set_distribution(None),
        "fsdp": lambda: model_parallel("fsdp"),
        "tensor": lambda: model_parallel("tensor", model_devices=4),
    }
    uvit = UViT, dict(hidden_dim=48, num_layers=3, num_heads=4)
    unet = UNet, dict(base_dim=32, multipliers=(1,), num_blocks=1, attention_levels=(), head_dim=8)
    parts = ("attention/qkv", "attention/proj", "mlp_in")
    for (make, arguments), kernels in (
        (uvit, [f"mid_block/{part}/kernel" for part in parts]),
        (unet, ["mid_0_attention/query/kernel", "mid_0/conv_1/kernel", "mid_0/conv_2/kernel"]),
    ):
        start = None
        for name, choose in choices.items():
            choose()
            network = make((8, 8, 1), num_classes=5, **arguments)
            check_layouts(network)
            start = start or network.get_weights()
            network.set_weights(start)
            model = DiffusionModel(network, optimizer=dict(learning_rate=1e-2, warmup_steps=0))
            model.compile()
            losses = []
            model.fit(data, batch_size=16, shuffle=False, verbose=0, callbacks=[Losses()])
            slots = {v.path.split("/")[-1]: v for v in model.optimizer.variables}
            weights = {w.path: w for w in network.weights}
            averages = {w.path: w for w in model.ema_network.weights}
            last = kernels[-1]
            watched = [weights[path] for path in kernels]
            watched += [averages[last], slots[last.replace("/", "_") + "_momentum"]]
            result[f"{make.__name__} {name}"] = {
                "losses": losses,
                "weights": float(sum(np.abs(np.array(w)).sum() for w in averages.values())),
                "parts": [v.value.addressable_shards[0].data.shape for v in watched],
            }
    print(json.dumps(result))
"""
PARTS = {
    "UViT fsdp": ([48, 18], [6, 48], [48, 24]),
    "UViT tensor": ([48, 36], [12, 48], [48, 48]),
    "UNet fsdp": ([32, 4], [3, 3, 32, 4], [3, 3, 4, 32]),
    "UNet tensor": ([32, 8], [3, 3, 32, 8], [3, 3, 8, 32]),
}


@jax_only
def test_eight_devices_train_as_one_does(alone):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINING)],
        env={**alone, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() - PARTS == {"UViT one", "UNet one"}
    for name, parts in PARTS.items():
        many, one = result[name], result[f"{name.split()[0]} one"]
        assert len(one["losses"]) == 3
        assert one["losses"][0] != one["losses"][-1]  # it trains
        assert many["losses"] == pytest.approx(one["losses"], rel=1e-5), name
        assert many["weights"] == pytest.approx(one["weights"], rel=1e-5), name
        assert many["parts"] == [*parts, parts[-1], parts[-1]], name
