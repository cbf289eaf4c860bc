"""Handwritten digits: train a U-ViT, sample it, measure it, draw it. This is `make demo`.

Reproduces   nothing published: the smallest real run of the whole package (preset
             `uvit_tiny_digits`, 0.4M weights, 1,437 scans bundled with scikit-learn, no download).
Expect       class agreement 0.98 to 0.99 (the classifier reads 0.994 of real test scans right),
             Fréchet distance 0.18 (floor 0.103), within-class spread 0.89 of the real one.
Hardware     2 CPU cores, 3 to 6 minutes on JAX; no GPU needed.
Commands     python examples/digits.py                 (KERAS_BACKEND=jax, tensorflow or torch)
             python examples/digits.py --quick         (half a minute, poor digits, same path)
             python examples/digits.py --preset uvit_tiny_digits_fast   (draws in two steps)

Writes into --out: samples.png (left of the line real scans, right generated ones, a row a class),
loss.png, metrics.json, model.keras (to continue training) and ema.weights.h5 (to sample).
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import flags  # noqa: E402
import keras  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.svm import SVC  # noqa: E402

import keras_uvit  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PRESETS = ["uvit_tiny_digits", "uvit_tiny_digits_fast"]
OFF = "off"  # of --resume: keeps no checkpoints


def main():
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"keras_uvit {keras_uvit.__version__} on {keras.config.backend()}, seed {options.seed}: "
        f"trains a U-ViT on real handwritten digits, draws new ones, measures them and writes "
        f"{out / 'samples.png'}",
        flush=True,
    )

    row = keras_uvit.presets.get(options.preset)
    steps = 44 if options.quick else options.steps or row.iterations
    train, test = keras_uvit.data.digits("train"), keras_uvit.data.digits("test")
    layers = {} if options.num_layers is None else {"num_layers": options.num_layers}
    model = keras_uvit.presets.load(options.preset, seed=options.seed, **layers)
    model.compile()

    batches = len(train["label"]) // row.batch_size  # whole ones: XLA compiles one shape
    epochs = max(1, round(steps / batches))
    print(
        f"Training {epochs * batches} steps of {row.batch_size} images, in {epochs} epochs. The "
        f"preset's {row.iterations} steps take 3 to 6 minutes on two CPU cores.",
        flush=True,
    )
    start = time.time()
    keep = keras_uvit.training.Checkpoint(out / "checkpoints", options.save_every)
    history = model.fit(
        shuffled(train, row.batch_size, options.seed),
        steps_per_epoch=batches,
        epochs=epochs,
        callbacks=[] if options.resume == OFF else [keep],
        resume=flags.RESUME.get(options.resume, "auto"),
        verbose=2 if options.quiet else "auto",
    )
    train_seconds = time.time() - start

    count = 100 if options.quick else 1000
    labels = np.arange(count) % 10
    print(
        f"Drawing {count} digits in {row.num_steps} steps with guidance {row.guidance_scale}, "
        "which takes 10 to 20 seconds",
        flush=True,
    )
    start = time.time()
    images = model.generate(labels=labels, batch_size=min(count, 500), seed=options.seed)
    sample_seconds = time.time() - start

    metrics = {
        **measure(images, labels, train, test),
        "train_seconds": round(train_seconds, 1),
        "sample_seconds": round(sample_seconds, 1),
        "backend": keras.config.backend(),
        "seed": options.seed,
        "steps": epochs * batches,
        "images": count,
        "num_steps": row.num_steps,
        "guidance_scale": row.guidance_scale,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_samples(out / "samples.png", test, images, labels)
    done = [(epoch + 1) * batches for epoch in history.epoch]
    draw_loss(out / "loss.png", done, history.history.get("loss", []))
    model.save(out / "model.keras")
    model.ema_network.save_weights(out / "ema.weights.h5")
    print(json.dumps(metrics, indent=2))
    print(f"Look at {(out / 'samples.png').absolute()}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default=PRESETS[0], choices=PRESETS, help="(%(default)s)")
    parser.add_argument("--out", default="runs/digits", help="folder to write into (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (the preset's)")
    parser.add_argument("--num-layers", type=int, help="transformer blocks, odd (the preset's)")
    # One process, because `shuffled` gives whole batches; and a demo starts from scratch each time.
    flags.add_to(parser, devices=("one", "all"), resume=OFF, off=[OFF])
    parser.add_argument("--quick", action="store_true", help="44 steps, 100 images: try the path")
    parser.add_argument("--quiet", action="store_true", help="one line an epoch, no bars")
    options = parser.parse_args()
    flags.apply(options)
    return options


def shuffled(data, batch_size, seed):
    """Endless whole batches, each epoch in a new order that is a function of (seed, epoch)."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(data["label"]))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            yield {key: value[order[first : first + batch_size]] for key, value in data.items()}
        epoch += 1


def measure(images, labels, train, test):
    """How good the digits are, beside what real ones score.

    `class_agreement`: share that a classifier, fitted on the real training scans, reads as the
    class asked for (`classifier_on_test`: its share on real test scans). `frechet_distance`: in
    pixels / 255, to the test scans; `frechet_floor`: the training scans' own.
    `within_class_spread`: mean standard deviation of a pixel within a class, over the real one;
    guidance that collapses a class shows below 1.
    """

    def features(images):
        return images.reshape(len(images), -1) / 255.0

    def spread(images, labels):
        return np.mean([features(images[labels == k]).std(axis=0).mean() for k in range(10)])

    classifier = SVC(C=10).fit(features(train["image"]), train["label"])
    distance = keras_uvit.evaluation.frechet_distance
    real = features(test["image"])
    metrics = {
        "class_agreement": (classifier.predict(features(images)) == labels).mean(),
        "classifier_on_test": classifier.score(real, test["label"]),
        "frechet_distance": distance(features(images), real),
        "frechet_floor": distance(features(train["image"]), real),
        "within_class_spread": spread(images, labels) / spread(train["image"], train["label"]),
    }
    return {key: round(float(value), 4) for key, value in metrics.items()}


def draw_samples(path, real, images, labels, columns=10):
    """A row a class: real scans, a gap, generated digits."""
    height, width = images.shape[1:3]
    grid = np.full((10 * (height + 1), (2 * columns + 1) * (width + 1)), 64, "uint8")
    for k in range(10):
        row = [*real["image"][real["label"] == k][:columns], None, *images[labels == k][:columns]]
        for j, image in enumerate(row):
            if image is not None:
                y, x = k * (height + 1), j * (width + 1)
                grid[y : y + height, x : x + width] = image[..., 0]
    figure, axes = plt.subplots(figsize=(12, 5.8), layout="constrained")
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks([k * (height + 1) + height / 2 for k in range(10)], range(10))
    middle = columns * (width + 1) / 2
    axes.set_xticks([middle, grid.shape[1] - middle], ["real test scans", "generated"])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_loss(path, done, loss, unit="step"):
    """Draws `loss` over what was done by then."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(done, loss)
    axes.set(xlabel=unit, ylabel="mean squared error", yscale="log", title="Training loss")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
