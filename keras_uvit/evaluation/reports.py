"""How good is a model of one's own pictures? One picture and one record, without a download."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops, tree

from keras_uvit import io, progress, sampling
from keras_uvit.diffusion.schedules import LinearPath, Schedule
from keras_uvit.evaluation.classifier import Classifier
from keras_uvit.evaluation.files import image_grid
from keras_uvit.evaluation.frechet import frechet_distance
from keras_uvit.evaluation.metrics import squared_distances, within_class_spread
from keras_uvit.optional import optional
from keras_uvit.pixels import to_unit_range
from keras_uvit.sampling.options import ARGUMENTS
from keras_uvit.types import PathLike

if TYPE_CHECKING:
    from keras_uvit.training import DiffusionModel

USED = 1000  # real pictures that are compared with, at most
COMPARED_SIDE = 16  # pixels to which pictures are shrunk before distances are taken of them
TIMES = np.linspace(0.05, 0.95, 10)
CLASSIFIER_STEPS = (600, 3000)  # at least and at most; in between one for every ten pictures
SHOWN = 16  # samples whose nearest training pictures are shown
COPY = 0.5  # of the usual distance between neighbours: below it a sample is called a copy
# Error of the x0 estimate over the variance of the pictures at TIMES of `LinearPath`, measured on
# the model that `examples/fashion.py --minutes 30` trained: docs/own_data.md shows what it draws.
OF_TYPICAL = "examples/fashion.py --minutes 30"
TYPICAL = (0.0038, 0.020, 0.042, 0.071, 0.106, 0.153, 0.214, 0.309, 0.423, 0.579)


def report(
    model: "DiffusionModel",
    data: Any,
    folder: PathLike,
    *,
    num_images: int = 500,
    seed: int = 0,
    verbose: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Measures a model of pixels on its own training pictures, and draws what it found.

    * `agreement`: how often a small classifier, trained on the real pictures, reads the class that
      was asked for (`agreement_real`: how often it is right on real pictures it has not seen);
    * `distance`: Fréchet distance (Heusel et al. 2017, arXiv 1706.08500, Eq. 6) between samples and
      real pictures on the classifier's features, and `distance_pixels` on shrunken pixels;
      `..._floor` is the distance between two halves of the real pictures;
    * `spread`: mean standard deviation of a feature within a class, over that of real pictures;
      guidance that collapses a class shows below 1;
    * `copies`: how many of 16 samples are much nearer to a training picture than training pictures
      are to each other;
    * `error`: mean squared error of the x0 estimate over the variance of the pictures, at ten
      times; 1 is what the mean picture scores.

    Args:
        model: `DiffusionModel` of pixels with classes or without conditions.
        data: the data set it was trained on: `data.ImageDataset`, or a dict of arrays "image"
            `(n, H, W, C)` uint8 and, for a model with classes, "label".
        folder: where `report.png`, `report.json` and the classifier go.
        num_images: int, samples to draw.
        seed: int.
        verbose: 0 or 1.
        **options: of `generate`: guidance_scale, num_steps, sampler, ...

    Returns:
        dict, the content of `report.json`.

    Raises:
        ImportError: without Matplotlib; `pip install "keras-uvit[demo]"`.
        ValueError: for a model of latents or captions, or fewer than 20 pictures.
    """
    plot = _matplotlib()
    images, labels = _pictures(model, data)
    asked_for = {name: value for name, value in options.items() if name in ARGUMENTS}
    chosen = sampling.resolve(model, **asked_for).record()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    say = progress.say if verbose else lambda text: None
    random = np.random.default_rng(seed)
    rows = random.permutation(len(images))[: 2 * USED]
    first, second = np.array_split(rows, 2)  # neither half knows the other

    say(f"1/4 Drawing {num_images} images")
    asked = None if labels is None else np.arange(num_images) % model.network.num_classes
    what = {"num_images": num_images} if labels is None else {"labels": asked}
    samples = model.generate(**what, seed=seed, verbose=verbose, **options)

    found = {
        "images": num_images,
        "seed": seed,
        "guidance_scale": chosen["guidance_scale"],
        "num_steps": options.get("num_steps", model.num_steps),
    }
    if asked is not None:
        say("2/4 Training a classifier on the real pictures, or taking the one that is there")
        judge = _classifier(images, labels, second, model.network.num_classes, folder, seed)
        # As many as are drawn: the distance of fewer images is larger, whatever they show.
        real, floor = judge.features(images[second]), judge.features(images[first[:num_images]])
        drawn = judge.features(samples)
        found |= {
            "agreement": (judge.classes(samples) == asked).mean(),
            "agreement_real": (judge.classes(images[second]) == labels[second]).mean(),
            "distance": frechet_distance(drawn, real),
            "distance_floor": frechet_distance(floor, real),
            "spread": within_class_spread(drawn, asked) / within_class_spread(real, labels[second]),
        }
    say("3/4 Comparing pixels, and looking for copies")
    small = {k: _shrunk(x) for k, x in (("real", images[second]), ("train", images[first]))}
    pixels = _shrunk(samples)
    found |= {
        "distance_pixels": frechet_distance(pixels, small["real"]),
        "distance_pixels_floor": frechet_distance(small["train"][:num_images], small["real"]),
    }
    every = _shrunk(images)
    nearest, gaps = _nearest(pixels[:SHOWN], every)
    usual = np.median(_nearest(small["real"][:200], small["train"])[1])
    found["copies"] = int((gaps < COPY * usual).sum())
    say("4/4 Measuring the error at ten times")
    held = images[second[: min(len(second), 256)]], labels is not None and labels[second[:256]]
    found["error"] = _errors(model, *held, seed)
    found = {key: _rounded(value) for key, value in found.items()}
    io.write_json(folder / "report.json", found)
    _draw(plot, folder / "report.png", model, found, images, labels, samples, asked, nearest)
    say(json.dumps(found, indent=2))
    say(f"Look at {folder / 'report.png'}")
    return found


def check_model(model: "DiffusionModel") -> None:
    """Raises ValueError for a model that a report cannot be made of."""
    if model.latent_scale is not None or model.network.context_shape is not None:
        raise ValueError(
            "A report is of models of pixels, with classes or without: for latents and captions "
            "use evaluation.evaluate. Received a model with "
            f"latent_scale={model.latent_scale}, context_shape={model.network.context_shape}."
        )


def _pictures(model, data):
    """Images and labels (or None) as arrays, checked against the model."""
    check_model(model)
    arrays = data if isinstance(data, dict) else getattr(data, "arrays", None)
    if not arrays or "image" not in arrays:
        raise TypeError(
            'Expected data.ImageDataset or a dict of arrays with "image". Received: '
            f"{type(data).__name__}."
        )
    images = np.asarray(arrays["image"][:])
    if images.shape[1:] != tuple(model.network.image_shape) or images.dtype != np.uint8:
        raise ValueError(
            f"The model draws uint8 pictures of {model.network.image_shape}. Received pictures of "
            f"{images.shape[1:]}, {images.dtype}."
        )
    if len(images) < 20:
        raise ValueError(f"A report needs at least 20 pictures. Received: {len(images)}.")
    if model.network.num_classes is None:
        return images, None
    if "label" not in arrays:
        raise ValueError('The model has classes: the data need "label".')
    return images, np.asarray(arrays["label"][:])


def _classifier(images, labels, held_out, num_classes, folder, seed):
    """A trained `Classifier`, kept in `folder` for the same data."""
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    judge = Classifier(images.shape[1:], num_classes, seed)
    about = hashlib.sha256()
    for part in (images[:: max(1, len(images) // 1000)], labels, held_out):
        about.update(np.ascontiguousarray(part).tobytes())
    path = folder / f"classifier-{about.hexdigest()[:12]}.weights.h5"
    if path.is_file():
        judge.network.load_weights(path)
    else:
        judge.fit(
            images[kept], labels[kept], steps=int(np.clip(len(kept) // 10, *CLASSIFIER_STEPS))
        )
        judge.network.save_weights(path)
    return judge


def _shrunk(images):
    """`(n, d)` float32 in [0, 1]: block means of at most 16 pixels a side."""
    steps = [max(1, round(side / COMPARED_SIDE)) for side in images.shape[1:3]]
    height, width = (side // step * step for side, step in zip(images.shape[1:3], steps))
    x = images[:, :height, :width].astype("float32") / 255
    x = x.reshape(len(x), height // steps[0], steps[0], width // steps[1], steps[1], -1)
    return x.mean(axis=(2, 4)).reshape(len(x), -1)


def _nearest(points, others):
    """Index of the nearest of `others` to each point, and its distance."""
    found = [(d.argmin(axis=1), d.min(axis=1)) for d in squared_distances(points, others)]
    rows, squares = (np.concatenate(part) for part in zip(*found))
    return rows, np.sqrt(squares)


def _errors(model, images, labels, seed):
    """Error of the x0 estimate over the variance of the pictures, at each of `TIMES`."""
    x0 = to_unit_range(images)
    random, errors = np.random.default_rng(seed), []
    for t in TIMES.astype("float32"):
        noise = random.standard_normal(x0.shape, "float32")
        times = ops.convert_to_tensor(np.full(len(x0), t))
        x = model.objective.add_noise(ops.convert_to_tensor(x0), times, noise)
        inputs = tree.map_structure(ops.convert_to_numpy, model.inputs(x, times))
        if model.network.num_classes is not None:
            inputs["label"] = labels.astype("int32")
        output = model.ema_network.predict(inputs, batch_size=64, verbose=0)
        found = model.objective.denoised(x, times, output)
        errors.append(np.square(ops.convert_to_numpy(found) - x0).mean())
    return list(np.array(errors) / np.square(x0 - x0.mean(axis=0)).mean())


def _rounded(value):
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value if isinstance(value, int) else float(f"{float(value):.4g}")


def _matplotlib():
    optional("matplotlib", "demo", "A report is drawn with Matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def typical(schedule: Schedule) -> np.ndarray:
    """`TYPICAL` at TIMES of another schedule, whose images have other noise at the same time."""
    noise, known = (-path.half_log_snr(TIMES) for path in (schedule, LinearPath()))
    return np.exp(np.interp(noise, known, np.log(TYPICAL)))


def _draw(plot, path, model, found, images, labels, samples, asked, nearest):
    """Real pictures, samples, neighbours and the error over time, in one picture."""
    figure, axes = plot.subplots(2, 2, figsize=(12, 12), layout="constrained")
    count = min(64, len(samples))
    if labels is None:
        rows = np.arange(min(count, len(images)))
    else:  # of the same classes in the same places
        used = np.zeros(len(images), bool)
        rows = []
        for k in asked[:count]:
            free = np.flatnonzero((labels == k) & ~used)
            rows.append(free[0] if len(free) else 0)
            used[rows[-1]] = True
    pairs = [image for pair in zip(samples[:SHOWN], images[nearest]) for image in pair]
    for panel, title, shown, columns in (
        (axes[0, 0], "real pictures", images[rows], 8),
        (axes[0, 1], "samples of the same classes" if labels is not None else "samples",
         samples[:count], 8),
        (axes[1, 0], "samples, each with the nearest real picture on its right",
         np.stack(pairs), 8),
    ):  # fmt: skip
        grid = image_grid(shown, columns)
        panel.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        panel.set_title(title)
        panel.axis("off")
    panel = axes[1, 1]
    panel.plot(TIMES, found["error"], "o-", label="this model")
    panel.plot(TIMES, typical(model.objective.schedule), "--", color="gray", label=OF_TYPICAL)
    panel.axhline(1.0, color="tab:red", lw=1, label="the mean picture")
    panel.set(xlabel="t (0: picture, 1: noise)", yscale="log", title="error of the x0 estimate")
    panel.legend(loc="lower right")
    numbers = ("agreement", "distance", "distance_floor", "spread", "distance_pixels", "copies")
    text = "   ".join(f"{key} {found[key]:.3g}" for key in numbers if key in found)
    figure.suptitle(f"{model.name}: {text}")
    with io.replacing(path) as beside:
        figure.savefig(beside, dpi=80)
    plot.close(figure)
