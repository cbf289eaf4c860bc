"""Bad data is refused before anything is compiled, in words."""

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_uvit import DiffusionModel, UViT
from keras_uvit.data import sources
from keras_uvit.training import batches

pytestmark = pytest.mark.once

TINY = dict(image_shape=(4, 4, 3), patch_size=2, hidden_dim=8, num_layers=1, num_heads=2)
IMAGES = np.zeros((6, 4, 4, 3), "uint8")
LABELS = np.arange(6)


def floats(value):
    x = np.full((6, 4, 4, 3), -1.0, "float32")
    x[2, 1, 1, 0] = value
    return x


CASES = {
    "label too large": (dict(image=IMAGES, label=LABELS + 5), ValueError, r"10\).*10 at index 5"),
    "label negative": (dict(image=IMAGES, label=LABELS - 1), ValueError, "Received -1 at index 0"),
    "labels float": (dict(image=IMAGES, label=LABELS * 1.0), TypeError, "Labels must be integers"),
    "labels one-hot": (dict(image=IMAGES, label=np.eye(10)[LABELS]), ValueError, "argmax"),
    "labels missing": (dict(image=IMAGES), ValueError, r"\['label'\].*keys \['image'\]"),
    "key misspelt": (dict(images=IMAGES, label=LABELS), ValueError, "'images', 'label'"),
    "two kinds": (dict(image=IMAGES, latent=floats(0), label=LABELS), ValueError, "one of"),
    "lengths differ": (dict(image=IMAGES, label=LABELS[:5]), ValueError, "'image': 6, 'label': 5"),
    "wrong size": (dict(image=IMAGES[:, :2], label=LABELS), ValueError, r"batch, 4, 4, 3.*2, 4, 3"),
    "channels first": (
        dict(image=IMAGES.transpose(0, 3, 1, 2), label=LABELS), ValueError, "Channels come last",
    ),
    "wrong channels": (dict(image=IMAGES[..., :1], label=LABELS), ValueError, r"4, 4, 3\)"),
    "int64 pixels": (dict(image=IMAGES.astype(int), label=LABELS), TypeError, "uint8 or float"),
    "0 to 255 floats": (dict(image=floats(255), label=LABELS), ValueError, r"x / 127.5 - 1"),
    "NaN": (dict(image=floats(np.nan), label=LABELS), ValueError, "infinity in 1 of 6.*index 2"),
    "latents for pixels": (dict(latent=floats(0), label=LABELS), ValueError, "works on pixels"),
    "empty": (dict(image=IMAGES[:0], label=LABELS[:0]), ValueError, "positive length"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = DiffusionModel(UViT(**TINY, num_classes=10))
    model.compile()
    return model


@pytest.fixture(autouse=True)
def _never_compiles(model, monkeypatch):
    def fail(*_):
        raise AssertionError("the data reached train_step")

    monkeypatch.setattr(type(model), "train_step", fail)


@pytest.mark.parametrize("case", CASES)
def test_bad_arrays(model, case):
    data, error, message = CASES[case]
    with pytest.raises(error, match=message):
        model.fit(data, verbose=0)


@pytest.mark.parametrize("case", ["label too large", "NaN", "key misspelt"])
def test_the_first_batch_of_a_generator_is_checked_too(model, case):
    data, error, message = CASES[case]
    with pytest.raises(error, match=message):
        model.fit((batch for batch in [data]), steps_per_epoch=1, verbose=0)


def test_bad_validation_data(model, monkeypatch):
    monkeypatch.undo()
    data, error, message = CASES["label too large"]
    with pytest.raises(error, match=message):
        model.fit(IMAGES, LABELS, validation_data=data, verbose=0)
    with pytest.raises(error, match=message):
        model.evaluate(data, verbose=0)


def rows():
    return [dict(image=image, label=np.int32(label)) for image, label in zip(IMAGES, LABELS)]


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return rows()[index]


def torch_rows():
    utils = pytest.importorskip("torch.utils.data")

    class TorchRows(utils.Dataset):
        __len__, __getitem__ = Rows.__len__, lambda self, index: (rows()[index],)

    return utils, TorchRows()


def torch_loader():
    utils, dataset = torch_rows()
    return utils.DataLoader(dataset, batch_size=None)


def grain_rows():
    return pytest.importorskip("grain").MapDataset.source(rows())


def tensorflow_rows():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(dict(image=IMAGES, label=LABELS))


SINGLE = {
    "generator": lambda: (row for row in rows()),
    "Grain": grain_rows,
    "Grain, iterated": lambda: grain_rows().to_iter_dataset(),
    "PyDataset": Rows,
    "PyTorch": lambda: torch_rows()[1],
    "PyTorch's loader": torch_loader,
    "tf.data": tensorflow_rows,
    "array": lambda: IMAGES[0],
    "dict": lambda: rows()[0],
}


@pytest.mark.parametrize("kind", SINGLE)
def test_single_samples_are_asked_to_be_batched(model, kind):
    with pytest.raises(ValueError, match=r"single sample: 'image' of shape \(4, 4, 3\).*batch\(32"):
        model.fit(SINGLE[kind](), verbose=0)


def test_grey_images_without_channels_are_told_what_is_missing():
    model = DiffusionModel(UViT(**{**TINY, "image_shape": (4, 4, 1)}))
    model.compile()
    with pytest.raises(ValueError, match=r"x\[\.\.\., None\]"):
        model.fit(IMAGES[..., 0], verbose=0)


def test_an_empty_generator(model):
    with pytest.raises(ValueError, match="gave no batch"):
        model.fit((batch for batch in []), steps_per_epoch=1, verbose=0)


def test_a_loader_of_dicts_is_explained(model, monkeypatch):
    from torch.utils.data import DataLoader

    from keras_uvit import backend

    monkeypatch.setattr(backend, "TAKES_LOADERS_OF_DICTS", False)
    rows = [{"image": IMAGES[i], "label": LABELS[i]} for i in range(6)]
    with pytest.raises(ValueError, match=r"let the data set return `\(item,\)`"):
        model.fit(DataLoader(rows, batch_size=3), verbose=0)


@pytest.mark.parametrize(
    "data", ["my_photos", Path("my_photos"), sources.arrays({"image": IMAGES}, "six"), 3]
)
def test_what_yields_no_batches_is_refused(model, data):
    for method in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(TypeError, match=r"data.image_folder.*data.images.in_memory"):
            method(data)


def test_sample_weights_are_refused(model, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="sample_weight is not supported"):
        model.fit(IMAGES, LABELS, sample_weight=np.ones(6), verbose=0)


def test_y_beside_a_dict_is_refused(model):
    with pytest.raises(ValueError, match='labels under "label"'):
        model.fit({"image": IMAGES}, LABELS, verbose=0)


def test_labels_for_a_network_without_labels():
    model = DiffusionModel(UViT(**TINY))
    model.compile()
    with pytest.raises(ValueError, match="network has no labels"):
        model.fit(IMAGES, LABELS, verbose=0)


def test_images_for_a_model_of_latents_and_wrong_moments():
    model = DiffusionModel(UViT(**TINY), latent_scale=0.18215)
    model.compile()
    with pytest.raises(ValueError, match="works on latents.*'latent' or 'moments'.*'image'"):
        model.fit(IMAGES, verbose=0)
    with pytest.raises(ValueError, match=r"'moments' must have shape \(batch, 4, 4, 6\)"):
        model.fit({"moments": floats(0)}, verbose=0)


def test_wrong_context_shape():
    model = DiffusionModel(UViT(**TINY, context_shape=(3, 5)))
    model.compile()
    with pytest.raises(ValueError, match=r"'context' must have shape \(batch, 3, 5\)"):
        model.fit({"image": IMAGES, "context": np.zeros((6, 3, 4))}, verbose=0)


def test_floats_from_0_to_1_are_suspicious(model):
    from keras_uvit.training.batches import check_batch

    images = np.random.default_rng(0).random((60, 4, 4, 3)).astype("float32")
    with pytest.warns(UserWarning, match=r"pass 2 x - 1"):
        check_batch(model, {"image": images, "label": np.zeros(60, int)})


def test_numbers_of_another_byte_order(model):
    """JAX and PyTorch cannot read them: arrays are converted, and what yields batches is told."""
    foreign = dict(image=floats(0).astype(">f4"), label=LABELS.astype(">i4"))
    ((generated,),) = batches.check_source(model, (batch for batch in [foreign]))
    for plain in (batches.check_source(model, foreign), generated):
        for key, value in foreign.items():
            assert plain[key].dtype.isnative
            np.testing.assert_array_equal(plain[key], value)
    with pytest.raises(ValueError, match="byte order"):
        batches.check_source(model, [foreign])
    inputs = {"image": foreign["image"], "timestep": np.ones(6, ">f4"), "label": foreign["label"]}
    plain = batches.check_inputs(model.network, inputs)
    assert all(plain[key].dtype.isnative for key in inputs)
