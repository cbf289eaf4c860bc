"""The small network, model and data that most tests share, and how they compare and refuse."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1), "uint8")
LABELS = np.arange(24) % 3
DATA = {"image": IMAGES, "label": LABELS}


def uvit(**changes):
    return UViT(**{**TINY, **changes})


def diffusion_model(network=None, seed=0, compiled=True, **options):
    """A model of three classes whose learning rate is high from the first step on."""
    keras.utils.set_random_seed(seed)
    options.setdefault("optimizer", dict(learning_rate=1e-2, warmup_steps=0))
    model = DiffusionModel(uvit(num_classes=3, **(network or {})), seed=seed, **options)
    if compiled:
        model.compile()
    return model


def fit(model, data=DATA, **options):
    """The history of one epoch, without shuffling."""
    return model.fit(data, **{"batch_size": 8, "verbose": 0, "shuffle": False, **options}).history


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(x)


def randomize(layer, scale=0.3):
    """Gives every weight another value: zero biases and unit gammas would hide mistakes."""
    for i, weight in enumerate(layer.weights):
        weight.assign(normal(*weight.shape, seed=i) * scale)
    return layer


def weights(layer):
    return [numpy(weight) for weight in layer.weights]


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def refused(error, call, *words):
    """`call` raises `error` with all the words in its message, which is returned."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message
