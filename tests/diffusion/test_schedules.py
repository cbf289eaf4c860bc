"""Schedules: identities first, then float32 against float64, then the published tables."""

import keras
import numpy as np
import pytest
from keras import ops
from oracles import GOLDEN, name

from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear

VP = [VPLinear(), VPLinear(beta_min=0.2, beta_max=10.0), VPCosine(), VPDiscrete()]
ALL = [*VP, LinearPath()]
of_all = pytest.mark.parametrize("schedule", ALL, ids=name)


def float32(t):
    return ops.convert_to_tensor(t, "float32")


@of_all
def test_identities(schedule):
    t = np.linspace(schedule.t_min, schedule.t_max, 201)
    alpha, sigma, lam = schedule.alpha(t), schedule.sigma(t), schedule.half_log_snr(t)
    if schedule in VP:
        # 1e-15: a few float64 roundings of numbers below 1.
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-15)
    # 1e-12: log of a sigma near 0.01 or an alpha near 0.001, each with relative error 1e-14.
    np.testing.assert_allclose(lam, np.log(alpha) - np.log(sigma), rtol=0, atol=1e-12)
    # 1e-11: near t = 0 and t = 1 lambda changes fast, its inverse passes through e^(2 lambda).
    np.testing.assert_allclose(schedule.time(lam), t, rtol=1e-11, atol=1e-13)
    assert max(np.diff(alpha).max(), -np.diff(sigma).min(), np.diff(lam).max()) < 0
    for zero in (0.0, float32(0.0)):
        assert (float(schedule.alpha(zero)), float(schedule.sigma(zero))) == (1, 0)


@pytest.mark.parametrize("of", ["alpha", "sigma"])
@of_all
def test_slopes_are_derivatives_by_time(schedule, of):
    # Middles of steps: VPDiscrete is smooth only inside a step, t in (n, n + 1) / 1000.
    t, h = (np.arange(20, 980, 7) + 0.5) / 1000, 1e-5
    value, slope = getattr(schedule, of), getattr(schedule, f"{of}_slope")(t)
    # 1e-6: rounding 1e-16 / h = 1e-11 and truncation (h / t)^2 < 3e-7, relative to the slope.
    np.testing.assert_allclose((value(t + h) - value(t - h)) / (2 * h), slope, rtol=1e-6)


@pytest.mark.parametrize(
    "of", ["alpha", "sigma", "half_log_snr", "alpha_slope", "sigma_slope", "training_time"]
)
@of_all
def test_float32_tensors_agree_with_float64_numpy(schedule, of):
    # 0.97 keeps away from the infinite slope of log alpha of VPCosine; inside steps, as above.
    t, function = (np.arange(2, 970, 3) + 0.5) / 1000, getattr(schedule, of)
    single, double = function(float32(t)), function(t)
    assert keras.backend.standardize_dtype(single.dtype) == "float32"
    assert np.asarray(double).dtype == np.float64
    # 5e-5: rounding of t (6e-8) times the condition of log alpha, below 300 on this range.
    np.testing.assert_allclose(ops.convert_to_numpy(single), double, rtol=5e-5, atol=1e-6)


@of_all
def test_float32_has_the_right_noise_in_nearly_clean_data(schedule):
    # Training draws these times: sigma there must be right, not a rounding error of 1 - alpha^2.
    t = np.geomspace(1e-7, 1e-2, 50)
    sigma = ops.convert_to_numpy(schedule.sigma(float32(t)))
    # 1e-5: a few float32 roundings, no cancellation.
    np.testing.assert_allclose(sigma, schedule.sigma(t), rtol=1e-5)


def tables():
    """For each schedule: times, alpha^2 there by its paper or the published program, tolerance."""
    published = np.load(GOLDEN / "samplers.npz")
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    t = np.linspace(0, 0.99, 100)
    cosine = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    return {
        # 1e-13: exp of a log alpha down to -5.
        "linear": (VPLinear(), published["pixel_t"], published["pixel_alpha_bar"], 1e-13),
        "cosine": (VPCosine(), t, cosine**2, 2e-13),
        # 1e-12: a thousand roundings, and n / 1000 * 1000 may fall just outside step n.
        "betas": (VPDiscrete(), np.arange(1001) / 1000, bar, 1e-12),
        "discrete": (
            VPDiscrete(), published["latent_n"] / 1000, published["latent_alpha_bar"], 1e-12,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("table", tables())
def test_alpha_is_as_published(table):
    schedule, t, expected, tolerance = tables()[table]
    np.testing.assert_allclose(schedule.alpha(t) ** 2, expected, rtol=tolerance)


def test_discrete_log_alpha_is_linear_between_steps():
    schedule, n = VPDiscrete(), np.arange(1000)
    ends = schedule.log_alpha(n / 1000), schedule.log_alpha((n + 1) / 1000)
    # 1e-10: rounding of t against a step of 1e-3.
    np.testing.assert_allclose(
        schedule.log_alpha((n + 0.25) / 1000), 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-10
    )


def test_training_draws_every_discrete_step_equally_often():
    u, steps = (np.arange(8000) + 0.5) / 8000, np.arange(1, 1001).repeat(8) / 1000
    np.testing.assert_array_equal(VPDiscrete().training_time(u), steps)
    single = ops.convert_to_numpy(VPDiscrete().training_time(float32(u)))
    # 1.2e-7: one float32 unit, since a compiler may multiply by 1 / 1000 instead of dividing.
    np.testing.assert_allclose(single, steps, rtol=1.2e-7)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), LinearPath()], ids=name)
def test_training_draws_continuous_time_uniformly_while_there_is_signal(schedule):
    u, cosine = np.linspace(0, 1, 11), isinstance(schedule, VPCosine)
    last = schedule.t_max if cosine else 1.0
    np.testing.assert_array_equal(schedule.training_time(u), last * u)
    assert schedule.t_start == last
    assert (last < 1) == cosine


def test_the_linear_path_is_straight_and_time_scales_reach_the_last_published_timestep():
    path, t = LinearPath(), np.linspace(0, 1, 11)
    slopes = path.alpha_slope(t), path.sigma_slope(t)
    for value, expected in zip((path.alpha(t), path.sigma(t), *slopes), (1 - t, t, -1, 1)):
        np.testing.assert_array_equal(value, expected * np.ones(11))
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
