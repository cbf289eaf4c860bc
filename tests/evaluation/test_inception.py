"""The Inception network: the answers of the two packages that published FIDs come from."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

from keras_uvit.convert import inception, load_torch_weights, save_torch_weights
from keras_uvit.convert.files import read_tensors
from keras_uvit.evaluation import InceptionFeatures, count_parameters

pytestmark = [pytest.mark.eager, pytest.mark.once]

GOLDEN = Path(__file__).parents[1] / "golden"
MADE = runpy.run_path(str(GOLDEN / "make_inception.py"))
PACKAGES = {"half_pixel": "pytorch_fid", "tf1": "torch_fidelity"}
PHOTO = MADE["random_images"](32, 32)


@pytest.fixture(scope="module")
def network():
    """Of random weights, which no test changes."""
    return InceptionFeatures()


@pytest.fixture(scope="module")
def tensors(network):
    """Random weights by their published names, from the seed that made the golden answers."""
    shapes = {
        name: layout.to_torch(np.zeros(variable.shape, "float32")).shape
        for name, variable, layout in inception.entries(network)
    }
    return MADE["random_weights"](shapes)


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=PACKAGES)
def features(request, file):
    return InceptionFeatures(file, resize=request.param)


@pytest.fixture(scope="module")
def found(features):
    return features(PHOTO, verbose=0)


@pytest.mark.parametrize("size", MADE["SIZES"])
def test_answers_are_those_of_the_package_with_this_resize(features, size):
    answers = np.load(GOLDEN / "inception.npz")
    prefix = f"{PACKAGES[features.resize]}_{size[0]}x{size[1]}_"
    found = features(MADE["random_images"](*size), verbose=0)
    keys = [key.removeprefix(prefix) for key in answers if key.startswith(prefix)]
    assert {"pool", "spatial"} <= {*keys} <= {*found}
    for key in keys:
        theirs = answers[prefix + key]
        # 2e-5 of the largest value: float32 sums of up to 18,000 terms through 94 layers.
        np.testing.assert_allclose(found[key], theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.each_backend
def test_each_backend_gives_these_answers(file):
    theirs = np.load(GOLDEN / "inception.npz")["pytorch_fid_32x32_pool"]
    found = InceptionFeatures(file)(PHOTO, verbose=0)["pool"]
    np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())  # as above


def test_the_two_resizes_differ_by_more_than_their_errors():
    answers = np.load(GOLDEN / "inception.npz")
    a, b = (answers[f"{package}_32x32_pool"] for package in PACKAGES.values())
    assert np.abs(a - b).max() > 1e-2


def test_shapes_and_types(found):
    widths = {"pool": 2048, "spatial": 17 * 17 * 7, "logits": 1008, "logits_unbiased": 1008}
    assert {key: a.shape for key, a in found.items()} == {k: (2, n) for k, n in widths.items()}
    assert all(a.dtype == np.float32 for a in found.values())


def test_logits_are_a_linear_layer_of_pool_with_its_bias_and_without(found, tensors):
    unbiased = found["pool"].astype("float64") @ tensors["fc.weight"].T.astype("float64")
    # Rounding of float32 sums of 2,048 terms.
    np.testing.assert_allclose(found["logits_unbiased"], unbiased, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["logits"], unbiased + tensors["fc.bias"], rtol=0, atol=1e-5)


@pytest.mark.compiled
def test_the_batch_size_does_not_matter(features):
    images = np.concatenate([PHOTO, 255 - PHOTO[:1]])
    whole = features(images, batch_size=3, verbose=0)
    parts = features(images, batch_size=2, verbose=0)  # the last batch has one image
    for key, a in whole.items():
        # Rounding: another batch is summed in another order.
        np.testing.assert_allclose(parts[key], a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_470_arrays_of_21_820_000_numbers_and_a_classifier(network):
    names = [name for name, _, _ in inception.entries(network)]
    assert len(names) == len({*names}) == len(network.weights) == 470 + 2
    assert count_parameters(network) == 21_820_000 + 2048 * 1008 + 1008


# Files --------------------------------------------------------------------------------------------


def test_counters_of_batches_are_left_out(tensors, tmp_path):
    import torch

    content = {key: torch.from_numpy(a) for key, a in tensors.items()}
    content["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(content, tmp_path / "weights.pth")
    network = InceptionFeatures(tmp_path / "weights.pth")
    kernel = network.network.get_layer("Conv2d_1a_3x3").conv.kernel
    expected = tensors["Conv2d_1a_3x3.conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("Mixed_6d.branch1x1.bn.bias"), r"missing: \['Mixed_6d.branch1x1.bn.bias'"),
        (lambda t: t.update(AuxLogits=np.zeros(1)), r"extra: \['AuxLogits'\]"),
        (lambda t: t.update({"fc.bias": np.zeros(1000)}), r"fc.bias is \(1000,\).*\(1008,\)"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(network, tensors, tmp_path, change, message):
    content = dict(tensors)
    change(content)
    save_file(content, tmp_path / "w.safetensors")
    before = network.fingerprint
    with pytest.raises(ValueError, match=message):
        load_torch_weights(network, tmp_path / "w.safetensors")
    assert network.fingerprint == before


def test_a_file_of_another_network_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        InceptionFeatures(GOLDEN / "uvit_uncond.pth")


def test_weights_come_back_exactly(file, tensors, tmp_path):
    network = InceptionFeatures(file)
    save_torch_weights(network, tmp_path / "again.safetensors")
    again = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for key, a in tensors.items():
        np.testing.assert_array_equal(again[key], a)
    network.save_weights(tmp_path / "keras.weights.h5")
    assert InceptionFeatures(tmp_path / "keras.weights.h5").fingerprint == network.fingerprint


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (PHOTO.astype("float32"), TypeError, "uint8.*float32"),
        (PHOTO[..., :1], ValueError, r"\(2, 32, 32, 1\).*repeat\(3"),
        (PHOTO[0], ValueError, r"\(32, 32, 3\)"),
        (PHOTO[:0], ValueError, "n at least 1"),
    ],
)
def test_images_that_do_not_fit_are_refused(network, images, error, message):
    with pytest.raises(error, match=message):
        network(images)


def test_a_batch_of_no_images_is_refused(network):
    with pytest.raises(ValueError, match="batch_size must be an int >= 1.*0"):
        network(PHOTO, batch_size=0)


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match="half_pixel.*bicubic"):
        InceptionFeatures(resize="bicubic")
