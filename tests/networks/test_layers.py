"""Each layer against the formula in its docstring, and Keras' contract for all of them."""

import math
import sys

import keras
import numpy as np
import pytest
from derivatives import gradients
from keras import ops
from tiny import normal, numpy, randomize

from keras_uvit import backend
from keras_uvit.networks import basics, patches, unet_layers
from keras_uvit.networks import layers as parts

TOKENS, IMAGE = (2, 5, 12), (2, 4, 6, 3)
# (class, arguments, shapes of its inputs)
LAYERS = [
    (patches.PatchEmbedding, dict(hidden_dim=12, patch_size=2), [IMAGE]),
    (patches.ConvPatchEmbedding, dict(hidden_dim=12, patch_size=4), [(2, 8, 4, 3)]),
    (patches.ConvPatchEmbedding, dict(hidden_dim=12, patch_size=1), [(2, 4, 4, 3)]),
    (patches.Unpatchify, dict(patch_size=2, image_shape=(4, 6, 3)), [(2, 6, 12)]),
    (parts.TimeEmbedding, dict(hidden_dim=13), [(2,)]),
    (parts.PositionEmbedding, {}, [TOKENS]),
    (parts.SinusoidalPositions, dict(grid=(2, 3)), [(2, 7, 12)]),
    (basics.RMSNorm, {}, [TOKENS]),
    (basics.RMSNorm, dict(affine=False), [TOKENS]),
    (parts.Attention, dict(num_heads=3, qkv_bias=True), [TOKENS]),
    (parts.Attention, dict(num_heads=3, qk_norm=True, grid=(2, 2)), [TOKENS]),
    (parts.TransformerBlock, dict(num_heads=3, mlp_dim=20, qkv_bias=True), [TOKENS]),
    (
        parts.TransformerBlock,
        dict(num_heads=3, mlp_dim=20, norm="rms", mlp="swiglu", qk_norm=True, grid=(1, 5)),
        [TOKENS],
    ),
    (
        parts.TransformerBlock,
        dict(num_heads=3, mlp_dim=20, adaln=True, remat=True),
        [TOKENS, (2, 12)],
    ),
    *[(parts.LongSkip, dict(merge=merge), [TOKENS, TOKENS]) for merge in parts.SKIPS],
    (parts.LongSkip, dict(merge="concat", norm=True, remat=True), [TOKENS, TOKENS]),
    (unet_layers.UNetBlock, dict(dim=6, resample="down"), [IMAGE, (2, 5)]),
    (unet_layers.UNetBlock, dict(dim=6, resample="up", remat=True), [IMAGE, (2, 5)]),
    (unet_layers.UNetAttention, dict(num_heads=3), [(2, 4, 6, 6)]),
    (unet_layers.UNetAttention, dict(num_heads=3, remat=True), [(2, 4, 6, 6), (2, 3, 5)]),
]


@pytest.mark.parametrize(("make", "arguments", "shapes"), LAYERS)
def test_layer_contract(make, arguments, shapes):
    layer, inputs = make(**arguments), [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    symbolic = make(**arguments)(*[keras.KerasTensor((None, *shape[1:])) for shape in shapes])
    layer(*inputs)
    out = numpy(randomize(layer)(*inputs))
    assert symbolic.shape == (None, *out.shape[1:])
    assert np.isfinite(out).all()

    copy = make.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    copy(*inputs)
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(copy(*inputs)), out)

    half = make(**arguments, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(half(*inputs).dtype) == "bfloat16"
    assert {keras.backend.standardize_dtype(w.dtype) for w in half.weights} <= {"float32"}


# Images, time and positions -----------------------------------------------------------------------


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
    image, layer = normal(2, 6, 4, 3), patches.PatchEmbedding(8, 2)
    out = numpy(layer(image))
    conv = keras.layers.Conv2D(8, 2, 2)
    conv.build(image.shape)
    conv.set_weights([numpy(layer.proj.kernel).reshape(2, 2, 3, 8), numpy(layer.proj.bias)])
    # Sums of 12 products of size one, in another order.
    np.testing.assert_allclose(out, numpy(conv(image)).reshape(2, 6, 8), atol=1e-5)


def test_time_embedding_is_cosines_then_sines_and_not_rounded_in_mixed_precision():
    timestep = np.array([0.0, 1.0, 999.0, 1000.0], "float32")
    angles = timestep[:, None].astype("float64") * 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # An angle of 999 has a float32 spacing of 6e-5. bfloat16 holds 1000 but not 999: rounding the
    # input would make the last two rows equal; its own rounding of numbers below 1 is 2e-3.
    for dtype, tolerance in (("float32", 1e-4), ("mixed_bfloat16", 4e-3)):
        out = parts.TimeEmbedding(8, dtype=dtype)(timestep)
        np.testing.assert_allclose(numpy(ops.cast(out, "float32")), expected, atol=tolerance)


def test_sinusoidal_positions_leave_extra_tokens_alone_and_tell_patches_apart():
    x = np.zeros((1, 8, 16), "float32")
    out = numpy(parts.SinusoidalPositions((2, 3))(x))[0]
    assert not out[:2].any()
    distances = np.linalg.norm(out[2:, None] - out[None, 2:], axis=-1)
    assert distances[~np.eye(6, dtype=bool)].min() > 0.5
    with pytest.raises(ValueError, match="multiple of 4"):
        parts.SinusoidalPositions((2, 2))(np.zeros((1, 5, 6)))


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("qk_norm", "grid"), [(False, None), (True, (2, 2))])
def test_attention_is_softmax_of_scaled_products_per_head(qk_norm, grid):
    x, layer = normal(2, 5, 12), parts.Attention(3, True, qk_norm, grid)
    layer.build(x.shape)
    values = (numpy(w).astype("float64") for w in randomize(layer).weights)
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


def test_both_forms_of_attention_agree_and_of_huge_scores_the_largest_is_picked(monkeypatch):
    q, k, v = (normal(2, 7, 3, 4, seed=i) for i in range(3))
    plain = numpy(backend.attention(q, k, v))
    # exp(1e4) overflows float32; the weights are one-hot.
    scores = np.einsum("blnk,bmnk->bnlm", q, k)
    expected = np.take_along_axis(v, scores.argmax(-1).transpose(0, 2, 1)[..., None], axis=1)
    np.testing.assert_allclose(numpy(backend.attention(1e4 * q, k, v)), expected, atol=1e-5)
    monkeypatch.setattr(backend, "fuses_attention", lambda: True)
    fused = backend.attention(*(ops.convert_to_tensor(a) for a in (q, k, v)))
    np.testing.assert_allclose(plain, numpy(fused), atol=1e-6)  # rounding of values of size one


@pytest.mark.skipif(backend.NAME != "jax", reason="cuDNN through JAX")
@pytest.mark.parametrize("length", [4, 5])
def test_on_a_gpu_cudnn_is_asked_for_an_even_number_of_tokens(monkeypatch, length):
    import jax

    shapes = []

    def attend(query, *args, **kwargs):
        shapes.append(query.shape)
        return ops.nn.dot_product_attention(query, *args, **kwargs)

    q, k, v = (ops.cast(normal(2, length, 3, 8, seed=i), "bfloat16") for i in range(3))
    plain = numpy(ops.dot_product_attention(q, k, v))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ops, "dot_product_attention", attend)
    np.testing.assert_array_equal(numpy(backend.fused_attention(q, k, v)), plain)
    assert [shape[1] % 2 for shape in shapes] == [0]


@pytest.mark.skipif(backend.NAME != "jax", reason="TPUs through JAX")
def test_on_a_tpu_keras_is_not_asked_for_its_kernel(monkeypatch):
    import jax

    q, k, v = (normal(2, 5, 3, 8, seed=i) for i in range(3))
    plain = numpy(backend.attention(q, k, v))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(ops, "dot_product_attention", None)  # a call would raise
    assert backend.fuses_attention()
    qkv = [ops.convert_to_tensor(a) for a in (q, k, v)]
    fused = numpy(backend.attention(*qkv))
    np.testing.assert_allclose(plain, fused, atol=1e-6)  # rounding of values of size one
    assert "remat" in str(jax.make_jaxpr(backend.attention)(*qkv))  # the weights are not kept


@pytest.mark.skipif(backend.NAME != "jax", reason="TPUs through JAX")
def test_on_a_tpu_a_projection_keeps_no_copy_of_the_tokens_in_rows(monkeypatch):
    import jax

    x, kernel, bias = (jax.numpy.asarray(normal(*shape)) for shape in ((2, 5, 4), (4, 6), (6,)))

    def program_and_result():
        def project(x):  # a new function each time: JAX keeps what it has traced
            return backend.project(x, kernel, bias)

        return str(jax.make_jaxpr(project)(x)), numpy(project(x))

    in_rows, expected = program_and_result()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    as_they_are, found = program_and_result()
    assert "[10,4]" in in_rows
    assert "[10,4]" not in as_they_are
    np.testing.assert_allclose(found, expected, atol=1e-6)  # rounding of values of size one


@pytest.mark.skipif(backend.NAME != "jax", reason="the others take the batch as one")
def test_attention_image_by_image_is_that_of_the_batch(monkeypatch):
    import jax

    qkv = [jax.numpy.asarray(normal(3, 5, 2, 4, seed=i)) for i in range(3)]

    def loops_and_gradients():
        def total(*qkv):  # a new function each time: JAX keeps what it has traced
            return (backend.attention(*qkv) ** 2).sum()

        loops = "scan" in str(jax.make_jaxpr(total)(*qkv))
        return loops, jax.value_and_grad(total, argnums=(0, 1, 2))(*qkv)

    looped, batch = loops_and_gradients()
    assert not looped
    monkeypatch.setattr(sys.modules["keras_uvit.backend.jax"], "LARGE", 0)
    looped, images = loops_and_gradients()
    assert looped
    # Rounding of numbers of size one, sums of 24.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), images, batch)


# Blocks and skips ---------------------------------------------------------------------------------


def layer_normed(h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(("kind", "mlp"), [("layer", "gelu"), ("rms", "swiglu")])
@pytest.mark.parametrize("adaln", [False, True])
def test_block_is_pre_norm_with_exact_gelu_or_gated(adaln, kind, mlp):
    x, time = normal(2, 5, 12), normal(2, 12, seed=1)
    block = parts.TransformerBlock(3, 20, adaln=adaln, norm=kind, mlp=mlp)
    inputs = (x, time) if adaln else (x,)
    block(*inputs)
    randomize(block)

    def linear(h, layer):
        return h @ numpy(layer.kernel) + numpy(layer.bias)

    def norm(h, layer, scale, shift):
        rms = kind == "rms"
        h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6) if rms else layer_normed(h)
        if adaln:
            return (1 + scale) * h + shift
        return h * numpy(layer.scale) if rms else h * numpy(layer.gamma) + numpy(layer.beta)

    e = np.split(linear(time, block.modulation)[:, None], 4, axis=-1) if adaln else [None] * 4
    h = x + numpy(block.attention(norm(x, block.norm_1, *e[:2]).astype("float32")))
    y = norm(h, block.norm_2, *e[2:])
    z = linear(y, block.mlp_in)
    if mlp == "swiglu":
        assert z.shape == (2, 5, 16)  # 2/3 of 20, to a multiple of 8
        gate = linear(y, block.mlp_gate)
        z = z * gate / (1 + np.exp(-gate))
    else:
        z = z * 0.5 * (1 + np.vectorize(math.erf)(z / np.sqrt(2)))
    expected = h + linear(z, block.mlp_out)
    # float32 rounding on values up to about 10; the tanh form of GELU would be off by 1e-4.
    np.testing.assert_allclose(numpy(block(*inputs)), expected, atol=2e-5)


@pytest.mark.parametrize("merge", parts.SKIPS)
def test_a_long_skip_is_its_formula_and_norms_the_result(merge):
    x, s = normal(2, 5, 12), normal(2, 5, 12, seed=1)
    expected = {
        "concat": lambda w, b: np.concatenate([x, s], -1) @ w + b,
        "add_project": lambda w, b: (x + s) @ w + b,
        "project_sum": lambda w, b: x + s @ w + b,
        "add": lambda: x + s,
    }
    for norm in (False, True):
        layer = parts.LongSkip(merge, norm=norm)
        layer(x, s)
        weights = [numpy(w).astype("float64") for w in randomize(layer).weights]
        affine = [weights.pop() for _ in range(2 * norm)]  # beta, gamma
        right = expected[merge](*weights)
        if norm:
            right = layer_normed(right) * affine[1] + affine[0]
        # float32 rounding of values of size one.
        np.testing.assert_allclose(numpy(layer(x, s)), right, atol=1e-5)


@pytest.mark.parametrize(("width", "units"), [(3, 5), (5, 3)], ids=["wider", "narrower"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["rows", "tokens"])
def test_a_dense_layer_has_the_gradients_of_a_product(width, units, shape):
    x, dy = keras.Variable(normal(*shape, width)), normal(*shape, units, seed=1)
    weigh = ops.convert_to_tensor(dy)
    layer = parts.dense(units, "float32", "dense")
    layer.build((None, width))
    kernel, bias = (numpy(w) for w in randomize(layer).weights)
    expected = {
        "x": dy @ kernel.T,
        "kernel": np.tensordot(numpy(x), dy, (range(len(shape)), range(len(shape)))),
        "bias": dy.reshape(-1, units).sum(axis=0),
    }
    # Sums of at most six products of float32 numbers of about 1.
    close = dict(rtol=0, atol=5e-6)
    value = layer(ops.convert_to_tensor(x))
    np.testing.assert_allclose(numpy(value), numpy(x) @ kernel + bias, **close)
    found = gradients(
        lambda: ops.sum(layer(ops.convert_to_tensor(x)) * weigh), [x, layer.kernel, layer.bias]
    )
    for key, gradient in zip(expected, found, strict=True):
        np.testing.assert_allclose(numpy(gradient), expected[key], **close, err_msg=key)
