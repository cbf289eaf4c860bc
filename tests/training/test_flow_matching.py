"""Flow matching: the recipe's parts together, against Euler's steps along the velocity."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.diffusion.schedules import LinearPath
from keras_uvit.sampling.generate import noise_of

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    network = UViT(**TINY, num_classes=3)
    network.set_weights([5.0 * w for w in network.get_weights()])  # fresh ones hear no label
    return DiffusionModel(network, LinearPath(), "velocity")


def drawn(model, sampler, **options):
    options = {"num_steps": 4, "guidance_scale": 1.5, "seed": 3, "verbose": 0, **options}
    return model.generate(labels=[0, 1, 2], sampler=sampler, decode=False, **options)


def by_hand(model, is_heun):
    """Four steps of Euler or Heun along the guided velocity."""

    def velocity(x, t):
        both = []
        for label in (np.arange(3), np.full(3, 3)):
            inputs = {"image": x, "timestep": np.full(3, 999.0 * t, "float32"), "label": label}
            both.append(ops.convert_to_numpy(model.ema_network(inputs)))
        return both[1] + 1.5 * (both[0] - both[1])

    x, _ = noise_of(3, np.arange(3), (4, 4, 1))
    for s, t in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        slope = velocity(x, s)
        if is_heun and t > 0:
            slope = (slope + velocity(x + np.float32(t - s) * slope, t)) / 2
        x = x + np.float32(t - s) * slope
    return x


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun"])
def test_guided_samples_are_steps_along_the_guided_velocity(model, sampler):
    x = by_hand(model, sampler == "heun")
    # float32: x0 = x - t v and back, a few roundings of numbers up to 10 in each step.
    np.testing.assert_allclose(drawn(model, sampler), x, atol=1e-4)
    assert np.abs(drawn(model, sampler, guidance_scale=1.0) - x).max() > 1e-2
