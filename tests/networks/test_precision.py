"""What stays float32 in mixed precision, what keras.json does not change, and recomputing."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UNet, UViT, presets
from keras_uvit.encoders import AutoencoderKL
from keras_uvit.evaluation.classifier import Classifier
from keras_uvit.networks import layers as parts

pytestmark = pytest.mark.eager

BACKEND = keras.config.backend()
TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=3, num_heads=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (8, 4, 4, 1)).astype("float32")
POLICIES = ["mixed_bfloat16", "mixed_float16"]
ONE_EACH = ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.once)]


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_timestep_reaches_its_embedding_exactly(policy, monkeypatch):
    seen, call = [], parts.TimeEmbedding.call
    model = DiffusionModel(UViT(**TINY, dtype=policy))
    monkeypatch.setattr(
        parts.TimeEmbedding, "call", lambda self, t: seen.append(t) or call(self, t)
    )
    times = np.array([998.9, 999.0, 3.3], "float32")  # bfloat16: 1000, 1000, 3.297
    model({"image": IMAGES[:3], "timestep": times})
    np.testing.assert_array_equal(ops.convert_to_numpy(seen[-1]), times)
    model.loss_of({"image": IMAGES})
    assert dtype_of(seen[-1]) == "float32"


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_of_norms_are_float32(policy):
    # A mean of 300 with deviations of 4: float16 cannot hold the sum of squares, and bfloat16's
    # spacing at 300 is 2, so a mean or variance rounded to it would move the results by half.
    half = policy.removeprefix("mixed_")
    x = ops.cast(300 + 4 * RNG.standard_normal((2, 5, 64)), half)
    exact = numpy(x).astype("float64")
    norm = parts.layer_norm(policy, "norm")
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True))
    # Half a spacing of the result, below 4: 2^-8 of it in bfloat16.
    np.testing.assert_allclose(numpy(norm(x)), expected, atol=0.02)
    rms = parts.Attention(1, qk_norm=True, dtype=policy)
    rms.build((None, 5, 64))
    expected = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(numpy(rms.query_norm(x)), expected, rtol=0.005)  # one rounding


# Keras' fused form on TensorFlow's CPU rounds sums or not, by the processor; it is not used there.
@pytest.mark.parametrize("fused", [False] if BACKEND == "tensorflow" else [False, True])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_attention_weights_are_a_float32_softmax(half, fused, monkeypatch):
    # Equal scores of 300 keys, values 1: each weight is 1/300 and the result is 1. Sums rounded to
    # bfloat16 on the way stop growing at 256 and miss it by 15 %.
    monkeypatch.setattr(parts.backend, "fuses_attention", lambda: fused)
    inside, softmax = [], ops.softmax
    monkeypatch.setattr(
        parts.backend.ops, "softmax", lambda x, *a: inside.append(dtype_of(x)) or softmax(x, *a)
    )
    ones = ops.ones((1, 300, 2, 8), half)
    out = numpy(parts.backend.attention(ones, ones, ones))
    np.testing.assert_allclose(out, 1.0, rtol=0.01)  # a few roundings of bfloat16, 0.4 % each
    assert inside == ([] if fused else ["float32"])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras' fused form rounds scores there")
def test_fused_attention_keeps_large_scores_apart(monkeypatch):
    # Scores near 100 differ by less than bfloat16's spacing there, 0.5: rounded, they would be
    # equal or twice as far apart.
    monkeypatch.setattr(parts.backend, "fuses_attention", lambda: True)
    query = np.full((1, 1, 1, 16), 5.0)
    key = np.full((1, 8, 1, 16), 5.0)
    key[0, :, 0, 0] += np.arange(8) / 32  # exact in bfloat16
    value = RNG.integers(-8, 9, (1, 8, 1, 16)).astype("float64")
    scores = np.einsum("blnk,bmnk->bnlm", query, key) / 4
    weights = np.exp(scores - scores.max())
    expected = np.einsum("bnlm,bmnk->blnk", weights / weights.sum(), value)
    half = [ops.cast(a, "bfloat16") for a in (query, key, value)]
    out = numpy(parts.backend.attention(*half))
    # Weights may be rounded to bfloat16, 0.4 % of values up to 8.
    np.testing.assert_allclose(out, expected, atol=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_loss_is_float32(policy):
    model = DiffusionModel(UViT(**TINY, dtype=policy))

    class Zero:
        num_classes = context_shape = None

        def __call__(self, inputs, training=False):
            self.inputs = inputs
            return ops.zeros(ops.shape(inputs["image"]), policy.removeprefix("mixed_"))

    drawn = model.draw(ops.convert_to_tensor(IMAGES), model.objective)
    model.draw = lambda x0, objective: drawn
    zero = Zero()
    loss = model.mean_loss({"image": IMAGES}, zero, training=True)
    assert {dtype_of(x) for x in (loss, *drawn[:2], *zero.inputs.values())} == {"float32"}
    expected = np.mean(ops.convert_to_numpy(drawn[1]).astype("float64") ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-6)  # rounding of a float32 mean
    assert dtype_of(model.loss_of({"image": IMAGES})) == "float32"  # of the network itself


@pytest.mark.parametrize("policy", ONE_EACH)
def test_weights_average_and_optimizer_are_float32(policy):
    model = DiffusionModel(
        UViT(**TINY, dtype=policy), ema_warmup=False, optimizer=dict(warmup_steps=0)
    )
    model.compile()
    before = [ops.convert_to_numpy(w) for w in model.ema_network.weights]
    model.fit({"image": IMAGES}, batch_size=8, verbose=0)
    floats = [v for v in (*model.variables, *model.optimizer.variables) if "float" in v.dtype]
    assert len(floats) > 4 * len(model.network.weights)  # weights, average, two slots each
    assert {v.dtype for v in floats} == {"float32"}
    # Adam's first step is 2e-4 of weights near 0.02, of which the average takes 1e-4: 2e-8.
    # bfloat16 could not tell that from nothing; float32's spacing there is 2e-9.
    name = "mid_block/mlp_in/kernel"
    k = [w.path.endswith(name) for w in model.ema_network.weights].index(True)
    average, weight = (
        ops.convert_to_numpy(n.weights[k]) for n in (model.ema_network, model.network)
    )
    np.testing.assert_allclose(average - before[k], 1e-4 * (weight - before[k]), atol=4e-9)
    assert np.abs(average - before[k]).max() > 1e-8


# Keras' own settings ------------------------------------------------------------------------------

# What a user's keras.json may hold, the least usual value of each.
UNUSUAL = {"image_data_format": "channels_first", "floatx": "bfloat16", "epsilon": 0.01}
SMALL_UNET = dict(multipliers=(1, 2), num_blocks=1, attention_levels=(1,), head_dim=8)


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
    x = RNG.uniform(-1, 1, (2, *shape)).astype("float32")
    usual = make()
    if isinstance(usual, UViT | UNet):
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


def inputs(count=4):
    return {"image": IMAGES[:count], "timestep": np.linspace(1, 999, count).astype("float32")}


def pair(**switches):
    """The same network, keeping and recomputing."""
    plain, remat = UViT(**TINY, **switches), UViT(**TINY, remat=True, **switches)
    for i, weight in enumerate(plain.weights):  # zero biases and unit scales hide mistakes
        weight.assign(weight + 0.1 * np.random.default_rng(i).standard_normal(weight.shape))
    remat.set_weights(plain.get_weights())
    return plain, remat


def loss_of(network, values=None):
    def loss(x):
        return ops.mean(ops.square(network(x, training=True) - 1.0))

    if values is None:
        return loss(inputs())
    with keras.StatelessScope(zip(network.trainable_variables, values)):
        return loss(inputs())


def gradients(network):
    if BACKEND == "jax":
        import jax

        values = [v.value for v in network.trainable_variables]
        return jax.jit(jax.grad(lambda values: loss_of(network, values)))(values)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def differentiate():
            with tf.GradientTape() as tape:
                loss = loss_of(network)
            return tape.gradient(loss, [v.value for v in network.trainable_variables])

        return differentiate()
    network.zero_grad()
    loss_of(network).backward()
    return [v.value.grad for v in network.trainable_variables]


@pytest.mark.parametrize(
    ("skip", "time"),
    [
        ("concat", "token"),
        ("add_project", "adaln"),
        *[
            pytest.param(skip, time, marks=pytest.mark.once)
            for skip, time in [("add", "adaln"), ("project_sum", "token"), (None, "token")]
        ],
    ],
)
def test_recomputing_changes_no_gradient(skip, time):
    later = dict(norm="rms", mlp="swiglu", position="rotary")
    extras = dict(qk_norm=True, skip_norm=skip is not None) if time == "token" else later
    plain, remat = (gradients(n) for n in pair(skip=skip, time=time, **extras))
    assert len(plain) == len(remat) > 30
    for a, b in zip(plain, remat):
        a, b = numpy(a), numpy(b)
        assert np.abs(a).max() > 0
        # The same sums, perhaps fused otherwise: some float32 roundings of the largest.
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("skip_norm", [False, True])
@pytest.mark.parametrize("merge", parts.SKIPS)
def test_a_long_skip_is_recomputed_where_that_keeps_less(merge, skip_norm, monkeypatch):
    calls, remat = [], keras.remat
    monkeypatch.setattr(keras, "remat", lambda f: calls.append(f) or remat(f))
    layer = parts.LongSkip(merge, norm=skip_norm, remat=True)
    x = RNG.standard_normal((2, 5, 12)).astype("float32")
    layer(x, x)
    assert not calls  # only where there will be a backward pass
    layer(x, x, training=True)
    assert bool(calls) == (skip_norm or merge == "concat")


def kept_bytes(network):
    """Bytes that the backward pass keeps beside the weights."""
    if BACKEND == "jax":
        import jax
        from jax.extend.core import Literal

        values = [v.value for v in network.trainable_variables]
        kept = jax.make_jaxpr(lambda v: jax.vjp(lambda v: loss_of(network, v), v)[1])(values)
        arrays = {v for v in kept.jaxpr.outvars if not isinstance(v, Literal)}
        arrays -= set(kept.jaxpr.invars)
        return sum(v.aval.size * v.aval.dtype.itemsize for v in arrays)
    import torch

    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes(), tensor  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(network)
    for variable in network.variables:
        storages.pop(variable.value.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in storages.values())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="no way to see what its tape keeps")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_recomputing_keeps_fewer_bytes(dtype):
    plain, remat = pair(dtype=dtype)
    kept = kept_bytes(remat)
    # An eighth is left; one of the three blocks not recomputed would leave 40 %.
    assert kept < kept_bytes(plain) / 5
    # Recomputing the long skip keeps x instead of [x, s], both `(B, L, D)`.
    remat.get_layer("skip_0").remat = False
    tokens = 4 * 5 * 16 * (4 if dtype == "float32" else 2)
    assert kept_bytes(remat) >= kept + tokens
