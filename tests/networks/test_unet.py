"""The U-Net against PyTorch, its config, precision and training."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UNet, backend
from keras_uvit.networks import unet_layers as parts
from keras_uvit.networks.layers import TimeEmbedding

pytest.importorskip("torch", reason="the oracle is written in PyTorch")
import torch_unet  # noqa: E402

TINY = dict(image_shape=(4, 6, 3), base_dim=8, multipliers=(1, 2), attention_levels=(1,))
TINY |= dict(num_blocks=1, head_dim=4)
# One value per argument that is not the default.
OTHER = dict(
    num_classes=7, null_label=False, context_shape=(3, 5), remat=True, dtype="mixed_bfloat16",
    name="other",
)  # fmt: skip


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def randomize(layer):
    """Zeros and unit gammas hide mistakes."""
    for i, weight in enumerate(layer.weights):
        weight.assign(random(*weight.shape, seed=i) * 0.3)
    return layer


def inputs_for(network, count=2):
    values = {
        "image": random(count, *network.image_shape),
        "timestep": np.linspace(1, 999, count).astype("float32"),
    }
    if network.context_shape:
        values["context"] = random(count, *network.context_shape, seed=1)
    if network.num_classes:
        values["label"] = np.arange(count) % network.num_classes
    return values


def answer(network, x):
    """Of one program: JAX takes ten times as long for a new network operation by operation."""
    return network.predict_on_batch(x)


def assert_close(ours, theirs):
    """To 1e-5 of the output's scale: float32 sums in another order."""
    np.testing.assert_allclose(numpy(ours), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# Against PyTorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize(("width", "dim"), [(12, 12), (12, 40)], ids=["same", "wider"])
def test_a_residual_block_is_that_of_torch(width, dim, resample):
    x, time = random(2, 4, 6, width), random(2, 20, seed=1)
    block = parts.UNetBlock(dim, resample)
    block.build(x.shape, time.shape)
    twin = torch_unet.take(torch_unet.Block(width, dim, 20, resample), randomize(block))
    assert_close(block(x, time), torch_unet.answer(twin, x, time))


@pytest.mark.parametrize("context", [None, random(2, 5, 7, seed=1)], ids=["self", "text"])
def test_attention_is_that_of_torch(context):
    inputs = [random(2, 4, 6, 12)] + ([] if context is None else [context])
    layer = parts.UNetAttention(3)
    layer.build(*[value.shape for value in inputs])
    twin = torch_unet.Attention(12, 3, None if context is None else 7)
    torch_unet.take(twin, randomize(layer))
    assert_close(layer(*inputs), torch_unet.answer(twin, *inputs))


def test_the_whole_is_that_of_torch():
    network = randomize(UNet(**TINY, num_classes=7, context_shape=(3, 5)))
    twin = torch_unet.take(torch_unet.UNet(network.config), network)
    x = inputs_for(network)
    assert_close(answer(network, x), torch_unet.answer(twin, x))


@pytest.mark.parametrize(("dim", "groups"), [(128, 32), (192, 32), (96, 24), (12, 3), (6, 1)])
def test_there_are_32_groups_or_as_many_as_have_four_channels(dim, groups):
    assert parts.group_norm(dim, "float32", "norm").groups == groups


@pytest.mark.once
def test_a_new_block_adds_nothing():
    x, time = random(2, 2, 2, 8), random(2, 6, seed=1)
    np.testing.assert_array_equal(numpy(parts.UNetBlock(8)(x, time)), x)
    np.testing.assert_array_equal(numpy(parts.UNetAttention(2)(x)), x)


# Configs ------------------------------------------------------------------------------------------


@pytest.mark.eager
@pytest.mark.parametrize("switch", [{}, OTHER])
def test_every_switch_runs_and_survives_its_config(switch):
    network = randomize(UNet(**TINY, **switch))
    x = inputs_for(network)
    out = answer(network, x)
    assert out.shape == (2, 4, 6, 3)
    assert out.dtype == "float32"
    assert np.isfinite(out).all()
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(network))
    copy.set_weights(network.get_weights())
    np.testing.assert_array_equal(answer(copy, x), out)
    assert copy.get_config() == network.get_config()
    blocks = [layer for layer in network.layers if hasattr(layer, "remat")]
    assert len(blocks) == (18 if network.context_shape else 14)  # of them 10 residual
    assert {layer.remat for layer in blocks} == {network.config["remat"]}


def test_no_argument_is_left_out_of_the_switch_test():
    assert set(inspect.signature(UNet).parameters) == {*TINY, *OTHER}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda **k: parts.UNetBlock(6, "down", **k), [(2, 4, 6, 3), (2, 5)]),
        (lambda **k: parts.UNetBlock(6, "up", **k), [(2, 4, 6, 3), (2, 5)]),
        (lambda **k: parts.UNetAttention(3, **k), [(2, 4, 6, 6), (2, 3, 5)]),
    ],
)
def test_layer_contract(make, shapes, remat):
    symbolic = make(remat=remat)(*[keras.KerasTensor((None, *shape[1:])) for shape in shapes])
    half = make(remat=remat, dtype="mixed_bfloat16")
    out = half(*[random(*shape) for shape in shapes])
    assert symbolic.shape == (None, *out.shape[1:])
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"
    assert {keras.backend.standardize_dtype(w.dtype) for w in half.weights} == {"float32"}
    assert type(half).from_config(half.get_config()).get_config() == half.get_config()


def test_layer_names_have_no_dots_because_torch_forbids_them():
    network = UNet(**TINY, context_shape=(3, 5))
    assert not [layer.name for layer in network._flatten_layers() if "." in layer.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_shape=(4, 6)), r"\(height, width, channels\)"),
        (dict(image_shape=(5, 6, 3)), r"halve the image 1 times.*at most 1 mul.*\(4, 6\)"),
        (dict(multipliers=(1, 2, 2)), r"\(4, 6, 3\) cannot be. Take at most 2.*for 3 is \(4, 8\)"),
        (dict(multipliers=2), "multipliers must be a tuple of ints. Received: 2"),
        (dict(multipliers=()), "at least one multiplier"),
        (dict(multipliers=(0, 1)), r"all at least 1. Received: \(0, 1\)"),
        (dict(num_blocks=0), "num_blocks must be at least 1. Received: 0"),
        (dict(attention_levels=(2,)), r"2 levels that .*\(1, 2\) makes, 0 to 1. Received: 2"),
        (dict(head_dim=5), r"head_dim=5 .* width of level 1, 16.*\[1, 2, 4, 8, 16\]"),
        (dict(attention_levels=(0,), head_dim=16), "head_dim=16 .* width of level 0, 8"),
        (dict(num_classes=0), "num_classes must be at least 1"),
        (dict(context_shape=(77,)), r"context_shape must be \(length, width\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **change})


# Precision and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_statistics_of_norms_are_float32(policy):
    # A mean of 300 with deviations of 4: float16 cannot hold the sum of squares, and bfloat16's
    # spacing at 300 is 2, so a mean or variance rounded to it would move the results by half.
    x = ops.cast(300 + 4 * random(2, 5, 4, 64), policy.removeprefix("mixed_"))
    groups = numpy(x).astype("float64").reshape(2, 20, 16, 4)
    expected = groups - groups.mean((1, 3), keepdims=True)
    expected /= groups.std((1, 3), keepdims=True)
    ours = numpy(parts.group_norm(64, policy, "norm")(x)).reshape(groups.shape)
    # Half a spacing of the result, below 4: 2^-8 of it in bfloat16.
    np.testing.assert_allclose(ours, expected, atol=0.02)


@pytest.mark.once
def test_the_timestep_and_the_last_convolution_are_float32(monkeypatch):
    seen, call = [], TimeEmbedding.call
    monkeypatch.setattr(TimeEmbedding, "call", lambda self, t: seen.append(t) or call(self, t))
    network = UNet((2, 2, 1), 8, (1,), 1, (), 8, dtype="mixed_bfloat16")
    conv = network.get_layer("output_conv")
    conv.kernel.assign(1 + 2**-12 * random(*conv.kernel.shape))  # bfloat16: 1
    conv.bias.assign([1 + 2**-12])
    times = np.array([998.9, 999.0], "float32")  # bfloat16: 1000
    inputs = {"image": random(2, 2, 2, 1), "timestep": times}
    out = ops.convert_to_numpy(network(inputs))
    np.testing.assert_array_equal(numpy(seen[-1]), times)
    before = numpy(keras.Model(network.inputs, conv.input)(inputs)).astype("float64")
    kernel = numpy(conv.kernel).astype("float64")
    expected = np.einsum("bhwc,hwc->b", before, kernel[1:, 1:, :, 0]) + 1 + 2**-12
    # Float32 sums of 33 numbers of about 1; with a bfloat16 kernel 1e-4 and more would be missed.
    np.testing.assert_allclose(out[:, 0, 0, 0], expected, atol=1e-5)


def test_recomputing_changes_no_gradient(monkeypatch):
    calls, remat = [], keras.remat
    monkeypatch.setattr(keras, "remat", lambda f: calls.append(f) or remat(f))
    changes = []
    for switch in (False, True):
        assert not calls
        x, time, text = (keras.Input(shape) for shape in [(4, 4, 8), (6,), (3, 5)])
        h = parts.UNetBlock(12, "down", switch)(x, time)
        h = parts.UNetAttention(3, switch)(parts.UNetAttention(3, switch)(h), text)
        network = randomize(keras.Model([x, time, text], h))
        before = network.get_weights()
        network.compile(keras.optimizers.SGD(1.0), "mse")
        given = [random(2, *value.shape[1:]) for value in (x, time, text)]
        network.train_on_batch(given, random(2, 2, 2, 12, seed=1))
        changes.append([b - a for a, b in zip(before, network.get_weights())])  # - gradient
    assert len(calls) == 3
    for plain, again in zip(*changes):
        assert np.abs(plain).max() > 0
        # Float32 roundings of gradients, and of weights below 1.
        np.testing.assert_allclose(plain, again, atol=1e-5 * np.abs(plain).max() + 1e-7)


# In a diffusion model -----------------------------------------------------------------------------


@pytest.mark.once  # what a backend does to it, gradients and kernels, is tested above
def test_it_is_trained_sampled_with_guidance_saved_and_loaded(tmp_path):
    network = UNet((4, 6, 3), 8, (1,), 1, (), 4, num_classes=3, context_shape=(3, 5))
    before = randomize(network).get_weights()
    model = DiffusionModel(network, num_steps=2, optimizer=dict(warmup_steps=0))
    model.compile(jit_compile=backend.NAME == "jax")  # XLA of TensorFlow takes a minute
    text = random(4, 3, 5, seed=1)
    batch = {"image": np.tanh(random(4, 4, 6, 3)), "label": np.arange(4) % 3, "context": text}
    model.fit(batch, batch_size=4, verbose=0)
    assert model.ema_step == 1
    assert all((a != b).any() for a, b in zip(before, network.get_weights()))
    asked = dict(labels=[0, 2], prompts=text[:2], negative_prompts=text[2:3], decode=False)
    more, less = (model.generate(**asked, guidance_scale=w, verbose=0) for w in (3.0, 2.0))
    assert more.shape == (2, 4, 6, 3)
    assert np.abs(more - less).max() > 1e-3
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.network.get_config() == network.get_config()
    for a, b in zip(loaded.network.get_weights(), network.get_weights()):
        np.testing.assert_array_equal(a, b)
