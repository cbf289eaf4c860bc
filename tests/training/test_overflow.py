"""float16 overflow is skipped and survived; gradient accumulation is the large batch."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.training import adamw

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=3, num_heads=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 4, 4, 1)).astype("uint8")


def values(variables):
    return [ops.convert_to_numpy(v) for v in variables]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def fit(model, images, batch_size=8, **options):
    options = {"verbose": 0, "shuffle": False, **options}
    return model.fit({"image": images}, batch_size=batch_size, **options).history


# Overflow -----------------------------------------------------------------------------------------


class Bursting(DiffusionModel):
    """Whose noisy images, on the batches numbered in `bad`, are too large for float16."""

    def draw(self, x0, objective):
        t, noise, dropped = super().draw(x0, objective)
        hit = ops.any(ops.equal(ops.convert_to_tensor(self.bad, "int32"), self.step))
        return t, noise * ops.where(hit, 1e6, 1.0), dropped


def bursting(bad, **arguments):
    network = UViT(**TINY, dtype="mixed_float16")
    model = Bursting(network, optimizer=dict(warmup_steps=0), **arguments)
    model.bad = bad
    model.compile()
    return model


def test_a_batch_that_overflows_float16_is_skipped_and_training_goes_on():
    model = bursting([1, 2])
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    scale = float(model.optimizer.dynamic_scale)
    fit(model, IMAGES[:8])  # a good one, so that no slot is zero
    kept = [*model.network.weights, *model.ema_network.weights]
    kept += model.optimizer.inner_optimizer.variables
    before = values(kept)
    history = fit(model, IMAGES[:16])
    assert_equal(values(kept), before)
    assert history["skipped_steps"] == [2]
    assert history["skipped_in_row"] == [2]
    assert float(model.optimizer.dynamic_scale) == scale / 4  # halved at each
    history = fit(model, IMAGES)
    assert history["skipped_steps"] == [2]
    assert history["skipped_in_row"] == [0]
    assert np.isfinite(history["loss"][0])
    assert np.isfinite(history["grad_norm"][0])
    assert int(model.optimizer.inner_optimizer.iterations) == 4
    moved = [np.abs(a - b).max() > 0 for a, b in zip(values(kept), before)]
    assert np.mean(moved) > 0.9  # all but the learning rate


@pytest.mark.once
@pytest.mark.eager
def test_float32_and_bfloat16_survive_the_same_batch():
    for dtype in ("float32", "mixed_bfloat16"):  # so it is float16 that the test above bursts
        model = Bursting(UViT(**TINY, dtype=dtype), optimizer=dict(warmup_steps=0))
        model.bad = [0]
        model.compile()
        assert fit(model, IMAGES[:8])["skipped_steps"] == [0]


@pytest.mark.eager
def test_a_weight_that_overflows_float16_stops_training_with_its_name_for_it():
    model = bursting([], max_skipped_steps=3)
    fit(model, IMAGES)
    kernel = model.network.get_layer("mid_block").mlp_in.kernel
    kernel.assign(ops.full(kernel.shape, 7e4))  # float16 ends at 65504
    before = values(model.network.weights)
    # Callbacks run beside JAX's steps: the count is read when one gets to it.
    with pytest.raises(FloatingPointError, match="[3-7] steps in a row.*float16 overflow"):
        fit(model, IMAGES, epochs=20)
    assert_equal(values(model.network.weights), before)
    assert all(np.isfinite(a).all() for a in values(model.optimizer.variables))


# Accumulation -------------------------------------------------------------------------------------


def own_draw(x0, objective):
    """Time and noise that are functions of the sample, so that no batch can change them."""
    total = ops.sum(x0, axis=(1, 2, 3))
    t = 0.5 + 0.4 * ops.sin(7.0 * total)
    noise = ops.sin(50.0 * x0 + 3.0 * ops.cos(total)[:, None, None, None])
    return t, noise, ops.zeros(ops.shape(total), "bool")


def trained(batch_size, accumulated):
    keras.utils.set_random_seed(0)
    network = UViT(**TINY)
    for i, weight in enumerate(network.weights):  # equal ones, and no gradient near zero
        weight.assign(weight + 0.1 * np.random.default_rng(i).standard_normal(weight.shape))
    model = DiffusionModel(network, ema_decay=0.5, ema_warmup=False)
    model.draw = own_draw
    optimizer = dict(warmup_steps=2, decay_steps=6, clipnorm=None)
    model.compile(adamw(1e-3, gradient_accumulation_steps=accumulated, **optimizer))
    start = values(network.weights)
    fit(model, IMAGES, batch_size=batch_size, epochs=5)
    assert int(model.optimizer.iterations) == int(model.ema_step) == 5
    return start, values(network.weights), values(model.ema_network.weights)


@pytest.mark.eager
@pytest.mark.once
@pytest.mark.parametrize("parts", [2, 6])
def test_accumulated_gradients_are_the_large_batch(parts):
    start, whole, whole_average = trained(24, None)
    again, weights, average = trained(24 // parts, parts)
    assert_equal(start, again)
    for a, b in zip(whole + whole_average, weights + average):
        # Sums of gradients in another order: 1e-7 of them, more where Adam divides a small one.
        np.testing.assert_allclose(a, b, atol=1e-5)
    moved = [np.abs(a - b).max() for a, b in zip(whole, start)]
    assert min(moved) > 1e-3  # a hundred times what would be overlooked
