"""How good are one to sixteen evaluations, of a flow map and of flow matching trained as long?

    KERAS_BACKEND=jax python benchmarks/few_steps.py --out runs/few_steps   (40 minutes, one core)

For each seed it trains the preset's flow map, and the same network by flow matching for the same
CPU time, on the same data; both draw in 1, 2, 4, 8 and 16 steps of one evaluation each (flow
matching without guidance, which would be two). Beside them `uvit_tiny_digits` draws in the papers'
50 guided steps, and by `presets.FAST`. The scores are those of benchmarks/shortcuts.py, and of
digits also the spread within a class over the real one. `cost` is a training step's time over one
of flow matching.

With `--fine-tune 500 2000` the weights of flow matching are then trained on as a flow map, for 500
and for 2,000 steps. Beside them are new flow maps, trained for as many.

Writes rows.json and few_steps.png into OUT, and the averages of the weights. What is in rows.json
already is not measured again.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import keras
import matplotlib
import numpy as np
from shortcuts import Digits, features
from side_by_side import COMMIT, table

from keras_uvit import data, networks, presets
from keras_uvit.evaluation.metrics import within_class_spread

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import digits  # noqa: E402

EVALUATIONS = (1, 2, 4, 8, 16)
# Changes of the preset, and options of `generate`.
PLAIN = dict(flow_map=None, network=dict(takes_span=False, takes_guidance=False))
WAYS = {
    "flow map": ({}, {}),
    "flow matching": (PLAIN, dict(sampler="ddim", guidance_scale=1.0)),
}
# How `uvit_tiny_digits` draws.
SHIPPED = {
    "uvit_tiny_digits, FAST": presets.FAST,
    "uvit_tiny_digits, 50 guided steps": dict(sampler="dpm_solver_pp", num_steps=50),
}


class FastDigits(Digits):
    name = "uvit_tiny_digits_fast"
    better = {**Digits.better, "spread": 1}

    def __init__(self, count):
        super().__init__(count, presets.load(self.name))
        self.train = data.digits("train")
        self.real_spread = within_class_spread(features(self.train["image"]), self.train["label"])

    def new(self, seed, **changes):
        keras.utils.set_random_seed(seed)
        return presets.get(self.name).build(seed=seed, **changes)

    def batches(self, seed, size):
        return digits.shuffled(self.train, size, seed)

    def score(self, images):
        spread = within_class_spread(features(images), self.wanted["labels"])
        return {**super().score(images), "spread": float(spread / self.real_spread)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps"), help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="(%(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="a seed draws (%(default)s)")
    parser.add_argument("--steps", type=int, help="of the flow map's training (the preset's)")
    parser.add_argument(
        "--fine-tune", type=int, nargs="*", default=[], help="steps after flow matching (none)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    task = FastDigits(options.images)

    def add(way, seed, evaluations, images, **more):
        row = {"way": way, "evaluations": evaluations, "seed": seed, **more, **task.score(images)}
        rows.append(row | {"backend": keras.config.backend(), "commit": COMMIT})
        print(json.dumps(rows[-1]), flush=True)
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def draw_and_add(model, way, seed, drawing, **more):
        for count in EVALUATIONS:
            images = model.generate(**task.wanted, num_steps=count, seed=seed, **drawing, verbose=0)
            add(way, seed, count, images, **more)

    def weights_of(way, seed):
        return options.out / f"{way.replace(' ', '-')}-{seed}.weights.h5"

    def lacks(way, seed):
        return not any((row["way"], row["seed"]) == (way, seed) for row in rows)

    shipped = Digits(options.images)
    for way, seed in itertools.product(SHIPPED, options.seeds):
        if lacks(way, seed):
            images, _ = shipped.draw(seed, SHIPPED[way])
            add(way, seed, shipped.work(SHIPPED[way]), images)
    missing = [(k, way) for k in options.seeds for way in WAYS if lacks(way, k)]
    if missing:
        # Both compiled before, in the same process, so that one is not measured beside the other.
        seconds = {way: train(task, 0, 300, changes)[1] for way, (changes, _) in WAYS.items()}
        cost = seconds["flow map"] / seconds["flow matching"]
        steps = options.steps or presets.get(task.name).iterations
    for seed, way in missing:
        changes, drawing = WAYS[way]
        length = steps if way == "flow map" else round(steps * cost)
        model, _ = train(task, seed, length, changes)
        model.ema_network.save_weights(weights_of(way, seed))
        draw_and_add(model, way, seed, drawing, steps=length, cost=cost)
    for seed, length, old in itertools.product(options.seeds, options.fine_tune, (True, False)):
        way = f"{'flow matching, then ' if old else ''}{length} steps of flow map"
        if not lacks(way, seed):
            continue
        weights = weights_of("flow matching", seed) if old else None
        shorter = dataclasses.replace(presets.get(task.name).flow_map, steps=length)
        model, _ = train(task, seed, length, dict(flow_map=shorter), weights)
        draw_and_add(model, way, seed, {}, steps=length)
    found = summary(rows, task)
    print(table(found, list(found[0])))
    draw(rows, task, options.out / "few_steps.png")


def train(task, seed, steps, changes, weights=None):
    """A trained model, and the CPU seconds of a step after the first ones, which compile.

    It begins at the `weights` of a network without the flow map's inputs, where they are given.
    """
    model = task.new(seed, **changes)
    if weights:
        old = task.new(seed, **PLAIN).network
        old.load_weights(weights)
        networks.transfer(old, model.network)
        model.copy_weights_to_ema()
    model.compile()
    clock = Clock()
    epoch = min(50, steps)
    model.fit(
        task.batches(seed, presets.get(task.name).batch_size),
        steps_per_epoch=epoch,
        epochs=round(steps / epoch),
        callbacks=[clock],
        verbose=0,
    )
    return model, float(np.median(np.diff(clock.seconds))) / epoch


class Clock(keras.callbacks.Callback):
    """CPU time at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.process_time())


def summary(rows, task):
    """The mean over seeds and its standard deviation, for each way and number of evaluations."""
    found = []
    for way, count in dict.fromkeys((row["way"], row["evaluations"]) for row in rows):
        own = [row for row in rows if (row["way"], row["evaluations"]) == (way, count)]
        scores = {}
        for key in task.better:
            values = [row[key] for row in own]
            deviation = np.std(values, ddof=1) if len(values) > 1 else float("nan")
            scores[key] = f"{np.mean(values):.3f} ± {deviation:.3f}"
        found.append({"way": way, "evaluations": count, "seeds": len(own), **scores})
    return found


def draw(rows, task, path):
    """Each score over the number of evaluations, with its deviation over seeds."""
    size = (5 * len(task.better), 4)
    figure, axes = plt.subplots(
        1, len(task.better), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, score in zip(axes[0], task.better):
        for way in dict.fromkeys(row["way"] for row in rows):
            counts = sorted({row["evaluations"] for row in rows if row["way"] == way})
            own = [
                [r[score] for r in rows if (r["way"], r["evaluations"]) == (way, n)] for n in counts
            ]
            means, deviations = zip(*((np.mean(v), np.std(v)) for v in own))
            axis.errorbar(counts, means, deviations, marker="o", capsize=3, label=way)
        axis.set(xscale="log", xlabel="evaluations an image", ylabel=score, title=task.name)
        ticks = sorted({row["evaluations"] for row in rows})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][-1].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
