"""What the fields of the page become, without a browser."""

import numpy as np
import pytest
from PIL import Image
from tiny import refused, uvit

from keras_uvit import DiffusionModel, presets
from keras_uvit.app.drawing import abilities, arguments, draw
from keras_uvit.diffusion import FlowMap
from keras_uvit.diffusion.samplers import SAMPLERS
from keras_uvit.diffusion.schedules import LinearPath
from keras_uvit.encoders import AutoencoderKL

pytestmark = pytest.mark.once


NO_CLASSES = {"num_classes": None}
READS_TEXT = {"num_classes": None, "context_shape": (3, 8)}


def model(network=None, **options):
    made = uvit(**{"num_classes": 3, **(network or {})})
    return DiffusionModel(made, **options)


def test_abilities_are_those_of_the_model():
    can = abilities(model())
    assert (can.num_classes, can.guidance, can.picture_size, can.channels) == (3, True, (4, 4), 1)
    assert not can.prompts
    assert not can.negative_prompts
    assert can.learned_scales is None
    assert set(can.samplers) == {*SAMPLERS} - {"flow_map"}

    can = abilities(model(NO_CLASSES))
    assert (can.num_classes, can.guidance) == (0, False)
    can = abilities(model(READS_TEXT))
    assert (can.prompts, can.negative_prompts, can.guidance) == (True, True, True)


def test_a_flow_map_has_learned_its_guidance():
    spans = {"takes_span": True, "takes_guidance": True, **READS_TEXT}
    options = dict(schedule=LinearPath(), prediction="velocity")
    flow_map = FlowMap(steps=10, guidance=(1.0, 3.0))
    can = abilities(model(spans, flow_map=flow_map, **options))
    assert can.learned_scales == (1.0, 3.0)
    assert (can.prompts, can.negative_prompts, can.guidance) == (True, False, True)
    assert "flow_map" in can.samplers


def test_a_picture_for_latents_is_as_large_as_what_the_autoencoder_makes():
    latents = {"image_shape": (4, 4, 4)}
    made = model(latents, latent_scale=0.18215)
    assert abilities(made).picture_size is None
    made.set_encoders(autoencoder=AutoencoderKL(base_dim=32, multipliers=(1, 1), num_res_blocks=1))
    can = abilities(made)
    assert (can.picture_size, can.channels) == ((8, 8), 3)


def test_fields_become_arguments(tmp_path):
    can = abilities(model())
    wishes = dict(number=5, classes=[2, 0], seed=3, num_steps=None, sampler="ddim", strength=0.4)
    expected = dict(labels=[2, 0, 2, 0, 2], seed=3, sampler="ddim")
    assert arguments(can, {**wishes, "resamples": 2, "prompts": ""}) == expected

    wide = np.zeros((8, 40), "uint8")
    wide[:, 20:] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    files = {"image": str(tmp_path / "wide.png"), "mask": str(tmp_path / "wide.png")}
    made = arguments(can, {**wishes, **files})
    assert made["strength"] == 0.4
    half = np.repeat([[False, False, True, True]], 4, axis=0)  # its centre, a quarter of the size
    np.testing.assert_array_equal(made["mask"], half)
    np.testing.assert_array_equal(made["image"][..., 0] > 127, half)


def test_lines_of_prompts_are_drawn_in_turn():
    can = abilities(model(READS_TEXT))
    made = arguments(can, dict(number=3, prompts="a cat\n\n a dog \n", negative_prompts="a cow"))
    assert made == dict(prompts=["a cat", "a dog", "a cat"], negative_prompts="a cow")
    assert arguments(abilities(model(NO_CLASSES)), dict(number=2)) == {"num_images": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(number=65), ("number", "at most 64", "65")),
        (dict(number=None), ("number of images", "None")),
        (dict(number=1.5), ("number of images", "1.5")),
        (dict(num_steps=10**9), ("num_steps", "at most 1000")),
        (dict(classes=[]), ("Choose a class",)),
    ],
)
def test_what_the_page_refuses(change, words):
    wishes = {**dict(number=2, classes=[1]), **change}
    refused(ValueError, lambda: arguments(abilities(model()), wishes), *words)


def test_the_share_that_is_done_rises_to_one_over_several_batches(monkeypatch):
    made, seen = presets.load("uvit_tiny_digits", weights="pretrained"), []
    monkeypatch.setattr("keras_uvit.backend.images_at_once", lambda widest: 2)
    wishes = dict(number=3, classes=[4], num_steps=3, sampler="heun")
    images = draw(made, abilities(made), wishes, seen.append)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    expected = made.generate(labels=[4] * 3, num_steps=3, sampler="heun", verbose=0)
    np.testing.assert_array_equal(images, expected)
