"""Eight optimizer steps against the published program's, from the same weights and draws."""

import numpy as np
import pytest
from published import GOLDEN, TRAINED, train
from tiny import assert_equal, diffusion_model, fit, numpy, weights

from keras_uvit import UViT, convert


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("torch", reason="the published weights are files of PyTorch")
    return train()


def test_losses_follow_the_published_program(trained):
    _, losses, expected = trained
    # Rounding grows from step to step through Adam, whose first updates divide by tiny numbers.
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["end", "ema"])
def test_weights_end_where_the_published_program_ends(trained, kind):
    model, _, _ = trained
    expected = UViT(**TRAINED)
    convert.load_torch_weights(expected, GOLDEN / f"training_{kind}.pth")
    network = model.network if kind == "end" else model.ema_network
    largest = max(np.abs(w).max() for w in expected.get_weights())
    for ours, theirs, variable in zip(weights(network), weights(expected), expected.weights):
        # 1e-4 of the largest weight: Keras adds Adam's epsilon before the bias correction, torch
        # after, which matters only for gradients near 1e-8.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * largest, err_msg=variable.path)


@pytest.mark.once
def test_the_first_step_changes_nothing_because_warm_up_starts_at_zero():
    model = diffusion_model(optimizer=dict(warmup_steps=4))
    before = weights(model.network)
    fit(model, batch_size=24)
    assert_equal(weights(model.network), before)
    assert int(model.optimizer.iterations) == 1
    assert numpy(model.optimizer.learning_rate) > 0
