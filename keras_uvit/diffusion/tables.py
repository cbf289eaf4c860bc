"""New tables from a sampler's table: a later start, repeated steps, and the way back to noise.

Symbols as in `samplers`: a step goes from s to t < s.
"""

import dataclasses

import numpy as np

from keras_uvit.diffusion.loop import Steps
from keras_uvit.diffusion.samplers import D0, X, ddim
from keras_uvit.diffusion.schedules import Schedule


def beginning_at(steps: Steps, t: float) -> Steps:
    """The rows of a table from its first step at or below time t.

    Raises:
        ValueError: if no step begins there, or it needs `denoised` of the rows before it.
    """
    begins = np.append(True, steps.commit[:-1] > 0) & (steps.t <= t)
    if not begins.any():
        raise ValueError(f"No step of these `Steps` begins at t <= {t}. Their times: {steps.t}.")
    first = int(np.argmax(begins))
    if (_reach(steps)[first:] > np.arange(len(steps) - first)).any():
        raise ValueError(
            "These `Steps` weigh x0 estimates from before the step that would be the first. Pass "
            "the sampler's name, whose grid then begins at t = strength, or make `Steps` on times "
            f"that begin at {t} by their builder."
        )
    return Steps(**_part(steps, slice(first, None)))


def with_known(steps: Steps, schedule: Schedule) -> Steps:
    """The table with alpha and sigma of the time at which each row ends: that of the next row.

    After the last one nothing is noisy: what is known comes back as it is.
    """
    ends = steps.t[1:]
    known = np.stack([schedule.alpha(ends), schedule.sigma(ends)], axis=1)
    return dataclasses.replace(steps, known=np.concatenate([known, [[1.0, 0.0]]]))


def resampled(steps: Steps, schedule: Schedule, resamples: int) -> Steps:
    """The table with each step but the last made `resamples` times: RePaint's jumps back.

    A step from s to t, the jump back to s, x_s = a x_t + sqrt(sigma_s^2 - a^2 sigma_t^2) z with
    a = alpha_s / alpha_t, another step to t, and so on (Lugmayr et al. 2022, arXiv 2201.09865,
    Algorithm 1 with U = resamples and a jump of one step). A jump is no row of its own: it is
    folded into the coefficients of the row before it. The first time a step is the sampler's own,
    then DDIM's, of one evaluation; so the newest evaluation before the next step is at s, where
    the second-order multistep samplers expect it, and no jump lies between the two.

    Raises:
        ValueError: if a step reaches back further, as the third-order multistep samplers do.
    """
    ends = np.flatnonzero(steps.commit)[:-1]
    begins = np.append(0, ends + 1)
    inside = np.arange(len(steps)) - np.repeat(begins, np.diff([*begins, len(steps)]))
    if resamples > 1 and (_reach(steps) > inside + 1).any():
        raise ValueError(
            "resamples > 1 jumps back in time, and this sampler needs x0 estimates from before "
            'the jump. Choose a sampler of order 1 or 2, such as "dpm_solver_pp_2m" or "ddim".'
        )
    parts = []
    for begin, end in zip(begins, ends):
        s, t = steps.t[begin], steps.t[end + 1]
        step = dataclasses.replace(ddim(schedule, [s, t]), span=steps.span[[begin]])
        again = [_part(step, slice(None))] * (resamples - 1)
        passes = [_part(steps, slice(begin, end + 1)), *again]
        parts += [_jumping_back(part, schedule, s, t) for part in passes[:-1]] + passes[-1:]
    parts.append(_part(steps, slice(begins[-1], None)))
    return Steps(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _jumping_back(part, schedule, s, t):
    """A step from s to t that ends at s again, with fresh noise."""
    a = schedule.alpha(s) / schedule.alpha(t)
    fresh = max(schedule.sigma(s) ** 2 - (a * schedule.sigma(t)) ** 2, 0.0)
    part = {name: value.copy() for name, value in part.items()}
    part["anchor"][-1] *= a
    part["denoised"][-1] *= a
    part["noise"][-1] = np.sqrt((a * part["noise"][-1]) ** 2 + fresh)
    return part


def backwards(steps: Steps, schedule: Schedule, evaluations: int = 3) -> Steps:
    """The table from data to noise whose x the given table leads back to the same data.

    A step of the table is x_t = a x_s + b D(x_s, s). The way back looks for its x_s by fixed-point
    iteration, one row an iteration, each of which evaluates at s and writes the next guess on the
    step's own x_t and its evaluations so far. Two forms have the same fixed point:

        x_s <- (x_t - b D) / a
        x_s <- (x_t + b sigma_s / alpha_s eps) / (a + b / alpha_s)

    with eps = (x_s - alpha_s D) / sigma_s.

    The first contracts faster near noise, the second near data (by the exact D of normal data of
    variance 1: the first if sigma_s sigma_t > alpha_s alpha_t). One evaluation of the second form
    is the DDIM inversion of Song et al. 2021 (arXiv 2010.02502, Section 4.3), which is exact for
    small steps only.

    Args:
        steps: a deterministic table with one evaluation a step, such as `ddim` and `euler` make.
        schedule: the one that the table was made with.
        evaluations: 1, 2 or 3 for each step: as many as a row can weigh.

    Raises:
        ValueError: if the table adds noise, or a step has several evaluations or a memory.
    """
    if steps.noise.any():
        raise ValueError(
            "Inversion needs a deterministic sampler; this one adds noise. Choose "
            'sampler="ddim" or "euler".'
        )
    if not steps.commit.all() or steps.denoised[:, 1:].any():
        raise ValueError(
            "Inversion follows samplers of one evaluation a step, without a memory. Choose "
            'sampler="ddim" or "euler".'
        )
    if len(steps) < 2:
        raise ValueError("Inversion needs at least two steps: one draws the same from any noise.")
    if evaluations not in (1, 2, 3):
        raise ValueError(f"evaluations must be 1, 2 or 3. Received: {evaluations!r}.")
    rows, ends = [], [*steps.t[1:], 0.0]
    for s, t, a, b in reversed(list(zip(steps.t, ends, steps.anchor, steps.denoised[:, 0]))):
        alpha, sigma = schedule.alpha(s), schedule.sigma(s)
        near_noise = sigma * schedule.sigma(t) > alpha * schedule.alpha(t)
        guess = X
        for k in range(evaluations):
            if near_noise:
                guess = (X - b * D0) / a
            else:
                seen = np.append(guess[0], np.append(0.0, guess[1:3]))  # D_i is now D_{i-1}
                eps = (seen - alpha * D0) / sigma
                guess = (X + b * sigma / alpha * eps) / (a + b / alpha)
            rows.append((s, guess, 0, k == evaluations - 1))
    t, vectors, noise, commit = (np.array(column) for column in zip(*rows))
    more = {
        name: np.repeat(getattr(steps, name)[::-1], evaluations) for name in ("guidance", "span")
    }
    return Steps(t, vectors[:, 0], vectors[:, 1:], noise, commit, **more)


def _reach(steps):
    """`(n,)` how many evaluations back each row weighs `denoised`."""
    return np.max((steps.denoised != 0) * np.arange(3), axis=1)


def _part(steps, rows):
    """Some rows of a table, which need not be one by themselves."""
    return {field.name: getattr(steps, field.name)[rows] for field in dataclasses.fields(steps)}
