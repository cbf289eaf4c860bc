"""Ablations: one thing changed at a time, several seeds, on data that a CPU can learn.

Reproduces   "All are Worth Words", Section 3.1 and Figures 2, 3, 8: how to join a long skip, feed
             the time, end, cut and place patches; how deep, how wide, which patch size. And what
             came after: objectives, blocks, the CNN of equal cost.
Expect       docs/science.md, which has what came out on the bundled digits, with its spread.
Hardware     2 CPU cores: digits 2 CPU minutes for a run of 1,500 steps, shapes 5 for 1,000 (the
             U-Net 17); the rest wants a GPU.
Commands     python examples/ablations.py                         (everything, three seeds, hours)
             python examples/ablations.py --iterations 1500 --num-steps 5 10 25   (docs/science.md)
             python examples/ablations.py --axes skip time --seeds 0 1 2 3 4
             python examples/ablations.py --data shapes --axes skip
             python examples/ablations.py --data cifar10 --inception pt_inception.pth \\
                 --reference cifar10.npz --iterations 50000
             python examples/ablations.py --data CACHE ...        (a folder of `keras-uvit encode`)
             python examples/ablations.py --process 0/2           (and 1/2: two divide the runs)
             python examples/ablations.py --quick                 (poor numbers, the same path)

Every variant differs from "base" in what its name says. Base is the paper's network at the size of
the data's preset (concatenated skips, time token, learned positions, 3x3 convolution), trained by
that preset's recipe: on digits v-prediction, for noise prediction draws poor ones in 3,000 steps.

Runs that are done are kept, so the same command resumes where it was, and another one only adds
what is missing. Writes into --out: runs/VARIANT-SEED.json, table.md, ablations.png and, of several
--num-steps, steps.png.
"""

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import flags  # noqa: E402
import keras  # noqa: E402
import matplotlib  # noqa: E402
import run_bar  # noqa: E402
import tasks  # noqa: E402

from keras_uvit import training  # noqa: E402
from keras_uvit.evaluation import count_macs  # noqa: E402
from keras_uvit.progress import say  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# axis: {variant: changes of the task's arguments}. "network" changes arguments of UViT, "model" of
# DiffusionModel; width and patch size are the base's times these. "network" is the task's own.
OBJECTIVES = {
    "epsilon, VP linear": dict(prediction="epsilon", schedule="VPLinear"),
    "x0, VP cosine": dict(prediction="x0", schedule="VPCosine"),
    "v, VP cosine, min-SNR": dict(prediction="v", schedule="VPCosine", loss_weighting="min_snr"),
    "flow": dict(prediction="velocity", schedule="LinearPath"),
    "flow, logit-normal": dict(
        prediction="velocity", schedule="LinearPath", time_sampling="logit_normal"
    ),
    "flow, cosmap": dict(prediction="velocity", schedule="LinearPath", time_sampling="cosmap"),
}
AXES = {
    "skip": {
        "Linear(x + s)": dict(network=dict(skip="add_project")),
        "x + Linear(s)": dict(network=dict(skip="project_sum")),
        "x + s": dict(network=dict(skip="add")),
        "no skip": dict(network=dict(skip=None)),
        "no skip, AdaLN": dict(network=dict(skip=None, time="adaln")),  # GenViT's kind
    },
    "time": {"AdaLN": dict(network=dict(time="adaln"))},
    "output": {
        "conv before": dict(network=dict(output_conv="before")),
        "no conv": dict(network=dict(output_conv=False)),
    },
    "patches": {"conv patches": dict(network=dict(patch_embed="conv"))},
    "position": {
        "2-D sinusoids": dict(network=dict(position="sinusoidal")),
        "rotary": dict(network=dict(position="rotary")),
        "no position": dict(network=dict(position=None)),
    },
    "depth": {
        "3 layers": dict(network=dict(num_layers=3)),
        "9 layers": dict(network=dict(num_layers=9)),
    },
    "width": {"half width": dict(width=0.5), "twice the width": dict(width=2)},
    "patch size": {"half patch": dict(patch=0.5), "twice the patch": dict(patch=2)},
    "objective": {name: dict(model=change) for name, change in OBJECTIVES.items()},
    "block": {
        "RMS norm": dict(network=dict(norm="rms")),
        "SwiGLU": dict(network=dict(mlp="swiglu")),
        "qk norm": dict(network=dict(qk_norm=True)),
    },
    "init": {
        "balanced init": dict(network=dict(init="balanced")),
        "balanced init, 2-D sinusoids": dict(network=dict(init="balanced", position="sinusoidal")),
    },
    "network": {"U-Net": dict(unet=True)},
}


def main():
    options = parse()
    task = tasks.make(options)
    if task.unet is None:
        if "network" in (options.axes or []):
            raise SystemExit(f"No U-Net of equal cost is known for --data {options.data}.")
        del AXES["network"]
    options.axes = options.axes or list(AXES)
    runs = [
        (axis, name, change, seed)
        for seed in options.seeds
        for axis, name, change in [("base", "base", {}), *variants(options.axes)]
    ]
    folder = Path(options.out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    agree(options, task)
    index, count = options.process
    for number, (axis, name, change, seed) in enumerate(runs[index::count]):
        path = folder / f"{name.replace(' ', '_')}-{seed}.json"
        if path.exists():
            continue
        say(f"Run {number + 1} of {len(runs[index::count])}: {name}, seed {seed}")
        row = {"axis": axis, "variant": name, **train(task, change, seed, options, path)}
        keep(path, row)
        keras.utils.clear_session()
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    summary = summarize(rows)
    text = table(summary)
    (Path(options.out) / "table.md").write_text(text, encoding="utf-8")
    draw(summary, task.better, Path(options.out) / "ablations.png")
    print(text)
    if len(options.num_steps or []) > 1 and len(task.better) > 1:
        draw_steps(summary, task.better, Path(options.out) / "steps.png")
    print(f"Look at {Path(options.out) / 'ablations.png'}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, shapes, cifar10 or a cache (%(default)s)")
    add("--axes", nargs="+", choices=AXES, help="what to change (all)")
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], help="(0 1 2)")
    add("--num-steps", nargs="+", type=at_least(2), help="of sampling, each measured (preset's)")
    add("--iterations", type=at_least(1), help="optimizer steps (the preset's)")
    add("--num-images", type=at_least(20), default=1000, help="drawn a run (%(default)s)")
    add("--inception", help="Inception weights; with --reference, measures FID")
    add("--reference", help="reference statistics of `keras-uvit statistics`")
    add("--autoencoder", help="of a cache of latents, for FID")
    add(
        "--process", type=part, default="0/1", help="K/N: each N-th run from the K-th (%(default)s)"
    )
    add("--out", default="runs/ablations", help="folder to write into (%(default)s)")
    add("--precision", default="float32", choices=flags.PRECISIONS, help="(%(default)s)")
    add(
        "--save-every",
        type=at_least(1),
        default=1000,
        help="steps between checkpoints (%(default)s)",
    )
    add("--quick", action="store_true", help="22 steps, 50 images, one seed: try the path")
    options = parser.parse_args()
    if bool(options.inception) != bool(options.reference):
        parser.error("FID needs --inception and --reference.")
    if options.quick:
        options.iterations, options.num_images, options.seeds = 22, 50, [0]
    keras.config.set_dtype_policy(options.precision)
    return options


def agree(options, task):
    """One table compares runs of equal settings."""
    path, now = Path(options.out) / "settings.json", {"iterations": task.iterations}
    names = "data num_steps num_images precision inception reference autoencoder"
    now |= {name: getattr(options, name) for name in names.split()}
    then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    other = {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}
    if other:
        raise SystemExit(
            f"{options.out} has runs of other settings, (then, now): {other}. Choose another --out."
        )
    keep(path, now)


def at_least(least):
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, is {text}")
        return int(text)

    return number


def part(text):
    """(K, N) of "K/N"."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be K/N, K from 0 to N - 1, is {text!r}")
    return int(index), int(count)


def variants(axes):
    return [(axis, name, change) for axis in axes for name, change in AXES[axis].items()]


def train(task, change, seed, options, path):
    """One run, from its checkpoint if it was interrupted; what it measured, as a dict."""
    keras.utils.set_random_seed(seed)
    model, dataset = task.model(change, seed), task.dataset(seed)
    model.compile()
    kept = path.with_suffix("")
    epochs = -(-task.iterations // len(dataset))
    history = model.fit(
        dataset,
        epochs=epochs,
        callbacks=[training.Checkpoint(kept, options.save_every), run_bar.RunBar()],
        verbose=0,
    )
    row = {"seed": seed, "steps": epochs * len(dataset), "loss": task.loss(model)}
    row["train_loss"] = history.history.get("loss", [None])[-1]
    row["parameters"], row["macs"] = model.network.count_params(), count_macs(model.network)
    row["scores"] = {
        steps: task.score(model, seed, steps) for steps in options.num_steps or [model.num_steps]
    }
    shutil.rmtree(kept, ignore_errors=True)
    return row


def keep(path, row):
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(row), encoding="utf-8")
    os.replace(beside, path)


def summarize(rows):
    """A row for each variant and number of sampling steps: means and deviations over its seeds."""
    summary = []
    for axis, name in dict.fromkeys((row["axis"], row["variant"]) for row in rows):
        own = [row for row in rows if row["variant"] == name]
        for steps in own[0]["scores"]:
            values = {"loss": [row["loss"] for row in own]}
            if axis == "objective":
                del values["loss"]  # of another objective: of another size
            for score in own[0]["scores"][steps]:
                values[score] = [row["scores"][steps][score] for row in own]
            summary.append(
                {
                    "axis": axis,
                    "variant": name,
                    "steps": int(steps),
                    "seeds": len(own),
                    "parameters": own[0]["parameters"],
                    "macs": own[0]["macs"],
                    "scores": {key: spread(value) for key, value in values.items()},
                }
            )
    order = ["base", *AXES]
    return sorted(summary, key=lambda row: (order.index(row["axis"]), row["variant"] != "base"))


def spread(values):
    """(mean, standard deviation over seeds or None)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def table(summary):
    scores = list(summary[0]["scores"])
    head = ["axis", "variant", "parameters", "MMACs", "sampling steps", *scores, "seeds"]
    lines = [head, ["---"] * len(head)]
    for row in summary:
        cells = [row["axis"], row["variant"], f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f}"]
        lines.append([*cells, str(row["steps"]), *(cell(row["scores"].get(key)) for key in scores)])
        lines[-1].append(str(row["seeds"]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cell(value):
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} +- {deviation:.4f}"


def draw(summary, better, path):
    """Each score, a line a variant, beside the base's band; seeds' deviations as bars."""
    steps = max(row["steps"] for row in summary)
    rows = [row for row in summary if row["steps"] == steps][::-1]
    scores = list(better)
    figure, axes = plt.subplots(
        1, len(scores), figsize=(5 * len(scores) + 2, 0.26 * len(rows) + 1.5), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, score in zip(axes[0], scores):
        for place, row in enumerate(rows):
            if score not in row["scores"]:
                continue
            mean, deviation = row["scores"][score]
            color = "C1" if row["variant"] == "base" else "C0"
            axis.errorbar(mean, place, xerr=deviation or 0, marker="o", capsize=3, color=color)
            if row["variant"] == "base":
                axis.axvspan(mean - (deviation or 0), mean + (deviation or 0), color="0.9")
        direction = "higher" if better[score] > 0 else "lower"
        axis.set(xlabel=f"{score} ({direction} is better)", xscale=scale_of(score, better))
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(rows)), [f"{row['axis']}: {row['variant']}" for row in rows])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def scale_of(score, better):
    """Of distances the worst is many times the best."""
    return "log" if better[score] < 0 and score != "loss" else "linear"


def draw_steps(summary, better, path):
    """What is drawn, over sampling steps: the objectives and the base."""
    scores = [score for score in better if score != "loss"]
    figure, axes = plt.subplots(
        1, len(scores), figsize=(5 * len(scores) + 2, 4), squeeze=False, layout="constrained"
    )
    rows = [row for row in summary if row["axis"] in ("base", "objective")]
    for axis, score in zip(axes[0], scores):
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = sorted((row for row in rows if row["variant"] == name), key=lambda r: r["steps"])
            mean, deviation = zip(*(row["scores"][score] for row in own))
            bars = [value or 0 for value in deviation]
            steps = [row["steps"] for row in own]
            axis.errorbar(steps, mean, bars, marker="o", capsize=3, label=name)
        axis.set(xlabel="sampling steps", ylabel=score, yscale=scale_of(score, better))
        axis.grid(alpha=0.3)
    axes[0][-1].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
