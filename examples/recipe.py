"""What the examples of the paper's recipes share: flags, the run itself, stand-ins for the data.

Each example says on top what it reproduces; this file trains, samples, measures and draws.
"""

import argparse
import csv
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import digits  # noqa: E402
import flags  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_uvit  # noqa: E402
from keras_uvit import (  # noqa: E402
    UViT,
    data,
    distribution,
    evaluation,
    presets,
    training,
)
from keras_uvit.encoders import SpaceToDepth  # noqa: E402
from keras_uvit.progress import say  # noqa: E402


def parse(doc, preset, choices=(), **defaults):
    """The flags that all examples have, and those of `defaults` with their help."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default=preset, choices=choices or [preset])
    for name, (default, text) in defaults.items():
        parser.add_argument(f"--{name}", default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--inception", help="Inception weights; with --reference, measures FID")
    parser.add_argument("--reference", help="reference statistics of `keras-uvit statistics`")
    parser.add_argument("--num-images", type=int, default=50_000, help="of FID (%(default)s)")
    parser.add_argument("--iterations", type=int, help="optimizer steps (the preset's)")
    parser.add_argument("--batch-size", type=int, help="of all devices (the preset's)")
    flags.add_to(parser)
    parser.add_argument("--quick", action="store_true", help="try the path: tiny, on digits")
    parser.add_argument("--quiet", action="store_true", help="one line an epoch, no bars")
    options = parser.parse_args()
    flags.apply(options)
    backend = keras.config.backend()
    say(f"keras_uvit {keras_uvit.__version__} on {backend}, {options.preset}")
    return options


def run(options, model, dataset, iterations, measure=None, show=None, **protocol):
    """Trains, draws a grid, measures; everything goes to `--out`.

    Args:
        model, dataset, iterations: what to train, on what, how long.
        measure: function of the model that returns a dict, or None; with `--reference` and
            `--inception` FID is measured too.
        show: prompts that a text model draws in grids.
        **protocol: of `evaluation.evaluate`.
    """
    out, measured = Path(options.out), None
    if options.reference and options.inception:
        measured = _protocol(options, model, protocol)
    epochs = -(-iterations // len(dataset))
    say(f"Training to step {epochs * len(dataset)}, batches of {dataset.batch_size}, in {out}")
    can_draw = model.latent_scale is None or model.encoders.autoencoder is not None
    what = {"prompts": show} if show else conditions(model, 80)
    drawing = evaluation.SampleGridCallback(
        out / "grids", every=max(1, epochs // 10), columns=columns(model), zoom=zoom(model), **what
    )
    start = time.time()
    model = training.train(
        model,
        dataset,
        out,
        iterations,
        every_steps=options.save_every,
        resume=flags.RESUME[options.resume],
        callbacks=[drawing] if can_draw else [],
        verbose=2 if options.quiet else "auto",
    )
    metrics = {"train_seconds": round(time.time() - start, 1)}
    # All processes of a job draw together; what the first one writes is kept.
    index, processes = distribution.process()
    own = out if index == 0 else Path(tempfile.mkdtemp())
    if can_draw:
        draw(own / "samples.png", model, what, options.seed)
    else:
        latents = model.generate(**what, seed=options.seed, decode=False)
        np.save(own / "latents.npy", latents)
        say("No --autoencoder: latents.npy holds latents, not pictures.")
    draw_log(out / "log.csv", own / "loss.png")
    metrics |= measure(model) if measure else {}
    if measured:
        folder = out / "images" if processes == 1 else None
        metrics |= evaluation.evaluate(model, **measured, folder=folder)
    (own / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if index:
        shutil.rmtree(own)
        return
    print(json.dumps(metrics, indent=2))
    print(f"Look at {out}")


def _protocol(options, model, protocol):
    """What `evaluate` takes beside the model, checked now: not after days of training."""
    measured = {
        "reference": evaluation.Reference.load(options.reference),
        "inception": evaluation.InceptionFeatures(options.inception),
        "num_images": options.num_images,
        **protocol,
    }
    evaluation.protocol.check(model, **measured)
    return measured


def conditions(model, count):
    """The argument of `generate` for `count` images, all classes in turn."""
    classes = model.network.num_classes
    return {"num_images": count} if classes is None else {"labels": np.arange(count) % classes}


def draw(path, model, what, seed):
    """A grid of the model's images, with their prompts if they have any."""
    images = model.generate(**what, seed=seed)
    if "prompts" in what:
        grid = evaluation.captioned_grid(images, what["prompts"], columns(model), zoom(model))
    else:
        grid = evaluation.image_grid(images, columns(model), zoom(model))
    evaluation.write_png(path, grid)


def columns(model):
    return 10 if model.network.context_shape is None else 6


def zoom(model):
    pixels = 64 if model.network.context_shape is None else 128
    factor = model.encoders.autoencoder.factor if model.encoders.autoencoder is not None else 1
    return max(1, pixels // (model.network.image_shape[0] * factor))


def draw_log(log, path):
    """The loss of a `log.csv` as a curve."""
    with open(log, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] != "epoch"]
    epochs, loss = zip(*((int(row["epoch"]) + 1, float(row["loss"])) for row in rows))
    digits.draw_loss(path, epochs, loss, "epoch")


# Stand-ins ----------------------------------------------------------------------------------------


def reduced(row, image_shape, patch_size, num_classes, quick, context_shape=None, **more):
    """The recipe of a preset with a network that a CPU can train."""
    width = 32 if quick else 96
    network = UViT(
        image_shape,
        patch_size=patch_size,
        hidden_dim=width,
        num_layers=3 if quick else 5,
        num_heads=4,
        num_classes=num_classes,
        context_shape=context_shape,
        null_label=row.network.get("null_label", True) if num_classes else True,
        output_conv=row.network.get("output_conv", True),
        init="balanced",  # the preset's own is for networks of a tenfold width
    )
    optimizer = dict(learning_rate=1e-3, warmup_steps=100)
    own = dict(latent_scale=None, ema_decay=0.999, num_steps=10 if quick else 50)
    return row.build(network, optimizer, **own | more)


def digits_cache(folder):
    """A latent cache of the bundled digits, by an autoencoder that only rearranges pixels."""
    autoencoder = SpaceToDepth(2, scale=1.3)
    data.write_latents(data.digits(), folder, autoencoder, shard_size=512, batch_size=256)
    return autoencoder


def digit_scores(quick):
    """`measure` of `run` for models of digits."""

    def measure(model):
        count = 100 if quick else 1000
        labels = np.arange(count) % 10
        images = model.generate(labels=labels, batch_size=None if quick else 500)
        return digits.measure(images, labels, data.digits("train"), data.digits("test"))

    return measure


def digit_pictures(image_shape, batch_size, labels, seed):
    """The bundled digits as a set of colour pictures of another size."""
    train = data.digits()
    height, width, channels = image_shape
    pictures = train["image"].repeat(height // 8, 1).repeat(width // 8, 2).repeat(channels, 3)
    content = {"image": pictures, **({"label": train["label"]} if labels else {})}
    return data.images.in_memory(
        data.sources.arrays(content, "digits"), batch_size, flip=False, seed=seed, verbose=0
    )


def preset_model(options, **more):
    """The preset as it is published, with the options' seed."""
    return presets.load(options.preset, seed=options.seed, **more)
