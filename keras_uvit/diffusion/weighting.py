"""Where training looks: how often it draws each time, and how much an error there counts.

Both choices leave what is learned alone, the best answer at each time, and move the network's
attention between times. Which pays depends on schedule and prediction.
"""

import math
from collections.abc import Callable

from keras import ops

from keras_uvit.diffusion.predictions import PREDICTIONS
from keras_uvit.diffusion.schedules import Schedule
from keras_uvit.types import Tensor

END = 2.0**-24  # 1 - END is the float32 below 1
TINY = 1e-12  # its square and the square's inverse are float32 too


def _logit_normal(u):
    """sigmoid(z), z standard normal, by the inverse of its distribution function.

    Esser et al. 2024, arXiv 2403.03206, Eq. 19 with m = 0, s = 1: the middle is drawn most, the
    ends, where the answer is almost the data or the noise itself, hardly ever. In float32 z stays
    within +-5.4.
    """
    return ops.sigmoid(2.0**0.5 * ops.erfinv(2.0 * ops.clip(u, END, 1.0 - END) - 1.0))


def _cosmap(u):
    """1 - 1 / (tan(pi u / 2) + 1): on `LinearPath` the log-SNR of alpha = cos(pi u / 2).

    Esser et al. 2024, arXiv 2403.03206, Section 3.1 (CosMap), as sin / (sin + cos): the tangent of
    float32's pi / 2 is negative.
    """
    sin, cos = ops.sin(0.5 * math.pi * u), ops.cos(0.5 * math.pi * u)
    return ops.clip(sin / (sin + cos), 0.0, 1.0 - END)


# name: u in [0, 1), uniform, to another value in [0, 1), of which `schedule.training_time` makes t
TIME_SAMPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit_normal": _logit_normal,
    "cosmap": _cosmap,
}

# name: SNR alpha^2 / sigma^2 to the weight of the squared error of x0, or None: weight 1 for the
# error of what is predicted
LOSS_WEIGHTINGS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "uniform": None,
    # Hang et al. 2023, arXiv 2303.09556, Min-SNR-gamma with their gamma = 5.
    "min_snr": lambda snr: ops.minimum(snr, 5.0),
}


def loss_weight(weighting: str, prediction: str, schedule: Schedule, t: Tensor) -> Tensor:
    """Weight of the squared error of a prediction, from that of the x0 estimate.

    A network that sees x_t = alpha x0 + sigma noise and errs by e in x0 errs by -e alpha / sigma
    in the noise, and so in a x0 + b noise by (a - b alpha / sigma) e:

        weight = w(SNR) sigma^2 / (a sigma - b alpha)^2

    Args:
        weighting: a name in `LOSS_WEIGHTINGS`.
        prediction: a name in `predictions.PREDICTIONS`.
        schedule: see `schedules`.
        t: `(B,)` in [0, 1].

    Returns:
        `(B,)`, finite at both ends; or 1.0 for "uniform".
    """
    weight_of_x0 = LOSS_WEIGHTINGS[weighting]
    if weight_of_x0 is None:
        return 1.0
    alpha, sigma = (ops.maximum(f(t), TINY) for f in (schedule.alpha, schedule.sigma))
    a, b = PREDICTIONS[prediction](schedule, t)
    return weight_of_x0((alpha / sigma) ** 2) * (sigma / (a * sigma - b * alpha)) ** 2
