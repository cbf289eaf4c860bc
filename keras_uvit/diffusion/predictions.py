"""What a network may predict, and how its output becomes `denoised`, the x0 estimate.

Every prediction is a mix of data and noise, output = a x0 + b noise. With
x_t = alpha x0 + sigma noise these are two equations in two unknowns, so one formula serves all:

    x0 = (b x_t - sigma output) / (b alpha - a sigma)
"""

from collections.abc import Callable

from keras import ops

from keras_uvit.diffusion.schedules import Schedule
from keras_uvit.types import Tensor

# name: (schedule, t) -> (a, b)
PREDICTIONS: dict[str, Callable[[Schedule, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda schedule, t: (0.0, 1.0),
    "x0": lambda schedule, t: (1.0, 0.0),
    # Salimans and Ho 2022, arXiv 2202.00512, Appendix D: v = alpha noise - sigma x0.
    "v": lambda schedule, t: (-schedule.sigma(t), schedule.alpha(t)),
    # Lipman et al. 2023, arXiv 2210.02747: dx_t/dt; noise - x0 on the linear path.
    "velocity": lambda schedule, t: (schedule.alpha_slope(t), schedule.sigma_slope(t)),
}


def target(prediction: str, schedule: Schedule, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """What the network should answer.

    Args:
        prediction: a name in `PREDICTIONS`.
        schedule: see `schedules`.
        t: `(B,)` in [0, 1].
        x0: `(B, ...)`.
        noise: like `x0`.

    Returns:
        `(B, ...)`.
    """
    a, b = (column(c, x0) for c in PREDICTIONS[prediction](schedule, t))
    return a * x0 + b * noise


def denoised(prediction: str, schedule: Schedule, t: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """The x0 estimate from noisy `x` and the network's `output`, `(B, ...)` each; t is `(B,)`."""
    a, b = (column(c, x) for c in PREDICTIONS[prediction](schedule, t))
    alpha, sigma = column(schedule.alpha(t), x), column(schedule.sigma(t), x)
    return (b * x - sigma * output) / (b * alpha - a * sigma)


def add_noise(schedule: Schedule, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) noise, `(B, ...)`; t is `(B,)`."""
    return column(schedule.alpha(t), x0) * x0 + column(schedule.sigma(t), x0) * noise


def column(c: Tensor, like: Tensor) -> Tensor:
    """`(B,)` to `(B, 1, ...)` so that it multiplies `like`; numbers stay numbers."""
    if isinstance(c, float):
        return c
    return ops.reshape(c, (-1, *[1] * (len(like.shape) - 1)))
