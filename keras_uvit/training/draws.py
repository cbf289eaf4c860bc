"""Random numbers of training: each step's are a function of (seed, stream, count)."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend
from keras_uvit.types import Tensor

STREAM = 2**29  # numbers of a stream, of which each draw takes one; four fit an int32
DRAWS = 4  # random tensors of a step: posterior, time, noise, condition dropout


def begin(generator: keras.random.SeedGenerator, seed: int) -> None:
    """Makes the draws a function of `seed`: half of the state, the other half counts steps.

    The seed is no constant of a program, so models that differ in it share a compiled one.
    """
    # Hashed, because torch adds the two halves: neighbouring seeds would overlap.
    base = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 2)
    generator.state.assign(np.array([base, 0], generator.state.dtype))


def go_to(generator: keras.random.SeedGenerator, stream: int, count: Tensor) -> None:
    """Sets the state from which step `count` of a stream draws."""
    state = generator.state
    place = ops.cast(stream * STREAM + count * DRAWS, state.dtype)
    state.assign(ops.stack([state.value[0], place]))


def normal(generator: keras.random.SeedGenerator, shape: Any) -> Tensor:
    """Standard normal float32, of which each replica gets its part."""
    return _drawn(keras.random.normal, generator, shape)


def uniform(generator: keras.random.SeedGenerator, shape: Any) -> Tensor:
    """Uniform float32 in [0, 1), of which each replica gets its part."""
    return _drawn(keras.random.uniform, generator, shape)


def _drawn(distribution, generator, shape):
    # For the global batch, of which each replica takes its part: the numbers of a step do not
    # depend on how many devices there are.
    return backend.drawn(lambda shape: distribution(shape, dtype="float32", seed=generator), shape)
