"""The Inception network: the answers of the two packages that published FIDs come from."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file
from tiny import refused

from keras_uvit.convert import inception, load_torch_weights, save_torch_weights
from keras_uvit.convert.files import read_tensors
from keras_uvit.evaluation import InceptionFeatures, count_parameters

pytestmark = [pytest.mark.eager, pytest.mark.once]

GOLDEN = Path(__file__).parents[1] / "golden"
MADE = runpy.run_path(str(GOLDEN / "make_inception.py"))
ANSWERS = np.load(GOLDEN / "inception.npz")
PACKAGES = {"half_pixel": "pytorch_fid", "tf1": "torch_fidelity"}
PHOTO = MADE["random_images"](32, 32)


def zeros(_, shape, dtype=None):
    return ops.convert_to_tensor(np.zeros(shape, dtype), dtype)


@pytest.fixture(scope="module")
def half_pixel():
    """Without random weights, for which JAX compiles a program of each shape: others follow."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("GlorotUniform", "Zeros", "Ones"):
            patch.setattr(f"keras.initializers.{kind}.__call__", zeros)
        return InceptionFeatures()


@pytest.fixture(scope="module")
def tensors(half_pixel):
    """Random weights by their published names, from the seed that made the golden answers."""
    shapes = {
        name: layout.to_torch(np.zeros(variable.shape, "float32")).shape
        for name, variable, layout in inception.entries(half_pixel)
    }
    return MADE["random_weights"](shapes)


@pytest.fixture(scope="module", autouse=True)
def _loaded(half_pixel, tensors, tmp_path_factory):
    """The network has these weights from the first test on."""
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(tensors, path)
    load_torch_weights(half_pixel, path)


@pytest.fixture(scope="module")
def tf1(tensors, tmp_path_factory):
    """Of the published kind of file, which counts batches too."""
    import torch

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    content = {key: torch.from_numpy(a) for key, a in tensors.items()}
    content["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(content, path)
    return InceptionFeatures(path, resize="tf1")


def assert_answers(features, size):
    prefix = f"{PACKAGES[features.resize]}_{size[0]}x{size[1]}_"
    found = features(MADE["random_images"](*size), verbose=0)
    keys = [key.removeprefix(prefix) for key in ANSWERS if key.startswith(prefix)]
    assert {"pool", "spatial"} <= {*keys} <= {*found}
    for key in keys:
        theirs = ANSWERS[prefix + key]
        # 2e-5 of the largest value: float32 sums of up to 18,000 terms through 94 layers.
        np.testing.assert_allclose(found[key], theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    return found


@pytest.mark.each_backend
def test_each_backend_gives_the_published_answers(half_pixel):
    assert_answers(half_pixel, (32, 32))


@pytest.mark.parametrize("size", [(48, 64), (299, 299), (512, 400)])
@pytest.mark.parametrize("resize", PACKAGES)
def test_answers_are_those_of_the_package_with_this_resize(request, resize, size):
    assert_answers(request.getfixturevalue(resize), size)


def test_logits_are_a_linear_layer_of_pool_with_its_bias_and_without(tf1, tensors):
    found = assert_answers(tf1, (32, 32))
    widths = {"pool": 2048, "spatial": 17 * 17 * 7, "logits": 1008, "logits_unbiased": 1008}
    assert {key: a.shape for key, a in found.items()} == {k: (2, n) for k, n in widths.items()}
    assert all(a.dtype == np.float32 for a in found.values())
    unbiased = found["pool"].astype("float64") @ tensors["fc.weight"].T.astype("float64")
    # Rounding of float32 sums of 2,048 terms.
    np.testing.assert_allclose(found["logits_unbiased"], unbiased, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["logits"], unbiased + tensors["fc.bias"], rtol=0, atol=1e-5)


@pytest.mark.compiled
def test_the_batch_size_does_not_matter(half_pixel):
    images = np.concatenate([PHOTO, 255 - PHOTO[:1]])
    whole = half_pixel(images, batch_size=3, verbose=0)
    parts = half_pixel(images, batch_size=2, verbose=0)  # the last batch has one image
    for key, a in whole.items():
        # Rounding: another batch is summed in another order.
        np.testing.assert_allclose(parts[key], a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_470_arrays_of_21_820_000_numbers_and_a_classifier(half_pixel):
    names = [name for name, _, _ in inception.entries(half_pixel)]
    assert len(names) == len({*names}) == len(half_pixel.weights) == 470 + 2
    assert count_parameters(half_pixel) == 21_820_000 + 2048 * 1008 + 1008


# Files and errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("Mixed_6d.branch1x1.bn.bias"), ["missing: ['Mixed_6d.branch1x1.bn.bias'"]),
        (lambda t: t.update(AuxLogits=np.zeros(1)), ["extra: ['AuxLogits'"]),
        (lambda t: t.update({"fc.bias": np.zeros(1000)}), ["fc.bias is (1000,)", "(1008,)"]),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(half_pixel, tensors, tmp_path, change, words):
    content = dict(tensors)
    change(content)
    save_file(content, tmp_path / "w.safetensors")
    before = half_pixel.fingerprint
    refused(ValueError, lambda: load_torch_weights(half_pixel, tmp_path / "w.safetensors"), *words)
    assert half_pixel.fingerprint == before


def test_weights_come_back_exactly(half_pixel, tensors, tmp_path):
    save_torch_weights(half_pixel, tmp_path / "again.safetensors")
    again = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for key, a in tensors.items():
        np.testing.assert_array_equal(again[key], a)
    half_pixel.save_weights(tmp_path / "keras.weights.h5")
    other = InceptionFeatures(tmp_path / "keras.weights.h5")
    assert other.fingerprint == half_pixel.fingerprint


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f: f(PHOTO.astype("float32")), TypeError, ["uint8", "float32"]),
        (lambda f: f(PHOTO[..., :1]), ValueError, ["(2, 32, 32, 1)", "repeat(3"]),
        (lambda f: f(PHOTO[0]), ValueError, ["(32, 32, 3)"]),
        (lambda f: f(PHOTO[:0]), ValueError, ["n at least 1"]),
        (lambda f: f(PHOTO, batch_size=0), ValueError, ["batch_size", "0"]),
        (lambda f: load_torch_weights(f, GOLDEN / "uvit_uncond.pth"), ValueError, ["not fit"]),
        (lambda _: InceptionFeatures(resize="bicubic"), ValueError, ["half_pixel", "bicubic"]),
    ],
)
def test_what_does_not_fit_is_refused(half_pixel, call, error, words):
    refused(error, lambda: call(half_pixel), *words)
