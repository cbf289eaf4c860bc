"""CKA: what the three ways to join a long skip do to the tokens, layer by layer.

Reproduces   on 8x8 digits what the paper (arXiv 2209.12152) says of its ablation of long skips:
             added to the main branch, or left out, neighbouring blocks stay alike; concatenated,
             the tokens after a long skip differ from those before it.
Expect       three seeds, t = 0.5: neighbouring deep blocks are alike by 0.88 +- 0.02 where skips
             are concatenated, by 0.97 +- 0.02 where they are added, by 0.98 +- 0.01 where there are
             none. Tokens before and after a long skip: 0.94 +- 0.03 and 0.98 +- 0.01.
Hardware     2 CPU cores, JAX: 1 to 2.4 CPU minutes for each of nine models; no GPU needed.
Commands     python examples/cka.py                (KERAS_BACKEND=jax, tensorflow or torch)
             python examples/cka.py --seeds 1      (a third of the time, no spread)
             python examples/cka.py --quick        (two small models, the same path)
             python examples/cka.py --models a.keras b.keras    (saved ones, nothing is trained)

Models are kept in --out and trained once. Writes into --out: cka.png (a heat map for each way, mean
of the seeds), cka.json (the matrices, and the similarity of blocks and of tokens before and after a
long skip: mean and standard deviation over the seeds).
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import run_bar  # noqa: E402

import keras_uvit  # noqa: E402
from keras_uvit import data, evaluation, presets, training  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PRESET = "uvit_tiny_digits"
SKIPS = ("concat", "add", None)
BATCH = 60  # of the 360 test scans


def main():
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"keras_uvit {keras_uvit.__version__} on {keras.config.backend()}")
    models = {}
    for model in saved(options.models) if options.models else trained(options, out):
        models.setdefault(str(model.network.config.skip).lower(), []).append(model)
    scans = data.digits("test")
    results = {}
    for skip, group in models.items():
        print(f"Comparing the layers of {len(group)} models with skip {skip}, t = {options.t}")
        names = evaluation.block_names(group[0].network)
        maps = [evaluation.cka_of_layers(m, scans, options.t, batch_size=BATCH) for m in group]
        results[skip] = {"layers": names, "maps": np.stack(maps), **summary(names, maps)}
    draw(out / "cka.png", results, options.t)
    about = {"t": options.t, "images": len(scans["image"]), "backend": keras.config.backend()}
    text = json.dumps({**about, "skips": results}, default=as_json) + "\n"
    (out / "cka.json").write_text(text, encoding="utf-8")
    for skip, result in results.items():
        print(f"{skip:8}" + json.dumps({k: v for k, v in result.items() if k in QUESTIONS}))
    print(f"Look at {out / 'cka.png'}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/cka", help="folder to write into (%(default)s)")
    add("--models", nargs="+", help="saved .keras files to compare instead of training")
    add("--steps", type=int, default=1000, help="optimizer steps of a model (%(default)s)")
    add("--seeds", type=int, default=3, help="models of each kind (%(default)s)")
    add("--t", type=float, default=0.5, help="time, 0 is data, 1 is noise (%(default)s)")
    add("--quick", action="store_true", help="two small models, 2 steps: try the path")
    return parser.parse_args()


def saved(paths):
    return [keras.saving.load_model(path, compile=False) for path in paths]


def trained(options, out):
    """A model of each kind and seed; those that are in `out` already are taken from there."""
    steps, seeds, skips, rows = options.steps, options.seeds, SKIPS, slice(None)
    small = {}
    if options.quick:
        steps, seeds, skips, rows = 2, 1, ("concat", None), slice(128)
        small = dict(hidden_dim=16, num_layers=3)
    scans = {key: value[rows] for key, value in data.digits().items()}
    scans = data.sources.arrays(scans, "digits")
    for skip in skips:
        for seed in range(seeds):
            folder = out / f"{skip}-{steps}-steps-seed-{seed}".lower()
            print(f"Training {folder}, or taking what is there")
            keras.utils.set_random_seed(seed)
            model = presets.load(PRESET, seed=seed, skip=skip, **small)
            size = presets.get(PRESET).batch_size
            digits = data.images.in_memory(scans, size, flip=False, seed=seed, verbose=0)
            bar = [run_bar.RunBar()]
            yield training.train(model, digits, folder, steps, callbacks=bar, verbose=0)


def pairs(names):
    """Places of layers to compare: {question: [(before, after)]}."""
    blocks = [k for k, name in enumerate(names) if "block" in name]
    neighbours = list(zip(blocks, blocks[1:]))
    merges = [k for k, name in enumerate(names) if name.startswith("skip")]
    return {
        "shallow neighbours": neighbours[: len(blocks) // 2],
        # Between them are the long skips, where there are any.
        "deep neighbours": neighbours[len(blocks) // 2 :],
        "before and after a long skip": [(k - 1, k) for k in merges],
    }


QUESTIONS = list(pairs([]))


def summary(names, maps):
    """Mean similarity of the pairs of each question: mean and deviation (if any) over `maps`."""
    answers = {}
    for question, places in pairs(names).items():
        if places:
            means = [np.mean([similarity[place] for place in places]) for similarity in maps]
            std = np.std(means, ddof=1) if len(means) > 1 else None
            answers[question] = {"mean": np.mean(means), "std": std}
    return answers


def as_json(value):
    return np.round(value, 4).tolist()  # NumPy's numbers and arrays


def draw(path, results, t):
    """A heat map for each kind, side by side, of the mean over its models."""
    count = len(results)
    means = [result["maps"].mean(axis=0) for result in results.values()]
    low = np.floor(10 * min(mean.min() for mean in means)) / 10
    figure, axes = plt.subplots(
        1, count, figsize=(4.3 * count + 1, 4.8), layout="constrained", squeeze=False
    )
    for place, mean, (skip, result) in zip(axes[0], means, results.items()):
        image = place.imshow(mean, vmin=low, vmax=1, cmap="magma")
        labels = [name.replace("_block", "").replace("_", " ") for name in result["layers"]]
        place.set_xticks(range(len(labels)), labels, rotation=90)
        place.set_yticks(range(len(labels)), labels)
        place.set_title(f"skip: {skip}, mean of {len(result['maps'])}")
    figure.colorbar(image, ax=axes[0], label=f"CKA of tokens at t = {t}", shrink=0.8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
