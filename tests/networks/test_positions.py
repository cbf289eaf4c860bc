"""Rotary positions against complex numbers; what is added to tokens is in test_layers.py."""

import numpy as np
import pytest
from keras import ops
from tiny import normal, numpy

from keras_uvit import UViT
from keras_uvit.networks.positions import rotary_turns, rotate


def test_rotation_is_a_product_of_complex_numbers_that_leaves_extra_tokens_as_they_were():
    """So that scores depend on where two patches are to each other alone."""
    x = normal(2, 2 + 12, 3, 8)  # (B, L, N, K), a grid of 3 x 4 behind two extras
    z = x[..., :4] + 1j * x[..., 4:]
    for k in range(12):
        row, column = divmod(k, 4)
        turns = np.exp(1j * np.array([row, row * 0.01, column, column * 0.01]))  # 10000^(-i / 2)
        z[:, 2 + k] = z[:, 2 + k] * turns
    out = numpy(rotate(ops.convert_to_tensor(x), rotary_turns((3, 4), 14, 8)))
    # float32 rounding of numbers up to 4.
    np.testing.assert_allclose(out, np.concatenate([z.real, z.imag], -1), atol=1e-6)
    np.testing.assert_array_equal(out[:, :2], x[:, :2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_angles_are_float32_whatever_the_dtype(dtype):
    # At row 200 bfloat16 would round angles to 1 radian.
    x, turns = ops.cast(normal(1, 201, 1, 4), dtype), rotary_turns((201, 1), 201, 4)
    exact = ops.cast(rotate(ops.cast(x, "float32"), turns), dtype)
    half = rotate(x, turns)
    np.testing.assert_array_equal(*(numpy(ops.cast(a, "float32")) for a in (half, exact)))


def test_a_network_has_no_weights_for_them_and_reads_them():
    tiny = dict(image_shape=(4, 6, 3), hidden_dim=16, num_layers=1, num_heads=2, output_conv=False)
    rotary, none = UViT(**tiny, position="rotary"), UViT(**tiny, position=None)
    assert [w.path for w in rotary.weights] == [w.path for w in none.weights]
    none.set_weights([5.0 * w for w in rotary.get_weights()])  # fresh ones hardly attend
    rotary.set_weights(none.get_weights())
    image, time = normal(1, 4, 6, 3), np.array([10.0], "float32")
    moved = np.roll(image, 2, axis=2)
    (out, out_), (blind, blind_) = (
        [numpy(network({"image": x, "timestep": time})) for x in (image, moved)]
        for network in (rotary, none)
    )
    assert np.abs(out - blind).max() > 1e-3
    # Without positions a network moves its answer as its input is moved, patch by patch.
    np.testing.assert_allclose(blind_, np.roll(blind, 2, axis=2), atol=1e-4)  # sums reordered
    assert np.abs(out_ - np.roll(out, 2, axis=2)).max() > 1e-3
