"""What the tests of data share: pictures, sources, small caches, and what happens to files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from words import Words

from keras_uvit import data
from keras_uvit.data import LatentDataset, sources
from keras_uvit.encoders import SpaceToDepth

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), "uint8")
LABELS = np.array([3, 0, 1, 2, 2, 1, 0, 3, 3, 1])
LABELLED = {"image": IMAGES, "label": LABELS}
COUNTS = [1, 5, 2, 7, 3, 1, 4, 6, 2, 5]
CAPTIONS = [[f"caption {k} {j}" for j in range(count)] for k, count in enumerate(COUNTS)]
CAPTIONED = {**LABELLED, "captions": CAPTIONS}
MOMENTS = SpaceToDepth().encode(IMAGES).astype("float16")
AUTOENCODER = SpaceToDepth()


class Counting(SpaceToDepth):
    """Counts the images that it was asked to encode."""

    count = 0

    def encode(self, images, batch_size=None, verbose=0):
        self.count += len(images)
        return super().encode(images)


def write_cache(path, source=LABELLED, autoencoder=AUTOENCODER, **options):
    """A cache of latents; of ten images three shards, the last of two."""
    options = {"shard_size": 4, "batch_size": 3, "verbose": 0, **options}
    return data.write_latents(source, path, autoencoder, **options)


def write_captioned(path, source=CAPTIONED, **options):
    return write_cache(path, source, **{"text_encoder": Words(), **options})


def moments_source(values, **options):
    """A source of moments `(1, 1, 2)` of these values; an Exception is raised instead."""

    def read(i):
        if isinstance(values[i], Exception):
            raise values[i]
        return {"moments": np.full((1, 1, 2), values[i], "float32"), "label": i}

    return sources.Source("some", len(values), (1, 1, 2), read, field="moments", **options)


def write_moments(path, values, **options):
    return write_cache(path, moments_source(values), None, **options)


def read_cache(path, batch_size=4, reader=LatentDataset, **options):
    return reader(path, batch_size, **{"verbose": 0, **options})


def content(folder):
    """What is in the files of a folder, by their names."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def times(folder, pattern="*"):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob(pattern)}


def stored(folder, field="moments"):
    return np.concatenate([np.load(path) for path in sorted(Path(folder).glob(f"*-{field}.npy"))])


def assert_resumes(folder, whole, images):
    """The same run again encodes so many images, and makes the whole cache of them."""
    autoencoder = Counting()
    assert write_captioned(folder, autoencoder=autoencoder)["count"] == 10
    assert autoencoder.count == images
    assert content(folder) == whole


def replace(file, made):
    """Puts other content into a file: none, bytes, or a function of its bytes or its JSON."""
    if made is None:
        file.unlink()
    elif isinstance(made, bytes):
        file.write_bytes(made)
    elif file.suffix == ".json":
        about = json.loads(file.read_text())
        made(about)
        file.write_text(json.dumps(about))
    else:
        file.write_bytes(made(file.read_bytes()))


def one_bit(content, bit=None):
    bit = 4 * len(content) if bit is None else bit
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def noise(height, width, seed=0, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype="uint8")


def grey(level, height=8, width=8):
    return np.full((height, width, 3), level, "uint8")


def save(path, array, **options):
    """A picture in a file, in folders that are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.squeeze()).save(path, **options)
    return path
