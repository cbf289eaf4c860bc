"""Flow matching: the recipe's parts together, against Euler's steps along the velocity."""

import numpy as np
import pytest
from tiny import diffusion_model, numpy

from keras_uvit.diffusion.schedules import LinearPath
from keras_uvit.sampling.generate import noise_of


@pytest.fixture(scope="module")
def model():
    model = diffusion_model(compiled=False, schedule=LinearPath(), prediction="velocity")
    model.network.set_weights([5.0 * w for w in model.network.get_weights()])  # to hear labels
    model.copy_weights_to_ema()
    return model


def by_hand(model, is_heun, scale=1.5):
    """Four steps of Euler or Heun along the guided velocity."""

    def velocity(x, t):
        both = []
        for label in (np.arange(3), np.full(3, 3)):
            inputs = {"image": x, "timestep": np.full(3, 999.0 * t, "float32"), "label": label}
            both.append(numpy(model.ema_network(inputs)))
        return both[1] + scale * (both[0] - both[1])

    x, _ = noise_of(3, np.arange(3), (4, 4, 1))
    for s, t in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        slope = velocity(x, s)
        if is_heun and t > 0:
            slope = (slope + velocity(x + np.float32(t - s) * slope, t)) / 2
        x = x + np.float32(t - s) * slope
    return x


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun"])
def test_guided_samples_are_steps_along_the_guided_velocity(model, sampler):
    options = dict(num_steps=4, guidance_scale=1.5, seed=3, verbose=0, decode=False)
    drawn = model.generate(labels=[0, 1, 2], sampler=sampler, **options)
    is_heun = sampler == "heun"
    # float32: x0 = x - t v and back, a few roundings of numbers up to 10 in each step.
    np.testing.assert_allclose(drawn, by_hand(model, is_heun), atol=1e-4)
    assert np.abs(drawn - by_hand(model, is_heun, scale=1.0)).max() > 1e-2
