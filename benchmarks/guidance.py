"""Which guidance draws better images on the models that ship?

    KERAS_BACKEND=jax python benchmarks/guidance.py --out runs/guidance   (12 minutes, 2 cores)

Every way draws the same images with several seeds, by 15 steps of dpm_solver_pp_2m, and is scored
as benchmarks/shortcuts.py scores:

    agreement  digits: share that a classifier reads as the class asked for
    distance   digits: Fréchet distance of pixels to the real test scans
    attributes shapes: share of right colours, shapes, sizes and places, held-out captions

The weak model of autoguidance is the preset's own network after a tenth of its training; on the
digits alone, for the shapes' takes half an hour. Every number is the mean over seeds; "_spread" is
their standard deviation. `better` says whether the mean is better than that without guidance, or
worse, by more than the larger of the two deviations. Draws what the digits scored into OUT.
"""

import argparse
import json
from pathlib import Path

import keras
import matplotlib
import numpy as np
from shortcuts import Digits, Shapes
from side_by_side import COMMIT, table

from keras_uvit import data, presets
from keras_uvit.sampling import APG, AutoGuidance, Rescale

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FEW = dict(sampler="dpm_solver_pp_2m", num_steps=15)


def rising(t):
    """More guidance the less noise there is: 1 at the noise, 2 at the data."""
    return 2.0 - t


# name: options of `generate`
WAYS = {
    "none": dict(guidance_scale=1.0),
    "classifier-free, 1.2": dict(guidance_scale=1.2),
    "classifier-free, 1.5": dict(guidance_scale=1.5),
    "classifier-free, 3": dict(guidance_scale=3.0),
    "1.5 up to t = 0.8": dict(guidance_scale=1.5, guidance_interval=(0.0, 0.8)),
    "rising, 2 - t": dict(guidance_scale=rising),
    "APG, 1.5": dict(guidance_scale=1.5, guidance=APG()),
    "APG, 3": dict(guidance_scale=3.0, guidance=APG()),
    "rescale 0.7, 1.5": dict(guidance_scale=1.5, guidance=Rescale()),
    "rescale 0.7, 3": dict(guidance_scale=3.0, guidance=Rescale()),
}
WEAK = {f"autoguidance, {w}": w for w in (1.2, 1.5, 2.0)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"), help="(%(default)s)")
    parser.add_argument("--images", type=int, default=250, help="digits a seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--model", choices=("digits", "shapes"), help="one of them alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = {"digits": Digits, "shapes": Shapes}
    for name, make in tasks.items():
        if options.model not in (None, name):
            continue
        count = options.images if name == "digits" else options.images // 2
        rows = compare(make(count), options.seeds)
        (options.out / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if name == "digits":
            draw(rows, options.out / "guidance.png")


def compare(task, seeds):
    ways, rows = dict(WAYS), []
    if isinstance(task, Digits):
        guidance = AutoGuidance(weak_digits())
        ways |= {name: dict(guidance=guidance, guidance_scale=w) for name, w in WEAK.items()}
    for name, way in ways.items():
        scores = [task.score(task.draw(seed, FEW | way)[0]) for seed in range(seeds)]
        row = {"model": task.name, "way": name}
        for key in scores[0]:
            values = [score[key] for score in scores]
            row[key], row[f"{key}_spread"] = float(np.mean(values)), float(np.std(values, ddof=1))
            row[f"{key}_better"] = better(row, (rows or [row])[0], key, task.better[key])
        row |= {"backend": keras.config.backend(), "commit": COMMIT}
        rows.append(row)
        print(json.dumps(row), flush=True)
    columns = [k for score in task.better for k in (score, f"{score}_spread", f"{score}_better")]
    print(table(rows, ["way", *columns]))
    return rows


def draw(rows, path):
    """The distance over the agreement, a point for each way with the spreads of its seeds."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for k, row in enumerate(rows):
        axis.errorbar(
            row["agreement"],
            row["distance"],
            row["distance_spread"],
            row["agreement_spread"],
            marker="os^"[k // 10 + (" 3" in row["way"])],
            color=f"C{k % 10}",
            capsize=2,
            label=row["way"],
        )
    axis.set(xlabel="read as the class asked for", ylabel="Fréchet distance", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def better(row, base, key, sign):
    margin = max(row[f"{key}_spread"], base[f"{key}_spread"])
    change = sign * (row[key] - base[key])
    return "yes" if change > margin else "worse" if change < -margin else "no"


def weak_digits():
    """The digits' network after a tenth of its preset's steps."""
    row = presets.get("uvit_tiny_digits")
    model = presets.load("uvit_tiny_digits", seed=1)
    model.compile()
    train = data.digits("train")
    per_epoch = len(train["label"]) // row.batch_size
    whole = {key: value[: per_epoch * row.batch_size] for key, value in train.items()}
    epochs = max(1, round(row.iterations / 10 / per_epoch))
    model.fit(whole, batch_size=row.batch_size, epochs=epochs, verbose=0)
    return model


if __name__ == "__main__":
    main()
