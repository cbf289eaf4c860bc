"""The papers' protocol: draw images, compare them with the reference, record all that matters."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_uvit import backend, io, progress, sampling
from keras_uvit.evaluation.clip_score import CLIPScore
from keras_uvit.evaluation.files import read_npz, save_arrays
from keras_uvit.evaluation.frechet import MIN_IMAGES, USUAL, Reference, frechet_distance, gaussian
from keras_uvit.evaluation.inception import InceptionFeatures
from keras_uvit.evaluation.metrics import inception_score, precision_recall
from keras_uvit.inference import fingerprint
from keras_uvit.pixels import listed
from keras_uvit.sampling.options import ARGUMENTS
from keras_uvit.types import PathLike
from keras_uvit.version import __version__

if TYPE_CHECKING:
    from keras_uvit.training import DiffusionModel

CHUNK = 1024  # images drawn, measured and written at a time
USUAL_PROMPTS = 30_000  # of the papers' COCO numbers
NEIGHBOURS = 3  # of precision and recall
# What `evaluate` passes on to `generate`: what the images depend on, and how they are drawn.
OPTIONS = (*ARGUMENTS, "batch_size", "use_ema")


def fid(
    images: np.ndarray,
    reference: Reference,
    inception: InceptionFeatures,
    *,
    allow_few: bool = False,
    verbose: int = 1,
) -> float:
    """Fréchet Inception distance of images to a reference (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        images: `(n, H, W, 3)` uint8, of the reference's size.
        reference: `Reference`.
        inception: `InceptionFeatures`, with the weights and resize convention of the reference.
        allow_few: bool. Go on with fewer than 2,049 images: such distances are far too large and
            cannot be compared with anything.
        verbose: 0 or 1. Progress bar.

    Returns:
        float >= 0.

    Raises:
        ValueError: for too few images, or another size, resize or network than the reference's.
    """
    check_count(len(images), allow_few)
    found = scores(
        [images], len(images), reference, inception, allow_few=True, usual=0, verbose=verbose
    )
    return found["fid"]


def scores(
    batches: Iterable[np.ndarray],
    num_images: int,
    reference: Reference,
    inception: InceptionFeatures,
    *,
    allow_few: bool = False,
    usual: int = USUAL,
    verbose: int = 1,
) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision and recall of images.

    Args:
        batches: iterable of `(b, H, W, 3)` uint8, `num_images` in all.
        usual: int, number of images that published numbers are of; fewer warn.
        num_images, reference, inception, allow_few, verbose: see `fid`.

    Returns:
        dict of floats "fid", "sfid", "inception_score", "precision", "recall"; None where the
        reference lacks what is needed.
    """
    check_count(num_images, allow_few, usual)
    check_inception(reference, inception)
    kept: dict[str, list[np.ndarray]] = {"pool": [], "spatial": [], "logits_unbiased": []}
    bar = progress.bar(num_images, verbose, "image")
    for batch in batches:
        check_size(reference, batch.shape[1:3])
        features = inception(batch, verbose=0)
        for key, parts in kept.items():
            parts.append(features[key])
        bar.add(len(batch))
    pool, spatial, logits = (np.concatenate(parts) for parts in kept.values())
    if len(pool) != num_images:
        raise ValueError(f"Expected {num_images} images. Received: {len(pool)}.")
    precision = recall = sfid = None
    if reference.spatial is not None:
        sfid = frechet_distance(gaussian(spatial), reference.spatial)
    if reference.features is not None and min(len(reference.features), len(pool)) > NEIGHBOURS:
        precision, recall = precision_recall(reference.features, pool, NEIGHBOURS)
    return {
        "fid": frechet_distance(gaussian(pool), reference.pool),
        "sfid": sfid,
        "inception_score": inception_score(logits),
        "precision": precision,
        "recall": recall,
    }


def check_count(num_images: int, allow_few: bool, usual: int = USUAL, stacklevel: int = 3) -> None:
    """Raises for fewer images than FID is defined on, warns for fewer than usual."""
    if num_images < MIN_IMAGES and not allow_few:
        raise ValueError(
            f"{num_images} images are too few for a FID: with fewer than {MIN_IMAGES} the "
            "covariance of 2,048 features is singular and the distance far too large. Draw more, "
            "or pass allow_few=True to try the path."
        )
    if num_images < usual:
        warnings.warn(
            f"FID of {num_images} images is larger than of {usual}, which published numbers are "
            "of; do not compare them.",
            stacklevel=stacklevel,
        )


def check_inception(reference: Reference, inception: InceptionFeatures) -> None:
    """Raises where reference and generated images would meet different networks."""
    for what, there, here in [
        ("resize", reference.resize, inception.resize),
        ("Inception weights", reference.inception, inception.fingerprint),
    ]:
        if there is not None and there != here:
            raise ValueError(
                f"The reference statistics were made with {what} {there!r}, this InceptionFeatures "
                f"has {here!r}. Use the same, or compute the reference again."
            )


def check_size(reference: Reference, size: Sequence[int]) -> None:
    """Raises where images are not of the reference's size."""
    if reference.image_size is not None and tuple(reference.image_size) != tuple(size):
        there, here = (" x ".join(map(str, s)) for s in (reference.image_size, size))
        raise ValueError(
            f"The reference statistics are of {there} images, these are {here}: FID compares "
            "equal sizes. Use the reference of this resolution."
        )


def evaluate(
    model: "DiffusionModel",
    reference: Reference,
    inception: InceptionFeatures,
    num_images: int | None = None,
    *,
    labels: str = "random",
    prompts: Sequence[str] | None = None,
    clip: CLIPScore | None = None,
    seed: int = 0,
    folder: PathLike | None = None,
    path: PathLike | None = None,
    allow_few: bool = False,
    usual: int | None = None,
    verbose: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Draws images from a model, measures them, and records what the numbers depend on.

    Args:
        model: `DiffusionModel`; one of latents needs its autoencoder.
        reference: `Reference`; the papers' is of the training images.
        inception: `InceptionFeatures`.
        num_images: int; `None` is the papers' 50,000, or as many as there are prompts.
        labels: "random" draws each label with equal probability, as the paper does; "balanced"
            takes each equally often.
        prompts: list of str, one an image, for a text model; COCO's protocol is
            `data.captioned.random_prompts` of 30,000 validation pictures.
        clip: `CLIPScore`, to measure how well images show their prompts; or None.
        seed: int, of labels and noise.
        folder: keeps the images there as `.npz` files of 1,024, and resumes with them when it is
            called again.
        path: JSON file for the record.
        allow_few, verbose: see `scores`.
        usual: int, fewer images warn; `None` is 50,000, with prompts 30,000.
        **options: of `generate`: sampler, num_steps, guidance_scale, guidance_interval, guidance,
            batch_size, use_ema.

    Returns:
        dict: the scores, with `clip` also "clip_score", and what they are of.

    Raises:
        ValueError: if anything does not fit, before images are drawn.
    """
    num_images = _count(num_images, prompts)
    if folder is not None and backend.process()[1] > 1:
        raise ValueError("folder= keeps the images of one process; here are several. Leave it out.")
    check(model, reference, inception, num_images, labels, prompts, clip, allow_few, usual, options)
    record = describe(model, num_images, labels, prompts, seed, options)
    condition = _condition(model, num_images, labels, prompts, seed)
    batches = _drawn(model, num_images, condition, record, folder, options | {"seed": seed})
    agreement: list[np.ndarray] = []
    if clip is not None:
        batches = _compared(batches, prompts, clip, agreement)
    found = scores(
        batches,
        num_images,
        reference,
        inception,
        allow_few=True,  # checked above, before the images were drawn
        usual=0,
        verbose=verbose,
    )
    if clip is not None:
        found["clip_score"] = float(np.concatenate(agreement).mean())
        record["clip"] = clip.id
    record = {
        **{k: v if v is None else round(v, 4) for k, v in found.items()},
        **record,
        "reference": reference.hash,
        "reference_images": reference.count,
        "resize": inception.resize,
        "inception": inception.fingerprint,
    }
    if path is not None and backend.is_first():
        io.write_json(path, record)
    return record


def _count(num_images, prompts):
    if prompts is None:
        return USUAL if num_images is None else num_images
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts are a list of strings, one an image.")
    if num_images not in (None, len(prompts)):
        raise ValueError(f"There are {len(prompts)} prompts, but num_images={num_images}.")
    return len(prompts)


def _compared(batches, prompts, clip, agreement):
    """Hands the images on, and keeps how well each shows its prompt."""
    done = 0
    for images in batches:
        agreement.append(clip(images, prompts[done : done + len(images)]))
        done += len(images)
        yield images


def check(
    model: "DiffusionModel",
    reference: Reference,
    inception: InceptionFeatures,
    num_images: int,
    labels: str = "random",
    prompts: Sequence[str] | None = None,
    clip: CLIPScore | None = None,
    allow_few: bool = False,
    usual: int | None = None,
    options: Iterable[str] = (),
) -> None:
    """Raises what `evaluate` would, without drawing an image."""
    if usual is None:
        usual = USUAL if prompts is None else USUAL_PROMPTS
    check_count(num_images, allow_few, usual, stacklevel=4)
    check_inception(reference, inception)
    unknown = sorted({*options} - {*OPTIONS})
    if unknown:
        raise TypeError(f"evaluate takes of `generate` {list(OPTIONS)}. Received: {unknown}.")
    if labels not in ("random", "balanced"):
        raise ValueError(f'labels must be "random" or "balanced". Received: {labels!r}.')
    reads_text = model.network.context_shape is not None
    if reads_text != (prompts is not None):
        raise ValueError(
            "A text model is measured on prompts: pass prompts=, such as those of "
            "data.captioned.random_prompts."
            if reads_text
            else "prompts go with a text model; this one reads none."
        )
    if reads_text and model.encoders.text_encoder is None:
        raise ValueError(
            "Prompts need a text encoder: call `model.set_encoders(text_encoder=...)`."
        )
    if clip is not None and prompts is None:
        raise ValueError("The CLIP score compares images with prompts; this model has none.")
    if model.latent_scale is not None and model.encoders.autoencoder is None:
        raise ValueError(
            "FID is of pixels: call `model.set_encoders(autoencoder=...)` to decode the latents."
        )
    if model.latent_scale is None and model.network.image_shape[-1] != 3:
        raise ValueError(
            "FID is of colour images, 3 channels; this model makes images of "
            f"{model.network.image_shape[-1]}."
        )
    check_size(reference, _image_size(model))


def describe(
    model: "DiffusionModel",
    num_images: int,
    labels: str,
    prompts: Sequence[str] | None,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What samples depend on, as the record keeps it."""
    use_ema = options.get("use_ema", True)
    chosen = sampling.resolve(model, **{k: v for k, v in options.items() if k in ARGUMENTS})
    autoencoder, text = model.encoders.autoencoder, model.encoders.text_encoder
    record = {
        "model": model.name,
        "weights": fingerprint(model.ema_network if use_ema else model.network),
        "ema": use_ema,
        "step": int(keras.ops.convert_to_numpy(model.ema_step)),
        "global_batch": int(keras.ops.convert_to_numpy(model.global_batch)) or None,
        "num_images": num_images,
        "label_protocol": labels if model.network.num_classes is not None else None,
        "prompts": prompts and hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        "text_encoder": text and text.id,
        "context_encoder": text and text.fingerprint,
        **chosen.record(),
        "seed": seed,
        "image_size": _image_size(model),
        "autoencoder": autoencoder and autoencoder.id,
        "latent_scale": listed(model.latent_scale),
        "latent_shift": listed(model.latent_shift),
        "backend": backend.NAME,
        "keras_uvit": __version__,
    }
    # Numbers of NumPy are no JSON.
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in record.items()}


def _image_size(model):
    autoencoder = model.encoders.autoencoder
    factor = 1 if autoencoder is None else autoencoder.factor
    return [n * factor for n in model.network.image_shape[:2]]


def _condition(model, num_images, labels, prompts, seed):
    """(name, values) of the argument of `generate` that says what to draw."""
    if prompts is not None:
        return "prompts", prompts
    classes = model.network.num_classes
    if classes is None:
        return "num_images", None
    if labels == "balanced":
        return "labels", np.arange(num_images) % classes
    return "labels", np.random.default_rng([seed, 1]).integers(0, classes, num_images)


def _drawn(model, num_images, condition, record, folder, options):
    """Yields the images in chunks; with a folder, those that are there are not drawn again."""
    name, values = condition
    about = folder and Path(folder) / "samples.json"
    if folder:
        _check_same(about, record)
    for first in range(0, num_images, CHUNK):
        last = min(first + CHUNK, num_images)
        file = folder and Path(folder) / f"{first:06d}.npz"
        if folder and file.is_file():
            there = read_npz(file, "images")["arr_0"]
            if len(there) >= last - first:  # fewer, where a smaller number was asked for before
                yield there[: last - first]
                continue
        what = last - first if values is None else values[first:last]
        images = model.generate(**{name: what}, first=first, verbose=0, **options)
        if folder:
            labels = {"arr_1": values[first:last]} if name == "labels" else {}
            io.write_json(about, record)
            save_arrays(file, {"arr_0": images, **labels})
        yield images


def _check_same(path, record):
    """Raises where the samples of a folder are of something else."""
    if not path.is_file():
        if any(path.parent.glob("*.npz")):
            raise ValueError(
                f"{path.parent} holds .npz files and no {path.name}. Choose another folder."
            )
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete the folder.") from error
    # Images are the same on any version; more of them may be asked for.
    free = ("num_images", "keras_uvit")
    other = [k for k in record if k not in free and there.get(k) != record[k]]
    if other:
        changed = "; ".join(f"{k} was {there.get(k)}, is {record[k]}" for k in other)
        raise ValueError(
            f"{path.parent} holds samples of something else: {changed}. Choose another folder."
        )
