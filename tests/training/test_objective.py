"""What a step draws and computes, by hand: noise, conditions, targets, weights."""

import dataclasses
import math

import numpy as np
import pytest
from keras import ops
from tiny import IMAGES, diffusion_model, normal, numpy, uvit

from keras_uvit import DiffusionModel
from keras_uvit.diffusion.objective import Objective
from keras_uvit.diffusion.schedules import LinearPath, VPLinear
from keras_uvit.training import draws

BATCH = {"image": np.concatenate([IMAGES, 255 - IMAGES]), "label": np.arange(48) % 3}
X0 = BATCH["image"] / 127.5 - 1
CHANGED = dict(time_sampling="logit_normal", loss_weighting="min_snr")


@pytest.fixture(scope="module")
def model():
    return diffusion_model(compiled=False, condition_dropout=0.3)


def drawn(model, step=0, stream=0, objective=None):
    """What a step draws."""
    draws.go_to(model.random, stream, ops.convert_to_tensor(step, "int32"))
    x0 = ops.convert_to_tensor(X0, "float32")
    return [numpy(array) for array in model.draw(x0, objective or model.objective)]


def weighted(prediction, schedule=VPLinear()):  # noqa: B008
    return Objective(schedule, prediction, **CHANGED)


CASES = {
    "default": (Objective(VPLinear()), lambda snr, t: 1 + 0 * t),
    "epsilon": (weighted("epsilon"), lambda snr, t: np.minimum(1, 5 / snr)),
    "x0": (weighted("x0"), lambda snr, t: np.minimum(snr, 5)),
    "v": (weighted("v"), lambda snr, t: np.minimum(snr, 5) / (snr + 1)),
    "velocity": (weighted("velocity", LinearPath()), lambda snr, t: np.minimum(snr, 5) * t**2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_weighted_mean_of_squares(model, monkeypatch, case):
    objective, weight = CASES[case]
    monkeypatch.setattr(model, "objective", objective)
    t, noise, dropped = drawn(model)
    t, seen, schedule = t.astype("float64").reshape(48, 1, 1, 1), {}, objective.schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    noisy, v = alpha * X0 + sigma * noise, alpha * noise - sigma * X0
    targets = {"epsilon": noise, "x0": X0, "v": v, "velocity": noise - X0}

    def half(inputs, training=False):
        """A network that answers half of what it sees."""
        seen.update({key: numpy(value) for key, value in inputs.items()})
        return 0.5 * inputs["image"]

    half.num_classes = 3
    draws.go_to(model.random, 0, model.step)
    loss = float(numpy(model.mean_loss(BATCH, half, training=True)))
    np.testing.assert_allclose(seen["image"], noisy, atol=1e-5)  # float32 exp and sqrt
    np.testing.assert_allclose(seen["timestep"], 999 * t.ravel(), rtol=1e-6)
    np.testing.assert_array_equal(seen["label"], np.where(dropped, 3, BATCH["label"]))
    errors = (0.5 * noisy - targets[objective.prediction]) ** 2
    assert loss == pytest.approx(
        np.mean(weight(alpha**2 / sigma**2, t) * errors), rel=1e-5
    )  # float32 sums
    if case != "default":
        assert abs(np.mean(errors) / loss - 1) > 0.005  # the weights count


def test_only_the_times_are_drawn_otherwise(model):
    u, noise, dropped = drawn(model)
    for sampling in ("logit_normal", "cosmap"):
        objective = dataclasses.replace(model.objective, time_sampling=sampling)
        t, *others = drawn(model, objective=objective)
        np.testing.assert_array_equal(others[0], noise)
        np.testing.assert_array_equal(others[1], dropped)
        assert np.abs(t - u).max() > 0.03
        if sampling == "logit_normal":
            shares = [0.5 * (1 + math.erf(math.log(x / (1 - x)) / math.sqrt(2))) for x in t]
            np.testing.assert_allclose(shares, u, atol=1e-5)  # float32 near the ends


def test_training_follows_the_choices_and_validation_compares_all_models_alike(model, monkeypatch):
    losses = []
    for changes in ({}, *({key: value} for key, value in CHANGED.items())):
        objective = Objective(prediction="v", **changes)  # whose target grows with t
        monkeypatch.setattr(model, "objective", objective)
        losses.append([float(numpy(f(BATCH))) for f in (model.loss_of, model.test_loss_of)])
        model.test_step_count.assign(0)
    (trained, validated), *others = losses
    assert all(abs(loss / trained - 1) > 0.01 for loss, _ in others)
    assert all(loss == validated for _, loss in others)


def test_every_step_draws_anew_and_the_same_step_the_same(model):
    first = drawn(model)
    for again, array in zip(drawn(model), first):
        np.testing.assert_array_equal(again, array)
    other_seed = DiffusionModel(model.network, seed=1)
    # Validation has its own stream.
    for t, noise, _ in (drawn(model, 1), drawn(model, 0, 1), drawn(other_seed)):
        assert np.abs(t - first[0]).min() > 0
        assert np.abs(noise - first[1]).min() > 0


def test_times_are_uniform_and_conditions_dropped_as_often_as_asked(model):
    t, _, dropped = map(numpy, model.draw(ops.zeros((2400, 1, 1, 1)), model.objective))
    # 2,400 draws: four standard deviations of a 30 % share are 3.8 %, of a uniform mean 2.4 %.
    assert abs(dropped.mean() - 0.3) < 0.038
    assert abs(t.mean() - 0.5) < 0.024
    assert 0 <= t.min() <= t.max() < 1


def test_moments_become_posterior_samples_times_the_scale(model, monkeypatch):
    monkeypatch.setattr(model, "latent_scale", 0.5)
    mean = normal(2000, 4, 4, 1)
    moments = np.concatenate([mean, np.full_like(mean, np.log(0.04))], -1)
    x = numpy(model.clean({"moments": moments}))
    noise = (x / 0.5 - mean) / 0.2
    # 32,000 numbers: four standard deviations of their mean and deviation.
    assert abs(noise.mean()) < 0.023
    assert abs(noise.std() - 1) < 0.016
    again = numpy(model.clean({"moments": moments}))
    assert np.abs(again - x).max() > 0.1  # a new sample at each visit
    np.testing.assert_array_equal(numpy(model.clean({"latent": mean})), mean)


def test_context_is_dropped_to_the_null_context():
    model = DiffusionModel(uvit(context_shape=(2, 3)))
    model.null_context.assign(np.full((2, 3), 7.0))
    context, dropped = normal(4, 2, 3), np.array([True, False, True, False])
    given = model.condition({"context": context}, ops.convert_to_tensor(dropped))
    out = numpy(given["context"])
    assert (out[dropped] == 7).all()
    np.testing.assert_array_equal(out[~dropped], context[~dropped])
