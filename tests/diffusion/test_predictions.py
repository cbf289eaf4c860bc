"""What networks predict: each definition, and that x0 comes back from each."""

import numpy as np
import pytest
from keras import ops

from keras_uvit.diffusion import predictions
from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear

SCHEDULES = [VPLinear(), VPCosine(), VPDiscrete(), LinearPath()]


def name(schedule):
    return type(schedule).__name__


def draws(t):
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, len(t), 3, 2, 1))
    return x0, noise


def tensors(*arrays):
    return [ops.convert_to_tensor(a, "float32") for a in arrays]


def column(c):
    return np.asarray(c)[:, None, None, None]


def predicted(prediction, schedule, t, x0, noise):
    t, x0, noise = tensors(t, x0, noise)
    return ops.convert_to_numpy(predictions.target(prediction, schedule, t, x0, noise))


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_x0_comes_back_from_its_target(schedule, prediction):
    # Up to 0.7: alpha > 0.07 there; epsilon divides the float32 rounding by alpha.
    t = np.linspace(0.03, 0.7, 16)
    x0, noise = draws(t)
    t_, x0_, noise_ = tensors(t, x0, noise)
    x = predictions.add_noise(schedule, t_, x0_, noise_)
    output = predictions.target(prediction, schedule, t_, x0_, noise_)
    result = ops.convert_to_numpy(predictions.denoised(prediction, schedule, t_, x, output))
    # 3e-5: float32 rounding 1e-7 of numbers up to 3, times 1 / alpha < 15, a few times over.
    np.testing.assert_allclose(result, x0, rtol=0, atol=3e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_x0_and_v_are_well_conditioned_where_epsilon_is_not(schedule, prediction):
    t = np.linspace(0.8, min(schedule.t_max, 0.999), 8)
    x0, noise = draws(t)
    t_, x0_, noise_ = tensors(t, x0, noise)
    x = predictions.add_noise(schedule, t_, x0_, noise_)
    output = predictions.target(prediction, schedule, t_, x0_, noise_)
    result = ops.convert_to_numpy(predictions.denoised(prediction, schedule, t_, x, output))
    # 3e-6: float32 rounding of numbers up to 3, no division by alpha.
    np.testing.assert_allclose(result, x0, rtol=0, atol=3e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_noisy_data_is_alpha_x0_plus_sigma_noise(schedule):
    t = np.linspace(0.1, 0.9, 9)
    x0, noise = draws(t)
    result = predictions.add_noise(schedule, *tensors(t, x0, noise))
    expected = column(schedule.alpha(t)) * x0 + column(schedule.sigma(t)) * noise
    # 1e-5: float32 time, alpha and sigma.
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_epsilon_is_the_noise_and_x0_the_data(schedule):
    t = np.linspace(0.1, 0.9, 9)
    x0, noise = draws(t)
    np.testing.assert_array_equal(
        predicted("epsilon", schedule, t, x0, noise), noise.astype("float32")
    )
    np.testing.assert_array_equal(predicted("x0", schedule, t, x0, noise), x0.astype("float32"))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_v_is_alpha_noise_minus_sigma_x0(schedule):
    t = np.linspace(0.1, 0.9, 9)
    x0, noise = draws(t)
    expected = column(schedule.alpha(t)) * noise - column(schedule.sigma(t)) * x0
    # 1e-5: float32 time, alpha and sigma.
    np.testing.assert_allclose(predicted("v", schedule, t, x0, noise), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_velocity_is_the_derivative_of_noisy_data_by_time(schedule):
    # Middles of steps of VPDiscrete, which is smooth only inside a step.
    t, h = (np.arange(100, 900, 100) + 0.5) / 1000, 1e-5
    x0, noise = draws(t)
    ahead, behind = (
        column(schedule.alpha(u)) * x0 + column(schedule.sigma(u)) * noise for u in (t + h, t - h)
    )
    # 2e-4: float32 slopes up to 5 on numbers up to 3; the difference itself is right to 1e-8.
    np.testing.assert_allclose(
        predicted("velocity", schedule, t, x0, noise), (ahead - behind) / (2 * h), atol=2e-4
    )


def test_velocity_on_the_linear_path_is_noise_minus_x0():
    t = np.linspace(0.0, 1.0, 9)
    x0, noise = draws(t)
    # 1e-6: one float32 subtraction.
    np.testing.assert_allclose(
        predicted("velocity", LinearPath(), t, x0, noise), noise - x0, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
def test_one_time_for_a_whole_batch_means_the_same_time_for_each_image(prediction):
    schedule, each = VPLinear(), np.full(4, 0.4)
    (x, output), (one, four) = draws(each), tensors(0.4, each)
    x, output = tensors(x, output)
    a, b = (predictions.denoised(prediction, schedule, t, x, output) for t in (one, four))
    # 1e-6: the compiler may fuse the two shapes differently.
    np.testing.assert_allclose(
        ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-6, atol=1e-6
    )
