"""Does a run that is killed again and again end as one that nobody disturbs?

Trains a small model twice: once in peace, and once in a process that is killed with SIGKILL at
random moments, every other time inside a save, and started again by the same command. After every
fifth kill a byte of the newest checkpoint is changed too. Then both runs are compared: every row of
log.csv (the loss of each epoch), weights, moving average and optimizer, bit by bit.

    KERAS_BACKEND=jax python benchmarks/faults.py              20 kills, a few minutes
    KERAS_BACKEND=torch python benchmarks/faults.py --kills 3

Prints a table and one JSON line. Exit code 1 if the runs differ.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 12  # of an epoch


def main():
    options = parse()
    if options.child:
        train(options.child, options.epochs)
        return
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    row = compare(options, work)
    if not os.environ.get("KEEP"):
        shutil.rmtree(work)
    print(" ".join(f"{key:>10}" for key in row))
    print(" ".join(f"{value!s:>10}" for value in row.values()))
    print(json.dumps(row))
    sys.exit(not (row["curve"] == row["state"] == "equal" and row["kills"] >= options.kills))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="at least (%(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help=f"of {STEPS} steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options, work):
    chance = random.Random(options.seed)
    peace = work / "peace"
    start(peace, options.epochs).communicate()
    counts = {"kills": 0, "in_save": 0, "damaged": 0, "put_aside": 0, "runs": 0}
    curve = state = "equal"
    while counts["kills"] < options.kills:
        folder = work / f"run-{counts['runs']}"
        disturb(folder, options, counts, chance)
        counts["runs"] += 1
        if (folder / "log.csv").read_bytes() != (peace / "log.csv").read_bytes():
            curve = "DIFFERENT"
        if (folder / "state.txt").read_bytes() != (peace / "state.txt").read_bytes():
            state = "DIFFERENT"
    name = os.environ.get("KERAS_BACKEND", "jax")
    return {"backend": name, **counts, "curve": curve, "state": state}


def disturb(folder, options, counts, chance):
    """One run to its end, killed up to `options.kills` times on the way."""
    while True:
        began = time.time()
        child = start(folder, options.epochs)
        wait_for_training(child)
        if counts["kills"] < options.kills:
            in_save = counts["kills"] % 2 == 1
            wait(folder, child, chance, began if in_save else None)
        if counts["kills"] >= options.kills or child.poll() is not None:
            said = child.communicate()[0]
            if child.returncode:
                raise SystemExit(f"The run failed:\n{said}")
            counts["put_aside"] += len(list(folder.glob("checkpoints/damaged-*")))
            return
        child.kill()
        child.communicate()
        counts["kills"] += 1
        counts["in_save"] += is_saving(folder, began)
        if counts["kills"] % 5 == 0:
            counts["damaged"] += damage(folder, chance)


def start(folder, epochs):
    command = [sys.executable, "-u", __file__, "--child", str(folder), "--epochs", str(epochs)]
    environment = {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, **pipes)


def wait_for_training(child):
    """Until two steps are done: the first is compiled."""
    for line in child.stdout:
        if line.startswith("step 3"):
            return


def wait(folder, child, chance, began):
    """Until a random moment, or until a save of this process has begun and a little longer."""
    time.sleep(chance.uniform(0, 1))
    while began and child.poll() is None and not is_saving(folder, began):
        time.sleep(1e-4)
    if began:
        time.sleep(chance.uniform(0, 0.005))


def is_saving(folder, began):
    """Whether a file is half written or half deleted, by a process started at `began`."""
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        return any(p.stat().st_mtime > began for p in folder.glob("checkpoints/tmp-*"))
    return True


def damage(folder, chance):
    """Changes a byte of the newest checkpoint; the number of checkpoints changed."""
    found = sorted(folder.glob("checkpoints/step-*/pieces-0000.h5"))
    if len(found) < 2:
        return 0
    content = bytearray(found[-1].read_bytes())
    content[chance.randrange(len(content))] ^= 1
    found[-1].write_bytes(content)
    return 1


def train(folder, epochs):
    """What the child does: the same as any script that calls `training.train`."""
    import hashlib

    import keras
    import numpy as np

    from keras_uvit import DiffusionModel, UViT, data, training

    class Say(keras.callbacks.Callback):
        """Counts the steps of this process."""

        count = 0

        def on_train_batch_begin(self, batch, logs=None):
            self.count += 1
            print(f"step {self.count}", flush=True)

    # Whatever a checkpoint does not bring back is another in each process.
    is_new = not list(Path(folder).glob("checkpoints/step-*"))
    keras.utils.set_random_seed(0 if is_new else time.time_ns() % 2**32)
    count = 16 * STEPS
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), "uint8")
    pictures = {"image": pixels, "label": np.arange(count) % 10}
    dataset = data.shuffled.ShuffledDataset(pictures, 16)
    network = UViT((8, 8, 1), 2, hidden_dim=32, num_layers=3, num_heads=2, num_classes=10)
    model = DiffusionModel(network, optimizer={"warmup_steps": 10, "learning_rate": 1e-3})
    # XLA on TensorFlow would compile for longer than these steps take.
    model.compile(jit_compile=keras.config.backend() == "jax")
    training.train(
        model,
        dataset,
        folder,
        epochs * STEPS,
        every_steps=7,
        callbacks=[Say()],
        verbose=0,
    )
    variables = [*model.variables, *model.optimizer.variables]
    values = [np.ascontiguousarray(keras.ops.convert_to_numpy(v)) for v in variables]
    digest = hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()
    (Path(folder) / "state.txt").write_text(digest, encoding="utf-8")


if __name__ == "__main__":
    main()
