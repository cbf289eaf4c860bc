"""What networks predict: each definition, and that x0 comes back from each."""

import numpy as np
import pytest
from keras import ops
from oracles import SCHEDULES, name

from keras_uvit.diffusion import predictions
from keras_uvit.diffusion.schedules import LinearPath, VPLinear

of_all = pytest.mark.parametrize("schedule", SCHEDULES, ids=name)


def draws(t):
    return np.random.default_rng(0).normal(size=(2, len(t), 3, 2, 1))  # x0, noise


def tensors(*arrays):
    return [ops.convert_to_tensor(a, "float32") for a in arrays]


def mixed(a, x0, b, noise):
    return np.asarray(a)[:, None, None, None] * x0 + np.asarray(b)[:, None, None, None] * noise


def assert_comes_back(schedule, prediction, t, tolerance):
    x0, noise = draws(t)
    now, *both = tensors(t, x0, noise)
    x = predictions.add_noise(schedule, now, *both)
    output = predictions.target(prediction, schedule, now, *both)
    result = ops.convert_to_numpy(predictions.denoised(prediction, schedule, now, x, output))
    np.testing.assert_allclose(result, x0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@of_all
def test_x0_comes_back_from_its_target(schedule, prediction):
    # Up to 0.7: alpha > 0.07 there; epsilon divides the float32 rounding by alpha.
    # 3e-5: float32 rounding 1e-7 of numbers up to 3, times 1 / alpha < 15, a few times over.
    assert_comes_back(schedule, prediction, np.linspace(0.03, 0.7, 16), 3e-5)
    if prediction in ("x0", "v"):  # well-conditioned where epsilon is not: no division by alpha
        late = np.linspace(0.8, min(schedule.t_max, 0.999), 8)
        assert_comes_back(schedule, prediction, late, 3e-6)


@of_all
def test_each_target_is_its_definition(schedule):
    # Middles of steps of VPDiscrete, which is smooth only inside a step.
    t, h = (np.arange(100, 900, 100) + 0.5) / 1000, 1e-5
    x0, noise = draws(t)

    def noisy(t):
        return mixed(schedule.alpha(t), x0, schedule.sigma(t), noise)

    expected = {
        "noisy": (noisy(t), 1e-5),  # float32 time, alpha and sigma
        "epsilon": (noise.astype("float32"), 0),
        "x0": (x0.astype("float32"), 0),
        "v": (mixed(-schedule.sigma(t), x0, schedule.alpha(t), noise), 1e-5),
        # 2e-4: float32 slopes up to 5 on numbers up to 3; the difference is right to 1e-8. On the
        # linear path it is noise - x0, one float32 subtraction.
        "velocity": ((noisy(t + h) - noisy(t - h)) / (2 * h), 2e-4),
    }
    if isinstance(schedule, LinearPath):
        expected["velocity"] = (noise - x0, 1e-6)
    now, *both = tensors(t, x0, noise)
    assert expected.keys() == {"noisy", *predictions.PREDICTIONS}
    for key, (value, tolerance) in expected.items():
        ours = (
            predictions.add_noise(schedule, now, *both)
            if key == "noisy"
            else predictions.target(key, schedule, now, *both)
        )
        np.testing.assert_allclose(
            ops.convert_to_numpy(ours), value, rtol=0, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
def test_one_time_for_a_whole_batch_means_the_same_time_for_each_image(prediction):
    each = np.full(4, 0.4)
    x, output, one, four = tensors(*draws(each), 0.4, each)
    a, b = (
        ops.convert_to_numpy(predictions.denoised(prediction, VPLinear(), t, x, output))
        for t in (one, four)
    )
    # 1e-6: the compiler may fuse the two shapes differently.
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
