"""Eight optimizer steps against the published program's, from the same weights and draws."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT, convert
from keras_uvit.process.schedules import VPDiscrete

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORK = dict(
    image_shape=(8, 8, 3), patch_size=2, hidden_dim=32, num_layers=3, num_heads=2,
    num_classes=6, null_label=False,
)  # fmt: skip


class Replay(DiffusionModel):
    """Draws what was recorded instead of random numbers; everything else is the real step."""

    def draw(self, x0):
        t = ops.take(ops.convert_to_tensor(self.recorded["n"] / 1000.0, "float32"), self.step, 0)
        noise = ops.take(ops.convert_to_tensor(self.recorded["noise"]), self.step, axis=0)
        return t, noise, ops.zeros_like(t, dtype="bool")


@pytest.fixture(scope="module")
def trained():
    data = np.load(GOLDEN / "training.npz")
    recipe = dict(learning_rate=2e-3, beta_1=0.99, beta_2=0.99, weight_decay=0.03, warmup_steps=4)
    model = Replay(
        UViT(**NETWORK), VPDiscrete(), latent_scale=1.0, ema_decay=0.9, ema_warmup=False,
        optimizer=recipe,
    )  # fmt: skip
    convert.load_torch_weights(model, GOLDEN / "training_start.pth")
    images = data["x0_nchw"].transpose(0, 1, 3, 4, 2)
    model.recorded = {"n": data["n"], "noise": data["eps_nchw"].transpose(0, 1, 3, 4, 2)}
    model.compile()
    batches = ({"latent": x, "label": y} for x, y in zip(images, data["label"]))
    history = model.fit(batches, steps_per_epoch=1, epochs=8, verbose=0)
    return model, np.array(history.history["loss"]), data["loss"]


def test_losses_follow_the_published_program(trained):
    _, losses, expected = trained
    # Rounding grows from step to step through Adam, whose first updates divide by tiny numbers.
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["end", "ema"])
def test_weights_end_where_the_published_program_ends(trained, kind):
    model, _, _ = trained
    expected = UViT(**NETWORK)
    convert.load_torch_weights(expected, GOLDEN / f"training_{kind}.pth")
    network = model.network if kind == "end" else model.ema_network
    largest = max(np.abs(w).max() for w in expected.get_weights())
    for ours, theirs, variable in zip(
        network.get_weights(), expected.get_weights(), expected.weights
    ):
        # 1e-4 of the largest weight: Keras adds Adam's epsilon before the bias correction, torch
        # after, which matters only for gradients near 1e-8.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * largest, err_msg=variable.path)


def test_the_first_step_changes_nothing_because_warm_up_starts_at_zero():
    model = DiffusionModel(UViT(**NETWORK), optimizer=dict(warmup_steps=4))
    model.compile()
    before = model.network.get_weights()
    images = np.zeros((4, 8, 8, 3), "uint8")
    model.fit(images, np.zeros(4, int), batch_size=4, verbose=0)
    for a, b in zip(before, model.network.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert int(model.optimizer.iterations) == 1
    assert keras.ops.convert_to_numpy(model.optimizer.learning_rate) > 0
