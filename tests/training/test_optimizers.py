"""The recipe's optimizer against its definition."""

import keras
import numpy as np
from keras import ops

from keras_uvit.training import adamw

RNG = np.random.default_rng(0)


def test_it_is_adamw_as_defined():
    # Loshchilov and Hutter 2019, arXiv 1711.05101, Algorithm 2, in float64.
    rate, beta_1, beta_2, decay = 0.01, 0.9, 0.99, 0.1
    start = [RNG.standard_normal(shape) for shape in [(3, 4), (5,)]]
    variables = [keras.Variable(w, dtype="float32") for w in start]
    optimizer = adamw(rate, beta_1, beta_2, decay, warmup_steps=0)
    w, m, v = start, [0.0, 0.0], [0.0, 0.0]
    for k in range(1, 6):
        g = [RNG.standard_normal(x.shape) for x in start]
        optimizer.apply([ops.convert_to_tensor(x, "float32") for x in g], variables)
        for i in range(2):
            m[i] = beta_1 * m[i] + (1 - beta_1) * g[i]
            v[i] = beta_2 * v[i] + (1 - beta_2) * g[i] ** 2
            ratio = (m[i] / (1 - beta_1**k)) / np.sqrt(v[i] / (1 - beta_2**k))
            w[i] = w[i] - rate * (ratio + decay * w[i])
    for variable, expected in zip(variables, w):
        # float32 on numbers of size one, moved by 0.05.
        np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, atol=2e-6)


def test_files_name_it_alike_on_all_backends():
    saved = keras.optimizers.serialize(adamw(1e-3))
    # Keras' own has a module of its backend on PyTorch, which JAX and TensorFlow cannot import.
    assert saved["registered_name"] == "keras_uvit>AdamW"
    assert saved["module"] == "keras_uvit.training.optimizers"
