"""Networks of one's own: trained, saved, loaded and drawn with, or refused at the door."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_uvit import DiffusionModel, training
from keras_uvit.networks import OwnNetwork

pytestmark = pytest.mark.eager

SHAPE = (4, 6, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, *SHAPE), "uint8")


def functional(inputs):
    """A convolution of the image, shifted by what the other inputs say."""
    x = layers.Conv2D(8, 3, padding="same")(inputs["image"])
    said = [layers.Reshape((1,))(inputs["timestep"])]
    if "label" in inputs:
        said.append(layers.Embedding(5, 4)(inputs["label"]))
    if "context" in inputs:
        said.append(layers.Flatten()(inputs["context"]))
    said = layers.Concatenate()(said) if len(said) > 1 else said[0]
    x = layers.Add()([x, layers.Reshape((1, 1, 8))(layers.Dense(8)(said))])
    x = layers.BatchNormalization()(layers.Dropout(0.5)(x))  # which have state of their own
    return keras.Model(inputs, layers.Conv2D(3, 3, padding="same")(x))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.conv = layers.Conv2D(width, 3, padding="same", name="conv")
        self.out = layers.Conv2D(3, 3, padding="same", name="out")

    def call(self, inputs, training=False):
        x = self.conv(inputs["image"])
        return self.out(x * ops.cast(inputs["timestep"], x.dtype)[:, None, None, None] / 1000)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def inputs(**more):
    shapes = {"image": SHAPE, "timestep": (), **more}
    return {key: keras.Input(shape, name=key) for key, shape in shapes.items()}


# The wrapper's arguments, by what is wrapped and what it is asked with.
OWN = {
    "functional": (lambda: functional(inputs()), {}),
    "functional, classes": (lambda: functional(inputs(label=())), {"num_classes": 4}),
    "functional, text": (lambda: functional(inputs(context=(2, 3))), {"context_shape": (2, 3)}),
    "subclassed": (lambda: Subclassed(5), {}),
}
CONDITIONS = {
    "num_classes": ("label", np.arange(8) % 4),
    "context_shape": ("context", np.ones((8, 2, 3), "float32")),
}


def trained(name):
    make, options = OWN[name]
    model = DiffusionModel(OwnNetwork(make(), SHAPE, **options), ema_decay=0.5)
    model.compile()
    model.fit({"image": IMAGES, **dict(CONDITIONS[key] for key in options)}, verbose=0)
    return model


def drawn(model):
    asked = {"num_images": 2}
    if model.network.num_classes:
        asked = {"labels": [0, 3], "guidance_scale": 2.0}
    if model.network.context_shape:
        asked = {"prompts": np.ones((2, 2, 3))}
    return model.generate(**asked, num_steps=2, verbose=0)


# What a backend does to it is the same for each: one of them is tried on all.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "functional, classes" else pytest.mark.once) for n in OWN],
)
def test_own_networks_come_back(tmp_path, name):
    model = trained(name)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    configs = [json.loads(json.dumps(each.get_config())) for each in (again, model)]
    assert configs[0].pop("network").keys() == configs[1].pop("network").keys()
    assert configs[0] == configs[1]
    for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(drawn(again), drawn(model))
    again.fit({"image": IMAGES, **dict(CONDITIONS[k] for k in OWN[name][1])}, verbose=0)


@pytest.mark.once
def test_own_networks_come_back_from_checkpoints(tmp_path):
    model = DiffusionModel(OwnNetwork(Subclassed(5), SHAPE))
    model.compile()
    model.fit(IMAGES, batch_size=8, callbacks=[training.Checkpoint(tmp_path)], verbose=0)
    np.testing.assert_array_equal(drawn(training.load_checkpoint(tmp_path)), drawn(model))


def with_attributes(network):
    network.image_shape, network.num_classes = SHAPE, None
    network.null_label = network.context_shape = None
    return network


class NoConfig(keras.Model):
    """Its constructor's argument is not in its config."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs["image"])


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: functional(inputs()),
        lambda: with_attributes(functional(inputs())),
        lambda: with_attributes(Subclassed(5)),
        lambda: with_attributes(NoConfig(layers.Conv2D(3, 3))),
        lambda: with_attributes(layers.Conv2D(3, 3)),
    ],
)
def test_networks_that_would_not_come_back_are_told_of_the_wrapper(make):
    with pytest.raises(TypeError, match=r"networks\.OwnNetwork\(model, image_shape="):
        DiffusionModel(make())


@pytest.mark.once
def test_another_shape_is_refused():
    same = functional(x := inputs())
    model = keras.Model(x, layers.Cropping2D(1)(same.output))
    with pytest.raises(ValueError, match=r"shape \(4, 6, 3\). Received: \(2, 4, 3\)"):
        OwnNetwork(model, SHAPE)


@pytest.mark.once
def test_arguments_are_those_of_the_other_networks():
    network = OwnNetwork(functional(inputs(label=())), [4, 6, 3], num_classes=4)
    assert (network.image_shape, network.null_label, network.context_shape) == (SHAPE, 4, None)
    assert {tensor.name for tensor in network.inputs} == {"image", "timestep", "label"}
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        OwnNetwork(functional(inputs(label=())), SHAPE, num_classes=0)
