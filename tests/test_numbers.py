"""Whole numbers and seeds: Python's and NumPy's are taken everywhere, by one rule."""

import json

import keras
import numpy as np
import pytest
from tiny import IMAGES, LABELS, TINY, diffusion_model, refused, uvit

from keras_uvit import DiffusionModel, UNet, UViT, data
from keras_uvit.checks import as_int
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.evaluation.classifier import Classifier
from keras_uvit.inference import Frozen
from keras_uvit.training.callbacks import Checkpoint

pytestmark = pytest.mark.once


def model(**options):
    return DiffusionModel(uvit(num_classes=3), **options)


def draws(**options):
    return model().generate(**{"labels": [0], "num_steps": 2, "verbose": 0, **options})


def frozen(**options):
    network = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Dense(2)])
    return Frozen(network)(IMAGES[:4], **options)


SEEDS = {
    "DiffusionModel": lambda seed: model(seed=seed),
    "generate": lambda seed: draws(seed=seed),
    "ShuffledDataset": lambda seed: ShuffledDataset({"image": IMAGES}, 2, seed)[0],
    "Classifier": lambda seed: Classifier((8, 8, 1), 3, seed),
}
COUNTS = {
    "first": lambda n: draws(first=n),
    "batch_size": lambda n: draws(batch_size=n),
    "num_steps": lambda n: draws(num_steps=n),
    "num_steps of DiffusionModel": lambda n: model(num_steps=n),
    "max_skipped_steps": lambda n: model(max_skipped_steps=n),
    "planned_steps": lambda n: model(planned_steps=n),
    "every_steps": lambda n: Checkpoint("nowhere", every_steps=n),
    "keep": lambda n: Checkpoint("nowhere", keep=n),
    "image_size": lambda n: data.sources.checked_size(n),
    "image_size of two": lambda n: data.sources.checked_size((n, 4)),
    "Frozen": lambda n: frozen(batch_size=n),
}


def test_the_rule():
    for number in (2, np.int64(2), np.uint8(2), np.array(2)):
        taken = as_int(number, "n", 1)
        assert (taken, type(taken)) == (2, int)
    for number in (-1, 0, 2.5, "2", True, np.float32(2), None):
        words = "n must be an int >= 1. Received: ", repr(number)
        refused(ValueError, lambda number=number: as_int(number, "n", 1), *words)


@pytest.mark.parametrize("place", [*SEEDS, *COUNTS])
def test_every_place_follows_it(place):
    take = {**SEEDS, **COUNTS}[place]
    take(np.int64(2))
    for number in (2.5, np.float32(2), -1, *([None] if place in SEEDS else [])):
        refused(ValueError, lambda number=number: take(number), "must be an int >= ", "Received: ")


@pytest.mark.eager
@pytest.mark.parametrize(
    "seed",
    [pytest.param(2**33, marks=pytest.mark.each_backend), 2**70, np.uint64(2**63)],
    ids=repr,
)
def test_large_seeds(seed):
    made = model(seed=seed)
    made.compile()
    made.fit(IMAGES[:4], LABELS[:4], verbose=0)
    made.generate(labels=[0], num_steps=2, seed=seed, verbose=0)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (UViT, dict(TINY, num_classes=3, context_shape=(2, 3))),
        (UNet, dict(image_shape=(4, 4, 1), base_dim=64, multipliers=(1, 1), attention_levels=(1,))),
    ],
)
def test_networks_of_numbers_from_numpy(kind, arguments):
    def numpy(value):
        return tuple(map(np.int64, value)) if isinstance(value, tuple) else np.int64(value)

    network = kind(**{key: numpy(value) for key, value in arguments.items()})
    assert json.dumps(network.get_config()) == json.dumps(kind(**arguments).get_config())


@pytest.mark.eager
@pytest.mark.parametrize(
    "dtype", ["uint8", pytest.param("uint64", marks=pytest.mark.each_backend), "int8"]
)
def test_labels_of_every_integer_type(dtype):
    made, labels = diffusion_model(), LABELS[:4].astype(dtype)
    batch = {"image": IMAGES[:4], "label": labels}
    made.fit(IMAGES[:4], labels, verbose=0)
    made.fit((batch for _ in range(2)), steps_per_epoch=1, verbose=0)
    made.evaluate(batch, verbose=0)
    made.train_on_batch(batch)
    made.generate(labels=labels, num_steps=2, verbose=0)
