"""From words on the command line to objects of the library: sources, datasets, prompts, models."""

from pathlib import Path
from typing import Any

import click
import keras
import numpy as np

from keras_uvit import data, presets
from keras_uvit.data import captioned, pictures, sources
from keras_uvit.data.manifest import MANIFEST, read_manifest
from keras_uvit.evaluation.files import read_npz
from keras_uvit.evaluation.protocol import USUAL_PROMPTS
from keras_uvit.inference import naming_missing_classes
from keras_uvit.presets import loading, sharing
from keras_uvit.training import DiffusionModel, load_checkpoint
from keras_uvit.training.checkpoints import steps_in
from keras_uvit.types import Config


def open_source(
    spec: str,
    image_size: int | None,
    split: str,
    channels: str | int,
    crop: tuple[int, int, int, int] | None,
    background: str,
    data_dir: str | None,
) -> sources.Source:
    """The `Source` that SOURCE names."""
    channels = int(channels)
    if spec == "digits" or spec.endswith(".npz"):
        if image_size or crop:
            raise click.UsageError(f"{spec} is read unchanged: omit --image-size and --crop.")
        content = data.digits() if spec == "digits" else read_npz(spec, "images")
        return sources.arrays(content, Path(spec).name)
    if spec.startswith("tfds:"):
        return data.tfds_source(
            spec[5:], split, image_size, channels=channels, crop=crop, data_dir=data_dir
        )
    if spec.startswith("shapes:"):
        if image_size or crop or channels != 3:
            raise click.UsageError(
                "shapes: are colour images of 32x32 pixels: omit --image-size, --crop, --channels."
            )
        return data.shapes.source(_count(spec), split)
    if spec.startswith("coco:"):
        if crop or channels != 3:
            raise click.UsageError(
                "coco: images are cropped at their centre, in colour: omit --crop and --channels."
            )
        split = {"train": "train2014", "val": "val2014"}.get(split, split)
        return captioned.coco(spec[5:], split, image_size or 256)
    if image_size is None:
        if Path(spec).is_dir():
            raise click.UsageError("A folder of images needs --image-size.")
        image_size = 1  # of no use: there is no such folder, which is said below
    options: dict[str, Any] = dict(channels=channels, crop=crop, background=background)
    if (Path(spec) / captioned.CAPTIONS).is_file():
        return captioned.captioned_folder(spec, image_size, **options)
    return sources.folder(spec, image_size, **options)


def _count(spec):
    count = spec.partition(":")[2]
    if not count.isdigit() or not int(count):
        raise click.UsageError(
            f"Expected the number of pictures to make, such as shapes:20000. Received: {spec}."
        )
    return int(count)


def open_dataset(
    spec: str, network: Config | None, size: int | None, batch_size: int | None, seed: int
) -> data.LatentDataset | data.images.ImageDataset:
    """The dataset that `train` reads: a cache, or images in memory.

    Args:
        spec: the command's DATASET.
        network: dict, the preset's arguments of its network; None for one that suits the data.
        size: int, height and width to resize to, where there is no preset.
        batch_size, seed: ints.
    """
    labels = "auto" if network is None or network.get("num_classes") else None
    captions = "auto" if network is None or network.get("context_shape") else None
    shared: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "labels": labels}
    if (Path(spec) / MANIFEST).is_file():
        is_latent = read_manifest(spec)["field"] == "moments"
        reader = data.LatentDataset if is_latent else data.image_shards
        return reader(spec, captions=captions, **shared)
    if captions and (network is not None or (Path(spec) / captioned.CAPTIONS).is_file()):
        raise ValueError(
            "A text-to-image model is trained on a cache: make one with "
            f"`keras-uvit encode {spec} CACHE --text ...`."
        )
    if spec == "digits":
        digits = sources.arrays(data.digits(), "digits")
        return data.images.in_memory(digits, batch_size, flip=False, seed=seed)
    if network is not None:
        height, width, channels = network["image_shape"]
    elif size:
        height, width, channels = size, size, 3
    else:
        raise click.UsageError(f"{spec} needs --image-size, or a --preset.")
    if spec.startswith("tfds:"):
        return data.tfds_images(spec[5:], (height, width), channels=channels, **shared)
    return data.image_folder(spec, (height, width), channels=channels, **shared)


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file with one per line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file of prompts at {path}.")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts: expected one per line.")
    return prompts


def open_prompts(spec: str, split: str, count: int | None, seed: int) -> list[str]:
    """Prompts of a text file, or one random caption of each image of a source."""
    is_source = spec.startswith(("coco:", "tfds:", "shapes:")) or Path(spec).is_dir()
    if not is_source:
        prompts = read_prompts(spec)
        if count and count > len(prompts):
            raise ValueError(f"{spec} has {len(prompts)} prompts, fewer than {count}.")
        return prompts[:count]
    size = None if spec.startswith("shapes:") else 256
    captions = open_source(spec, size, split, 3, None, "white", None).captions
    if captions is None:
        raise ValueError(f"{spec} has no captions.")
    return captioned.random_prompts(captions, count or min(USUAL_PROMPTS, len(captions)), seed)


def holds_model(name: str) -> bool:
    """Whether this is the folder of a run's checkpoints, or one that `share` wrote."""
    return bool(steps_in(name)) or sharing.is_preset(name)


def is_preset(name: str) -> bool:
    """Whether MODEL is meant as the name of a preset, known or not; raises for another path."""
    if name.endswith(".keras") or holds_model(name):
        return False
    if name not in presets.names() and Path(name).exists():
        raise click.UsageError(
            f"{name} is no model: expected the name of a preset, a .keras file, a folder that "
            "`share` wrote, hf://user/name, or a folder of checkpoints."
        )
    return True


def check_preset(
    name: str,
    autoencoder: str | None,
    labels: list[int] | None,
    prompts: list[str],
    num_images: int | None,
) -> None:
    """Raises for what a preset cannot generate, before its network is built and loaded."""
    row = presets.get(name)
    classes: Any = row.network.get("num_classes")
    reads_text = row.network.get("context_shape")
    needed = (["--labels"] if classes else []) + (["--prompt"] if reads_text else [])
    needed = needed or ["--num-images"]
    values = {"--labels": labels, "--prompt": prompts, "--num-images": num_images}
    given = [option for option, value in values.items() if value]
    if given != needed:
        raise click.UsageError(
            f"{name} generates images from {' and '.join(needed)}. "
            f"Received: {' and '.join(given) or 'none of these options'}."
        )
    wrong = [label for label in labels or () if label >= classes]
    if wrong:
        raise click.UsageError(
            f"{name} has {classes} classes, numbered from 0 to {classes - 1}. Received: {wrong[0]}."
        )
    check_decodes(name, autoencoder)


def check_decodes(name: str, autoencoder: str | None) -> None:
    """Raises for a preset of latents without an autoencoder, before its network is built."""
    if presets.get(name).latent_scale is not None and autoencoder is None:
        raise click.UsageError(f"{name} generates latents: pass --autoencoder to decode them.")


def open_model(
    name: str, weights: str | None, autoencoder: str | None, text: str | None
) -> DiffusionModel:
    """A `DiffusionModel` by what MODEL names: see `is_preset`."""
    if is_preset(name):
        return presets.load(name, weights, autoencoder=autoencoder, text_encoder=text)
    if weights is not None:
        raise click.UsageError("--weights goes with a preset: a saved model has its own weights.")
    if sharing.is_preset(name):
        return loading.from_folder(name, autoencoder, text)
    is_file = name.endswith(".keras")
    with naming_missing_classes(name):
        model = keras.saving.load_model(name, compile=False) if is_file else load_checkpoint(name)
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"Expected a DiffusionModel in {name}. Received: {type(model).__name__}.")
    loading.set_encoders(model, autoencoder, text)
    return model


def open_models(name: str | None, parts: dict[str, Any]) -> dict[str, DiffusionModel]:
    """Models by name: one, a preset with the weights that it ships; or all that ship weights."""
    shipped = [key for key, row in presets.PRESETS.items() if row.weights]
    if name is not None:
        if is_preset(name):
            check_decodes(name, parts["autoencoder"])
        if name in shipped and parts["weights"] is None:
            parts = {**parts, "weights": "pretrained"}
        return {name: open_model(name, **parts)}
    for option, value in parts.items():
        if value is not None:
            raise click.UsageError(f"--{option} goes with a MODEL.")
    models = {}
    for key in shipped:
        try:
            models[key] = open_model(key, **{**parts, "weights": "pretrained"})
        except ImportError as error:  # such as without a tokenizer
            click.echo(f"{key} is left out: {error}", err=True)
    return models


def read_edit(model: DiffusionModel, edit: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from the options that change a picture; what is not given is not in.

    A mask is drawn where it is white.
    """
    edit = {key: value for key, value in edit.items() if value not in (None, ())}
    channels = 3 if model.latent_scale is not None else model.network.image_shape[-1]
    if "image" in edit:
        read = [pictures.read_file(file, channels=channels) for file in edit["image"]]
        sizes = {name: image.shape[:2] for name, image in zip(edit["image"], read)}
        if len({*sizes.values()}) > 1:
            raise click.UsageError(f"Pictures of one size are needed. Received: {sizes}.")
        edit["image"] = read[0] if len(read) == 1 else np.stack(read)
    if "mask" in edit:
        edit["mask"] = pictures.read_file(edit["mask"], channels=1)[..., 0] > 127
    return edit


def before_and_after(images: np.ndarray, edit: dict[str, Any]) -> tuple[np.ndarray, int | None]:
    """Images for a grid and its number of columns: with a picture also that and its mask."""
    if "image" not in edit:
        return images, None
    shown = [np.broadcast_to(edit["image"], images.shape)]
    if "mask" in edit:
        mask = edit["mask"][..., None].astype("uint8") * 255
        shown.append(np.broadcast_to(mask, images.shape))
    return np.stack([*shown, images], axis=1).reshape(-1, *images.shape[1:]), len(shown) + 1
