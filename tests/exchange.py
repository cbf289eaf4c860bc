"""Writes every kind of file on one backend, and reads those that others have written.

`python exchange.py FOLDER` writes into FOLDER/<its backend>, prints "written", waits for a line,
and then reads all others in FOLDER.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from tiny import assert_equal, numpy, weights

from keras_uvit import DiffusionModel, UViT, data, training
from keras_uvit.encoders import AutoencoderKL, SpaceToDepth
from keras_uvit.evaluation import Reference

NAME = keras.config.backend()
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), "uint8")
INPUTS = {"image": np.ones((1, 4, 4, 12), "float32"), "timestep": np.array([500.0], "float32")}


def make():
    keras.utils.set_random_seed(len(NAME))  # other weights on each backend
    network = UViT((4, 4, 12), 2, 16, num_layers=1, num_heads=2)
    recipe = dict(learning_rate=0.1, warmup_steps=0, gradient_accumulation_steps=2)
    model = DiffusionModel(network, latent_scale=1.0, optimizer=recipe)
    # The quickest of each: JAX compiles a program in less time than all of its operations.
    model.compile(jit_compile=NAME == "jax", run_eagerly=NAME == "tensorflow")
    return model


def train(model, cache, run, epochs):
    dataset = data.LatentDataset(cache, 4, verbose=0)
    checkpoint = training.Checkpoint(run)
    model.fit(dataset, epochs=epochs, callbacks=[checkpoint], verbose=0)
    return model


def state(model):
    """All that training moves, but the seed: how many numbers it has is a backend's own."""
    variables = [*model.weights, *model.optimizer.variables]
    return [numpy(variable) for variable in variables]


def write(folder):
    folder.mkdir()
    autoencoder = AutoencoderKL(32, (1,), 1, scale=1.0)
    autoencoder.save(folder / "autoencoder.keras")
    data.write_latents(IMAGES, folder / "cache", SpaceToDepth(), verbose=0)
    model = train(make(), folder / "cache", folder / "run", epochs=1)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    statistics = Reference((np.arange(2.0), np.eye(2)), inception=autoencoder.fingerprint)
    statistics.save(folder / "reference.npz")
    arrays = {f"{k:03d}": array for k, array in enumerate(state(model))}
    np.savez(folder / "state.npz", **arrays)
    np.save(folder / "output.npy", model.predict(INPUTS, verbose=0))


def read(folder):
    with np.load(folder / "state.npz") as file:
        expected = [file[key] for key in sorted(file.files)]
    model = make()
    model.load_weights(folder / "model.weights.h5")
    assert_equal(weights(model), expected[: len(model.weights)])
    output = model.predict(INPUTS, verbose=0)
    # float32 sums in another order.
    np.testing.assert_allclose(output, np.load(folder / "output.npy"), rtol=1e-4, atol=1e-5)
    for again in (
        training.load_checkpoint(folder / "run"),
        keras.saving.load_model(folder / "model.keras"),
        train(model, folder / "cache", folder / "run", epochs=1),  # all of it is done
    ):
        assert_equal(state(again), expected)
    autoencoder = keras.saving.load_model(folder / "autoencoder.keras")
    assert autoencoder.fingerprint == Reference.load(folder / "reference.npz").inception


if __name__ == "__main__":
    everything = Path(sys.argv[1])
    write(everything / NAME)
    print("written", flush=True)
    input()
    for other in sorted(everything.iterdir()):
        if other.name != NAME:
            print(f"reading what {other.name} wrote", flush=True)
            read(other)
