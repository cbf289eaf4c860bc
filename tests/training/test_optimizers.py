"""The recipe's optimizer against its definition, and its rates."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny import numpy

from keras_uvit.training import adamw


def test_it_is_adamw_as_defined():
    # Loshchilov and Hutter 2019, arXiv 1711.05101, Algorithm 2, in float64.
    rng = np.random.default_rng(0)
    rate, beta_1, beta_2, decay = 0.01, 0.9, 0.99, 0.1
    start = [rng.standard_normal(shape) for shape in [(3, 4), (5,)]]
    variables = [keras.Variable(w, dtype="float32") for w in start]
    optimizer = adamw(rate, beta_1, beta_2, decay, warmup_steps=0)
    w, m, v = start, [0.0, 0.0], [0.0, 0.0]
    for k in range(1, 6):
        g = [rng.standard_normal(x.shape) for x in start]
        optimizer.apply([ops.convert_to_tensor(x, "float32") for x in g], variables)
        for i in range(2):
            m[i] = beta_1 * m[i] + (1 - beta_1) * g[i]
            v[i] = beta_2 * v[i] + (1 - beta_2) * g[i] ** 2
            ratio = (m[i] / (1 - beta_1**k)) / np.sqrt(v[i] / (1 - beta_2**k))
            w[i] = w[i] - rate * (ratio + decay * w[i])
    for variable, expected in zip(variables, w):
        # float32 on numbers of size one, moved by 0.05.
        np.testing.assert_allclose(numpy(variable), expected, atol=2e-6)


def test_files_name_it_alike_on_all_backends():
    saved = keras.optimizers.serialize(adamw(1e-3))
    # Keras' own has a module of its backend on PyTorch, which JAX and TensorFlow cannot import.
    assert saved["registered_name"] == "keras_uvit>AdamW"
    assert saved["module"] == "keras_uvit.training.optimizers"


def rates(optimizer, steps):
    return [float(optimizer.schedule(k)) for k in steps]


@pytest.mark.once
def test_rates_rise_and_fall_and_count_optimizer_steps():
    flat, falling = adamw(2.0, warmup_steps=4), adamw(2.0, warmup_steps=4, decay_steps=8)
    assert rates(flat, (0, 1, 4, 1000)) == [0.0, 0.5, 2.0, 2.0]
    # Cosine: half way after half the steps, zero at the end.
    np.testing.assert_allclose(rates(falling, (4, 8, 12)), [2, 1, 0], atol=1e-6)
    assert adamw(2.0, warmup_steps=0).get_config()["learning_rate"] == 2.0
    accumulating = adamw(1.0, warmup_steps=4, gradient_accumulation_steps=3)
    saved = keras.optimizers.deserialize(keras.optimizers.serialize(accumulating))
    # The same for all three batches of a step, the last of which makes it.
    expected = [min(k / 4, 1.0) for k in range(6) for _ in range(3)]
    assert rates(accumulating, range(18)) == rates(saved, range(18)) == expected
