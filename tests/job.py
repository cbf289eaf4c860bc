"""What each process of tests/test_distribution.py does; leaves a file of what it saw."""

import argparse
import contextlib
import json
import random
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_uvit import DiffusionModel, UViT, backend, data, distribution, training
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.encoders import SpaceToDepth
from keras_uvit.inference import Frozen

RNG = np.random.default_rng(0)
PICTURES = {
    "image": RNG.integers(0, 256, (64, 8, 8, 1)).astype("uint8"),
    "label": np.arange(64) % 3,
}
BATCH = 16


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", choices=["one", "many", "processes"])
    parser.add_argument("--address")
    parser.add_argument("--index", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--layout", default="data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bad", action="store_true", help="one batch is not finite")
    parser.add_argument("--draw", action="store_true", help="draw and encode images at the end")
    options = parser.parse_args()
    choose_devices(options)
    model = make(options)
    each = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: each.append(logs["loss"])
    )
    dataset = BadDataset(PICTURES, BATCH) if options.bad else ShuffledDataset(PICTURES, BATCH)
    with contextlib.suppress(SystemExit):  # asked to stop
        training.train(
            model,
            dataset,
            options.folder,
            options.epochs * len(dataset),
            every_steps=3,
            callbacks=[note],
            verbose=2,
        )
    # A file each: lines of two processes that share a pipe may run into each other.
    file = options.folder / f"report-{backend.process()[0]}.json"
    file.write_text(json.dumps(report(model, options, each)))


def choose_devices(options):
    if options.devices == "processes":
        if options.address:
            distribution.initialize(options.address, 2, options.index)
        if options.layout == "data":
            distribution.data_parallel()
        else:
            distribution.model_parallel(options.layout)
    if options.devices == "many":
        distribution.data_parallel(devices_of_tensorflow())


def devices_of_tensorflow():
    if backend.NAME != "tensorflow":
        return None
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return ["CPU:0", "CPU:1"]


def make(options):
    """Weights of a file that whoever comes first writes: initializers may differ."""
    # On JAX all processes must make the same weights; torch takes those of process 0. (Keras' seeds
    # come from here; its own set_random_seed imports TensorFlow for seconds.)
    random.seed(1 + (backend.NAME == "torch") * backend.process()[0])
    size = dict(num_layers=1, num_heads=2, num_classes=3)
    network = UViT((8, 8, 1), 2, 16, **size, dtype=options.dtype)
    model = DiffusionModel(network, optimizer=dict(learning_rate=1e-2, warmup_steps=2))
    start = options.folder.parent / "start.npz"
    if not start.exists():
        np.savez(start, *model.network.get_weights())
    with np.load(start) as weights:
        if backend.process()[0] == 0 or backend.NAME == "jax":  # torch takes process 0's
            model.network.set_weights([weights[f"arr_{i}"] for i in range(len(weights.files))])
            model.copy_weights_to_ema()
    model.compile(jit_compile=backend.NAME == "jax")
    return model


class BadDataset(ShuffledDataset):
    """In batch 1 one sample, which only the last replica sees, has a label out of range."""

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        if (self.epoch, index) == (0, 1) and self.process[0] + 1 == self.process[1]:
            batch["label"] = np.where(np.arange(len(batch["label"])) == 7, 3, batch["label"])
        return batch


def report(model, options, each):
    get = {"data": backend.alone, "fsdp": backend.whole}[options.layout]
    weights = [np.array(get(v.value)) if backend.NAME == "jax"
               else ops.convert_to_numpy(v) for v in model.ema_network.weights]  # fmt: skip
    return {
        "process": backend.process(),
        "replicas": backend.replicas(),
        "losses": model.history.history.get("loss"),  # None where it was stopped
        "each": each,
        "skipped": int(ops.convert_to_numpy(model.skipped_steps)),
        "weights": [float(np.abs(w.astype("float64")).sum()) for w in weights],
        **(drawn(model, options) if options.draw else {}),
    }


def drawn(model, options):
    images = model.generate(labels=[0, 1, 2, 0, 1], num_steps=4, seed=3, verbose=0)
    made = data.write_latents(
        data.sources.arrays(PICTURES, "pictures"),
        options.folder / "cache",
        SpaceToDepth(2, scale=1.0),
        shard_size=16,
        verbose=0,
    )
    # Each process alone, on inputs of its own.
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    mine = np.full((4, 3), backend.process()[0], "float32")
    seen = Frozen(network)(mine, 4)
    return {
        "images": images.astype(int).reshape(5, -1).sum(axis=1).tolist(),
        "encoded": made["count"],
        "alone": float(np.abs(seen).max()) == 0
        if backend.process()[0] == 0
        else seen.shape == (4, 2),
    }


if __name__ == "__main__":
    main()
