"""Names, time grids, the loop that runs tables, and errors."""

import numpy as np
import pytest
from keras import ops
from oracles import (
    SCHEDULES,
    X,
    flow,
    gaussian,
    name,
    run,
)

from keras_uvit.diffusion.samplers import (
    SAMPLERS,
    Steps,
    ddim,
    ddpm,
    dpm_solver,
    dpm_solver_pp,
    euler,
    euler_maruyama,
    fast_orders,
    heun,
    log_snr_uniform,
    named,
    sample,
    time_uniform,
)
from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear


@pytest.mark.parametrize(
    ("nfe", "orders"),
    [(3, [2, 1]), (6, [3, 2, 1]), (9, [3, 3, 2, 1]), (10, [3, 3, 3, 1]), (11, [3, 3, 3, 2])],
)
def test_fast_orders_as_published(nfe, orders):
    assert fast_orders(nfe) == orders


@pytest.mark.parametrize("nfe", range(1, 60))
def test_fast_orders_add_up_to_the_evaluations(nfe):
    assert sum(fast_orders(nfe)) == nfe


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VPDiscrete()], ids=name)
@pytest.mark.parametrize("n", [3, 10, 50])
def test_cost_of_each_sampler_is_its_number_of_steps(sampler, schedule, n):
    steps = named(sampler, schedule, n)
    assert steps.nfe == len(steps) == (2 * n - 1 if sampler == "heun" else n)
    assert steps.packed().shape == (steps.nfe, 7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_runs_with_its_fewest_steps(sampler):
    fewest = SAMPLERS[sampler][0]
    x = run(named(sampler, VPLinear(), fewest), gaussian(VPLinear()), X, np.zeros((fewest, 3)))
    assert np.isfinite(x).all()


@pytest.mark.parametrize("sampler", [n for n in SAMPLERS if n not in ("ddpm", "euler_maruyama")])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_fifty_evaluations_come_close_to_the_exact_solution(sampler, schedule):
    steps = named(sampler, schedule, 50 if sampler != "heun" else 25)
    end = schedule.t_min if sampler.startswith("dpm") else 0.0
    exact = flow(schedule, steps.t[0], end, X)
    # 5%: what first-order samplers reach; the others are far below.
    assert np.abs(run(steps, gaussian(schedule), X) - exact).max() < 0.05


def test_time_uniform_is_equally_spaced_and_exact_at_its_ends():
    times = time_uniform(10, 0.9, 0.1)
    assert (times[0], times[-1], len(times)) == (0.9, 0.1, 11)
    # 1e-14: float64 rounding.
    np.testing.assert_allclose(np.diff(times), -0.08, rtol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_log_snr_uniform_is_equally_spaced_and_exact_at_its_ends(schedule):
    times = log_snr_uniform(schedule, 10)
    assert (times[0], times[-1], len(times)) == (schedule.t_max, schedule.t_min, 11)
    steps = np.diff(schedule.half_log_snr(times))
    # 1e-9: the inverse of lambda near its ends.
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-9)
    assert log_snr_uniform(schedule, 3, 0.8, 0.2)[[0, -1]].tolist() == [0.8, 0.2]


# The loop -----------------------------------------------------------------------------------------


def keras_gaussian(schedule):
    exact = gaussian(schedule)
    return lambda x, t: exact(x, t)


def recorded(n, shape):
    noise = np.random.default_rng(1).normal(size=(n, *shape)).astype("float32")
    table = ops.convert_to_tensor(noise)
    return noise.astype("float64"), lambda i: ops.take(table, i, axis=0)


def start(schedule, shape=(2, 3, 3, 1)):
    t = schedule.t_start
    x = schedule.sigma(t) * np.random.default_rng(0).normal(size=shape)
    return x.astype("float32")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VPDiscrete()], ids=name)
def test_the_float32_loop_agrees_with_float64_numpy(sampler, schedule):
    steps, x = named(sampler, schedule, 12), start(schedule)
    noise, draw = recorded(len(steps), x.shape)
    result = sample(keras_gaussian(schedule), x, steps, draw)
    expected = run(steps, gaussian(schedule), x.astype("float64"), noise)
    # 3e-5: float32 rounding of weights up to 30 over a dozen rows.
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm_solver_pp_3m"])
def test_a_deterministic_sampler_needs_no_noise_and_ignores_it(sampler):
    schedule = VPLinear()
    steps, x = named(sampler, schedule, 6), start(schedule)
    _, draw = recorded(len(steps), x.shape)
    a, b = (sample(keras_gaussian(schedule), x, steps, d) for d in (None, draw))
    np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver", "dpm_solver_pp_3m"])
def test_segments_give_what_one_run_gives(sampler):
    schedule = VPLinear()
    steps, x = named(sampler, schedule, 7), start(schedule)
    _, draw = recorded(7, x.shape)
    denoise = keras_gaussian(schedule)

    whole = sample(denoise, x, steps, draw)
    parts = sample([(2, denoise), (0, denoise), (5, denoise)], x, steps, draw)
    np.testing.assert_array_equal(ops.convert_to_numpy(whole), ops.convert_to_numpy(parts))


def test_each_segment_uses_its_own_denoiser():
    schedule, x = VPLinear(), np.ones((1, 2), "float32")
    steps = dpm_solver_pp(schedule, time_uniform(4, 1.0, 0.1), order=2)
    result = sample([(3, lambda x, t: 0 * x + 1.0), (1, lambda x, t: 0 * x - 2.0)], x, steps)
    expected = run(steps, lambda x, t: 0 * x + (-2.0 if t == steps.t[3] else 1.0), x)
    # 1e-6: float32 rounding.
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, atol=1e-6)


def test_the_packed_table_is_as_good_as_the_steps():
    schedule = VPLinear()
    steps, x = named("dpm_solver_pp_2m", schedule, 5), start(schedule)
    a, b = (sample(keras_gaussian(schedule), x, s) for s in (steps, steps.packed()))
    np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_a_stochastic_sampler_asks_for_noise():
    with pytest.raises(ValueError, match="`draw_noise` must be given"):
        sample(lambda x, t: x, np.ones((1, 2)), named("ddpm", VPLinear(), 3))


# Errors -------------------------------------------------------------------------------------------


def table(**changes):
    rows = dict(
        t=np.array([1.0, 0.5]), anchor=np.ones(2), denoised=np.zeros((2, 3)), noise=np.zeros(2),
        commit=np.ones(2),
    )  # fmt: skip
    return Steps(**{**rows, **changes})


def test_steps_are_stored_in_float64():
    steps = table(commit=[False, True], t=[1, 0.5])
    assert all(getattr(steps, f).dtype == np.float64 for f in vars(steps))
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(anchor=np.ones(3)), r"Steps.anchor must be finite, of shape \(2,\)"),
        (dict(denoised=np.zeros(2)), r"Steps.denoised must be finite, of shape \(2, 3\)"),
        (dict(denoised=np.full((2, 3), np.nan)), "Steps.denoised must be finite"),
        (dict(noise=np.array([0, np.inf])), "Steps.noise must be finite"),
        (dict(t=np.array([np.nan, 0.5])), "Steps.t must be finite"),
        (dict(t=np.array([1.0, 0.0])), r"t in \(0, 1\]"),
        (dict(t=np.array([1.1, 0.5])), r"t in \(0, 1\]"),
        (dict(noise=np.array([-0.1, 0.0])), "noise >= 0"),
        (
            dict(
                t=np.zeros(0), anchor=np.zeros(0), denoised=np.zeros((0, 3)), noise=np.zeros(0),
                commit=np.zeros(0),
            ),
            "at least one row",
        ),
        (dict(commit=np.array([1, 0])), "last row of Steps must commit"),
        (dict(denoised=np.array([[0, 1, 0], [0, 0, 0]])), "before the first evaluation"),
        (dict(denoised=np.array([[0, 0, 1], [0, 0, 0]])), "before the first evaluation"),
        (dict(denoised=np.array([[0, 0, 0], [0, 0, 1]])), "before the first evaluation"),
    ],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)


@pytest.mark.parametrize(
    "build", [ddim, ddpm, euler, heun, euler_maruyama, dpm_solver, dpm_solver_pp]
)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.5, 0.5], "strictly decreasing"),
        ([0.1, 0.9], "strictly decreasing"),
        ([1.2, 0.5], r"in \[0, 1\]"),
        ([0.5, -0.1], r"in \[0, 1\]"),
        ([0.5], "at least two times"),
        ([[0.9, 0.1]], "at least two times"),
    ],
)
def test_times_must_fall_within_zero_and_one(build, times, message):
    with pytest.raises(ValueError, match=f"{build.__name__.replace('ddpm', 'ddim')}.*{message}"):
        build(VPLinear(), times)


@pytest.mark.parametrize(
    ("build", "schedule"),
    [
        *((build, VPCosine()) for build in (ddim, ddpm, euler, heun, dpm_solver_pp)),
        *((build, schedule) for build in (euler_maruyama, dpm_solver)
          for schedule in (VPCosine(), LinearPath())),
    ],
)  # fmt: skip
def test_times_begin_where_the_schedule_still_has_signal(build, schedule):
    with pytest.raises(ValueError, match=f"at t = {schedule.t_max} at most on .*np.linspace"):
        build(schedule, np.linspace(1.0, 0.1, 7))
    steps = build(schedule, np.linspace(schedule.t_max, 0.1, 7))
    assert np.isfinite(steps.packed()).all()


@pytest.mark.parametrize("build", [ddim, euler_maruyama])
@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_must_be_a_share(build, eta):
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
        build(VPLinear(), time_uniform(4), eta=eta)


@pytest.mark.parametrize(
    "arguments", [{}, dict(multistep=False), dict(multistep=False, on_grid=True)]
)
@pytest.mark.parametrize("order", [0, 4])
def test_order_is_one_two_or_three(order, arguments):
    with pytest.raises(ValueError, match="order 1, 2 or 3"):
        dpm_solver_pp(VPLinear(), time_uniform(4, 1.0, 0.1), order=order, **arguments)


@pytest.mark.parametrize("order", [4, [1, 2, 3, 5]])
def test_order_of_the_noise_form_is_one_two_or_three(order):
    with pytest.raises(ValueError, match="dpm_solver has order 1, 2 or 3"):
        dpm_solver(VPLinear(), time_uniform(4, 1.0, 0.1), order=order)


def test_numpy_orders_are_orders():
    times = time_uniform(4, 1.0, 0.1)
    a, b = (dpm_solver(VPLinear(), times, order=k) for k in (2, np.int64(2)))
    np.testing.assert_array_equal(a.packed(), b.packed())


def test_singlestep_cannot_end_at_clean_data():
    for build in (dpm_solver, lambda s, g: dpm_solver_pp(s, g, multistep=False)):
        with pytest.raises(ValueError, match="end above t = 0"):
            build(VPLinear(), time_uniform(4))


@pytest.mark.parametrize(("order", "intervals"), [([3, 3], 5), (3, 4), ([2], 4)])
def test_on_grid_orders_must_use_up_the_intervals(order, intervals):
    times = time_uniform(intervals, 1.0, 0.1)
    with pytest.raises(ValueError, match=f"intervals that end above t = 0. Received: {intervals}"):
        dpm_solver_pp(VPLinear(), times, order=order, multistep=False, on_grid=True)


@pytest.mark.parametrize("order", [2, 3])
def test_multistep_needs_as_many_steps_as_its_order(order):
    with pytest.raises(ValueError, match=f"order {order} needs at least {order} steps"):
        dpm_solver_pp(VPLinear(), time_uniform(order - 1), order=order)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("dpm_solver_p", "dpm_solver_pp"),
        ("dpm++", "dpm_solver_pp"),
        ("DPM++ 2M", "dpm_solver_pp_2m"),
        ("dpm", "dpm_solver"),
        ("DDIM ", "ddim"),
        ("eular", "euler"),
        ("unipc", None),
    ],
)
def test_an_unknown_sampler_gets_the_nearest_name(wrong, near):
    with pytest.raises(ValueError, match="Unknown sampler") as error:
        named(wrong, VPLinear(), 10)
    assert ", ".join(SAMPLERS) in str(error.value)
    assert ("Did you mean" in str(error.value)) == (near is not None)
    assert near is None or f"Did you mean {near!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "num_steps"),
    [(n, fewest - 1) for n, (fewest, _) in SAMPLERS.items()]
    + [("ddim", 10.0), ("ddim", "10"), ("ddim", None)],
)
def test_named_samplers_need_enough_whole_steps(sampler, num_steps):
    with pytest.raises(ValueError, match="num_steps of sampler .* must be an int >=") as error:
        named(sampler, VPLinear(), num_steps)
    assert repr(num_steps) in str(error.value)


def test_numpy_numbers_of_steps_are_numbers():
    assert named("ddim", VPLinear(), np.int64(4)).nfe == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_flow_matching_runs_every_sampler_but_the_sde_of_infinite_rate(sampler):
    if sampler == "euler_maruyama":  # g^2 is infinite at t = 1
        with pytest.raises(ValueError, match="at t = 0.999 at most on LinearPath"):
            named(sampler, LinearPath(), 8)
    else:
        assert np.isfinite(named(sampler, LinearPath(), 8).packed()).all()
