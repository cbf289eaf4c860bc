"""Tables made of tables: a later start, RePaint's jumps, the way back to noise."""

import numpy as np
import pytest
from oracles import SCHEDULES, SD, X, flow, gaussian, name, run
from tiny import normal, numpy, refused

from keras_uvit.diffusion import loop
from keras_uvit.diffusion.samplers import (
    SAMPLERS,
    Steps,
    ddim,
    ddpm,
    dpm_solver_pp,
    euler,
    named,
    time_uniform,
)
from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPLinear
from keras_uvit.diffusion.tables import backwards, beginning_at, resampled, with_known

pytestmark = pytest.mark.once


def assert_same(a, b):
    np.testing.assert_array_equal(a.packed(), b.packed())


# A later start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_a_grid_begins_where_it_is_told_and_leads_to_the_same_data(sampler, schedule):
    steps = named(sampler, schedule, 30, t_start=0.5)
    assert steps.t[0] == 0.5
    if sampler == "euler_maruyama" and isinstance(schedule, LinearPath):
        return  # which cannot start from pure noise
    assert_same(named(sampler, schedule, 30, t_start=1.0), named(sampler, schedule, 30))
    end = schedule.t_min if sampler.startswith("dpm") else 0.0
    if not steps.noise.any():
        found = run(steps, gaussian(schedule), flow(schedule, 0.9, 0.5, X))
        # What thirty first-order steps reach; the others are far below.
        assert np.abs(found - flow(schedule, 0.9, end, X)).max() < 0.05


def test_a_table_is_cut_where_a_step_begins():
    schedule = VPLinear()
    steps = ddim(schedule, time_uniform(10))
    assert_same(beginning_at(steps, 1.0), steps)
    assert_same(beginning_at(steps, 0.55), ddim(schedule, time_uniform(5, 0.5)))
    heun = named("heun", schedule, 10)  # rows at 1, 0.9, 0.9, 0.8, 0.8, ...
    assert beginning_at(heun, 0.9).t[:3].tolist() == heun.t[2:5].tolist()
    refused(ValueError, lambda: beginning_at(steps, 0.05), "No step", "t <= 0.05")
    memory = named("dpm_solver_pp_2m", schedule, 10)
    refused(ValueError, lambda: beginning_at(memory, 0.5), "from before", "sampler's name")


# The known part -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm_solver_pp_2m"])
def test_the_known_part_is_the_picture_at_each_rows_noise(sampler):
    schedule, seen = VPLinear(), []
    steps = with_known(resampled(named(sampler, schedule, 6), schedule, 2), schedule)
    picture, noise, mask = normal(2, 4), normal(2, 4, seed=1), np.array([[1.0, 1, 0, 0]], "float32")

    def denoise(x, row):
        seen.append((float(numpy(row["t"])), numpy(x)))
        return gaussian(schedule)(x, row["t"])

    begin, draw = loop.begin(noise), lambda i: normal(2, 4, seed=int(i) + 2)
    args = [(len(steps), denoise)], begin, steps.packed(), draw, 0
    x = numpy(loop.advance(*args, (mask, picture, noise))[0])
    assert len(seen) == len(steps)
    for t, x_t in seen[1:]:
        expected = schedule.alpha(t) * picture + schedule.sigma(t) * noise
        # float32 against float64: a few roundings of numbers up to 4.
        np.testing.assert_allclose(x_t[:, 2:], expected[:, 2:], atol=2e-6)
    np.testing.assert_array_equal(x[:, 2:], picture[:, 2:])
    assert np.abs(x[:, :2] - picture[:, :2]).max() > 0.1


def test_jumps_are_steps_with_noise_in_between():
    schedule, denoise = VPLinear(), gaussian(VPLinear())
    times = np.array([0.9, 0.5, 0.2])
    noise = np.random.default_rng(0).normal(size=(9, 3))
    found = run(resampled(ddim(schedule, times), schedule, 3), denoise, X, noise)
    x, alpha, sigma = X, schedule.alpha(times), schedule.sigma(times)
    step = lambda x, s, t: run(ddim(schedule, [s, t]), denoise, x)  # noqa: E731
    for k in range(2):
        a = alpha[0] / alpha[1]
        x = step(x, *times[:2])
        x = a * x + np.sqrt(sigma[0] ** 2 - a**2 * sigma[1] ** 2) * noise[k]
    x = step(step(x, *times[:2]), *times[1:])
    np.testing.assert_allclose(found, x, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", ["heun", "ddpm", "dpm_solver", "dpm_solver_pp_2m"])
def test_jumps_keep_the_distribution(sampler, schedule):
    """Exact steps carry the marginal at s to the one at t, and jumps carry it back."""
    plain = named(sampler, schedule, 400)
    steps = resampled(plain, schedule, 3)
    assert_same(resampled(plain, schedule, 1), plain)
    random = np.random.default_rng(0)
    x = schedule.alpha(steps.t[0]) * random.normal(0.6, SD, 4000)
    x = x + schedule.sigma(steps.t[0]) * random.normal(size=4000)
    found = run(steps, gaussian(schedule), x, random.normal(size=(len(steps), 4000)))
    # 4,000 draws: 4 standard errors of the mean and the deviation, and 2% for what the steps err.
    assert abs(found.mean() - 0.6) < 4 * SD / np.sqrt(4000) + 0.02
    assert abs(found.std() / SD - 1) < 4 / np.sqrt(8000) + 0.02


def test_a_memory_of_two_steps_is_not_carried_over_a_jump():
    steps = named("dpm_solver_pp_3m", VPLinear(), 6)
    refused(ValueError, lambda: resampled(steps, VPLinear(), 2), "before the jump", "pp_2m")
    assert_same(resampled(steps, VPLinear(), 1), steps)


# The way back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [ddim, euler])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_the_way_back_leads_to_noise_and_the_table_leads_back_to_data(builder, schedule):
    steps = builder(schedule, time_uniform(20, schedule.t_start))
    errors = []
    for evaluations in (1, 2, 3):
        back = backwards(steps, schedule, evaluations)
        noise = run(back, gaussian(schedule), X)
        errors.append(np.abs(run(steps, gaussian(schedule), noise) - X).max())
    assert len(back) == 3 * len(steps)
    assert back.t[-1] == steps.t[0]
    # Each evaluation more contracts the error; the last steps to t = 0 are the least exact.
    assert errors[0] > 3 * errors[1] > 9 * errors[2] or errors[2] < 1e-3
    assert errors[2] < 0.02


def test_inversion_refuses_what_cannot_be_turned_round():
    for steps, words in (
        (ddpm(VPLinear(), time_uniform(5)), ("deterministic", '"ddim"')),
        (named("heun", VPLinear(), 5), ("one evaluation a step",)),
        (named("dpm_solver_pp_2m", VPLinear(), 5), ("without a memory",)),
    ):
        refused(ValueError, lambda: backwards(steps, VPLinear()), *words)  # noqa: B023
    steps = ddim(VPLinear(), time_uniform(5))
    refused(ValueError, lambda: backwards(steps, VPLinear(), 4), "1, 2 or 3", "4")


def test_guidance_goes_backwards_too():
    steps = ddim(LinearPath(), time_uniform(3))
    steps = Steps(steps.t, steps.anchor, steps.denoised, steps.noise, steps.commit, [1.0, 2.0, 3.0])
    assert backwards(steps, LinearPath(), 2).guidance.tolist() == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]


def test_columns_of_the_call_have_defaults_and_are_checked():
    steps = dpm_solver_pp(VPCosine(), [0.9, 0.5, 0.1])
    assert steps.guidance.tolist() == [1.0, 1.0]
    assert steps.known.tolist() == [[1.0, 0.0]] * 2
    known = with_known(steps, VPCosine()).known
    assert known[-1].tolist() == [1.0, 0.0]
    assert known[0].tolist() == [VPCosine().alpha(0.5), VPCosine().sigma(0.5)]
    parts = [steps.t, steps.anchor, steps.denoised, steps.noise, steps.commit]
    refused(ValueError, lambda: Steps(*parts, [1.0]), "Steps.guidance", "(2,)")
