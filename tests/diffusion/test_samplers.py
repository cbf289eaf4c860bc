"""Samplers: each table against its paper's formula and against exact solutions.

Everything runs in NumPy float64. Data are Gaussian, N(mu, sd^2), for which the exact
denoiser and the exact solution of the probability-flow ODE are known.
"""

import functools

import numpy as np
import pytest
from oracles import MU, SCHEDULES, SD, X, anchors_and_targets, flow, gaussian, name, run, spread

from keras_uvit.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver,
    dpm_solver_pp,
    euler,
    euler_maruyama,
    heun,
    named,
    time_uniform,
)
from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear

# Orders of convergence ----------------------------------------------------------------------------

BUILDERS = {
    "ddim": (1, ddim),
    "euler": (1, euler),
    "dpm_solver 1": (1, lambda s, g: dpm_solver(s, g, order=1)),
    "dpm_solver_pp 1": (1, lambda s, g: dpm_solver_pp(s, g, order=1)),
    "heun": (2, heun),
    "dpm_solver_pp 2 multistep": (2, lambda s, g: dpm_solver_pp(s, g, order=2)),
    "dpm_solver_pp 2 singlestep": (2, lambda s, g: dpm_solver_pp(s, g, order=2, multistep=False)),
    "dpm_solver 2": (2, lambda s, g: dpm_solver(s, g, order=2)),
    "dpm_solver_pp 3 singlestep": (3, lambda s, g: dpm_solver_pp(s, g, order=3, multistep=False)),
    "dpm_solver_pp 3 on grid": (
        3, lambda s, g: dpm_solver_pp(s, g, order=3, multistep=False, on_grid=True),
    ),
    "dpm_solver 3": (3, lambda s, g: dpm_solver(s, g, order=3)),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(
    ("schedule", "t_start", "t_end"),
    [(VPLinear(), 0.8, 0.2), (VPCosine(), 0.95, 0.05), (LinearPath(), 0.95, 0.05)],
    ids=["VPLinear", "VPCosine", "LinearPath"],
)
def test_error_falls_with_the_claimed_order(builder, schedule, t_start, t_end):
    order, build = BUILDERS[builder]
    counts = [96, 192, 384]
    exact, errors = flow(schedule, t_start, t_end, X), []
    for n in counts:
        steps = build(schedule, time_uniform(n, t_start, t_end))
        errors.append(np.abs(run(steps, gaussian(schedule), X) - exact).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    # 0.25: the next power of the step still shows at these counts; the wrong order is off by 1.
    assert abs(slope - order) < 0.25, errors


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), LinearPath()], ids=name)
def test_one_multistep_step_errs_by_one_order_more(schedule, order):
    """From exact earlier evaluations: over a whole run the first-order start would hide order 3."""
    widths, errors = 0.1 / 2.0 ** np.arange(4), []
    for h in widths:
        worst = 0
        for middle in (0.3, 0.5, 0.7):  # the leading error may vanish at one of them
            nodes = np.array([-2.0, -1.1, 0.0, 1.0])[-order - 1 :]  # unequal, to test the ratios
            times = schedule.time(schedule.half_log_snr(middle) + h * nodes)
            steps = dpm_solver_pp(schedule, times, order=order)
            path = [flow(schedule, middle, t, X) for t in times]
            seen = [gaussian(schedule)(x, t) for x, t in zip(path, times)]
            x = steps.anchor[-1] * path[-2]
            x = x + sum(w * d for w, d in zip(steps.denoised[-1], seen[-2::-1]))
            worst = max(worst, np.abs(x - path[-1]).max())
        errors.append(worst)
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    # 0.25: the next power of h; a lower order is off by 1.
    assert abs(slope - (order + 1)) < 0.25, errors


# The papers' formulas, written plainly ------------------------------------------------------------


def plain_2m(schedule, times, x, denoise):
    """Lu et al. 2022, arXiv 2211.01095, Algorithm 2."""
    lam, alpha, sigma = schedule.half_log_snr(times), schedule.alpha(times), schedule.sigma(times)
    before = None
    for i in range(1, len(times)):
        h, now = lam[i] - lam[i - 1], denoise(x, times[i - 1])
        d = now
        if before is not None:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * d
        before = now
    return x


def plain_3m(schedule, times, x, denoise):
    """Eq. 8 of the paper with D(lambda) the parabola through three evaluations, integrated exactly.

    sigma_t / sigma_s x + sigma_t int e^lambda D(lambda) dlambda, by a quadrature that is exact to
    rounding; the first two steps are those of `plain_2m`.
    """
    lam, alpha, sigma = schedule.half_log_snr(times), schedule.alpha(times), schedule.sigma(times)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    seen = []
    for i in range(1, len(times)):
        h = lam[i] - lam[i - 1]
        seen.append(denoise(x, times[i - 1]))
        if i < 3:
            d = seen[-1]
            if i == 2:
                d = d + h / (lam[1] - lam[0]) / 2 * (seen[-1] - seen[-2])
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * d
            continue
        at, known = lam[i - 1] + h * (nodes + 1) / 2, lam[i - 3 : i]
        basis = [
            np.prod([(at - b) / (a - b) for b in known if b != a], axis=0) for a in known
        ]  # Lagrange
        integral = [alpha[i] * h / 2 * np.sum(weights * np.exp(at - lam[i]) * q) for q in basis]
        x = sigma[i] / sigma[i - 1] * x + sum(w * d for w, d in zip(integral, seen[-3:]))
    return x


def plain_3s(schedule, times, x, denoise):
    """DPM-Solver++ of order 3, singlestep, evaluations at thirds of each interval of lambda."""
    for s, t in zip(times, times[1:]):
        lam_s, lam_t = schedule.half_log_snr(s), schedule.half_log_snr(t)
        h, r1, r2 = lam_t - lam_s, 1 / 3, 2 / 3
        u1, u2 = schedule.time(lam_s + r1 * h), schedule.time(lam_s + r2 * h)
        d = denoise(x, s)
        x1 = (
            schedule.sigma(u1) / schedule.sigma(s) * x
            - schedule.alpha(u1) * (np.exp(-r1 * h) - 1) * d
        )
        d1 = denoise(x1, u1) - d
        x2 = (
            schedule.sigma(u2) / schedule.sigma(s) * x
            - schedule.alpha(u2) * (np.exp(-r2 * h) - 1) * d
            + r2 / r1 * schedule.alpha(u2) * ((np.exp(-r2 * h) - 1) / (r2 * h) + 1) * d1
        )
        d2 = denoise(x2, u2) - d
        x = (
            schedule.sigma(t) / schedule.sigma(s) * x
            - schedule.alpha(t) * (np.exp(-h) - 1) * d
            + 1 / r2 * schedule.alpha(t) * ((np.exp(-h) - 1) / h + 1) * d2
        )
    return x


def plain_noise(schedule, times, x, denoise, orders):
    """Lu et al. 2022, arXiv 2206.00927: Eq. 3.7, Algorithms 1 and 2."""

    def eps(x, t):
        return (x - schedule.alpha(t) * denoise(x, t)) / schedule.sigma(t)

    for order, s, t in zip(orders, times, times[1:]):
        lam_s, lam_t = schedule.half_log_snr(s), schedule.half_log_snr(t)
        h, e = lam_t - lam_s, eps(x, s)
        first = schedule.alpha(t) / schedule.alpha(s) * x - schedule.sigma(t) * np.expm1(h) * e
        if order == 1:
            x = first
        if order == 2:
            u = schedule.time(lam_s + h / 2)
            mid = schedule.alpha(u) / schedule.alpha(s) * x
            mid = mid - schedule.sigma(u) * np.expm1(h / 2) * e
            x = first - schedule.sigma(t) * np.expm1(h) * (eps(mid, u) - e)
        if order == 3:
            u, v = schedule.time(lam_s + h / 3), schedule.time(lam_s + 2 * h / 3)
            x1 = schedule.alpha(u) / schedule.alpha(s) * x
            x1 = x1 - schedule.sigma(u) * np.expm1(h / 3) * e
            x2 = schedule.alpha(v) / schedule.alpha(s) * x
            x2 = x2 - schedule.sigma(v) * np.expm1(2 * h / 3) * e
            bend = np.expm1(2 * h / 3) / (2 * h / 3) - 1
            x2 = x2 - 2 * schedule.sigma(v) * bend * (eps(x1, u) - e)
            x = first - 1.5 * schedule.sigma(t) * (np.expm1(h) / h - 1) * (eps(x2, v) - e)
    return x


PLAIN = {
    "2M": (plain_2m, lambda s, g: dpm_solver_pp(s, g, order=2)),
    "3M": (plain_3m, lambda s, g: dpm_solver_pp(s, g, order=3)),
    "3S": (plain_3s, lambda s, g: dpm_solver_pp(s, g, order=3, multistep=False)),
}
for orders in ([1] * 12, [2] * 12, [3] * 12, [3, 1, 2] * 4):
    PLAIN[f"noise {orders[:3]}"] = (
        functools.partial(plain_noise, orders=orders),
        functools.partial(dpm_solver, order=orders),
    )


@pytest.mark.parametrize("solver", PLAIN)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_table_is_the_formula_of_the_paper(solver, schedule):
    plain, build = PLAIN[solver]
    times = time_uniform(12, 0.9, 0.05) ** 1.2  # neither equal in t nor in lambda
    expected = plain(schedule, times, X, gaussian(schedule))
    result = run(build(schedule, times), gaussian(schedule), X)
    # 1e-12: the noise form divides roundings by alpha, the others stay at 1e-15.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def beta(t):
    return 0.1 + 19.9 * t


def score(x, t):
    schedule = VPLinear()
    return (schedule.alpha(t) * gaussian(schedule)(x, t) - x) / schedule.sigma(t) ** 2


@pytest.mark.parametrize("t_end", [0.01, 0.0])
def test_euler_and_heun_step_along_the_probability_flow_of_the_vp_sde(t_end):
    """Heun averages the drifts at both ends, unless the end is clean."""
    schedule, times, x, y = VPLinear(), time_uniform(20, 1.0, t_end), X, X
    for s, t in zip(times, times[1:]):
        first, slope = (-beta(s) / 2 * (z + score(z, s)) for z in (x, y))
        guess = y + (t - s) * slope
        second = slope if t == 0 else -beta(t) / 2 * (guess + score(guess, t))
        x, y = x + (t - s) * first, y + (t - s) * (slope + second) / 2
    # 1e-11: up to forty evaluations of float64 rounding, divided by sigma at the end.
    steps = heun(schedule, times)
    for ours, expected in ((euler(schedule, times), x), (steps, y)):
        np.testing.assert_allclose(run(ours, gaussian(schedule), X), expected, atol=1e-11)
    assert steps.nfe == 40 - (t_end == 0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_maruyama_steps_along_the_reverse_sde(eta):
    x, schedule, times = X, VPLinear(), time_uniform(20)
    noise = np.random.default_rng(0).normal(size=(20, 3))
    for i, (s, t) in enumerate(zip(times, times[1:])):
        drift = -beta(s) / 2 * x - (1 + eta**2) / 2 * beta(s) * score(x, s)
        x = x + (t - s) * drift + (i < 19) * eta * np.sqrt(beta(s) * (s - t)) * noise[i]
    steps = euler_maruyama(schedule, times, eta=eta)
    # 1e-11: twenty steps of float64 rounding, divided by sigma at the end.
    np.testing.assert_allclose(run(steps, gaussian(schedule), X, noise), x, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_its_formula(schedule, eta):
    x, times = X, time_uniform(15, schedule.t_max, 0.0)
    noise = np.random.default_rng(0).normal(size=(15, 3))
    for s, t, z in zip(times, times[1:], noise):
        (a_s, v_s), (a_t, v_t) = ((schedule.alpha(u), schedule.sigma(u)) for u in (s, t))
        d = gaussian(schedule)(x, s)
        fresh = eta * v_t / v_s * np.sqrt(1 - (a_s / a_t) ** 2 * (v_t / v_s) ** 2) * v_s
        x = a_t * d + np.sqrt(v_t**2 - fresh**2) * (x - a_s * d) / v_s + fresh * z
    result = run(ddim(schedule, times, eta=eta), gaussian(schedule), X, noise)
    # 1e-12: fifteen steps of float64 rounding.
    np.testing.assert_allclose(result, x, atol=1e-12)


def test_ddpm_has_the_posterior_of_the_thousand_steps():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    # Ho et al. 2020, arXiv 2006.11239, Eq. 7.
    x0 = np.sqrt(before) * betas / (1 - alpha_bar)
    xt = np.sqrt(1 - betas) * (1 - before) / (1 - alpha_bar)
    variance = (1 - before) / (1 - alpha_bar) * betas
    steps = named("ddpm", VPDiscrete(), 1000)
    # 1e-10: beta = 1e-3 as a difference of alpha_bar; 1e-12 where the answer is 0.
    close = dict(rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(steps.denoised[::-1, 0], x0, **close)
    np.testing.assert_allclose(steps.anchor[::-1], xt, **close)
    np.testing.assert_allclose(steps.noise[::-1] ** 2, variance, **close)
    np.testing.assert_allclose(steps.t[::-1], np.arange(1, 1001) / 1000, **close)
    assert steps.noise[-1] == 0
    assert steps.commit.all()


def test_ddim_on_the_linear_path_is_euler_of_flow_matching():
    schedule, x, times = LinearPath(), X, time_uniform(20)
    for s, t in zip(times, times[1:]):
        velocity = (x - gaussian(schedule)(x, s)) / s
        x = x + (t - s) * velocity
    for build in (ddim, euler):
        # 1e-14: float64 rounding.
        np.testing.assert_allclose(
            run(build(schedule, times), gaussian(schedule), X), x, atol=1e-14
        )


@pytest.mark.parametrize("form", [dpm_solver, dpm_solver_pp])
def test_order_one_of_both_forms_is_ddim(form):
    times = time_uniform(12, 1.0, 0.01)
    a, b = form(VPLinear(), times, order=np.int64(1)), ddim(VPLinear(), times)
    # 1e-12: e^h - 1 computed in two ways.
    np.testing.assert_allclose(a.anchor, b.anchor, rtol=1e-12)
    np.testing.assert_allclose(a.denoised, b.denoised, rtol=1e-12)


def test_multistep_ends_at_clean_data_with_the_last_denoised_image():
    steps = dpm_solver_pp(VPLinear(), time_uniform(5), order=3)
    assert (steps.anchor[-1], *steps.denoised[-1]) == (0, 1, 0, 0)


# Row invariants -----------------------------------------------------------------------------------

BY_TIMES = {
    "ddim eta": lambda s, g: ddim(s, g, eta=0.4),
    **{key: value[1] for key, value in BUILDERS.items() if key.startswith("dpm")},
}
EXACT = [*BY_TIMES, *(n for n in SAMPLERS if "euler" not in n and n != "heun")]


@pytest.mark.parametrize("builder", EXACT)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_each_row_moves_perfect_data_and_noise_to_their_new_scales(builder, schedule):
    """If every denoised image is x0, alpha_s x0 + sigma_s n goes to alpha_t x0 + sigma_t n."""
    if builder in BY_TIMES:
        steps, end = BY_TIMES[builder](schedule, time_uniform(9, 0.95, 0.02)), 0.02
    else:  # on its own times
        steps = named(builder, schedule, 9)
        end = schedule.t_min if builder.startswith("dpm") else 0.0
    s, t = anchors_and_targets(steps, end)
    # 1e-11: the noise form's e^h - 1 reaches 1e3, over few steps on the linear path 1e5.
    close = dict(rtol=0, atol=1e-12 if builder in BY_TIMES else 1e-11)
    data = steps.anchor * schedule.alpha(s) + steps.denoised.sum(axis=1)
    np.testing.assert_allclose(data, schedule.alpha(t), **close)
    variance = (steps.anchor * schedule.sigma(s)) ** 2 + steps.noise**2
    np.testing.assert_allclose(variance, schedule.sigma(t) ** 2, **close)


# Exact moments ------------------------------------------------------------------------------------


def moments(schedule, steps):
    """Mean and variance of the samples: x is kept as coefficients of (1, x_T, z_0, z_1, ...)."""
    unit = np.eye(len(steps) + 2)
    t = steps.t[0]
    x = schedule.alpha(t) * MU * unit[0] + spread(schedule, t) * unit[1]
    x = run(steps, gaussian(schedule, mu=MU * unit[0]), x, unit[2:])
    return np.array([x[0], np.sum(x[1:] ** 2)])


@pytest.mark.parametrize("builder", [ddpm, euler_maruyama])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine()], ids=name)
def test_stochastic_samplers_reach_the_moments_of_the_data(builder, schedule):
    coarse, fine = (
        moments(schedule, builder(schedule, time_uniform(n, schedule.t_start, 0.0))) - [MU, SD**2]
        for n in (250, 500)
    )
    # 3%: first order in a step of 1 / 500 times rates up to beta = 20.
    assert (np.abs(fine) < 0.03 * np.array([MU, SD**2])).all(), fine
    # First order: half the step, half the error (0.6 leaves room for the next power).
    assert np.abs(fine[1]) < 0.6 * np.abs(coarse[1])
