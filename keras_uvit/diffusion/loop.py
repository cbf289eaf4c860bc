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
from typing import Any

import numpy as np
from keras import ops

from keras_uvit.types import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, t) to an x0 estimate
Row = dict[str, Any]  # by the names in COLUMNS: a scalar tensor, or a list of them
DenoiseRow = Callable[[Tensor, Row], Tensor]  # (x, row) to an x0 estimate
Carry = tuple[Tensor, Tensor, Tensor, Tensor]  # x, the anchor, the last two x0 estimates

# A packed table's columns, in order: a field of `Steps`, and how many numbers a row has of it.
COLUMNS = {
    **{"t": 1, "anchor": 1, "denoised": 3, "noise": 1, "commit": 1},
    **{"guidance": 1, "known": 2, "span": 1},
}
WIDTH = sum(COLUMNS.values())


@dataclasses.dataclass(frozen=True)
class Steps:
    """A sampler: one row per network evaluation, float64.

    Args:
        t: `(n,)` time in (0, 1] of each evaluation.
        anchor: `(n,)` weight of the anchor.
        denoised: `(n, 3)` weights of this and the two earlier `denoised`.
        noise: `(n,)` standard deviation of fresh noise, >= 0.
        commit: `(n,)` bool, where the new x becomes the anchor; the last row does.
        guidance: `(n,)` scale w of guidance, 1 is off, the default. `generate` sets it.
        known: `(n, 2)` alpha and sigma of the time that a row ends at, by which inpainting adds
            noise to the known part of the images; by default none. `generate` sets it.
        span: `(n,)` t - r, where the network is asked for the mean velocity from t to r; by default
            0, for the velocity at t. See `diffusion.FlowMap`.
    """

    t: np.ndarray
    anchor: np.ndarray
    denoised: np.ndarray
    noise: np.ndarray
    commit: np.ndarray
    guidance: np.ndarray = None  # type: ignore[assignment]
    known: np.ndarray = None  # type: ignore[assignment]
    span: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        n = len(self.t)
        defaults = {
            "guidance": np.ones(n),
            "known": np.tile([1.0, 0.0], (n, 1)),
            "span": np.zeros(n),
        }
        for field, count in COLUMNS.items():
            value, shape = getattr(self, field), (n,) if count == 1 else (n, count)
            value = np.asarray(defaults[field] if value is None else value, "float64")
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

    @property
    def guided(self) -> np.ndarray:
        """`(n,)` bool, the rows with guidance."""
        return self.guidance != 1.0

    def packed(self) -> np.ndarray:
        """`(n, WIDTH)` float32, with the columns of `COLUMNS`."""
        columns = [getattr(self, field).reshape(len(self), -1) for field in COLUMNS]
        return np.concatenate(columns, axis=1).astype("float32")


def sample(
    denoise: Denoise | Sequence[tuple[int, Denoise]],
    x_init: Tensor,
    steps: Steps | Tensor,
    draw_noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs a sampler from noise to data.

    Inside a compiled function the loop is one program, and `steps` may be a traced table
    (`Steps.packed()`), so that another sampler of n rows needs no new program.

    Args:
        denoise: (x, t) -> x0 estimate like x; t is a float32 scalar tensor in (0, 1]. Or a list of
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
    runs = [(steps.shape[0], denoise)] if callable(denoise) else denoise
    parts = [(count, functools.partial(_at_time, evaluate)) for count, evaluate in runs]
    return advance(parts, begin(x_init), steps, draw_noise)[0]


def _at_time(denoise, x, row):
    return denoise(x, row["t"])


def begin(x: Tensor) -> Carry:
    """What `advance` carries on from, before the first row."""
    x = ops.convert_to_tensor(x, "float32")
    return x, x, ops.zeros_like(x), ops.zeros_like(x)


def advance(
    parts: Sequence[tuple[int, DenoiseRow]],
    carry: Carry,
    table: Tensor,
    draw_noise: Callable[[Tensor], Tensor] | None = None,
    first: Tensor | int = 0,
    known: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Carry:
    """Runs some rows of a sampler; `sample` runs all of them.

    Args:
        parts: list of (count, function), one after the other for so many rows each: (x, row) ->
            x0 estimate like x, where `row` is a dict of the row's numbers.
        carry: of `begin`, or of the rows before these.
        table: the rows, packed.
        draw_noise: see `sample`.
        first: int32, the number of the first of these rows in the whole table.
        known: (mask, x0, noise), each like x or broadcast to it. After each row x is replaced by
            alpha x0 + sigma noise where mask is 0, with the row's `known` alpha and sigma: the
            inpainting of RePaint (Lugmayr et al. 2022, arXiv 2201.09865, Eq. 8).

    Returns:
        The new carry: x, the anchor, the last two x0 estimates, each `(B, ...)` float32.
    """
    table = ops.convert_to_tensor(table, "float32")

    def step(evaluate, i, carry):
        x, anchor, d1, d2 = carry
        row = _row(ops.take(table, i, axis=0))
        d0 = evaluate(x, row)
        b0, b1, b2 = row["denoised"]
        x = row["anchor"] * anchor + b0 * d0 + b1 * d1 + b2 * d2
        if draw_noise is not None:
            noise = row["noise"]
            x = ops.cond(noise > 0, lambda: x + noise * draw_noise(first + i), lambda: x)
        if known is not None:
            mask, x0, eps = known
            alpha, sigma = row["known"]
            x = ops.where(mask > 0, x, alpha * x0 + sigma * eps)
        return x, ops.where(row["commit"] > 0, x, anchor), d0, d1

    covered = sum(count for count, _ in parts)
    if covered != table.shape[0]:
        raise ValueError(f"`denoise` covers {covered} of {table.shape[0]} rows.")
    start = 0
    for count, evaluate in parts:
        carry = ops.fori_loop(start, start + count, functools.partial(step, evaluate), carry)
        start += count
    return carry


def _row(numbers):
    """A packed row by the names of its columns."""
    rest = (numbers[k] for k in range(WIDTH))
    return {
        name: next(rest) if count == 1 else [next(rest) for _ in range(count)]
        for name, count in COLUMNS.items()
    }
