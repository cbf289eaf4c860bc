"""What people type in a shell, and the objects that are meant: data, models, options."""

from pathlib import Path

import click
import keras

from keras_uvit import data, presets
from keras_uvit.data import sources
from keras_uvit.data.manifest import MANIFEST, read_manifest
from keras_uvit.evaluation.files import read_npz
from keras_uvit.latent import AutoencoderKL
from keras_uvit.training import DiffusionModel


def open_source(spec, image_size, split, channels, crop, data_dir):
    """A `Source` from what was typed."""
    channels = int(channels)
    if spec == "digits" or spec.endswith(".npz"):
        if image_size or crop:
            raise click.UsageError(f"{spec} is taken as it is: no --image-size, no --crop.")
        content = data.digits() if spec == "digits" else read_npz(spec, "images")
        return sources.arrays(content, Path(spec).name)
    if spec.startswith("tfds:"):
        return data.tfds_source(
            spec[5:], split, image_size, channels=channels, crop=crop, data_dir=data_dir
        )
    if image_size is None and Path(spec).is_dir():
        raise click.UsageError("A folder of images needs --image-size.")
    return sources.folder(spec, image_size or 1, channels=channels, crop=crop)


def open_model(name, weights, autoencoder):
    """A `DiffusionModel` of a preset's name or a saved `.keras` file."""
    if not name.endswith(".keras"):
        return presets.load(name, weights, autoencoder=autoencoder)
    if weights is not None:
        raise click.UsageError("--weights go with a preset; a .keras file has its own.")
    model = keras.saving.load_model(name, compile=False)
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"{name} holds a {type(model).__name__}, not a DiffusionModel.")
    if autoencoder is not None:
        model.autoencoder = AutoencoderKL.from_file(autoencoder, scale=model.latent_scale or 1.0)
    return model


def open_dataset(spec, image_shape, labels, batch_size, seed):
    """What `train` reads: a cache, or what `open_source` takes, in memory."""
    height, width, channels = image_shape
    shared = {"batch_size": batch_size, "seed": seed, "labels": labels}
    if (Path(spec) / MANIFEST).is_file():
        is_latent = read_manifest(spec)["field"] == "moments"
        return (data.LatentDataset if is_latent else data.image_shards)(spec, **shared)
    if spec.startswith("tfds:"):
        return data.tfds_images(spec[5:], (height, width), channels=channels, **shared)
    if spec == "digits":
        digits = sources.arrays(data.digits(), "digits")
        return data.images.in_memory(digits, batch_size, flip=False, seed=seed)
    return data.image_folder(spec, (height, width), channels=channels, **shared)


def numbers(context, option, text):
    """A list of the ints in "1,2,3"."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise click.BadParameter(f"expected class numbers such as 207,360. Received: {text}.")
    return [int(part) for part in parts]


def sampling(sampler, num_steps, guidance_scale, seed, batch_size, raw):
    """The arguments of `generate` that were given."""
    given = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}
    given = {key: value for key, value in given.items() if value is not None}
    return {**given, "seed": seed, "batch_size": batch_size, "use_ema": not raw}
