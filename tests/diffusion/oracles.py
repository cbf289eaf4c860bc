"""What the tests of samplers share: Gaussian data, whose exact denoiser and solution are known."""

from pathlib import Path

import numpy as np

from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES = [VPLinear(), VPCosine(), VPDiscrete(), LinearPath()]
MU, SD = 0.6, 0.7
X = np.array([1.3, -0.8, 0.1])  # where solutions start


def name(schedule):
    return type(schedule).__name__


def run(steps, denoise, x, noise=None):
    """The loop of `sample` with recorded noise, one row per evaluation."""
    anchor, seen = x, [0 * x] * 3
    for i in range(len(steps)):
        seen = [denoise(x, steps.t[i]), *seen[:2]]
        x = steps.anchor[i] * anchor + sum(w * d for w, d in zip(steps.denoised[i], seen))
        if steps.noise[i]:
            x = x + steps.noise[i] * noise[i]
        if steps.commit[i]:
            anchor = x
    return x


def gaussian(schedule, mu=MU, sd=SD):
    """E[x0 | x_t = x] for x0 ~ N(mu, sd^2)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return mu + alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * (x - alpha * mu)

    return denoise


def spread(schedule, t):
    """Standard deviation of x_t for data of standard deviation SD."""
    return np.sqrt(schedule.alpha(t) ** 2 * SD**2 + schedule.sigma(t) ** 2)


def flow(schedule, s, t, x):
    """The probability-flow ODE solved exactly from time s to t."""
    scale = spread(schedule, t) / spread(schedule, s)
    return schedule.alpha(t) * MU + scale * (x - schedule.alpha(s) * MU)


def anchors_and_targets(steps, end):
    """For each row: the time its anchor belongs to and the time it goes to."""
    targets, anchors, anchor = [*steps.t[1:], end], [], steps.t[0]
    for commit, target in zip(steps.commit, targets):
        anchors.append(anchor)
        anchor = target if commit else anchor
    return np.array(anchors), np.array(targets)
