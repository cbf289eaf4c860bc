"""Rotary positions against complex numbers; what is added to tokens is in test_layers.py."""

import numpy as np
import pytest
from keras import ops

from keras_uvit import UViT
from keras_uvit.networks.positions import rotary_turns, rotate

GRID, EXTRAS, HEAD = (3, 4), 2, 8
LENGTH = EXTRAS + 12


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def rotated(x, grid=GRID):
    turns = rotary_turns(grid, x.shape[1], x.shape[-1])
    return ops.convert_to_numpy(rotate(ops.convert_to_tensor(x), turns))


def test_rotation_is_a_product_of_complex_numbers():
    x = random(2, LENGTH, 3, HEAD)
    z = x[..., : HEAD // 2] + 1j * x[..., HEAD // 2 :]
    for k in range(12):
        row, column = divmod(k, 4)
        turns = np.exp(1j * np.array([row, row * 0.01, column, column * 0.01]))  # 10000^(-i / 2)
        z[:, EXTRAS + k] = z[:, EXTRAS + k] * turns
    # float32 rounding of numbers up to 4.
    np.testing.assert_allclose(rotated(x), np.concatenate([z.real, z.imag], -1), atol=1e-6)


def test_extra_tokens_are_as_they_were_and_lengths_too():
    x = random(2, LENGTH, 3, HEAD)
    out = rotated(x)
    np.testing.assert_array_equal(out[:, :EXTRAS], x[:, :EXTRAS])
    assert np.abs(out[:, EXTRAS + 1 :] - x[:, EXTRAS + 1 :]).max(axis=(0, 2, 3)).min() > 0.1
    lengths = [np.linalg.norm(a, axis=-1) for a in (out, x)]
    np.testing.assert_allclose(*lengths, rtol=1e-6)  # float32 rounding


def test_scores_depend_on_relative_positions_only():
    query, key = (np.broadcast_to(random(HEAD, seed=i), (1, 12, 1, HEAD)) for i in (0, 1))
    scores = rotated(query)[0, :, 0] @ rotated(key)[0, :, 0].T
    places = np.array([divmod(k, 4) for k in range(12)])
    by_offset = {}
    for i, j in np.ndindex(12, 12):
        by_offset.setdefault(tuple(places[i] - places[j]), []).append(scores[i, j])
    assert len(by_offset) == 5 * 7
    # float32 rounding of sums of eight products.
    assert max(np.ptp(values) for values in by_offset.values()) < 1e-5
    means = np.sort([np.mean(values) for values in by_offset.values()])
    assert np.diff(means).min() > 1e-4  # no two offsets are alike


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_angles_are_float32_whatever_the_dtype(dtype):
    # At row 200 bfloat16 would round angles to 1 radian.
    x = ops.cast(random(1, 201, 1, 4), dtype)
    turns = rotary_turns((201, 1), 201, 4)
    exact = rotate(ops.cast(x, "float32"), turns)
    half = rotate(x, turns)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(half, "float32")),
        ops.convert_to_numpy(ops.cast(ops.cast(exact, dtype), "float32")),
    )


def test_a_network_has_no_weights_for_them_and_reads_them():
    tiny = dict(image_shape=(4, 6, 3), hidden_dim=16, num_layers=1, num_heads=2, output_conv=False)
    rotary, none = UViT(**tiny, position="rotary"), UViT(**tiny, position=None)
    assert [w.path for w in rotary.weights] == [w.path for w in none.weights]
    none.set_weights([5.0 * w for w in rotary.get_weights()])  # fresh ones hardly attend
    rotary.set_weights(none.get_weights())
    x = {"image": random(1, 4, 6, 3), "timestep": np.array([10.0], "float32")}
    out, blind = (ops.convert_to_numpy(network(x)) for network in (rotary, none))
    assert np.abs(out - blind).max() > 1e-3
    # Without positions a network moves its answer as its input is moved, patch by patch.
    x["image"] = np.roll(x["image"], 2, axis=2)
    out_, blind_ = (ops.convert_to_numpy(network(x)) for network in (rotary, none))
    np.testing.assert_allclose(blind_, np.roll(blind, 2, axis=2), atol=1e-4)  # sums reordered
    assert np.abs(out_ - np.roll(out, 2, axis=2)).max() > 1e-3


@pytest.mark.parametrize("head_dim", [2, 6])
def test_a_head_that_cannot_be_split_is_named(head_dim):
    with pytest.raises(ValueError, match=f"hidden_dim / num_heads = {head_dim}; .* multiple of 4"):
        rotary_turns(GRID, LENGTH, head_dim)
