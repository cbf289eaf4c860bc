"""A sampler as a table, and the one loop that runs every such table.

Every fixed-step sampler here is linear in an anchor state, the last three `denoised` images and
fresh noise, with coefficients known before sampling starts:

    D_i = denoise(x, t_i)
    x  <- anchor_i a + denoised_i0 D_i + denoised_i1 D_{i-1} + denoised_i2 D_{i-2} + noise_i z_i
    a  <- x where commit_i
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from keras_uvit.types import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, span) to an x0 estimate


@dataclasses.dataclass(frozen=True)
class Steps:
    """A sampler: one row per network evaluation, float64.

    Args:
        t: `(n,)` time in (0, 1] of each evaluation.
        anchor: `(n,)` weight of the anchor.
        denoised: `(n, 3)` weights of this and the two earlier `denoised`.
        noise: `(n,)` standard deviation of fresh noise, >= 0.
        commit: `(n,)` bool, where the new x becomes the anchor; the last row does.
        span: `(n,)` t - r, where the network is asked for the mean velocity from t to r; 0, the
            default, asks for the velocity at t. See `diffusion.FlowMap`.
    """

    t: np.ndarray
    anchor: np.ndarray
    denoised: np.ndarray
    noise: np.ndarray
    commit: np.ndarray
    span: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.t)
        if self.span is None:
            object.__setattr__(self, "span", np.zeros(n))
        for field in (field.name for field in dataclasses.fields(self)):
            shape = (n, 3) if field == "denoised" else (n,)
            value = np.asarray(getattr(self, field), "float64")
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(
                    f"Steps.{field} must be finite, of shape {shape}. Received: {value}."
                )
            object.__setattr__(self, field, value)
        if n == 0 or self.t.min() <= 0 or self.t.max() > 1 or self.noise.min() < 0:
            raise ValueError(
                "Steps needs at least one row, t in (0, 1] and noise >= 0. Received: "
                f"t={self.t}, noise={self.noise}."
            )
        if self.commit[-1] != 1 or self.denoised[0, 1:].any() or self.denoised[1:2, 2:].any():
            raise ValueError(
                "The last row of Steps must commit, and a row may not weigh `denoised` images "
                "from before the first evaluation."
            )

    def __len__(self) -> int:
        return len(self.t)

    @property
    def nfe(self) -> int:
        """Network evaluations (a guided one counts once, as one doubled batch)."""
        return len(self)

    def packed(self) -> np.ndarray:
        """`(n, 8)` float32: t, span, anchor, denoised x 3, noise, commit."""
        columns = [self.t, self.span, self.anchor, *self.denoised.T, self.noise, self.commit]
        return np.stack(columns, axis=1).astype("float32")


def sample(
    denoise: Denoise | Sequence[tuple[int, Denoise]],
    x_init: Tensor,
    steps: Steps | Tensor,
    draw_noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs a sampler from noise to data.

    Inside a compiled function the loop is one program, and `steps` may be a traced `(n, 8)` table
    (`Steps.packed()`), so that another sampler of n rows needs no new program.

    Args:
        denoise: (x, t, span) -> x0 estimate like x; t and span are float32 scalar tensors. Or a
            list of
            (count, function), one after the other for so many rows, where rows differ in how they
            ask the network.
        x_init: `(B, ...)` float32, noise of standard deviation sigma(t) of the first row.
        steps: `Steps`, or its packed table.
        draw_noise: i -> standard normal like x, i the row's number, an int32 scalar tensor; may
            be None for deterministic samplers.

    Returns:
        `(B, ...)` float32.
    """
    if isinstance(steps, Steps):
        if steps.noise.any() and draw_noise is None:
            raise ValueError("This sampler adds noise: `draw_noise` must be given.")
        steps = steps.packed()
    table, x = ops.convert_to_tensor(steps, "float32"), ops.convert_to_tensor(x_init, "float32")

    def step(evaluate, i, carry):
        x, anchor, d1, d2 = carry
        t, span, keep, b0, b1, b2, noise, commit = ops.unstack(ops.take(table, i, axis=0), 8)
        d0 = evaluate(x, t, span)
        x = keep * anchor + b0 * d0 + b1 * d1 + b2 * d2
        if draw_noise is not None:
            x = ops.cond(noise > 0, lambda: x + noise * draw_noise(i), lambda: x)
        return x, ops.where(commit > 0, x, anchor), d0, d1

    runs = [(table.shape[0], denoise)] if callable(denoise) else denoise
    covered = sum(count for count, _ in runs)
    if covered != table.shape[0]:
        raise ValueError(f"`denoise` covers {covered} of {table.shape[0]} rows.")
    carry, first = (x, x, ops.zeros_like(x), ops.zeros_like(x)), 0
    for count, evaluate in runs:
        carry = ops.fori_loop(first, first + count, functools.partial(step, evaluate), carry)
        first += count
    return carry[0]
