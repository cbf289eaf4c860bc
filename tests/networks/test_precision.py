"""What stays float32 in mixed precision, what keras.json does not change, and recomputing."""

import keras
import numpy as np
import pytest
from derivatives import gradients, kept_bytes
from keras import ops
from tiny import normal

from keras_uvit import DiffusionModel, UNet, UViT, backend, presets
from keras_uvit.encoders import AutoencoderKL
from keras_uvit.evaluation.classifier import Classifier
from keras_uvit.networks import layers as parts
from keras_uvit.networks import unet_layers

pytestmark = pytest.mark.eager

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=3, num_heads=2)
SMALL_UNET = dict(multipliers=(1, 2), num_blocks=1, attention_levels=(1,), head_dim=8)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype("float32")
HALVES = ["bfloat16", "float16"]


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["uvit", "unet"])
def test_the_timestep_and_the_last_convolution_are_float32(kind, half, monkeypatch):
    seen, call = [], parts.TimeEmbedding.call
    monkeypatch.setattr(
        parts.TimeEmbedding, "call", lambda self, t: seen.append(t) or call(self, t)
    )
    policy = f"mixed_{half}"
    network = (
        UViT(**TINY, dtype=policy)
        if kind == "uvit"
        else UNet((4, 4, 1), 8, (1,), 1, (), 8, dtype=policy)
    )
    conv = network.get_layer("output_conv")
    conv.kernel.assign(1 + 2**-12 * normal(*conv.kernel.shape))  # bfloat16: 1
    conv.bias.assign([1 + 2**-12])
    times = np.array([998.9, 999.0, 3.3], "float32")  # bfloat16: 1000, 1000, 3.297
    inputs = {"image": IMAGES[:3], "timestep": times}
    out = ops.convert_to_numpy(network(inputs))
    np.testing.assert_array_equal(ops.convert_to_numpy(seen[-1]), times)
    before = numpy(keras.Model(network.inputs, conv.input)(inputs)).astype("float64")
    kernel = numpy(conv.kernel).astype("float64")[..., 0]
    around = np.lib.stride_tricks.sliding_window_view(before, (3, 3), axis=(1, 2))
    expected = np.einsum("byxchw,hwc->byx", around, kernel) + 1 + 2**-12
    # Float32 sums of 73 numbers of about 1; with a bfloat16 kernel 1e-4 and more would be missed.
    np.testing.assert_allclose(out[:, 1:-1, 1:-1, 0], expected, atol=2e-5)
    DiffusionModel(network).loss_of({"image": IMAGES})
    assert dtype_of(seen[-1]) == "float32"


def standardized(x, axes):
    return (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)


# Each norm, and what it is of (2, 5, 4, 64) numbers; 64 channels are 16 groups of four.
NORMS = {
    "layer": (parts.layer_norm, lambda x: standardized(x, -1)),
    "rms": (parts.rms_norm, lambda x: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))),
    "group": (
        lambda *options: unet_layers.group_norm(64, *options),
        lambda x: standardized(x.reshape(2, 20, 16, 4), (1, 3)).reshape(x.shape),
    ),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", NORMS)
def test_statistics_of_norms_are_float32(kind, half):
    # A mean of 300 with deviations of 4: float16 cannot hold the sum of squares, and bfloat16's
    # spacing at 300 is 2, so a mean or variance rounded to it would move the results by half.
    make, expected = NORMS[kind]
    x = ops.cast(300 + 4 * normal(2, 5, 4, 64), half)
    # Half a spacing of the result, below 4: 2^-8 of it in bfloat16.
    ours = numpy(make(f"mixed_{half}", "norm")(x))
    np.testing.assert_allclose(ours, expected(numpy(x).astype("float64")), atol=0.02)


# Keras' fused form on TensorFlow's CPU rounds sums or not, by the processor; it is not used there.
@pytest.mark.parametrize("fused", [False] if backend.NAME == "tensorflow" else [False, True])
@pytest.mark.parametrize("half", HALVES)
def test_attention_weights_are_a_float32_softmax(half, fused, monkeypatch):
    # Equal scores of 300 keys, values 1: each weight is 1/300 and the result is 1. Sums rounded to
    # bfloat16 on the way stop growing at 256 and miss it by 15 %.
    monkeypatch.setattr(backend, "fuses_attention", lambda: fused)
    inside, softmax = [], ops.softmax
    monkeypatch.setattr(
        backend.ops, "softmax", lambda x, *a: inside.append(dtype_of(x)) or softmax(x, *a)
    )
    ones = ops.ones((1, 300, 2, 8), half)
    out = numpy(backend.attention(ones, ones, ones))
    np.testing.assert_allclose(out, 1.0, rtol=0.01)  # a few roundings of bfloat16, 0.4 % each
    assert inside == ([] if fused else ["float32"])


@pytest.mark.skipif(backend.NAME == "tensorflow", reason="Keras' fused form rounds scores there")
def test_fused_attention_keeps_large_scores_apart(monkeypatch):
    # Scores near 100 differ by less than bfloat16's spacing there, 0.5: rounded, they would be
    # equal or twice as far apart.
    monkeypatch.setattr(backend, "fuses_attention", lambda: True)
    query, key = np.full((1, 1, 1, 16), 5.0), np.full((1, 8, 1, 16), 5.0)
    key[0, :, 0, 0] += np.arange(8) / 32  # exact in bfloat16
    value = np.random.default_rng(0).integers(-8, 9, (1, 8, 1, 16)).astype("float64")
    scores = np.einsum("blnk,bmnk->bnlm", query, key) / 4
    weights = np.exp(scores - scores.max())
    expected = np.einsum("bnlm,bmnk->blnk", weights / weights.sum(), value)
    out = numpy(backend.attention(*[ops.cast(a, "bfloat16") for a in (query, key, value)]))
    # Weights may be rounded to bfloat16, 0.4 % of values up to 8.
    np.testing.assert_allclose(out, expected, atol=0.05)


@pytest.mark.parametrize("half", HALVES)
def test_the_loss_is_float32(half):
    model = DiffusionModel(UViT(**TINY, dtype=f"mixed_{half}"))

    class Zero:
        num_classes = context_shape = None

        def __call__(self, inputs, training=False):
            self.inputs = inputs
            return ops.zeros(ops.shape(inputs["image"]), half)

    drawn = model.draw(ops.convert_to_tensor(IMAGES), model.objective)
    model.draw = lambda x0, objective: drawn
    zero = Zero()
    loss = model.mean_loss({"image": IMAGES}, zero, training=True)
    assert {dtype_of(x) for x in (loss, *drawn[:2], *zero.inputs.values())} == {"float32"}
    expected = np.mean(ops.convert_to_numpy(drawn[1]).astype("float64") ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-6)  # rounding of a float32 mean
    assert dtype_of(model.loss_of({"image": IMAGES})) == "float32"  # of the network itself


@pytest.mark.parametrize("half", ["bfloat16", pytest.param("float16", marks=pytest.mark.once)])
def test_weights_average_and_optimizer_are_float32(half):
    network = UViT(**TINY, dtype=f"mixed_{half}")
    model = DiffusionModel(network, ema_warmup=False, optimizer=dict(warmup_steps=0))
    model.compile()
    k = [w.path for w in network.weights].index("mid_block/mlp_in/kernel")
    before = ops.convert_to_numpy(model.ema_network.weights[k])
    model.fit({"image": IMAGES}, batch_size=8, verbose=0)
    floats = [v for v in (*model.variables, *model.optimizer.variables) if "float" in v.dtype]
    assert len(floats) > 4 * len(network.weights)  # weights, average, two slots each
    assert {v.dtype for v in floats} == {"float32"}
    # Adam's first step is 2e-4 of weights near 0.02, of which the average takes 1e-4: 2e-8.
    # bfloat16 could not tell that from nothing; float32's spacing there is 2e-9.
    average, weight = (ops.convert_to_numpy(n.weights[k]) for n in (model.ema_network, network))
    np.testing.assert_allclose(average - before, 1e-4 * (weight - before), atol=4e-9)
    assert np.abs(average - before).max() > 1e-8


# Keras' own settings ------------------------------------------------------------------------------

# What a user's keras.json may hold, the least usual value of each.
UNUSUAL = {"image_data_format": "channels_first", "floatx": "bfloat16", "epsilon": 0.01}


@pytest.fixture
def unusual():
    """A function that sets Keras as in `UNUSUAL`; the test's end undoes it."""
    usual = {key: getattr(keras.config, key)() for key in UNUSUAL}

    def set_all(values=UNUSUAL):
        for key, value in values.items():
            getattr(keras.config, f"set_{key}")(value)

    yield set_all
    set_all(usual)


# Networks by what makes them, and the shape of an image.
MADE = {
    "uvit": (lambda: UViT(**TINY, dtype="float32"), (4, 4, 1)),
    "uvit, convolutions": (
        lambda: UViT(**TINY, patch_embed="conv", output_conv="before", dtype="float32"),
        (4, 4, 1),
    ),
    "unet": (lambda: UNet((4, 8, 1), 8, **SMALL_UNET, dtype="float32"), (4, 8, 1)),
    "autoencoder": (
        lambda: AutoencoderKL(base_dim=32, multipliers=(1, 1), num_res_blocks=1),
        (4, 8, 3),
    ),
    "classifier": (lambda: Classifier((8, 40, 1), 2).network, (8, 40, 1)),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MADE)
def test_networks_do_not_depend_on_keras_json(name, unusual):
    make, shape = MADE[name]
    x, usual = normal(2, *shape), make()
    if "net" in name or "uvit" in name:
        x = {"image": x, "timestep": np.array([1, 900], "float32")}

    def output(network):
        return numpy(keras.tree.flatten(network(x))[0])

    expected = output(usual)
    unusual()
    network = make()
    assert [w.shape for w in network.weights] == [w.shape for w in usual.weights]
    network.set_weights(usual.get_weights())
    np.testing.assert_allclose(output(network), expected, atol=1e-6)


def test_training_does_not_depend_on_keras_json(unusual):
    network = UViT(**TINY, dtype="float32")

    def trained():
        model = DiffusionModel(network, optimizer=dict(warmup_steps=1), seed=3)
        model.compile()
        losses = model.fit(IMAGES, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
        return [*losses, model.evaluate(IMAGES, verbose=0)], model.generate(2, num_steps=2)

    weights = network.get_weights()
    expected, images = trained()
    network.set_weights(weights)
    unusual()
    losses, again = trained()
    # bfloat16 anywhere in the losses would change their third digit.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert np.abs(again.astype(int) - images).max() <= 1


@pytest.mark.once
def test_shipped_weights_do_not_depend_on_keras_json(unusual):
    expected = presets.load("uvit_tiny_digits", weights="pretrained").network.get_weights()
    unusual()
    weights = presets.load("uvit_tiny_digits", weights="pretrained", dtype="float32")
    for a, b in zip(weights.network.get_weights(), expected):
        np.testing.assert_array_equal(a, b)


# Recomputing --------------------------------------------------------------------------------------


def pair(make, **switches):
    """The same network, keeping and recomputing."""
    plain, remat = make(**switches), make(**switches, remat=True)
    for i, weight in enumerate(plain.weights):  # zero biases and unit scales hide mistakes
        weight.assign(weight + 0.1 * normal(*weight.shape, seed=i))
    remat.set_weights(plain.get_weights())
    return plain, remat


def uvit(**switches):
    return UViT(**TINY, **switches)


def unet(**switches):
    return UNet((4, 4, 1), 4, (1,), 1, (), 4, context_shape=(3, 5), **switches)


ALL_NEW = dict(norm="rms", mlp="swiglu", position="rotary")
NORMS_MORE = dict(qk_norm=True, skip_norm=True)
RECOMPUTED = [
    (uvit, dict(skip="concat", **NORMS_MORE)),
    (uvit, dict(skip="add_project", time="adaln", **ALL_NEW)),
    (unet, {}),
    *[
        pytest.param(uvit, switches, marks=pytest.mark.once)
        for switches in (
            dict(skip="add", time="adaln", **ALL_NEW),
            dict(skip="project_sum", **NORMS_MORE),
            dict(skip=None, qk_norm=True),
        )
    ],
]


@pytest.mark.parametrize(("make", "switches"), RECOMPUTED)
def test_recomputing_changes_no_gradient(make, switches, monkeypatch):
    calls, remat = [], keras.remat
    monkeypatch.setattr(keras, "remat", lambda f: calls.append(f) or remat(f))
    inputs = {"image": IMAGES[:4], "timestep": np.linspace(1, 999, 4).astype("float32")}
    if make is unet:
        inputs["context"] = normal(4, 3, 5)
    found = []
    for network in pair(make, **switches):
        assert not calls
        found.append(
            gradients(
                lambda n=network: ops.mean(ops.square(n(inputs, training=True) - 1.0)),
                network.trainable_variables,
            )
        )
    layers = [layer for layer in network.layers if hasattr(layer, "remat")]
    # A long skip is where that keeps less: the next test.
    kept = [layer for layer in layers if getattr(layer, "merge", "concat") != "concat"]
    assert len(calls) == len(layers) - len([layer for layer in kept if not layer.norm])
    assert len(found[0]) > 30
    for a, b in zip(*found, strict=True):
        a, b = numpy(a), numpy(b)
        assert np.abs(a).max() > 0
        # The same sums, perhaps fused otherwise: some float32 roundings of the largest.
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("skip_norm", [False, True])
@pytest.mark.parametrize("merge", parts.SKIPS)
def test_a_long_skip_is_recomputed_where_that_keeps_less(merge, skip_norm, monkeypatch):
    calls, remat = [], keras.remat
    monkeypatch.setattr(keras, "remat", lambda f: calls.append(f) or remat(f))
    layer, x = parts.LongSkip(merge, norm=skip_norm, remat=True), normal(2, 5, 12)
    layer(x, x)
    assert not calls  # only where there will be a backward pass
    layer(x, x, training=True)
    assert bool(calls) == (skip_norm or merge == "concat")


@pytest.mark.skipif(backend.NAME == "tensorflow", reason="no way to see what its tape keeps")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_recomputing_keeps_fewer_bytes(dtype, monkeypatch):
    plain, remat = pair(uvit, dtype=dtype)
    kept = kept_bytes(remat, 4, monkeypatch)
    # An eighth is left; one of the three blocks not recomputed would leave 40 %.
    assert kept < kept_bytes(plain, 4, monkeypatch) / 5
    # Recomputing the long skip keeps x instead of [x, s], both `(B, L, D)`.
    remat.get_layer("skip_0").remat = False
    tokens = 4 * 5 * 16 * (4 if dtype == "float32" else 2)
    assert kept_bytes(remat, 4, monkeypatch) >= kept + tokens
