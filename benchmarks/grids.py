"""What samples of late, failed and memorised runs look like, and losses of each prediction.

    python benchmarks/grids.py                    (Fashion-MNIST, about eight CPU minutes)

Writes grids.png and losses.png into --out, as docs/own_data.md shows them. The data are found as by
`own_data.py`, and so are the losses: those of its runs in --runs.
"""

import argparse
import json
from pathlib import Path

import keras
import matplotlib
import numpy as np
import own_data as benchmark

from keras_uvit import data, evaluation, presets
from keras_uvit.evaluation.metrics import squared_distances

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# name: (pictures, steps, learning rate)
RUNS = {
    "late: 150 steps": (60_000, 150, None),
    "on the way: 1,000 steps": (60_000, 1000, None),
    "failed: learning rate 0.1": (60_000, 300, 0.1),
    "memorised: 30 pictures, 1,500 steps\n(below each sample its nearest picture)": (
        30,
        1500,
        None,
    ),
}
COUNT = 20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/grids"), help="(%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/own_data"), help="(%(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    losses(options.runs / "fashion", options.out / "losses.png")
    train, _ = benchmark.fashion()
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), layout="constrained")
    for axis, (name, choices) in zip(axes.flat, RUNS.items()):
        axis.imshow(samples(train, *choices), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.savefig(options.out / "grids.png", dpi=110)


def samples(train, count, steps, rate):
    """A grid of 20 samples; of few pictures the nearest of them below each."""
    keras.utils.set_random_seed(0)
    few = {key: array[:count] for key, array in train.items()}
    photos = data.images.in_memory(data.sources.arrays(few), 16, flip=False, seed=0, verbose=0)
    optimizer = {"optimizer": {"learning_rate": rate}} if rate else {}
    model = presets.for_data(photos, steps=steps, verbose=0, **optimizer)
    model.fit(photos, verbose=2)
    images = model.generate(labels=np.arange(COUNT) % 10, verbose=0)
    if count < len(train["image"]):
        flat = [a.reshape(len(a), -1).astype("float32") for a in (images, few["image"])]
        nearest = few["image"][np.concatenate([*squared_distances(*flat)]).argmin(axis=1)]
        rows = [half for k in (0, 10) for half in (images[k : k + 10], nearest[k : k + 10])]
        images = np.concatenate(rows)
    return evaluation.image_grid(images, 10)[..., 0]


def losses(folder, path):
    """Mean loss of each eighth of a run, for each prediction."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for colour, name in enumerate(("x0", "flow", "v", "epsilon")):
        for k, file in enumerate(sorted(folder.glob(f"{name}-?.json"))):
            row = json.loads(file.read_text(encoding="utf-8"))
            steps = row["steps"] / len(row["loss"]) * (np.arange(len(row["loss"])) + 0.5)
            axis.plot(steps, row["loss"], f"C{colour}", label=None if k else name)
    axis.set(xlabel="training step", ylabel="loss", ylim=(0, None))
    axis.legend(title="prediction")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
