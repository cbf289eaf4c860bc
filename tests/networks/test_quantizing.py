"""Networks of 8-bit integers: near the float ones, read back from files, for sampling alone."""

import keras
import numpy as np
import pytest
from keras import layers
from tiny import IMAGES, diffusion_model, numpy, randomize, refused, uvit, weights
from tiny import assert_equal as equal

from keras_uvit import DiffusionModel, UNet, convert, training
from keras_uvit.networks import OwnNetwork

pytestmark = pytest.mark.eager

INPUTS = {
    "image": (IMAGES[:2] / 127.5 - 1).astype("float32"),
    "timestep": np.array([3.0, 700.0], "float32"),
}


def network(**changes):
    return randomize(uvit(num_layers=3, **changes), scale=0.1)


def output(net):
    return numpy(net(INPUTS))


def test_a_quantized_network_is_near_the_float_one_and_read_back(tmp_path):
    net = network()
    before = output(net)
    net.quantize("int8")
    after = output(net)
    kernels = [w for w in net.weights if w.path.endswith("kernel") and "conv" not in w.path]
    assert len(kernels) > 10
    assert {w.dtype for w in kernels} == {"int8"}
    # A kernel's number is off by up to 1/254 of its column's largest, an input's of its token's;
    # each of the fifteen products here averages over 16 numbers or more, so their sum stays small.
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
    assert not net.trainable_variables
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    equal(weights(loaded), weights(net))
    np.testing.assert_array_equal(output(loaded), after)


def test_a_model_draws_from_its_quantized_average(tmp_path):
    model = diffusion_model(network={"num_layers": 3})
    for net in (model.network, model.ema_network):
        randomize(net, scale=0.1)
    # Another average than the network: which of the two draws can be seen.
    model.ema_network.get_layer("head").bias.assign_add([1.0] * 4)
    own = {use: model.generate(labels=[1, 2], num_steps=3, use_ema=use, decode=False, verbose=0)
           for use in (True, False)}  # fmt: skip
    model.quantize("int8")
    for use, images in own.items():
        drawn = model.generate(labels=[1, 2], num_steps=3, use_ema=use, decode=False, verbose=0)
        # Three steps of the error above; the average and the network differ by far more.
        assert np.abs(drawn - images).max() < 0.1 < np.abs(own[True] - own[False]).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    equal(weights(loaded), weights(model))
    again = loaded.generate(labels=[1, 2], num_steps=3, use_ema=False, decode=False, verbose=0)
    np.testing.assert_array_equal(again, drawn)


@pytest.mark.once
def test_a_quantized_model_is_not_trained():
    model = diffusion_model()
    model.quantize()
    words = "before it was quantized", "saved before"
    refused(ValueError, lambda: model.compile(), *words)
    refused(ValueError, lambda: model.fit({"image": IMAGES}, verbose=0), *words)
    refused(ValueError, lambda: training.adapt(model, num_classes=2, verbose=0), *words)
    refused(ValueError, lambda: convert.save_torch_weights(model, "never.pth"), *words)
    refused(ValueError, lambda: model.export_sampler("never.onnx", "onnx"), *words)
    refused(ValueError, lambda: model.quantize("int8"), "already")


@pytest.mark.once
@pytest.mark.parametrize("mode", ["int4", "float8", "gptq", "awq", "int16", None])
def test_other_modes_are_refused_before_anything_is_changed(mode):
    model = diffusion_model(compiled=False)
    before = weights(model)
    for part in (model, model.network):
        refused(ValueError, lambda: part.quantize(mode), "'int8'", repr(mode))  # noqa: B023
    equal(weights(model), before)
    assert model.network.trainable_variables


@pytest.mark.once
def test_networks_that_cannot_be_quantized_are_refused():
    refused(ValueError, lambda: uvit(lora=2).quantize(), "merge_lora")
    refused(ValueError, lambda: uvit(dtype="mixed_float16").quantize(), "float16")
    image, time = keras.Input((4, 4, 1), name="image"), keras.Input((), name="timestep")
    inner = keras.Model({"image": image, "timestep": time}, layers.Dense(1)(image))
    own = OwnNetwork(inner, image_shape=(4, 4, 1))
    refused(NotImplementedError, lambda: own.quantize("int8"), "UViT and UNet")


@pytest.mark.once
def test_a_network_alone_inside_a_model_is_told_of_both():
    model = diffusion_model(compiled=False)
    model.network.quantize("int8")
    refused(ValueError, lambda: model.generate(labels=[0], verbose=0), "model.quantize('int8')")


@pytest.mark.once
def test_a_unet_is_quantized_where_it_is_dense(tmp_path):
    net = UNet(
        (8, 8, 1), base_dim=32, multipliers=(1,), num_blocks=1, head_dim=32, attention_levels=(0,)
    )
    model = DiffusionModel(net)
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    equal(weights(keras.saving.load_model(tmp_path / "model.keras")), weights(model))
