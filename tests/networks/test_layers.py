"""Each layer against the formula in its docstring, and Keras' contract for all of them."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit.networks import basics, patches
from keras_uvit.networks import layers as parts


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(x)


def randomize(layer):
    """Zero biases and unit gammas hide mistakes."""
    for i, weight in enumerate(layer.weights):
        weight.assign(random(*weight.shape, seed=i) * 0.3)


# (layer, shapes of its inputs)
LAYERS = [
    (lambda **k: patches.PatchEmbedding(12, 2, **k), [(2, 4, 6, 3)]),
    (lambda **k: patches.ConvPatchEmbedding(12, 4, **k), [(2, 8, 4, 3)]),
    (lambda **k: patches.ConvPatchEmbedding(12, 1, **k), [(2, 4, 4, 3)]),
    (lambda **k: parts.TimeEmbedding(13, **k), [(2,)]),
    (lambda **k: parts.PositionEmbedding(**k), [(2, 5, 12)]),
    (lambda **k: parts.SinusoidalPositions((2, 3), **k), [(2, 7, 12)]),
    (lambda **k: parts.Attention(3, True, **k), [(2, 5, 12)]),
    (lambda **k: parts.Attention(3, qk_norm=True, **k), [(2, 5, 12)]),
    (lambda **k: parts.Attention(3, qk_norm=True, grid=(2, 2), **k), [(2, 5, 12)]),
    (lambda **k: basics.RMSNorm(**k), [(2, 5, 12)]),
    (lambda **k: basics.RMSNorm(affine=False, **k), [(2, 5, 12)]),
    (lambda **k: parts.TransformerBlock(3, 20, True, qk_norm=True, **k), [(2, 5, 12)]),
    (
        lambda **k: parts.TransformerBlock(3, 20, norm="rms", mlp="swiglu", grid=(1, 5), **k),
        [(2, 5, 12)],
    ),
    (lambda **k: parts.TransformerBlock(3, 20, adaln=True, remat=True, **k), [(2, 5, 12), (2, 12)]),
    *[(lambda m=m, **k: parts.LongSkip(m, **k), [(2, 5, 12), (2, 5, 12)]) for m in parts.SKIPS],
    (lambda **k: parts.LongSkip("concat", True, True, **k), [(2, 5, 12), (2, 5, 12)]),
    (lambda **k: patches.Unpatchify(2, (4, 6, 3), **k), [(2, 6, 12)]),
]


@pytest.mark.parametrize(("make", "shapes"), LAYERS)
def test_layer_contract(make, shapes):
    layer, inputs = make(), [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    symbolic = make()(*[keras.KerasTensor((None, *shape[1:])) for shape in shapes])
    out = numpy(layer(*inputs))
    assert symbolic.shape == (None, *out.shape[1:])
    assert np.isfinite(out).all()

    copy = type(layer).from_config(layer.get_config())
    copy(*inputs)
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(copy(*inputs)), out)

    half = make(dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(half(*inputs).dtype) == "bfloat16"
    assert {keras.backend.standardize_dtype(w.dtype) for w in half.weights} <= {"float32"}


def test_patches_are_cut_row_by_row_and_flattened_row_column_channel():
    image = np.arange(2 * 4 * 6 * 3, dtype="float32").reshape(2, 4, 6, 3)
    cut = numpy(patches.patchify(image, 2))
    assert cut.shape == (2, 6, 12)
    for k in range(6):
        row, column = divmod(k, 3)
        expected = image[1, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(cut[1, k], expected.reshape(-1))
    np.testing.assert_array_equal(numpy(patches.unpatchify(cut, 2, (4, 6, 3))), image)


def test_patch_embedding_is_a_strided_convolution():
    image, layer = random(2, 6, 4, 3), patches.PatchEmbedding(8, 2)
    out = numpy(layer(image))
    conv = keras.layers.Conv2D(8, 2, 2)
    conv.build(image.shape)
    conv.set_weights([numpy(layer.proj.kernel).reshape(2, 2, 3, 8), numpy(layer.proj.bias)])
    # Sums of 12 products of size one, in another order.
    np.testing.assert_allclose(out, numpy(conv(image)).reshape(2, 6, 8), atol=1e-5)


def test_time_embedding_is_cosines_then_sines():
    timestep, dim = np.array([0.0, 1.0, 999.0], "float32"), 8
    out = numpy(parts.TimeEmbedding(dim)(timestep))
    angles = timestep[:, None].astype("float64") * 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # An angle of 999 has a float32 spacing of 6e-5.
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_time_embedding_is_not_rounded_in_mixed_precision():
    layer = parts.TimeEmbedding(64, dtype="mixed_bfloat16")
    out = numpy(ops.cast(layer(np.array([999.0, 1000.0], "float32")), "float32"))
    # bfloat16 holds 1000 but not 999; rounding the input would make the two rows equal.
    assert np.abs(out[0] - out[1]).max() > 0.5


@pytest.mark.parametrize("grid", [None, (2, 2)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_softmax_of_scaled_products_per_head(qk_norm, grid):
    x, layer = random(2, 5, 12), parts.Attention(3, True, qk_norm, grid)
    layer.build(x.shape)
    randomize(layer)
    values = (numpy(w).astype("float64") for w in layer.weights)
    kernel, bias, proj, proj_bias, *scales = values
    qkv = (x @ kernel + bias).reshape(2, 5, 3, 3, 4).transpose(2, 0, 3, 1, 4)  # (3, B, N, L, K)
    assert [scale.shape for scale in scales] == [(4,)] * 2 * qk_norm
    for i, scale in enumerate(scales):
        mean_square = np.mean(qkv[i] ** 2, axis=-1, keepdims=True)
        qkv[i] *= scale / np.sqrt(mean_square + 1e-6)
    if grid:
        # Heads of 4 are two complex numbers: one turns by the row, one by the column.
        turns = np.exp(1j * np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]))
        turned = (qkv[:2, ..., :2] + 1j * qkv[:2, ..., 2:]) * turns
        qkv[:2] = np.concatenate([turned.real, turned.imag], -1)
    scores = qkv[0] @ qkv[1].swapaxes(-1, -2) / 2.0
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = (weights @ qkv[2]).transpose(0, 2, 1, 3).reshape(2, 5, 12) @ proj + proj_bias
    # float32 against float64 on values of size one.
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-5)


def test_both_forms_of_attention_agree(monkeypatch):
    q, k, v = (random(2, 7, 3, 4, seed=i) for i in range(3))
    plain = numpy(parts.backend.attention(q, k, v))
    monkeypatch.setattr(parts.backend, "fuses_attention", lambda: True)
    fused = parts.backend.attention(*(ops.convert_to_tensor(a) for a in (q, k, v)))
    np.testing.assert_allclose(plain, numpy(fused), atol=1e-6)  # rounding of values of size one


@pytest.mark.skipif(keras.config.backend() != "jax", reason="cuDNN through JAX")
@pytest.mark.parametrize("length", [4, 5])
def test_on_a_gpu_cudnn_is_asked_for_an_even_number_of_tokens(monkeypatch, length):
    import jax

    shapes = []

    def attend(query, *args, **kwargs):
        shapes.append(query.shape)
        return ops.nn.dot_product_attention(query, *args, **kwargs)

    q, k, v = (
        ops.cast(random(2, length, 3, 8, seed=i), "bfloat16") for i in range(3)
    )  # (B, L, N, K)
    plain = numpy(ops.dot_product_attention(q, k, v))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ops, "dot_product_attention", attend)
    np.testing.assert_array_equal(numpy(parts.backend.fused_attention(q, k, v)), plain)
    assert [shape[1] % 2 for shape in shapes] == [0]


def test_attention_of_huge_scores_picks_the_largest():
    # exp(1e4) overflows float32; the weights are one-hot.
    q, k, v = (random(2, 7, 3, 4, seed=i) for i in range(3))
    scores = np.einsum("blnk,bmnk->bnlm", q, k)
    expected = np.take_along_axis(v, scores.argmax(-1).transpose(0, 2, 1)[..., None], axis=1)
    np.testing.assert_allclose(numpy(parts.backend.attention(1e4 * q, k, v)), expected, atol=1e-5)


@pytest.mark.skipif(parts.backend.NAME != "jax", reason="the others take the batch as one")
def test_attention_image_by_image_is_that_of_the_batch(monkeypatch):
    import jax

    qkv = [jax.numpy.asarray(random(3, 5, 2, 4, seed=i)) for i in range(3)]

    def loops_and_gradients():
        def total(*qkv):  # a new function each time: JAX keeps what it has traced
            return (parts.backend.attention(*qkv) ** 2).sum()

        loops = "scan" in str(jax.make_jaxpr(total)(*qkv))
        return loops, jax.value_and_grad(total, argnums=(0, 1, 2))(*qkv)

    looped, batch = loops_and_gradients()
    assert not looped
    monkeypatch.setattr(sys.modules["keras_uvit.backend.jax"], "LARGE", 0)
    looped, images = loops_and_gradients()
    assert looped
    # Rounding of numbers of size one, sums of 24.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), images, batch)


@pytest.mark.parametrize(("kind", "mlp"), [("layer", "gelu"), ("rms", "swiglu")])
@pytest.mark.parametrize("adaln", [False, True])
def test_block_is_pre_norm_with_exact_gelu_or_gated(adaln, kind, mlp):
    x, time = random(2, 5, 12), random(2, 12, seed=1)
    block = parts.TransformerBlock(3, 20, adaln=adaln, norm=kind, mlp=mlp)
    inputs = (x, time) if adaln else (x,)
    block(*inputs)
    randomize(block)

    def norm(h, layer, scale, shift):
        if kind == "layer":
            h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        else:
            h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6)
        if adaln:
            return (1 + scale) * h + shift
        if kind == "layer":
            return h * numpy(layer.gamma) + numpy(layer.beta)
        return h * numpy(layer.scale)

    parts4 = [None] * 4
    if adaln:
        e = time @ numpy(block.modulation.kernel) + numpy(block.modulation.bias)
        parts4 = np.split(e[:, None], 4, axis=-1)
    h = x + numpy(block.attention(norm(x, block.norm_1, *parts4[:2]).astype("float32")))
    y = norm(h, block.norm_2, *parts4[2:])
    z = y @ numpy(block.mlp_in.kernel) + numpy(block.mlp_in.bias)
    if mlp == "swiglu":
        assert z.shape == (2, 5, 16)  # 2/3 of 20, to a multiple of 8
        gate = y @ numpy(block.mlp_gate.kernel) + numpy(block.mlp_gate.bias)
        z = z * gate / (1 + np.exp(-gate))
    else:
        erf = np.vectorize(__import__("math").erf)
        z = z * 0.5 * (1 + erf(z / np.sqrt(2)))
    expected = h + z @ numpy(block.mlp_out.kernel) + numpy(block.mlp_out.bias)
    # float32 rounding on values up to about 10; the tanh form of GELU would be off by 1e-4.
    np.testing.assert_allclose(numpy(block(*inputs)), expected, atol=2e-5)


def test_long_skip_merges():
    x, s = random(2, 5, 4), random(2, 5, 4, seed=1)
    expected = {
        "concat": lambda w, b: np.concatenate([x, s], -1) @ w + b,
        "add_project": lambda w, b: (x + s) @ w + b,
        "project_sum": lambda w, b: x + s @ w + b,
        "add": lambda: x + s,
    }
    for merge in parts.SKIPS:
        layer = parts.LongSkip(merge)
        layer(x, s)
        randomize(layer)
        right = expected[merge](*map(numpy, layer.weights))
        np.testing.assert_allclose(numpy(layer(x, s)), right, atol=1e-6)  # rounding


@pytest.mark.parametrize("merge", parts.SKIPS)
def test_long_skip_norms_the_result(merge):
    x, s = random(2, 5, 12), random(2, 5, 12, seed=1)
    layer, plain = parts.LongSkip(merge, norm=True), parts.LongSkip(merge)
    layer(x, s)
    plain(x, s)
    randomize(layer)
    *projection, gamma, beta = layer.weights
    plain.set_weights([numpy(w) for w in projection])
    h = numpy(plain(x, s)).astype("float64")
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    # float32 rounding of values of size one.
    np.testing.assert_allclose(numpy(layer(x, s)), h * numpy(gamma) + numpy(beta), atol=1e-5)


def test_sinusoidal_positions_leave_extra_tokens_alone_and_tell_patches_apart():
    x = np.zeros((1, 8, 16), "float32")
    out = numpy(parts.SinusoidalPositions((2, 3))(x))[0]
    assert not out[:2].any()
    distances = np.linalg.norm(out[2:, None] - out[None, 2:], axis=-1)
    assert distances[~np.eye(6, dtype=bool)].min() > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patches.ConvPatchEmbedding(8, 3), "power of two.*patch_size=3"),
        (lambda: parts.SinusoidalPositions((2, 2))(np.zeros((1, 5, 6))), "multiple of 4"),
    ],
)
def test_layers_say_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("width", "units"), [(3, 5), (5, 3)], ids=["wider", "narrower"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["rows", "tokens"])
def test_a_dense_layer_has_the_gradients_of_a_product(width, units, shape):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((*shape, width)), rng.standard_normal((*shape, units))
    layer = parts.dense(units, "float32", "dense")
    layer.build((None, width))
    layer.kernel.assign(rng.standard_normal((width, units)))
    expected = {
        "value": x @ ops.convert_to_numpy(layer.kernel),
        "x": dy @ ops.convert_to_numpy(layer.kernel).T,
        "kernel": np.tensordot(x, dy, (range(len(shape)), range(len(shape)))),
        "bias": dy.reshape(-1, units).sum(axis=0),
    }
    # Sums of at most six products of float32 numbers of about 1.
    for key, value in gradients(layer, x.astype("float32"), dy.astype("float32")).items():
        np.testing.assert_allclose(ops.convert_to_numpy(value), expected[key], atol=5e-6)


def gradients(layer, x, dy):
    """The layer's answer, and gradients of its sum weighted by dy."""
    x, dy = ops.convert_to_tensor(x), ops.convert_to_tensor(dy)
    if keras.config.backend() == "jax":
        import jax

        def answer(x, kernel, bias):
            return layer.stateless_call([kernel, bias], [], x)[0]

        value, back = jax.vjp(answer, x, layer.kernel.value, layer.bias.value)
        return dict(zip(("value", "x", "kernel", "bias"), (value, *back(dy))))
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            value = layer(x)
        back = tape.gradient(value, [x, layer.kernel.value, layer.bias.value], dy)
        return dict(zip(("value", "x", "kernel", "bias"), (value, *back)))
    x.requires_grad_()
    value = layer(x)
    value.backward(dy)
    kernel, bias = layer.kernel.value.grad, layer.bias.value.grad
    return {"value": value.detach(), "x": x.grad, "kernel": kernel, "bias": bias}
