"""Clothes: a U-ViT on Fashion-MNIST by what the package chooses for the data, then a report.

Reproduces   nothing published: what `presets.for_data` and ten minutes of a laptop give on 60,000
             real pictures of 28x28 pixels in 10 classes (Xiao et al. 2017, arXiv 1708.07747).
Expect       clothes that a classifier reads as the requested class 0.93 of the time after 30 CPU
             minutes (real pictures 0.92): docs/own_data.md shows them.
Hardware     2 CPU cores.
Commands     python examples/fashion.py                    (10 minutes of training)
             python examples/fashion.py --minutes 30
             python examples/fashion.py --quick            (20 steps, poor pictures, the same path)

The data are downloaded by Keras (30 MB). Without a network: on Debian and Ubuntu the package
`dataset-fashion-mnist` has the same files, and they are taken from there.

Writes into --out: grids/ (samples while it trains), report.png and report.json (samples beside real
pictures, how often a classifier agrees, distances, copies), log.csv, model.keras.
"""

import argparse
import os
import shutil
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import flags  # noqa: E402
import keras  # noqa: E402

from keras_uvit import data, evaluation, presets, training  # noqa: E402
from keras_uvit.progress import say  # noqa: E402

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag")
CLASSES += ("ankle boot",)


def main():
    options = parse()
    out = Path(options.out)
    clothes = load()
    if options.quick:
        clothes = {key: array[:2000] for key, array in clothes.items()}
    # Shoes all point to the left: mirror images would be something else to learn.
    photos = data.images.in_memory(
        data.sources.arrays(clothes, "fashion-mnist"),
        options.batch_size,
        flip=False,
        seed=options.seed,
    )
    length = {"steps": 20} if options.quick else {"minutes": options.minutes}
    small = dict(hidden_dim=32, num_layers=3) if options.quick else {}
    model = presets.for_data(photos, **length, folder=out, network=small, seed=options.seed)
    grids = evaluation.SampleGridCallback(out / "grids", zoom=2, labels=[k % 10 for k in range(40)])
    training.train(
        model,
        photos,
        out,
        model.planned_steps,
        steps_per_epoch=-(-model.planned_steps // 8),
        resume=flags.RESUME[options.resume],
        callbacks=[grids],
    )
    evaluation.report(
        model, photos, out, num_images=40 if options.quick else 1000, seed=options.seed
    )


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/fashion", help="folder to write into (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of training (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="images per step (what suits the machine)")
    flags.add_to(parser, devices=("one", "all"))
    parser.add_argument("--quick", action="store_true", help="20 steps: try the path")
    options = parser.parse_args()
    flags.apply(options)
    return options


def load():
    """The 60,000 training pictures, "image" `(n, 28, 28, 1)` uint8 and "label"."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    folder = home / "datasets" / "fashion-mnist"
    if DEBIAN.is_dir() and not folder.is_dir():
        say(f"Taking Fashion-MNIST from {DEBIAN}")
        shutil.copytree(DEBIAN, folder)
    try:
        (images, labels), _ = keras.datasets.fashion_mnist.load_data()
    except Exception as error:  # whatever the download raises
        raise SystemExit(
            f"Fashion-MNIST could not be downloaded ({error}). On Debian and Ubuntu: "
            f"apt-get install dataset-fashion-mnist. Elsewhere put the four .gz files in {folder}."
        ) from error
    return {"image": images[..., None], "label": labels.astype("int32")}


if __name__ == "__main__":
    main()
