"""Bad data is refused before anything is compiled, in words."""

import functools
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny import refused, uvit

from keras_uvit import DiffusionModel, backend
from keras_uvit.data import sources
from keras_uvit.training import batches

pytestmark = pytest.mark.once

IMAGES, LABELS = np.zeros((6, 4, 4, 3), "uint8"), np.arange(6)
MODELS = {
    "labels": dict(num_classes=10),
    "grey": dict(image_shape=(4, 4, 1)),
    "plain": {},
    "latents": {},
    "context": dict(context_shape=(3, 5)),
}


@functools.cache
def model_of(kind="labels"):
    network = uvit(**{"image_shape": (4, 4, 3), **MODELS[kind]})
    model = DiffusionModel(network, latent_scale=0.18215 if kind == "latents" else None)
    model.compile()
    return model


def floats(value):
    x = np.full((6, 4, 4, 3), -1.0, "float32")
    x[2, 1, 1, 0] = value
    return x


def data(image=IMAGES, label=LABELS, **more):
    return dict(image=image, label=label, **more)


LATENT = dict(latent=floats(0), label=LABELS)
CASES = {  # kind of the model, what is passed to `fit`, error, words
    "label too large": ("labels", data(label=LABELS + 5), ValueError, "10)", "10 at index 5"),
    "label negative": ("labels", data(label=LABELS - 1), ValueError, "-1 at index 0"),
    "labels float": ("labels", data(label=LABELS * 1.0), TypeError, "must be integers"),
    "labels one-hot": ("labels", data(label=np.eye(10)[LABELS]), ValueError, "argmax"),
    "labels of two axes": ("labels", data(label=LABELS[:, None]), ValueError, "(batch,)"),
    "labels missing": ("labels", IMAGES, ValueError, "['label']", "keys ['image']"),
    "labels beside a dict": ("labels", (data(), LABELS), ValueError, 'labels under "label"'),
    "labels for none": ("plain", data(), ValueError, "network has no labels"),
    "key misspelt": ("labels", dict(images=IMAGES, label=LABELS), ValueError, "'images', 'label'"),
    "two kinds": ("labels", {**LATENT, "image": IMAGES}, ValueError, "one of"),
    "lengths differ": ("labels", data(label=LABELS[:5]), ValueError, "'image': 6, 'label': 5"),
    "wrong size": ("labels", data(IMAGES[:, :2]), ValueError, "batch, 4, 4, 3", "2, 4, 3"),
    "channels first": ("labels", data(np.moveaxis(IMAGES, 3, 1)), ValueError, "Channels come last"),
    "wrong channels": ("labels", data(IMAGES[..., :1]), ValueError, "4, 4, 3)"),
    "no channels": ("grey", IMAGES[..., 0], ValueError, "x[..., None]"),
    "int64 pixels": ("labels", data(IMAGES.astype(int)), TypeError, "uint8 or float"),
    "0 to 255 floats": ("labels", data(floats(255)), ValueError, "x / 127.5 - 1"),
    "NaN": ("labels", data(floats(np.nan)), ValueError, "infinity in 1 of 6", "index 2"),
    "latents for pixels": ("labels", LATENT, ValueError, "works on pixels"),
    "pixels for latents": ("latents", IMAGES, ValueError, "'latent' or 'moments'", "'image'"),
    "moments": ("latents", dict(moments=floats(0)), ValueError, "'moments'", "(batch, 4, 4, 6)"),
    "context": (
        "context", dict(image=IMAGES, context=np.zeros((6, 3, 4))), ValueError, "(batch, 3, 5)",
    ),
    "empty": ("labels", data(IMAGES[:0], LABELS[:0]), ValueError, "positive length"),
    "an empty generator": ("labels", (batch for batch in []), ValueError, "gave no batch"),
    "another byte order": ("labels", [data(label=LABELS.astype(">i4"))], ValueError, "byte order"),
}  # fmt: skip


@pytest.fixture
def never_compiles(monkeypatch):
    def fail(*_):
        raise AssertionError("the data reached train_step")

    monkeypatch.setattr(DiffusionModel, "train_step", fail)


@pytest.mark.usefixtures("never_compiles")
@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_refused(case):
    kind, given, error, *words = CASES[case]
    x, y = given if isinstance(given, tuple) else (given, None)
    refused(error, lambda: model_of(kind).fit(x, y, verbose=0), *words)
    if isinstance(x, dict) and y is None:  # the first batch of a generator is checked too
        generator = (batch for batch in [x])
        fit = functools.partial(model_of(kind).fit, generator, steps_per_epoch=1, verbose=0)
        refused(error, fit, *words)


def test_bad_validation_data():
    bad, model = data(label=LABELS + 5), model_of()
    refused(ValueError, lambda: model.fit(data(), validation_data=bad, verbose=0), "at index 5")
    refused(ValueError, lambda: model.evaluate(bad, verbose=0), "at index 5")


ROWS = [data(image, np.int32(label)) for image, label in zip(IMAGES, LABELS)]


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return ROWS[index]


def torch_rows(rows=tuple((row,) for row in ROWS), **options):
    return pytest.importorskip("torch.utils.data").DataLoader(rows, **options)


def grain_rows():
    return pytest.importorskip("grain").MapDataset.source(ROWS)


def tensorflow_rows():
    return pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices(data())


SINGLE = {
    "generator": lambda: (row for row in ROWS),
    "Grain": grain_rows,
    "Grain, iterated": lambda: grain_rows().to_iter_dataset(),
    "PyDataset": Rows,
    "PyTorch": lambda: torch_rows().dataset,
    "PyTorch's loader": lambda: torch_rows(batch_size=None),
    "tf.data": tensorflow_rows,
    "array": lambda: IMAGES[0],
    "dict": lambda: ROWS[0],
}


@pytest.mark.usefixtures("never_compiles")
@pytest.mark.parametrize("kind", SINGLE)
def test_single_samples_are_asked_to_be_batched(kind):
    source, words = SINGLE[kind](), ("single sample: 'image' of shape (4, 4, 3)", "batch(32")
    refused(ValueError, lambda: model_of().fit(source, verbose=0), *words)


def test_a_loader_of_dicts_is_explained(monkeypatch):
    monkeypatch.setattr(backend, "TAKES_LOADERS_OF_DICTS", False)
    loader = torch_rows(ROWS, batch_size=3)
    refused(ValueError, lambda: model_of().fit(loader, verbose=0), "return `(item,)`")


@pytest.mark.parametrize(
    "given", ["my_photos", Path("my_photos"), sources.arrays({"image": IMAGES}, "six"), 3]
)
def test_what_yields_no_batches_is_refused(given):
    for method in (model_of().fit, model_of().evaluate, model_of().train_on_batch):
        refused(TypeError, functools.partial(method, given), "image_folder", "images.in_memory")


def test_floats_from_0_to_1_are_suspicious():
    images = np.random.default_rng(0).random((60, 4, 4, 3)).astype("float32")
    with pytest.warns(UserWarning, match="pass 2 x - 1"):
        batches.check_batch(model_of(), data(images, np.zeros(60, int)))


def test_numbers_of_another_byte_order():
    """JAX and PyTorch cannot read them: arrays are converted, and what yields batches is told."""
    foreign = data(floats(0).astype(">f4"), LABELS.astype(">i4"))
    ((generated,),) = batches.check_source(model_of(), (batch for batch in [foreign]))
    for plain in (batches.check_source(model_of(), foreign), generated):
        for key, value in foreign.items():
            assert plain[key].dtype.isnative
            np.testing.assert_array_equal(plain[key], value)
    inputs = {**foreign, "timestep": np.ones(6, ">f4")}
    plain = batches.check_inputs(model_of().network, inputs)
    assert all(plain[key].dtype.isnative for key in inputs)
