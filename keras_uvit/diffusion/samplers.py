"""Samplers: builders of tables (`loop.Steps`), time grids for them, and their names.

A builder writes its paper's formula on the unit vectors of (anchor, last three denoised images);
the vector it ends with *is* the row of the table.

Symbols: s is the time a step starts from, t the one it goes to (t < s), lambda the half log-SNR,
h = lambda_t - lambda_s > 0.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from keras_uvit.checks import as_int, nearest
from keras_uvit.diffusion.loop import Steps as Steps
from keras_uvit.diffusion.loop import sample as sample
from keras_uvit.diffusion.schedules import Schedule
from keras_uvit.types import Array

X, D0, D1, D2 = np.eye(4)  # the anchor and the last three denoised images, newest first


def _steps(rows):
    """`Steps` from rows (t, vector, noise, commit)."""
    t, vectors, noise, commit = (np.array(column) for column in zip(*rows))
    return Steps(t, vectors[:, 0], vectors[:, 1:], noise, commit)


# Time grids ---------------------------------------------------------------------------------------


def time_uniform(num_steps: int, t_start: float = 1.0, t_end: float = 0.0) -> np.ndarray:
    """`num_steps + 1` times from `t_start` down to `t_end`, equally spaced."""
    return np.linspace(t_start, t_end, num_steps + 1)


def log_snr_uniform(
    schedule: Schedule, num_steps: int, t_start: float | None = None, t_end: float | None = None
) -> np.ndarray:
    """`num_steps + 1` times, equally spaced in half log-SNR; default `t_max` down to `t_min`."""
    ends = (
        schedule.t_max if t_start is None else t_start,
        schedule.t_min if t_end is None else t_end,
    )
    first, last = (float(schedule.half_log_snr(t)) for t in ends)
    times = schedule.time(np.linspace(first, last, num_steps + 1))
    times[[0, -1]] = ends  # no rounding at the ends
    return times


def _checked(times, name, schedule, limit="t_start"):
    times = np.asarray(times, "float64")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"{name} needs at least two times (one step). Received: {times}.")
    if (np.diff(times) >= 0).any() or times[0] > 1 or times[-1] < 0:
        raise ValueError(
            f"{name} needs strictly decreasing times in [0, 1], noise first. Received: {times}."
        )
    latest = getattr(schedule, limit)
    if times[0] > latest:
        raise ValueError(
            f"{name} starts at t = {latest} at most on {type(schedule).__name__}, which has no "
            f"signal left later. Received: a first time of {times[0]}; pass "
            f"np.linspace({latest}, {times[-1]}, {len(times)}), for example."
        )
    return times


def _checked_order(order, name) -> int:
    if order not in (1, 2, 3):
        raise ValueError(f"{name} has order 1, 2 or 3. Received: order={order}.")
    return order


# Builders -----------------------------------------------------------------------------------------


def ddim(schedule: Schedule, times: Array, *, eta: float = 0.0) -> Steps:
    """DDIM; `eta=1` is DDPM ancestral sampling, and on `LinearPath` `eta=0` is Euler.

    x_t = alpha_t D + sqrt(sigma_t^2 - n^2) (x_s - alpha_s D) / sigma_s + n z,
    n = eta sigma_t / sigma_s sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2)

    Song et al. 2021, arXiv 2010.02502, Eq. 12 and 16, for any (alpha, sigma).

    Args:
        schedule: gives alpha and sigma.
        times: `(n + 1,)`, strictly decreasing from at most `schedule.t_start`; the last may be 0.
        eta: float in [0, 1]. 0 is deterministic, 1 has the DDPM posterior variance.

    Returns:
        `Steps` with n rows.

    Raises:
        ValueError: if `times` or `eta` is out of range.

    Example:
        >>> from keras_uvit.diffusion.schedules import VPLinear
        >>> ddim(VPLinear(), time_uniform(50)).nfe
        50
    """
    times = _checked(times, "ddim", schedule)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]. Received: {eta}.")
    rows = []
    for s, t in zip(times[:-1], times[1:]):
        (a_s, v_s), (a_t, v_t) = ((schedule.alpha(u), schedule.sigma(u)) for u in (s, t))
        n = eta * v_t / v_s * np.sqrt(max(v_s**2 - (a_s / a_t) ** 2 * v_t**2, 0.0))
        rows.append((s, a_t * D0 + np.sqrt(v_t**2 - n**2) * (X - a_s * D0) / v_s, n, 1))
    return _steps(rows)


def ddpm(schedule: Schedule, times: Array) -> Steps:
    """Ancestral sampling, exact posterior variance: Ho et al. 2020, arXiv 2006.11239, Eq. 7.

    On `time_uniform(1000)` with `VPDiscrete` these are the paper's thousand steps. Arguments as in
    `ddim`.
    """
    return ddim(schedule, times, eta=1.0)


def flow_map(schedule: Schedule, times: Array) -> Steps:
    """Steps of a flow map: x_t = x_s - (s - t) u(x_s, s, t), u the mean velocity from s to t.

    Exact at any length for a perfect network, which is trained by `DiffusionModel(flow_map=...)`
    (MeanFlow, arXiv 2505.13447, Eq. 12). Those of `ddim` where the network is told their span.
    Arguments as in `ddim`; the schedule is `LinearPath`.
    """
    steps = ddim(schedule, times)
    return dataclasses.replace(steps, span=-np.diff(np.asarray(times, "float64")))


def _drift(schedule, t, x):
    """dx/dt = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) D, the probability-flow ODE."""
    rate = schedule.sigma_slope(t) / schedule.sigma(t)
    return rate * x + (schedule.alpha_slope(t) - schedule.alpha(t) * rate) * D0


def euler(schedule: Schedule, times: Array) -> Steps:
    """Euler steps of the probability-flow ODE, order 1. Arguments as in `ddim`."""
    times = _checked(times, "euler", schedule)
    return _steps(
        [(s, X + (t - s) * _drift(schedule, s, X), 0, 1) for s, t in zip(times, times[1:])]
    )


def heun(schedule: Schedule, times: Array) -> Steps:
    """Heun's second-order steps of the probability-flow ODE: two evaluations each.

    A step that ends at t = 0, where the drift is 0 / 0, is an Euler step (Karras et al. 2022,
    arXiv 2206.00364, Algorithm 1). Arguments as in `ddim`.
    """
    times, rows = _checked(times, "heun", schedule), []
    for s, t in zip(times[:-1], times[1:]):
        first = _drift(schedule, s, X)
        guess = X + (t - s) * first
        if t == 0:
            rows.append((s, guess, 0, 1))
            continue
        first = np.array([first[0], 0, first[1], 0])  # one evaluation later D_i is D_{i-1}
        second = _drift(schedule, t, X + (t - s) * first)
        rows += [(s, guess, 0, 0), (t, X + (t - s) * (first + second) / 2, 0, 1)]
    return _steps(rows)


def euler_maruyama(schedule: Schedule, times: Array, *, eta: float = 1.0) -> Steps:
    """Euler-Maruyama steps of the reverse SDE; `eta=0` is `euler`.

    dx = [x' + eta^2 g^2 / (2 sigma) eps] dt + eta g dw,
    g^2 = (sigma^2)' - 2 (alpha' / alpha) sigma^2

    with x' the probability-flow drift and eps = (x - alpha D) / sigma: Song et al. 2021, arXiv
    2011.13456, Eq. 6 for eta = 1. The last step adds no noise. The published CIFAR-10 and CelebA
    samples are 1000 of these. Arguments as in `ddim`; `eta` in [0, 1].
    """
    times, rows = _checked(times, "euler_maruyama", schedule, "t_max"), []
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]. Received: {eta}.")
    for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
        alpha, sigma = schedule.alpha(s), schedule.sigma(s)
        slope = schedule.alpha_slope(s) / alpha
        g2 = 2 * sigma * schedule.sigma_slope(s) - 2 * slope * sigma**2
        drift = _drift(schedule, s, X) + eta**2 * g2 / (2 * sigma) * (X - alpha * D0) / sigma
        last = i == len(times) - 2
        rows.append((s, X + (t - s) * drift, 0 if last else eta * np.sqrt(g2 * (s - t)), 1))
    return _steps(rows)


def dpm_solver(schedule: Schedule, times: Array, *, order: int | Sequence[int] = 3) -> Steps:
    """DPM-Solver, noise form, singlestep: Lu et al. 2022, arXiv 2206.00927, Eq. 4.1, Alg. 1 and 2.

    Order 3 evaluates at thirds of each interval of lambda, order 2 at the half. The published
    "fast" schedule is `order=fast_orders(nfe)` on `log_snr_uniform`; see `SAMPLERS`.

    Args:
        schedule: gives alpha, sigma, half_log_snr and its inverse.
        times: `(n + 1,)`, strictly decreasing in (0, 1].
        order: 1, 2 or 3, or a list of n of them, one per interval.

    Returns:
        `Steps`, as many rows as the orders' sum.
    """
    return _singlestep(schedule, times, order, _noise_weights, "dpm_solver")


def dpm_solver_pp(
    schedule: Schedule,
    times: Array,
    *,
    order: int | Sequence[int] = 2,
    multistep: bool = True,
    on_grid: bool = False,
) -> Steps:
    """DPM-Solver++, data form: Lu et al. 2022, arXiv 2211.01095, Alg. 1 and 2, Appendix A.

    Multistep uses the earlier evaluations: one per interval; the first steps and a step to t = 0
    have the order that is possible. (Order 3 weighs the second derivative fully; code in
    circulation takes half of it, which leaves an error of second order.)

    Singlestep evaluates inside each interval: at thirds (order 3) or the half (order 2) of lambda,
    or, with `on_grid`, at the given times themselves, so that an order-3 step spans three
    intervals of `times`. The published "fast" schedule is singlestep with
    `order=fast_orders(nfe)` on the uniform-time grid.

    Args:
        schedule: gives alpha, sigma, half_log_snr and its inverse.
        times: `(n + 1,)`, strictly decreasing; only multistep may end at 0.
        order: 1, 2 or 3; singlestep also takes a list, one per step.
        multistep: bool.
        on_grid: bool, singlestep only.
    """
    if not multistep:
        return _singlestep(schedule, times, order, _data_weights, "dpm_solver_pp", on_grid)
    times = _checked(times, "dpm_solver_pp", schedule)
    highest = _checked_order(order, "dpm_solver_pp")
    if len(times) - 1 < highest:
        raise ValueError(
            f"dpm_solver_pp of order {highest} needs at least {highest} steps. "
            f"Received: {len(times) - 1}."
        )
    rows = []
    for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
        if t == 0:  # lambda is infinite there: the first-order limit
            rows.append((s, schedule.alpha(t) * D0, 0, 1))
            continue
        k = min(highest, i + 1)
        lambdas = [schedule.half_log_snr(u) for u in times[i + 1 - k : i + 2][::-1]]  # t, s, ...
        h = lambdas[0] - lambdas[1]
        p1 = np.expm1(-h)
        x = schedule.sigma(t) / schedule.sigma(s) * X - schedule.alpha(t) * p1 * D0
        if k >= 2:
            r0 = (lambdas[1] - lambdas[2]) / h
            slope = (D0 - D1) / r0
        if k == 2:
            x = x - schedule.alpha(t) * p1 / 2 * slope
        if k == 3:
            r1 = (lambdas[2] - lambdas[3]) / h
            bend = (slope - (D1 - D2) / r1) / (r0 + r1)
            p2 = p1 / h + 1
            # `bend` is a divided difference, half of the second derivative times h^2.
            x = x + schedule.alpha(t) * (p2 * (slope + r0 * bend) - 2 * (p2 / h - 0.5) * bend)
        rows.append((s, x, 0, 1))
    return _steps(rows)


def fast_orders(nfe: int) -> list[int]:
    """Orders of the "fast" singlestep schedule: 3 as often as `nfe` evaluations allow.

    >>> fast_orders(9), fast_orders(10), fast_orders(11)
    ([3, 3, 2, 1], [3, 3, 3, 1], [3, 3, 3, 2])
    """
    return [3] * (nfe // 3 - (nfe % 3 == 0)) + {0: [2, 1], 1: [1], 2: [2]}[nfe % 3]


def _singlestep(schedule, times, order, weights, name, on_grid=False):
    times = _checked(times, name, schedule, "t_max")  # lambda may be infinite later
    intervals = len(times) - 1
    if isinstance(order, int | np.integer):
        _checked_order(order, name)
        order = [int(order)] * (intervals // order if on_grid else intervals)
    for k in order:
        _checked_order(k, name)
    spans = [k if on_grid else 1 for k in order]
    if sum(spans) != intervals or times[-1] <= 0:
        raise ValueError(
            f"{name} with orders {order} needs {sum(spans)} intervals that end above t = 0. "
            f"Received: {intervals} ending at {times[-1]}."
        )
    rows, start = [], 0
    for k, span in zip(order, spans):
        s, t = times[start], times[start + span]
        if on_grid:
            stages = [s, *times[start + 1 : start + span]]
        else:
            lambda_s, lambda_t = schedule.half_log_snr(s), schedule.half_log_snr(t)
            stages = [s, *schedule.time(lambda_s + np.arange(1, k) / k * (lambda_t - lambda_s))]
        rows += _stages(schedule, [*stages, t], weights)
        start += span
    return _steps(rows)


def _stages(schedule, nodes, weights):
    """Rows of one singlestep step through `nodes` = (s, inner times, t), noise or data form.

    The prediction P (noise or x0) is approximated in lambda: constant, then linear through the
    first and the newest evaluation. phi_1(h) P_s + phi_2(h) (P_k - P_s) / r_k, except that order 2
    ends with phi_1 / 2 in place of phi_2, as published.
    """
    lambdas = np.array([schedule.half_log_snr(u) for u in nodes])
    ratios = (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0])
    order, x, rows, known = len(nodes) - 1, X, [], []
    for j in range(order):
        # `known` holds the predictions of this step over (X, D of stage 0, of stage 1, of stage 2).
        stage = np.eye(4)[1 + j]
        noise = (x - schedule.alpha(nodes[j]) * stage) / schedule.sigma(nodes[j])
        known.append(noise if weights is _noise_weights else stage)
        u, h = nodes[j + 1], lambdas[j + 1] - lambdas[0]
        keep, phi_1, phi_2 = weights(schedule, nodes[0], u, h)
        if order == 2:
            phi_2 = phi_1 / 2
        x = keep * X + phi_1 * known[0]
        if j > 0:
            x = x + phi_2 / (ratios[j] / ratios[j + 1]) * (known[j] - known[0])
        # Newest first: stage j is D0, stage j - 1 is D1, ...
        row = np.array([x[0], *x[j + 1 : 0 : -1], *[0.0] * (2 - j)])
        rows.append((nodes[j], row, 0, j == order - 1))
    return rows


def _noise_weights(schedule, s, u, h):
    # x_t = alpha_t / alpha_s x - sigma_t (e^h - 1) eps - ...
    keep, sigma = schedule.alpha(u) / schedule.alpha(s), schedule.sigma(u)
    return keep, -sigma * np.expm1(h), -sigma * (np.expm1(h) / h - 1)


def _data_weights(schedule, s, u, h):
    # x_t = sigma_t / sigma_s x - alpha_t (e^-h - 1) D + ...
    keep, alpha = schedule.sigma(u) / schedule.sigma(s), schedule.alpha(u)
    return keep, -alpha * np.expm1(-h), alpha * (np.expm1(-h) / h + 1)


# Names --------------------------------------------------------------------------------------------


def _uniform(builder):
    return lambda s, n, start: builder(s, time_uniform(n, min(start, s.t_start)))


def _fast_noise(s, n, start):
    orders = fast_orders(n)
    return dpm_solver(s, log_snr_uniform(s, len(orders), min(start, s.t_max)), order=orders)


def _fast_data(s, n, start):
    times = time_uniform(n, min(start, s.t_max), s.t_min)
    return dpm_solver_pp(s, times, order=fast_orders(n), multistep=False, on_grid=True)


def _multistep(order):
    return lambda s, n, start: dpm_solver_pp(
        s, log_snr_uniform(s, n, min(start, s.t_max)), order=order
    )


# name: (fewest steps, builder from (schedule, num_steps, the time to start from)). All but "heun"
# (two evaluations a step, the last has one) cost num_steps evaluations.
SAMPLERS: dict[str, tuple[int, Callable[[Schedule, int, float], Steps]]] = {
    "ddim": (1, _uniform(ddim)),
    "ddpm": (1, _uniform(ddpm)),
    "euler": (1, _uniform(euler)),
    "heun": (1, _uniform(heun)),
    "flow_map": (1, _uniform(flow_map)),  # models with a flow map, 1 to 4 steps
    "euler_maruyama": (1, _uniform(euler_maruyama)),  # CIFAR-10 and CelebA, 1000 steps
    "dpm_solver": (3, _fast_noise),  # ImageNet 64 and the latent L models, 50 steps
    "dpm_solver_pp": (3, _fast_data),  # the latent H models and COCO, 50 steps
    "dpm_solver_pp_2m": (2, _multistep(2)),  # the one to use for few steps
    "dpm_solver_pp_3m": (3, _multistep(3)),
}


def named(name: str, schedule: Schedule, num_steps: int, t_start: float = 1.0) -> Steps:
    """The `Steps` of a sampler in `SAMPLERS` on its default time grid.

    Args:
        name, schedule, num_steps: a key of `SAMPLERS`, such as `VPLinear()`, an int.
        t_start: float in (schedule.t_min, 1], the time that the grid begins at, if the sampler
            does not begin earlier.

    Raises:
        ValueError: for an unknown name, or fewer steps than the sampler's order.
    """
    if name not in SAMPLERS:
        raise ValueError(
            f"Unknown sampler {name!r}.{nearest(name, SAMPLERS)} Known: {', '.join(SAMPLERS)}."
        )
    fewest, builder = SAMPLERS[name]
    return builder(schedule, as_int(num_steps, f"num_steps of sampler {name!r}", fewest), t_start)
