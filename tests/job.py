"""The runs of tests/test_distribution.py; each process leaves a file of what it saw of each.

    python job.py FOLDER --devices many [--address HOST:PORT --index K] RUN ...

A RUN is JSON: what changes of `RUN`.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_uvit import DiffusionModel, UNet, UViT, backend, data, distribution, training
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.encoders import SpaceToDepth
from keras_uvit.inference import Frozen

RNG = np.random.default_rng(0)
PICTURES = {
    "image": RNG.integers(0, 256, (64, 8, 8, 1)).astype("uint8"),
    "label": np.arange(64) % 3,
}
BATCH = 16
NETWORKS = {
    "small": (UViT, dict(hidden_dim=16, num_layers=1, num_heads=2)),
    "uvit": (UViT, dict(hidden_dim=48, num_layers=3, num_heads=4)),
    "lora": (UViT, dict(hidden_dim=48, num_layers=3, num_heads=4, lora=2)),
    "unet": (
        UNet,
        dict(base_dim=32, multipliers=(1,), num_blocks=1, attention_levels=(), head_dim=8),
    ),
}
RUN = dict(
    name="run",
    network="small",
    layout="data",  # or "fsdp", "tensor", or "one": no distribution
    dtype="float32",
    epochs=2,
    bad=False,  # one batch is not finite
    draw=False,  # images are drawn and encoded at the end
    stop=False,  # the last process is asked to stop, after the first checkpoint
    address=None,  # where the processes join each other anew
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", choices=["many", "processes"])
    parser.add_argument("--address")
    parser.add_argument("--index", type=int)
    parser.add_argument("runs", nargs="+", type=json.loads)
    options = parser.parse_args()
    if options.devices == "processes" and options.address:
        distribution.initialize(options.address, 2, options.index)
    for run in options.runs:
        choose({**RUN, **run})
        perform(options.folder, run)


def choose(run):
    if run["address"]:
        rejoin(run["address"])
    if run["layout"] == "one":
        keras.distribution.set_distribution(None)
    elif run["layout"] != "data":
        copies = 4 if run["layout"] == "tensor" else None
        distribution.model_parallel(run["layout"], copies)
    elif backend.NAME != "tensorflow" or backend.replicas() == 1:
        distribution.data_parallel(devices_of_tensorflow())


def rejoin(address):
    """On PyTorch: as where torchrun has not started the processes."""
    import torch

    index, count = backend.process()
    torch.distributed.destroy_process_group()
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's, where nobody would serve
    distribution.initialize(address, count, index)


def devices_of_tensorflow():
    if backend.NAME != "tensorflow":
        return None
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return ["CPU:0", "CPU:1"]


def perform(folder, run):
    """Trains as the run says, in FOLDER/its name; returns its report, which lies there too."""
    run = {**RUN, **run}
    own = folder / run["name"]
    own.mkdir(parents=True, exist_ok=True)
    model, each = make(run, folder / f"start-{run['network']}.npz"), []
    dataset = (BadDataset if run["bad"] else ShuffledDataset)(PICTURES, BATCH)

    def note(batch, logs):
        each.append(logs["loss"])
        index, count = backend.process()
        if run["stop"] and index + 1 == count and len(each) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    watching = [keras.callbacks.LambdaCallback(on_train_batch_end=note)]
    length, said = run["epochs"] * len(dataset), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):  # asked to stop
        training.train(model, dataset, own, length, every_steps=3, callbacks=watching, verbose=2)
    seen = report(model, run, each, own) | {"said": said.getvalue().splitlines()}
    (own / f"report-{backend.process()[0]}.json").write_text(json.dumps(seen))
    return seen


def make(run, start):
    """Weights of a file that whoever comes first writes: initializers may differ."""
    # On JAX all processes must make the same weights; torch takes those of process 0. (Keras' seeds
    # come from here; its own set_random_seed imports TensorFlow for seconds.)
    random.seed(1 + (backend.NAME == "torch") * backend.process()[0])
    kind, size = NETWORKS[run["network"]]
    network = kind((8, 8, 1), **size, num_classes=3, dtype=run["dtype"])
    model = DiffusionModel(network, optimizer=dict(learning_rate=1e-2, warmup_steps=2))
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


def report(model, run, each, folder):
    divided = run["layout"] in ("fsdp", "tensor")
    get = backend.whole if divided else backend.alone
    weights = [np.array(get(v.value)) if backend.NAME == "jax"
               else ops.convert_to_numpy(v) for v in model.ema_network.weights]  # fmt: skip
    return {
        "replicas": backend.replicas(),
        "losses": model.history.history.get("loss"),  # None where it was stopped
        "each": each,
        "skipped": int(ops.convert_to_numpy(model.skipped_steps)),
        "weights": [float(np.abs(w.astype("float64")).sum()) for w in weights],
        **({"parts": parts(model)} if divided else {}),
        **(drawn(model, folder) if run["draw"] else {}),
    }


def parts(model):
    """Shapes of what the first device holds of each variable."""
    kinds = dict(weight=model.network, average=model.ema_network, slot=model.optimizer)
    return {
        f"{kind} {v.path.replace('/', '_')}": v.value.addressable_shards[0].data.shape
        for kind, owner in kinds.items()
        for v in (owner.variables if kind == "slot" else owner.weights)
    }


def drawn(model, folder):
    images = model.generate(labels=[0, 1, 2, 0, 1], num_steps=4, seed=3, verbose=0)
    pictures = data.sources.arrays(PICTURES, "pictures")
    encoder = SpaceToDepth(2, scale=1.0)
    made = data.write_latents(pictures, folder / "cache", encoder, shard_size=16, verbose=0)
    # Each process alone, on inputs of its own.
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    index, _ = backend.process()
    seen = Frozen(network)(np.full((4, 3), index, "float32"), 4)
    return {
        "images": images.astype(int).reshape(5, -1).sum(axis=1).tolist(),
        "encoded": made["count"],
        "alone": not np.abs(seen).max() if index == 0 else seen.shape == (4, 2),
    }


if __name__ == "__main__":
    main()
