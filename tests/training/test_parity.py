"""Eight optimizer steps against the published program's, from the same weights and draws."""

import keras
import numpy as np
import pytest
from published import GOLDEN, TRAINED, train

from keras_uvit import DiffusionModel, UViT, convert


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
    for ours, theirs, variable in zip(
        network.get_weights(), expected.get_weights(), expected.weights
    ):
        # 1e-4 of the largest weight: Keras adds Adam's epsilon before the bias correction, torch
        # after, which matters only for gradients near 1e-8.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * largest, err_msg=variable.path)


@pytest.mark.once
def test_the_first_step_changes_nothing_because_warm_up_starts_at_zero():
    model = DiffusionModel(UViT(**TRAINED), optimizer=dict(warmup_steps=4))
    model.compile()
    before = model.network.get_weights()
    images = np.zeros((4, 8, 8, 3), "uint8")
    model.fit(images, np.zeros(4, int), batch_size=4, verbose=0)
    for a, b in zip(before, model.network.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert int(model.optimizer.iterations) == 1
    assert keras.ops.convert_to_numpy(model.optimizer.learning_rate) > 0
