"""Which times training draws and what errors there count, against the papers' own formulas."""

import math

import numpy as np
import pytest
from keras import ops
from oracles import SCHEDULES, name

from keras_uvit import backend
from keras_uvit.diffusion import predictions, weighting
from keras_uvit.diffusion.schedules import LinearPath, VPDiscrete, VPLinear

U = np.linspace(0.002, 0.998, 250)
LAST = 1 - 2.0**-24  # the float32 below 1
ENDS = [0.0, 2.0**-149, 2.0**-30, 2.0**-24, 1 - 2.0**-23, LAST]


def sampled(sampling, u):
    u = ops.convert_to_tensor(np.asarray(u, "float32"))
    return ops.convert_to_numpy(weighting.TIME_SAMPLINGS[sampling](u)).astype("float64")


def min_snr(prediction, schedule, t, run=lambda f: f):
    of = run(lambda t: weighting.loss_weight("min_snr", prediction, schedule, t))
    return ops.convert_to_numpy(of(ops.convert_to_tensor(np.asarray(t, "float32"))))


# Distribution functions of the times, from the papers' densities.
def logit_normal_share(t):
    return 0.5 * (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2)))


def cosmap_share(t):
    grid = np.linspace(0, t, 2001)
    density = 2 / (math.pi - 2 * math.pi * grid + 2 * math.pi * grid**2)
    return np.trapezoid(density, grid)


SHARES = {"uniform": lambda t: t, "logit_normal": logit_normal_share, "cosmap": cosmap_share}


@pytest.mark.parametrize("sampling", weighting.TIME_SAMPLINGS)
def test_as_many_times_are_drawn_as_the_density_says(sampling):
    t = sampled(sampling, U)
    shares = np.array([SHARES[sampling](x) for x in t])
    # float32: where little is drawn, a spacing of t, 6e-8, holds up to 20 spacings of u.
    np.testing.assert_allclose(shares, U, rtol=0, atol=2e-6)
    assert (np.diff(t) > 0).all()
    np.testing.assert_allclose(t + t[::-1], 1, atol=1e-6)  # both ends are drawn alike
    if sampling != "uniform":
        assert np.diff(t).argmin() in (124, 125)  # small where much is drawn: the middle


@pytest.mark.parametrize("sampling", weighting.TIME_SAMPLINGS)
def test_times_stay_below_one_and_finite_at_the_ends(sampling):
    for run in (lambda u: u, backend.compiled):
        of = run(weighting.TIME_SAMPLINGS[sampling])
        values = ops.convert_to_numpy(of(ops.convert_to_tensor(np.array(ENDS, "float32"))))
        assert values.dtype == "float32"
        assert 0 <= values.min() <= values.max() <= LAST
        assert (np.diff(values) >= 0).all()
        t = VPDiscrete().training_time(ops.convert_to_tensor(values))
        assert ops.convert_to_numpy(t).max() <= 1  # there is no step 1001


def test_cosmap_gives_the_linear_path_the_log_snr_of_a_cosine():
    half_log_snr = LinearPath().half_log_snr(sampled("cosmap", U))
    expected = np.log(np.cos(np.pi / 2 * U) / np.sin(np.pi / 2 * U))
    # 1 - t, at least 3e-3, is right to a spacing of float32.
    np.testing.assert_allclose(half_log_snr, expected, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=name)
def test_min_snr_is_as_published_for_each_prediction(schedule):
    t = np.arange(40, 981, 20) / 1000  # steps of VPDiscrete
    t = t[t < schedule.t_max]
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    assert snr.min() < 5 < snr.max()
    published = {
        "epsilon": np.minimum(snr, 5) / snr,
        "x0": np.minimum(snr, 5),
        "v": np.minimum(snr, 5) / (snr + 1),
    }
    for prediction, expected in published.items():
        # float32 alpha and sigma of a float32 time, which counts 1000 times in `VPDiscrete`.
        ours = min_snr(prediction, schedule, t)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, err_msg=prediction)
    assert weighting.loss_weight("uniform", "v", schedule, None) == 1.0


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_the_weighted_error_is_that_of_x0_whatever_is_predicted(schedule, prediction):
    t = np.linspace(0.1, 0.7, 13).astype("float32")
    rng = np.random.default_rng(0)
    x, one, other = (rng.standard_normal((13, 1)).astype("float32") for _ in range(3))
    args = (prediction, schedule, *(ops.convert_to_tensor(a) for a in (t, x)))
    x0 = [ops.convert_to_numpy(predictions.denoised(*args, output)) for output in (one, other)]
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    expected = np.minimum(snr, 5) * (x0[0] - x0[1])[:, 0] ** 2
    weighted = min_snr(prediction, schedule, t) * (one - other)[:, 0] ** 2
    # float32, after a division by alpha > 0.07 and the difference of two estimates.
    np.testing.assert_allclose(weighted, expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("prediction", "ends"),
    [("epsilon", [0, 1]), ("x0", [5, 0]), ("v", [0, 0]), ("velocity", [0, 0])],
)
def test_weights_have_their_limits_where_data_or_noise_are_alone(prediction, ends):
    for run in (lambda f: f, backend.compiled):
        out = min_snr(prediction, LinearPath(), [0.0, 1.0], run)
        np.testing.assert_allclose(out, ends, rtol=1e-6, atol=1e-20)  # rounding; 1e-12 for 0
    if prediction != "velocity":  # itself infinite there
        out = min_snr(prediction, VPLinear(), [0.0])
        np.testing.assert_allclose(out, ends[:1], rtol=1e-6, atol=1e-20)
