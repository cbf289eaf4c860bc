"""Names, time grids, the loop that runs tables, and errors."""

import numpy as np
import pytest
from keras import ops
from oracles import SCHEDULES, X, flow, gaussian, name, run
from tiny import numpy, refused

from keras_uvit.diffusion.loop import WIDTH
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
from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPLinear

STOCHASTIC = ("ddpm", "euler_maruyama")


def test_fast_orders_are_as_published_and_add_up_to_the_evaluations():
    published = {3: [2, 1], 6: [3, 2, 1], 9: [3, 3, 2, 1], 10: [3, 3, 3, 1], 11: [3, 3, 3, 2]}
    assert {nfe: fast_orders(nfe) for nfe in published} == published
    assert all(sum(fast_orders(nfe)) == nfe for nfe in range(1, 60))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=name)
def test_each_sampler_costs_its_number_of_steps_and_runs_with_its_fewest(sampler, schedule):
    fewest = SAMPLERS[sampler][0]
    for n in (fewest, 10, np.int64(50)):
        steps = named(sampler, schedule, n)
        assert steps.nfe == len(steps) == (2 * n - 1 if sampler == "heun" else n)
        assert steps.packed().shape == (steps.nfe, WIDTH)
    steps = named(sampler, schedule, fewest)
    assert np.isfinite(run(steps, gaussian(schedule), X, np.zeros((fewest, 3)))).all()


@pytest.mark.parametrize("sampler", [n for n in SAMPLERS if n not in STOCHASTIC])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_fifty_evaluations_come_close_to_the_exact_solution(sampler, schedule):
    steps = named(sampler, schedule, 50 if sampler != "heun" else 25)
    end = schedule.t_min if sampler.startswith("dpm") else 0.0
    exact = flow(schedule, steps.t[0], end, X)
    # 5%: what first-order samplers reach; the others are far below.
    assert np.abs(run(steps, gaussian(schedule), X) - exact).max() < 0.05


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_grids_are_equally_spaced_and_exact_at_their_ends(schedule):
    # 1e-14: float64 rounding. 1e-9: the inverse of lambda near its ends.
    for times, ends, of, rounding in (
        (time_uniform(10, 0.9, 0.1), (0.9, 0.1), lambda t: t, 1e-14),
        (
            log_snr_uniform(schedule, 10),
            (schedule.t_max, schedule.t_min),
            schedule.half_log_snr,
            1e-9,
        ),
    ):
        assert (times[0], times[-1], len(times)) == (*ends, 11)
        step = (of(times[-1]) - of(times[0])) / 10
        np.testing.assert_allclose(np.diff(of(times)), step, rtol=rounding)
    assert log_snr_uniform(schedule, 3, 0.8, 0.2)[[0, -1]].tolist() == [0.8, 0.2]


# The loop -----------------------------------------------------------------------------------------


def recorded(n, shape):
    noise = np.random.default_rng(1).normal(size=(n, *shape)).astype("float32")
    table = ops.convert_to_tensor(noise)
    return noise.astype("float64"), lambda i: ops.take(table, i, axis=0)


def start(schedule, shape=(2, 3, 3, 1)):
    x = schedule.sigma(schedule.t_start) * np.random.default_rng(0).normal(size=shape)
    return x.astype("float32")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=name)
def test_the_float32_loop_agrees_with_float64_numpy(sampler, schedule):
    steps, x = named(sampler, schedule, 12), start(schedule)
    noise, draw = recorded(len(steps), x.shape)
    result = numpy(sample(gaussian(schedule), x, steps, draw))
    expected = run(steps, gaussian(schedule), x.astype("float64"), noise)
    # 3e-5: float32 rounding of weights up to 30 over a dozen rows.
    np.testing.assert_allclose(result, expected, rtol=0, atol=3e-5)


def test_a_deterministic_sampler_ignores_noise_and_a_packed_table_is_as_good_as_steps():
    schedule = VPLinear()
    steps, x = named("dpm_solver_pp_3m", schedule, 6), start(schedule)
    _, draw = recorded(len(steps), x.shape)
    expected = numpy(sample(gaussian(schedule), x, steps))
    for again in ((steps, draw), (steps.packed(),)):
        np.testing.assert_array_equal(numpy(sample(gaussian(schedule), x, *again)), expected)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver_pp_3m"])
def test_segments_give_what_one_run_gives_each_by_its_own_denoiser(sampler):
    schedule = VPLinear()
    steps, x = named(sampler, schedule, 7), start(schedule)
    noise, draw = recorded(7, x.shape)
    first, last = gaussian(schedule), gaussian(schedule, mu=-2.0)
    whole = sample(first, x, steps, draw)
    parts = sample([(2, first), (0, last), (5, first)], x, steps, draw)
    np.testing.assert_array_equal(numpy(whole), numpy(parts))
    ours = numpy(sample([(2, first), (5, last)], x, steps, draw))
    expected = run(steps, lambda x, t: (first if t >= steps.t[1] else last)(x, t), x, noise)
    np.testing.assert_allclose(ours, expected, atol=3e-5)  # as above
    with pytest.raises(ValueError, match="covers 8 of 7 rows"):
        sample([(8, first)], x, steps, draw)


# Errors -------------------------------------------------------------------------------------------


def table(**changes):
    rows = dict(
        t=[1, 0.5], anchor=np.ones(2), denoised=np.zeros((2, 3)), noise=np.zeros(2),
        commit=[False, True],
    )  # fmt: skip
    return Steps(**{**rows, **changes})


def test_steps_are_stored_in_float64():
    steps = table()
    assert all(getattr(steps, f).dtype == np.float64 for f in vars(steps))
    assert len(steps) == 2


TABLES = [
    (dict(anchor=np.ones(3)), r"Steps.anchor must be finite, of shape \(2,\)"),
    (dict(denoised=np.zeros(2)), r"Steps.denoised .* shape \(2, 3\)"),
    (dict(denoised=np.full((2, 3), np.nan)), "Steps.denoised must be finite"),
    (dict(t=np.array([1.0, 0.0])), r"t in \(0, 1\]"),
    (dict(t=np.array([1.1, 0.5])), r"t in \(0, 1\]"),
    (dict(noise=np.array([-0.1, 0.0])), "noise >= 0"),
    (
        dict.fromkeys(("t", "anchor", "noise", "commit"), ()) | {"denoised": np.zeros((0, 3))},
        "at least one row",
    ),
    (dict(commit=np.array([1, 0])), "last row of Steps must commit"),
    (dict(denoised=np.array([[0, 1, 0], [0, 0, 0]])), "before the first evaluation"),
    (dict(denoised=np.array([[0, 0, 1], [0, 0, 0]])), "before the first evaluation"),
    (dict(denoised=np.array([[0, 0, 0], [0, 0, 1]])), "before the first evaluation"),
]


@pytest.mark.parametrize(("changes", "message"), TABLES)
def test_a_table_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)


@pytest.mark.parametrize(
    "build", [ddim, ddpm, euler, heun, euler_maruyama, dpm_solver, dpm_solver_pp]
)
def test_times_must_fall_from_where_there_is_signal(build):
    who = build.__name__.replace("ddpm", "ddim")
    for times, words in (
        ([0.5, 0.5], "strictly decreasing"),
        ([0.1, 0.9], "strictly decreasing"),
        ([1.2, 0.5], "in [0, 1]"),
        ([0.5, -0.1], "in [0, 1]"),
        ([0.5], "at least two times"),
        ([[0.9, 0.1]], "at least two times"),
    ):
        refused(ValueError, lambda times=times: build(VPLinear(), times), who, words)
    # The linear path has none at t = 1 only for those that divide by it.
    divides = build in (euler_maruyama, dpm_solver)
    for schedule in (VPCosine(), LinearPath()) if divides else (VPCosine(),):
        limit = f"at t = {schedule.t_max} at most on"
        times = np.linspace(1.0, 0.1, 7)
        refused(ValueError, lambda s=schedule, t=times: build(s, t), limit, "np.linspace")
        assert np.isfinite(build(schedule, np.linspace(schedule.t_max, 0.1, 7)).packed()).all()


def pp(count, end=0.1, **options):
    return dpm_solver_pp(VPLinear(), time_uniform(count, 1.0, end), **options)


ON_GRID = dict(multistep=False, on_grid=True)
ORDERS = [
    *((lambda k=k, o=o: pp(4, order=k, **o), "order 1, 2 or 3")
      for k in (0, 4) for o in ({}, dict(multistep=False), ON_GRID)),
    *((lambda k=k: dpm_solver(VPLinear(), time_uniform(4, 1.0, 0.1), order=k), "1, 2 or 3")
      for k in (4, [1, 2, 3, 5])),
    (lambda: dpm_solver(VPLinear(), time_uniform(4)), "end above t = 0"),
    (lambda: pp(4, 0.0, multistep=False), "end above t = 0"),
    *((lambda k=k, n=n: pp(n, order=k, **ON_GRID), f"above t = 0. Received: {n}")
      for k, n in (([3, 3], 5), (3, 4), ([2], 4))),
    *((lambda k=k: pp(k - 1, order=k), f"order {k} needs at least {k} steps") for k in (2, 3)),
    *((lambda b=b, e=e: b(VPLinear(), time_uniform(4), eta=e), "eta must be in [0, 1]")
      for b in (ddim, euler_maruyama) for e in (-0.1, 1.1, float("nan"))),
    (lambda: sample(lambda x, t: x, X, named("ddpm", VPLinear(), 3)), "`draw_noise` must be given"),
    (lambda: named("euler_maruyama", LinearPath(), 8), "at t = 0.999 at most on LinearPath"),
    *((lambda s=s, n=n: named(s, VPLinear(), n), f"{s!r} must be an int >= ")
      for s, n in [*((s, SAMPLERS[s][0] - 1) for s in SAMPLERS), ("ddim", 10.0), ("ddim", None)]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), ORDERS)
def test_orders_shares_and_numbers_that_cannot_be_are_refused(call, words):
    refused(ValueError, call, words)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("dpm_solver_p", "dpm_solver_pp"),
        ("DPM++ 2M", "dpm_solver_pp_2m"),
        ("dpm", "dpm_solver"),
        ("DDIM ", "ddim"),
        ("eular", "euler"),
        ("unipc", None),
    ],
)
def test_an_unknown_sampler_gets_the_nearest_name(wrong, near):
    said = refused(ValueError, lambda: named(wrong, VPLinear(), 10), ", ".join(SAMPLERS))
    assert ("Did you mean" in said) == (near is not None)
    assert near is None or f"Did you mean {near!r}?" in said
