"""U-ViT, U-Net and networks of one's own as a whole: one contract, their graphs, errors.

Parity with the published program is in tests/convert, the U-Net's with PyTorch in test_unet.py.
"""

import inspect

import keras
import numpy as np
import pytest
from keras import layers, ops
from tiny import assert_equal, normal, numpy, randomize, refused, weights

from keras_uvit import DiffusionModel, UNet, UViT, training
from keras_uvit.networks import OwnNetwork

pytestmark = pytest.mark.eager

SHAPE = (4, 6, 3)
TINY = dict(image_shape=SHAPE, patch_size=2, hidden_dim=16, num_layers=5, num_heads=2)
TINY_UNET = dict(image_shape=SHAPE, base_dim=8, multipliers=(1, 2), attention_levels=(1,))
TINY_UNET |= dict(num_blocks=1, head_dim=4)
# One value per argument that is not the default.
SHARED = dict(
    num_classes=7, null_label=False, context_shape=(3, 5), remat=True, dtype="mixed_bfloat16",
    takes_span=True, takes_guidance=True, lora=dict(rank=2, alpha=3.0, targets=("attention",)),
    name="other",
)  # fmt: skip
OTHER = dict(
    **SHARED, mlp_dim=24, skip="add_project", time="adaln", time_mlp=True, qkv_bias=True,
    output_conv=False, position="sinusoidal", patch_embed="conv", qk_norm=True, skip_norm=True,
    norm="rms", mlp="swiglu", init="balanced",
)  # fmt: skip


# Networks of one's own ----------------------------------------------------------------------------


def inputs(**more):
    shapes = {"image": SHAPE, "timestep": (), **more}
    return {key: keras.Input(shape, name=key) for key, shape in shapes.items()}


def functional(inputs):
    """A convolution of the image, shifted by what the other inputs say."""
    x = layers.Conv2D(8, 3, padding="same")(inputs["image"])
    said = [layers.Reshape((1,))(inputs["timestep"])]
    if "label" in inputs:
        said.append(layers.Embedding(5, 4)(inputs["label"]))
    if "context" in inputs:
        said.append(layers.Flatten()(inputs["context"]))
    said = layers.Concatenate()(said) if len(said) > 1 else said[0]
    x = layers.Add()([x, layers.Reshape((1, 1, 8))(layers.Dense(8)(said))])
    x = layers.BatchNormalization()(layers.Dropout(0.5)(x))  # which have state of their own
    return keras.Model(inputs, layers.Conv2D(3, 3, padding="same")(x))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.conv = layers.Conv2D(width, 3, padding="same", name="conv")
        self.out = layers.Conv2D(3, 3, padding="same", name="out")

    def call(self, inputs, training=False):
        x = self.conv(inputs["image"])
        return self.out(x * ops.cast(inputs["timestep"], x.dtype)[:, None, None, None] / 1000)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


# The wrapper's arguments by what is wrapped.
OWN = {
    "functional": lambda: OwnNetwork(functional(inputs()), image_shape=SHAPE),
    "functional, classes": lambda: OwnNetwork(
        functional(inputs(label=())), image_shape=[*SHAPE], num_classes=4
    ),
    "functional, text": lambda: OwnNetwork(
        functional(inputs(context=(3, 5))), image_shape=SHAPE, context_shape=(3, 5)
    ),
    "subclassed": lambda: OwnNetwork(Subclassed(5), image_shape=SHAPE),
}

# The contract -------------------------------------------------------------------------------------


def inputs_for(network, count=2):
    values = {
        "image": normal(count, *network.image_shape),
        "timestep": np.linspace(1, 999, count).astype("float32"),
    }
    if network.context_shape:
        values["context"] = normal(count, *network.context_shape, seed=1)
    if network.num_classes:
        values["label"] = np.arange(count) % network.num_classes
    for name in ("span", "guidance"):
        if getattr(network, f"takes_{name}"):
            values[name] = np.linspace(0, 1, count).astype("float32")
    return values


def once(*values):
    return pytest.param(*values, marks=pytest.mark.once)


NETWORKS = [
    *[(UViT, {**TINY, **more}) for more in ({}, OTHER, {"output_conv": "before"})],
    *[once(UViT, {**TINY, key: value}) for key, value in OTHER.items()],
    *[once(UViT, {**TINY, "skip": skip}) for skip in ("add", "project_sum", None)],
    *[once(UViT, {**TINY, **more, "position": "rotary"}) for more in ({}, OTHER)],
    *[(UNet, {**TINY_UNET, **more}) for more in ({}, SHARED)],
    *[once(make, {}) for make in OWN.values()],
]


@pytest.mark.parametrize(("make", "arguments"), NETWORKS)
def test_every_switch_runs_and_survives_its_config(make, arguments):
    network = make(**arguments)
    if isinstance(network, UNet):  # whose output starts at zero
        randomize(network)
    x = inputs_for(network)
    out = network.predict_on_batch(x)  # one program: JAX takes longer operation by operation
    assert network.output_shape == (None, *SHAPE)
    assert out.shape == (2, *SHAPE)
    assert out.dtype == "float32"
    assert np.isfinite(out).all()
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(network))
    copy.set_weights(network.get_weights())
    np.testing.assert_array_equal(copy.predict_on_batch(x), out)
    configs = [{**each.get_config(), "model": None} for each in (copy, network)]
    assert configs[0] == configs[1]
    assert {tensor.name for tensor in network.inputs} == x.keys()
    assert {w.dtype for w in network.trainable_weights} == {"float32"}
    # PyTorch forbids dots in names.
    assert not [layer.name for layer in network._flatten_layers() if "." in layer.name]
    for layer in network.layers:
        assert getattr(layer, "remat", False) == ("remat" in arguments and hasattr(layer, "remat"))


def test_no_argument_is_left_out_of_the_contract():
    elsewhere = {"quantization"}  # such a network is not trained: test_quantizing.py
    assert set(inspect.signature(UViT).parameters) == {*TINY, *OTHER} | elsewhere
    assert set(inspect.signature(UNet).parameters) == {*TINY_UNET, *SHARED} | elsewhere


def trained(network):
    """A model after one step, the same step again, and images that it draws."""
    model = DiffusionModel(network, ema_decay=0.5, num_steps=2, optimizer=dict(warmup_steps=0))
    model.compile(jit_compile=False)
    batch = inputs_for(network, 4)
    del batch["timestep"]
    batch["image"] = np.tanh(batch["image"])
    model.fit(batch, batch_size=4, verbose=0)

    def drawn(model, guidance_scale=2.0):
        asked = {"num_images": 2, "verbose": 0, "decode": False}
        if network.context_shape:
            asked |= {"prompts": batch["context"][:2], "negative_prompts": batch["context"][2:3]}
        if network.num_classes:
            asked |= {"labels": [0, 2]}
        if len(asked) > 3:
            del asked["num_images"]
            asked["guidance_scale"] = guidance_scale
        return model.generate(**asked)

    return model, lambda again: again.fit(batch, batch_size=4, verbose=0), drawn


# What a backend does to it is the same for each: one of them is tried on all.
@pytest.mark.parametrize(
    "make",
    [
        OWN["functional, classes"],
        once(lambda: UNet(SHAPE, 8, (1,), 1, (), 4, num_classes=3, context_shape=(3, 5))),
        once(OWN["functional, text"]),
        once(OWN["subclassed"]),
    ],
)
def test_they_are_trained_drawn_with_guidance_saved_and_loaded(tmp_path, make):
    network = make()
    if isinstance(network, UNet):
        randomize(network)
    before = weights(network)
    model, fit, drawn = trained(network)
    assert model.ema_step == 1
    changed = [(a != b).any() for a, b in zip(before, weights(network))]
    assert all(changed) if isinstance(network, UNet) else any(changed)
    if network.num_classes:
        assert np.abs(drawn(model) - drawn(model, 3.0)).max() > 1e-3
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.network.get_config().keys() == network.get_config().keys()
    assert_equal(weights(again), weights(model))
    np.testing.assert_array_equal(drawn(again), drawn(model))
    fit(again)


@pytest.mark.once
def test_own_networks_come_back_from_checkpoints(tmp_path):
    model = DiffusionModel(OWN["subclassed"]())
    model.compile()
    images = np.tanh(normal(8, *SHAPE))
    model.fit(images, batch_size=8, callbacks=[training.Checkpoint(tmp_path)], verbose=0)
    assert_equal(weights(training.load_checkpoint(tmp_path)), weights(model))


# What would not come back -------------------------------------------------------------------------


def with_attributes(network):
    network.image_shape, network.num_classes = SHAPE, None
    network.null_label = network.context_shape = None
    return network


class NoConfig(keras.Model):
    """Its constructor's argument is not in its config."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs["image"])


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: functional(inputs()),
        lambda: with_attributes(functional(inputs())),
        lambda: with_attributes(Subclassed(5)),
        lambda: with_attributes(NoConfig(layers.Conv2D(3, 3))),
        lambda: with_attributes(layers.Conv2D(3, 3)),
    ],
)
def test_networks_that_would_not_come_back_are_told_of_the_wrapper(make):
    refused(TypeError, lambda: DiffusionModel(make()), "networks.OwnNetwork(model, image_shape=")


# U-ViT's graph ------------------------------------------------------------------------------------


def test_a_config_saved_before_there_were_more_switches_still_loads():
    network = UViT(**TINY)
    config, new = network.get_config(), ("qk_norm", "skip_norm", "norm", "mlp")
    copy = UViT.from_config({key: value for key, value in config.items() if key not in new})
    assert copy.get_config() == config
    assert [w.path for w in copy.weights] == [w.path for w in network.weights]
    assert not [w.path for w in copy.weights if "query_norm" in w.path or "skip_0/norm" in w.path]


def test_tokens_come_label_time_context_patches():
    network = UViT(**TINY, num_classes=7, context_shape=(3, 5), position=None)
    x, layer = inputs_for(network), network.get_layer
    tokens = numpy(keras.Model(network.inputs, layer("tokens").output)(x))
    expected = [
        layer("label_embed")(x["label"])[:, None],
        layer("time_embed")(x["timestep"])[:, None],
        layer("context_embed")(x["context"]),
        layer("patch_embed")(x["image"]),
    ]
    # The same products, perhaps fused otherwise.
    np.testing.assert_allclose(tokens, np.concatenate([*map(numpy, expected)], 1), atol=1e-6)
    assert tokens.shape == (2, 1 + 1 + 3 + 6, 16)


def test_long_skips_join_first_with_last():
    network = UViT(**TINY)
    for i, shallow in enumerate(["in_block_1", "in_block_0"]):
        node = network.get_layer(f"skip_{i}")._inbound_nodes[0]
        sources = [tensor._keras_history.operation.name for tensor in node.input_tensors]
        assert sources == [("mid_block", "out_block_0")[i], shallow]
    names = [layer.name for layer in UViT(**TINY, skip=None).layers]
    assert not [name for name in names if name.startswith("skip")]


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
        assert np.std(numpy(weight)) == pytest.approx(expected, rel=0.04), name
    assert not numpy(block.mlp_in.bias).any()


def test_kernels_that_read_tokens_may_begin_by_their_fan_in():
    block = UViT(**{**TINY, "hidden_dim": 64}, mlp="swiglu", init="balanced").get_layer("mid_block")
    reading = (block.attention.qkv, block.mlp_in, block.mlp_gate)
    for layers_, expected in ((reading, 1 / 8), ((block.attention.proj, block.mlp_out), 0.02)):
        for layer in layers_:  # 4,000 numbers and more: 4 % is twice their sample deviation's own
            assert np.std(numpy(layer.kernel)) == pytest.approx(expected, rel=0.04), layer.name


CONVOLUTIONS = {"output_conv": True, "feature_conv": "before"}  # by what asks for them


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_last_convolution_may_begin_as_the_identity(name):
    layer = UViT(**TINY, output_conv=CONVOLUTIONS[name], init="balanced").get_layer(name)
    features = normal(2, 4, 4, layer.filters)
    np.testing.assert_array_equal(numpy(layer(features)), features)
    published = UViT(**TINY, output_conv=CONVOLUTIONS[name]).get_layer(name)
    # Each has numbers of its own, as PyTorch's.
    assert not np.isin(numpy(published.bias), numpy(published.kernel)).any()


@pytest.mark.parametrize("dim", [512, 1152])
def test_later_switches_leave_the_number_of_weights_nearly_as_it_was(dim):
    later = dict(norm="rms", mlp="swiglu", position="rotary")
    sizes = dict(image_shape=(32, 32, 4), hidden_dim=dim, num_layers=3)
    with keras.StatelessScope(initialize_variables=False):  # shapes only
        plain, other = (UViT(**sizes, **more).count_params() for more in ({}, later))
    # 0.2 %: of the MLP's width rounded to 8, of the norms' biases. (2.5 %: the learned positions.)
    positions = 257 * dim
    assert other + positions == pytest.approx(plain, rel=2e-3)


# Errors -------------------------------------------------------------------------------------------

OF_ALL = [
    (dict(image_shape=(4, 6)), r"\(height, width, channels\)"),
    (dict(image_shape=28), "channels.*Received: 28"),
    (dict(num_classes=0), "num_classes must be at least 1"),
    (dict(context_shape=(77,)), r"context_shape must be \(length, width\)"),
]
OF_UVIT = [
    (dict(patch_size=4), r"patch_size=4 does not divide.*that do: \[1, 2\].*\(4, 8\)"),
    (dict(num_layers=4), "odd.*Received: 4; use 3 or 5"),
    (dict(num_heads=3), r"num_heads=3 does not divide hidden_dim=16.*\[1, 2, 4, 8, 16\]"),
    *[(dict.fromkeys([key], "x"), f"{key} must be one of .*'x'")
      for key in ("skip", "time", "position", "norm", "mlp", "init", "patch_embed", "output_conv")],
    (dict(position="rotary", num_heads=8), "hidden_dim / num_heads = 2; .* multiple of 4"),
    (dict(skip_norm=True, skip=None), "skip_norm=True .* skip=None has none"),
    (dict(image_shape=(6, 6, 3), patch_size=3, patch_embed="conv"), "power of two.*patch_size=3"),
]  # fmt: skip
OF_UNET = [
    (dict(image_shape=(5, 6, 3)), r"halve the image 1 times.*at most 1 mul.*\(4, 6\)"),
    (dict(multipliers=(1, 2, 2)), r"\(4, 6, 3\) cannot be. Take at most 2.*for 3 is \(4, 8\)"),
    (dict(multipliers=2), "multipliers must be a tuple of ints. Received: 2"),
    (dict(multipliers=()), "at least one multiplier"),
    (dict(multipliers=(0, 1)), r"all at least 1. Received: \(0, 1\)"),
    (dict(num_blocks=0), "num_blocks must be at least 1. Received: 0"),
    (dict(attention_levels=(2,)), r"2 levels that .*\(1, 2\) makes, 0 to 1. Received: 2"),
    (dict(head_dim=5), r"head_dim=5 .* width of level 1, 16.*\[1, 2, 4, 8, 16\]"),
    (dict(attention_levels=(0,), head_dim=16), "head_dim=16 .* width of level 0, 8"),
]


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        *[(UViT, *row) for row in OF_ALL + OF_UVIT],
        *[(UNet, *row) for row in OF_ALL + OF_UNET],
        (OwnNetwork, dict(num_classes=0), "num_classes must be at least 1"),
        (OwnNetwork, dict(image_shape=(4, 6, 5)), r"shape \(4, 6, 5\). Received: \(4, 6, 3\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, change, message):
    usual = {UViT: TINY, UNet: TINY_UNET}.get(make)
    usual = usual or dict(model=Subclassed(5), image_shape=SHAPE)
    with pytest.raises(ValueError, match=message):
        make(**{**usual, **change})


@pytest.mark.once
def test_an_unknown_argument_is_named_with_the_nearest_one():
    refused(TypeError, lambda: UViT(SHAPE, num_head=2), "UViT has no argument", "'num_heads'")
