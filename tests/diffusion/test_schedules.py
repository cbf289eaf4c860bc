"""Schedules: identities first, then float32 against float64, then the published tables."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear

GOLDEN = Path(__file__).parents[1] / "golden"
VP = [VPLinear(), VPLinear(beta_min=0.2, beta_max=10.0), VPCosine(), VPDiscrete()]
ALL = [*VP, LinearPath()]


def name(schedule):
    return type(schedule).__name__


def times(schedule, n=201):
    return np.linspace(schedule.t_min, schedule.t_max, n)


def float32(t):
    return ops.convert_to_tensor(t, "float32")


@pytest.mark.parametrize("schedule", VP, ids=name)
def test_variance_is_preserved(schedule):
    t = times(schedule)
    # 1e-15: a few float64 roundings of numbers below 1.
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, atol=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_half_log_snr_is_the_log_of_alpha_over_sigma(schedule):
    t = times(schedule)
    expected = np.log(schedule.alpha(t)) - np.log(schedule.sigma(t))
    # 1e-12: log of a sigma near 0.01 or an alpha near 0.001, each with relative error 1e-14.
    np.testing.assert_allclose(schedule.half_log_snr(t), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_time_inverts_half_log_snr(schedule):
    t = times(schedule)
    # 1e-11: near t = 0 and t = 1 lambda changes fast, its inverse passes through e^(2 lambda).
    np.testing.assert_allclose(schedule.time(schedule.half_log_snr(t)), t, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_noise_grows_with_time(schedule):
    t = times(schedule)
    assert (np.diff(schedule.alpha(t)) < 0).all()
    assert (np.diff(schedule.sigma(t)) > 0).all()
    assert (np.diff(schedule.half_log_snr(t)) < 0).all()


@pytest.mark.parametrize("of", ["alpha", "sigma"])
@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_slopes_are_derivatives_by_time(schedule, of):
    # Middles of steps: VPDiscrete is smooth only inside a step, t in (n, n + 1) / 1000.
    t, h = (np.arange(20, 980, 7) + 0.5) / 1000, 1e-5
    value, slope = getattr(schedule, of), getattr(schedule, f"{of}_slope")(t)
    # 1e-6: rounding 1e-16 / h = 1e-11 and truncation (h / t)^2 < 3e-7, relative to the slope.
    np.testing.assert_allclose((value(t + h) - value(t - h)) / (2 * h), slope, rtol=1e-6)


@pytest.mark.parametrize(
    "of", ["alpha", "sigma", "half_log_snr", "alpha_slope", "sigma_slope", "training_time"]
)
@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_float32_tensors_agree_with_float64_numpy(schedule, of):
    # 0.97 keeps away from the infinite slope of log alpha of VPCosine; inside steps, as above.
    t = (np.arange(2, 970, 3) + 0.5) / 1000
    function = getattr(schedule, of)
    single, double = function(float32(t)), function(t)
    assert keras.backend.standardize_dtype(single.dtype) == "float32"
    assert np.asarray(double).dtype == np.float64
    # 5e-5: rounding of t (6e-8) times the condition of log alpha, below 300 on this range.
    np.testing.assert_allclose(ops.convert_to_numpy(single), double, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_float32_has_the_right_noise_in_nearly_clean_data(schedule):
    # Training draws these times: sigma there must be right, not a rounding error of 1 - alpha^2.
    t = np.geomspace(1e-7, 1e-2, 50)
    sigma = ops.convert_to_numpy(schedule.sigma(float32(t)))
    # 1e-5: a few float32 roundings, no cancellation.
    np.testing.assert_allclose(sigma, schedule.sigma(t), rtol=1e-5)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_time_zero_is_clean_data(schedule):
    assert schedule.alpha(0.0) == 1
    assert schedule.sigma(0.0) == 0
    assert float(schedule.alpha(float32(0.0))) == 1
    assert float(schedule.sigma(float32(0.0))) == 0


def test_linear_betas_integrate_to_log_alpha():
    schedule, n = VPLinear(), 100_000
    t = (np.arange(n) + 0.5) / n
    # The midpoint rule is exact for the linear beta; 1e-12 is the rounding of the sum.
    integral = np.mean(0.1 + t * 19.9)
    np.testing.assert_allclose(schedule.log_alpha(1.0), -0.5 * integral, rtol=1e-12)


def test_cosine_follows_its_formula():
    schedule, t = VPCosine(), np.linspace(0, 0.99, 100)
    expected = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    # 1e-13: exp(log alpha) where log alpha reaches -4.
    np.testing.assert_allclose(schedule.alpha(t), expected, rtol=1e-13)


def test_cosine_stops_before_its_signal_vanishes():
    schedule = VPCosine()
    assert schedule.t_start == schedule.t_max < 1
    assert schedule.training_time(np.array([0.0, 1.0])).tolist() == [0.0, schedule.t_max]


def test_discrete_alpha_bar_is_the_running_product_of_the_betas():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    schedule, n = VPDiscrete(), np.arange(1001)
    expected = np.concatenate([[1.0], np.cumprod(1 - betas)])
    # 1e-12: a thousand roundings, and n / 1000 * 1000 may fall just outside step n.
    np.testing.assert_allclose(schedule.alpha(n / 1000) ** 2, expected, rtol=1e-12)
    assert schedule.alpha(0.0) == 1


def test_discrete_log_alpha_is_linear_between_steps():
    schedule, n = VPDiscrete(), np.arange(1000)
    ends = schedule.log_alpha(n / 1000), schedule.log_alpha((n + 1) / 1000)
    # 1e-10: rounding of t against a step of 1e-3.
    np.testing.assert_allclose(
        schedule.log_alpha((n + 0.25) / 1000), 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-10
    )


def test_discrete_training_draws_every_step_equally_often():
    t = VPDiscrete().training_time((np.arange(8000) + 0.5) / 8000)
    drawn, counts = np.unique(t, return_counts=True)
    np.testing.assert_array_equal(drawn, np.arange(1, 1001) / 1000)
    assert (counts == 8).all()


def test_discrete_training_draws_the_same_steps_in_float32():
    t = ops.convert_to_numpy(VPDiscrete().training_time(float32((np.arange(8000) + 0.5) / 8000)))
    # 1.2e-7: one float32 unit, since a compiler may multiply by 1 / 1000 instead of dividing.
    np.testing.assert_allclose(t, np.repeat(np.arange(1, 1001) / 1000, 8), rtol=1.2e-7)


@pytest.mark.parametrize("schedule", [VPLinear(), LinearPath()], ids=name)
def test_continuous_training_draws_time_uniformly(schedule):
    u = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(schedule.training_time(u), u)


def test_linear_path_is_a_straight_line_with_constant_slopes():
    schedule, t = LinearPath(), np.linspace(0, 1, 11)
    np.testing.assert_array_equal(schedule.alpha(t), 1 - t)
    np.testing.assert_array_equal(schedule.sigma(t), t)
    np.testing.assert_array_equal(schedule.alpha_slope(t), -np.ones(11))
    np.testing.assert_array_equal(schedule.sigma_slope(t), np.ones(11))


def test_time_scale_reaches_the_last_published_timestep():
    assert [s.time_scale for s in (VPLinear(), VPCosine(), VPDiscrete())] == [999, 999, 1000]


@pytest.mark.parametrize(
    "schedule",
    [*ALL, VPCosine(s=0.02, t_max=0.99), VPDiscrete(1e-4, 0.02, 100), LinearPath(t_min=0.01)],
    ids=name,
)
def test_a_saved_schedule_comes_back_equal(schedule):
    config = keras.saving.serialize_keras_object(schedule)
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is type(schedule)
    assert restored == schedule


def test_published_discrete_table():
    golden = np.load(GOLDEN / "samplers.npz")
    alpha = VPDiscrete().alpha(golden["latent_n"] / 1000)
    # 1e-12: a thousand roundings in another order.
    np.testing.assert_allclose(alpha**2, golden["latent_alpha_bar"], rtol=1e-12)


def test_published_linear_table():
    golden = np.load(GOLDEN / "samplers.npz")
    # 1e-13: exp of a log alpha down to -5.
    np.testing.assert_allclose(
        VPLinear().alpha(golden["pixel_t"]) ** 2, golden["pixel_alpha_bar"], rtol=1e-13
    )
