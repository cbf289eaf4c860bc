"""How noise grows with time: x_t = alpha(t) x0 + sigma(t) noise, t in [0, 1], 0 = data, 1 = noise.

Each schedule is one formula. Given NumPy arrays or numbers it answers in float64 (for sampler
tables), given backend tensors in float32 (for training).

Every schedule has

* `alpha(t)`, `sigma(t)`, and `half_log_snr(t)` = log(alpha / sigma), DPM-Solver's lambda;
* `time(half_log_snr)`, its inverse;
* `alpha_slope(t)`, `sigma_slope(t)`, the derivatives by t;
* `training_time(u)`: u uniform in [0, 1) to the t that training draws;
* `t_start`: where sampling starts, from pure noise;
* `time_scale`: the published factor from t to the network's timestep;
* `t_min`, `t_max`: between them samplers that step in log-SNR work, which is finite there.
"""

import dataclasses
from typing import Protocol, Self

import keras
import numpy as np
from keras import ops

from keras_uvit.types import Array, Config, Tensor


class Schedule(Protocol):
    """What samplers and training ask a schedule for; for the meaning see above."""

    @property
    def t_start(self) -> float: ...
    @property
    def time_scale(self) -> float: ...
    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def half_log_snr(self, t: Tensor) -> Tensor: ...
    def time(self, half_log_snr: Array) -> Array: ...
    def alpha_slope(self, t: Tensor) -> Tensor: ...
    def sigma_slope(self, t: Tensor) -> Tensor: ...
    def training_time(self, u: Tensor) -> Tensor: ...


def _module(t):
    """The namespace that computes on `t`: NumPy in float64, or the backend."""
    return ops if keras.ops.is_tensor(t) else np


def _array(t):
    return t if keras.ops.is_tensor(t) else np.asarray(t, "float64")


@dataclasses.dataclass(frozen=True)
class _Config:
    @property
    def t_start(self) -> float:
        return 1.0

    @property
    def time_scale(self) -> float:
        return 999.0

    def get_config(self) -> Config:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**config)


class _VariancePreserving(_Config):
    """alpha^2 + sigma^2 = 1, all of it from `log_alpha(t)` and its derivative."""

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def log_alpha_slope(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return _module(t).exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _module(t).sqrt(-_module(t).expm1(2.0 * self.log_alpha(t)))

    def half_log_snr(self, t: Tensor) -> Tensor:
        xp, log_alpha = _module(t), self.log_alpha(t)
        return log_alpha - 0.5 * xp.log(-xp.expm1(2.0 * log_alpha))

    def alpha_slope(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.log_alpha_slope(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        # From alpha alpha' + sigma sigma' = 0.
        return -(self.alpha(t) ** 2) * self.log_alpha_slope(t) / self.sigma(t)

    def training_time(self, u: Tensor) -> Tensor:
        return u

    def _log_alpha_at(self, half_log_snr):
        # alpha^2 = 1 / (1 + exp(-2 lambda)).
        return -0.5 * np.logaddexp(0.0, -2.0 * _array(half_log_snr))


@keras.saving.register_keras_serializable("keras_uvit")
@dataclasses.dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min); the published pixel models and latent L.

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2

    Song et al. 2021, arXiv 2011.13456, Eq. 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-4
    t_max: float = 1.0

    def log_alpha(self, t: Tensor) -> Tensor:
        t = _array(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def log_alpha_slope(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + _array(t) * (self.beta_max - self.beta_min))

    def time(self, half_log_snr: Array) -> Array:
        # The positive root of the quadratic, in the form that does not cancel near t = 0.
        c = -2.0 * self._log_alpha_at(half_log_snr)
        span = self.beta_max - self.beta_min
        return 2.0 * c / (self.beta_min + np.sqrt(self.beta_min**2 + 2.0 * span * c))


@keras.saving.register_keras_serializable("keras_uvit")
@dataclasses.dataclass(frozen=True)
class VPCosine(_VariancePreserving):
    """alpha(t) = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)).

    Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 17, square root. alpha(1) = 0, where no
    epsilon prediction can tell x0: t stops at `t_max`, also in training.
    """

    s: float = 0.008
    t_min: float = 1e-4
    t_max: float = 0.9946

    def _angle(self, t):
        return 0.5 * np.pi * (_array(t) + self.s) / (1.0 + self.s)

    def log_alpha(self, t: Tensor) -> Tensor:
        # log(cos(a + b) / cos(b)) without cancellation near t = 0, with a = angle(t) - angle(0).
        xp, a = _module(t), 0.5 * np.pi / (1.0 + self.s) * _array(t)
        fall = 2.0 * xp.sin(0.5 * a) ** 2 + float(np.tan(self._angle(0.0))) * xp.sin(a)
        return xp.log1p(-fall)

    def log_alpha_slope(self, t: Tensor) -> Tensor:
        xp = _module(t)
        return -0.5 * np.pi / (1.0 + self.s) * xp.tan(self._angle(t))

    @property
    def t_start(self) -> float:
        return self.t_max

    def training_time(self, u: Tensor) -> Tensor:
        return u * self.t_max

    def time(self, half_log_snr: Array) -> Array:
        alpha = np.exp(self._log_alpha_at(half_log_snr))
        angle = np.arccos(alpha * np.cos(self._angle(0.0)))
        return angle * 2.0 / np.pi * (1.0 + self.s) - self.s


@keras.saving.register_keras_serializable("keras_uvit")
@dataclasses.dataclass(frozen=True)
class VPDiscrete(_VariancePreserving):
    """Stable Diffusion's betas; between their steps log alpha is linear in t.

    betas = linspace(sqrt(beta_min), sqrt(beta_max), num_timesteps)^2,
    log alpha(n / num_timesteps) = sum over k <= n of log(1 - beta_k) / 2

    Rombach et al. 2022 (arXiv 2112.10752); the interpolation is DPM-Solver's (arXiv 2206.00927,
    Appendix D.3). Training draws n uniformly from 1..num_timesteps, t = n / num_timesteps.
    """

    beta_min: float = 0.00085
    beta_max: float = 0.012
    num_timesteps: int = 1000

    @property
    def t_min(self) -> float:
        return 1.0 / self.num_timesteps

    t_max = 1.0

    @property
    def time_scale(self) -> float:
        return float(self.num_timesteps)

    def _table(self):
        """log alpha(n / num_timesteps) for n = 0..num_timesteps."""
        root = np.linspace(self.beta_min**0.5, self.beta_max**0.5, self.num_timesteps)
        return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-(root**2)))])

    def _segment(self, t):
        """n with n < t num_timesteps <= n + 1; log alpha's slope per step there; its value at n."""
        n = _module(t).maximum(_module(t).ceil(_array(t) * self.num_timesteps) - 1, 0)
        table = self._table()
        return n, _lookup(np.diff(table), n), _lookup(table, n)

    def log_alpha(self, t: Tensor) -> Tensor:
        n, slope, start = self._segment(t)
        return start + slope * (_array(t) * self.num_timesteps - n)

    def log_alpha_slope(self, t: Tensor) -> Tensor:
        return self._segment(t)[1] * self.num_timesteps

    def training_time(self, u: Tensor) -> Tensor:
        return (_module(u).floor(_array(u) * self.num_timesteps) + 1.0) / self.num_timesteps

    def time(self, half_log_snr: Array) -> Array:
        # np.interp wants increasing abscissae: log alpha falls with n.
        steps = np.arange(self.num_timesteps, -1, -1)
        log_alpha = self._log_alpha_at(half_log_snr)
        return np.interp(log_alpha, self._table()[::-1], steps) / self.num_timesteps


def _lookup(table, index):
    if keras.ops.is_tensor(index):
        return ops.take(ops.convert_to_tensor(table, "float32"), ops.cast(index, "int32"))
    return table[index.astype(int)]


@keras.saving.register_keras_serializable("keras_uvit")
@dataclasses.dataclass(frozen=True)
class LinearPath(_Config):
    """x_t = (1 - t) x0 + t noise: flow matching (Lipman et al. 2023, arXiv 2210.02747, Eq. 22).

    `t_min` and `t_max` only bound samplers that step in log-SNR, infinite at both ends.
    """

    t_min: float = 1e-3
    t_max: float = 0.999

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - _array(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _array(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        xp = _module(t)
        return xp.log1p(-_array(t)) - xp.log(_array(t))

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -_module(t).ones_like(_array(t))

    def sigma_slope(self, t: Tensor) -> Tensor:
        return _module(t).ones_like(_array(t))

    def training_time(self, u: Tensor) -> Tensor:
        return u

    def time(self, half_log_snr: Array) -> Array:
        return 1.0 / (1.0 + np.exp(_array(half_log_snr)))
