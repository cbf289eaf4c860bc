"""How much less work can sampling do, and what does it cost in quality?

    KERAS_BACKEND=jax python benchmarks/shortcuts.py --out runs/shortcuts   (20 minutes, 2 cores)
    python examples/digits.py --num-layers 13 --out runs/deep     (a deep network, 9 minutes)
    python benchmarks/shortcuts.py --digits runs/deep/model.keras --out runs/deep

The two models that ship with weights, or a saved one, draw the same images in many ways, each with
several seeds:

    work       evaluations of the network for one image, a guided one being two
    seconds    of drawing, without compiling; `times` is the base's by the row's
    agreement  digits: share that a classifier reads as the class asked for
    distance   digits: Fréchet distance of pixels to the real test scans
    attributes shapes: share of right colours, shapes, sizes and places, held-out captions
    ode        root mean square distance to 200 steps, pixels in [-1, 1], the same noise

The base is the papers' sampler, 50 singlestep steps, all guided. Every number is the mean over
seeds; "+-" is their standard deviation. A row is `equal` if its mean is not worse than the base's
by more than the larger of the two deviations. Draws what it measured into OUT.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import matplotlib
import numpy as np
from side_by_side import COMMIT, table
from sklearn.svm import SVC

from keras_uvit import data, presets, sampling
from keras_uvit.data import shapes
from keras_uvit.diffusion import samplers
from keras_uvit.evaluation import frechet_distance

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TWO = "dpm_solver_pp_2m"
# name: (family to draw it with, options of `generate`)
WAYS = {
    "base": ("base", dict(sampler="dpm_solver_pp", num_steps=50)),
    **{f"2m, {n}": ("steps", dict(sampler=TWO, num_steps=n)) for n in (25, 20, 15, 12, 10, 8)},
    **{
        f"2m, {n}, Karras": ("Karras' grid", dict(sampler="karras", num_steps=n))
        for n in (20, 15, 12, 10, 8)
    },
    **{
        f"2m, {n}, uniform time": ("uniform time", dict(sampler="uniform", num_steps=n))
        for n in (15, 10)
    },
    **{
        f"2m, {n}, guided to {high}": (
            "interval",
            dict(sampler=TWO, num_steps=n, guidance_interval=(0.0, high)),
        )
        for n, high in ((20, 0.8), (15, 0.8), (12, 0.8), (10, 0.8), (20, 0.5))
    },
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shortcuts"), help="(%(default)s)")
    parser.add_argument("--images", type=int, default=500, help="digits a seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--digits", help="a saved model of digits instead of those that ship")
    parser.add_argument("--only", nargs="+", help="names of ways; all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    if options.digits:
        tasks = [Digits(options.images, keras.saving.load_model(options.digits))]
    else:
        tasks = [Digits(options.images), Shapes(options.images // 4)]
    for task in tasks:
        rows += compare(task, options)
    (options.out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    draw(rows, options.out / "shortcuts.png")


def compare(task, options):
    ways = {name: way for name, way in WAYS.items() if name == "base" or not options.only
            or name in options.only}  # fmt: skip
    exact = [task.draw(seed, dict(sampler=TWO, num_steps=200))[0] for seed in range(1)]
    rows = []
    for name, (family, way) in ways.items():
        way = dict(way)
        if way["sampler"] in GRIDS:
            times = GRIDS[way["sampler"]](task.model.objective.schedule, way.pop("num_steps"))
            way["sampler"] = samplers.dpm_solver_pp(task.model.objective.schedule, times, order=2)
        task.draw(0, way)  # compiles
        drawn = [task.draw(seed, way) for seed in range(options.seeds)]
        scores = [task.score(images) for images, _ in drawn]
        ode = np.sqrt(np.mean((unit(drawn[0][0]) - unit(exact[0])) ** 2))
        row = {"model": task.name, "way": name, "family": family, "work": task.work(way)}
        row["seconds"] = float(np.median([seconds for _, seconds in drawn]))
        for key in scores[0]:
            values = [score[key] for score in scores]
            row[key], row[f"{key}_spread"] = float(np.mean(values)), float(np.std(values, ddof=1))
        row |= {"ode": float(ode), "backend": keras.config.backend(), "commit": COMMIT}
        base = (rows or [row])[0]
        row["times"] = base["seconds"] / row["seconds"]
        row["equal"] = all(
            task.better[key] * (row[key] - base[key])
            >= -max(row[f"{key}_spread"], base[f"{key}_spread"])
            for key in scores[0]
        )
        rows.append(row)
        print(json.dumps(row), flush=True)
    columns = ["way", "work", "seconds", "times"]
    columns += [key for score in task.better for key in (score, f"{score}_spread")]
    print(table(rows, [*columns, "ode", "equal"]))
    return rows


def karras(schedule, num_steps, rho=7.0):
    """Times equally spaced in (sigma / alpha)^(1 / rho): Karras et al. 2022, Eq. 5."""
    ends = np.array([schedule.half_log_snr(t) for t in (schedule.t_max, schedule.t_min)])
    first, last = np.exp(-ends / rho)
    grid = np.linspace(first, last, num_steps + 1)
    times = schedule.time(-rho * np.log(grid))
    times[[0, -1]] = schedule.t_max, schedule.t_min
    return times


def uniform(schedule, num_steps):
    return samplers.time_uniform(num_steps, schedule.t_max, schedule.t_min)


# Beside the default, times equally spaced in log-SNR.
GRIDS = {"karras": karras, "uniform": uniform}


def unit(images):
    return images.astype("float32") / 127.5 - 1


class Task:
    def __init__(self, model=None):
        self.model = model or presets.load(self.name, weights="pretrained")

    def draw(self, seed, way):
        start = time.perf_counter()
        images = self.model.generate(**self.wanted, **way, seed=seed, batch_size=250, verbose=0)
        return images, time.perf_counter() - start

    def work(self, way):
        options = sampling.resolve(self.model, **way)
        return len(options.steps) + int(options.guided.sum())


class Digits(Task):
    name = "uvit_tiny_digits"
    better = {"agreement": 1, "distance": -1}

    def __init__(self, count, model=None):
        super().__init__(model)
        self.wanted = {"labels": np.arange(count) % 10}
        train, test = data.digits("train"), data.digits("test")
        self.real = features(test["image"])
        self.classifier = SVC(C=10).fit(features(train["image"]), train["label"])

    def score(self, images):
        read = self.classifier.predict(features(images))
        return {
            "agreement": float((read == self.wanted["labels"]).mean()),
            "distance": frechet_distance(features(images), self.real),
        }


class Shapes(Task):
    name = "uvit_tiny_shapes"
    better = {"attributes": 1}

    def __init__(self, count):
        super().__init__()
        scenes = shapes.scenes(count, split="test", seed=1)
        self.wanted = {"prompts": [str(scene) for scene in scenes]}

    def score(self, images):
        return {"attributes": shapes.score(images, self.wanted["prompts"])["attributes"]}


def features(images):
    return images.reshape(len(images), -1) / 255.0


def draw(rows, path):
    """Each score over the work, a colour a family, the base's band behind them."""
    panels = [
        (task.name, score)
        for task in (Digits, Shapes)
        for score in task.better
        if any(row["model"] == task.name for row in rows)
    ]
    size = (5 * len(panels), 4.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    families = list(dict.fromkeys(row["family"] for row in rows))
    for axis, (model, score) in zip(axes, panels):
        own = [row for row in rows if row["model"] == model]
        base = own[0]
        low, high = (base[score] + sign * base[f"{score}_spread"] for sign in (-1, 1))
        axis.axhspan(low, high, color="0.9")
        for family in families:
            some = sorted((r for r in own if r["family"] == family), key=lambda r: r["work"])
            axis.errorbar(
                [row["work"] for row in some],
                [row[score] for row in some],
                [row[f"{score}_spread"] for row in some],
                marker="o",
                capsize=3,
                linestyle="-" if family in ("steps", "Karras' grid") else "none",
                label=family,
            )
        axis.set(xscale="log", xlabel="evaluations an image", ylabel=score, title=model)
        axis.set_xticks([15, 20, 30, 50, 100], ["15", "20", "30", "50", "100"], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
