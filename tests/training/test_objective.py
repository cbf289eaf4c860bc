"""The loss by other times and weights, computed by hand; the default's are in the model's tests."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.diffusion.schedules import LinearPath, VPLinear
from keras_uvit.training import draws

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (64, 4, 4, 1)).astype("float32")
BATCH = {"image": IMAGES, "label": np.arange(64) % 3}
CHANGED = dict(time_sampling="logit_normal", loss_weighting="min_snr")


def make(**arguments):
    keras.utils.set_random_seed(0)
    return DiffusionModel(UViT(**TINY, num_classes=3), **arguments)


def drawn(model, **changes):
    """What the first step draws, with another objective where there are `changes`."""
    objective = dataclasses.replace(model.objective, **changes)
    draws.go_to(model.random, 0, model.step)
    return [ops.convert_to_numpy(a) for a in model.draw(ops.convert_to_tensor(IMAGES), objective)]


def number(loss):
    return float(ops.convert_to_numpy(loss))


def zeros(inputs, training=False):
    """A network that answers 0, so that the error is the target."""
    return ops.zeros(ops.shape(inputs["image"]))


zeros.num_classes = 3


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("epsilon", VPLinear()), ("x0", VPLinear()), ("v", VPLinear()), ("velocity", LinearPath())],
)
def test_the_loss_is_the_weighted_mean_of_squares(prediction, schedule):
    model = make(prediction=prediction, schedule=schedule, **CHANGED)
    t, noise, _ = (a.astype("float64") for a in drawn(model))
    column = (64, 1, 1, 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    snr = alpha**2 / sigma**2
    clipped = np.minimum(snr, 5)
    alpha, sigma = alpha.reshape(column), sigma.reshape(column)
    weight, target = {
        "epsilon": (clipped / snr, noise),
        "x0": (clipped, IMAGES),
        "v": (clipped / (snr + 1), alpha * noise - sigma * IMAGES),
        "velocity": (clipped * t**2, noise - IMAGES),
    }[prediction]
    draws.go_to(model.random, 0, model.step)
    loss = number(model.mean_loss(BATCH, zeros, training=True))
    expected = np.mean(weight.reshape(column) * target**2)
    assert loss == pytest.approx(expected, rel=1e-5)  # float32 sums, alpha and sigma
    assert abs(np.mean(target**2) / expected - 1) > 0.005  # the weights count


def test_only_the_times_are_drawn_otherwise():
    model = make()
    u, noise, dropped = drawn(model)
    for sampling in ("logit_normal", "cosmap"):
        t, noise_, dropped_ = drawn(model, time_sampling=sampling)
        np.testing.assert_array_equal(noise_, noise)
        np.testing.assert_array_equal(dropped_, dropped)
        assert np.abs(t - u).max() > 0.03
    shares = [
        0.5 * (1 + math.erf(math.log(x / (1 - x)) / math.sqrt(2)))
        for x in drawn(model, time_sampling="logit_normal")[0]
    ]
    np.testing.assert_allclose(shares, u, atol=1e-5)  # float32 near the ends


def test_training_follows_the_choices_and_validation_compares_all_models_alike():
    plain = make(prediction="v")  # whose target grows with t
    trained, validated = number(plain.loss_of(BATCH)), number(plain.test_loss_of(BATCH))
    for key, value in CHANGED.items():
        other = make(prediction="v", **{key: value})
        assert abs(number(other.loss_of(BATCH)) / trained - 1) > 0.01
        assert number(other.test_loss_of(BATCH)) == validated
