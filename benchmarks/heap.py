"""How much faster does a process train that keeps the memory it frees, and does it need more?

    python benchmarks/heap.py                        (the digits, JAX and TensorFlow: 5 minutes)
    python benchmarks/heap.py --network S/2 --backends jax

The setting is the environment's `KERAS_UVIT_KEEP_MEMORY`: 0 turns off what `compile` asks of the
allocator, on the two backends where it asks. Each run is a process of its own; runs with and
without it take turns. `faults` are the pages that the kernel mapped during the steps, `system_s`
its CPU time, and `peak_gib` the most that the process had in memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from side_by_side import COMMIT, table

NETWORKS = {  # batch size, batches per epoch, epochs that are measured
    "digits": (64, 22, 8),
    "S/2": (8, 4, 1),
}
BACKENDS = ["jax", "tensorflow"]
COLUMNS = ["network", "backend", "kept", "seconds", "user_s", "system_s", "faults", "peak_gib"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="digits", help="(%(default)s)")
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="(both)")
    add("--repeats", type=int, default=2, help="runs of each (%(default)s)")
    add("--measure", action="store_true", help="run here, in this process, and print one row")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.network)))
        return
    rows = []
    for backend in options.backends:
        runs = {"0": [], "1": []}
        for _ in range(options.repeats):
            for kept, own in runs.items():
                own.append(started(options.network, backend, kept))
        for kept, own in runs.items():
            row = {key: statistics.median(run[key] for run in own) for key in own[0]}
            row = {"network": options.network, "backend": backend, "kept": kept, **row}
            rows.append(row | {"commit": COMMIT})
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows, COLUMNS))


def started(network, backend, kept):
    """A row of another process, with the setting."""
    setting = {
        "KERAS_BACKEND": backend,
        "KERAS_UVIT_KEEP_MEMORY": kept,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # What the user has set for the allocator would be kept in both.
    usual = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, __file__, "--network", network, "--measure"]
    done = subprocess.run(command, env=usual | setting, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(network):
    import keras
    import numpy as np
    from train_step import SIZES

    from keras_uvit import DiffusionModel, UViT, presets

    class Clock(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:  # compiled
                self.begun = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    if network == "digits":
        model = presets.get("uvit_tiny_digits").build(seed=0)
    else:
        model = DiffusionModel(UViT(**SIZES[network]), seed=0)
    batch, batches, epochs = NETWORKS[network]
    random, shape = np.random.default_rng(0), (batch * batches, *model.network.image_shape)
    images = {"image": random.integers(0, 256, shape, dtype="uint8")}
    if model.network.num_classes:
        images["label"] = np.arange(len(images["image"])) % model.network.num_classes
    model.compile()
    clock = Clock()
    model.fit(images, batch_size=batch, epochs=1 + epochs, callbacks=[clock], verbose=0)
    start, before = clock.begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "user_s": round(after.ru_utime - before.ru_utime, 2),
        "system_s": round(after.ru_stime - before.ru_stime, 2),
        "faults": after.ru_minflt - before.ru_minflt,
        "peak_gib": round(after.ru_maxrss / 2**20, 2),  # of KiB on Linux
    }


if __name__ == "__main__":
    main()
