"""Text-to-image presets: whose contexts they read, and the shipped model's obedience."""

import numpy as np
import pytest
from keras import ops
from words import Words

from keras_uvit import presets
from keras_uvit.data import shapes
from keras_uvit.encoders import CLIPText, clip
from keras_uvit.presets import loading

pytestmark = pytest.mark.once

SMALL = dict(hidden_dim=16, num_layers=1, num_heads=2)
TEXT = {**SMALL, "context_shape": (2, 3), "image_shape": (4, 4, 4)}


def null(model):
    return ops.convert_to_numpy(model.null_context)


def test_a_text_encoder_is_taken_as_it_is():
    words = Words()
    model = presets.load("uvit_small_coco", text_encoder=words, **TEXT)
    assert model.encoders.text_encoder is words
    assert model.context_encoder == "words-1"
    np.testing.assert_array_equal(null(model), words.null_context)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_of_clip_is_read(tmp_path, kind):
    text = CLIPText.random(["a dog"], length=2, hidden_dim=4, vocabulary_size=520)
    text.save(tmp_path / "mine")
    small = {**TEXT, "context_shape": (2, 4)}
    model = presets.load("uvit_mid_coco", text_encoder=kind(tmp_path / "mine"), **small)
    assert (model.encoders.text_encoder.id, model.context_encoder) == ("mine", text.fingerprint)


def test_clip_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"network has context_shape=\(77, 768\)"):
        presets.load("uvit_small_coco", text_encoder=Words(), **SMALL)


def test_a_preset_without_text_refuses_clip():
    with pytest.raises(ValueError, match="reads no text"):
        presets.load("uvit_small_cifar10", text_encoder=Words(), **SMALL)


def test_a_saved_model_brings_its_empty_prompt(tmp_path):
    model = presets.load("uvit_small_coco", text_encoder=Words(), **TEXT)
    model.save(tmp_path / "m.keras")
    again = presets.load("uvit_small_coco", tmp_path / "m.keras", **TEXT)
    assert again.encoders.text_encoder is None
    assert again.context_encoder == "words-1"
    np.testing.assert_array_equal(null(again), null(model))
    with pytest.raises(ValueError, match="is of text encoder words-2"):
        again.set_encoders(text_encoder=Words(fingerprint="words-2"))


@pytest.mark.parametrize("name", [name for name in presets.names() if "coco" in name])
def test_coco_models_read_clip(name):
    row = presets.get(name)
    assert row.network["context_shape"] == (77, 768)
    assert row.text_encoder == "clip_vit_large_patch14"
    assert (row.guidance_scale, row.condition_dropout, row.latent_scale) == (2.0, 0.1, 0.23010)


# The shipped model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return presets.load("uvit_tiny_shapes", weights="pretrained")


def test_it_ships_in_less_than_4_megabytes():
    row = presets.get("uvit_tiny_shapes")
    files = [loading.SHIPPED / row.weights, *(loading.SHIPPED / row.text_encoder).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6


def test_its_text_encoder_ships_too(shipped):
    assert isinstance(shipped.encoders.text_encoder, CLIPText)
    assert shipped.encoders.text_encoder.context_shape == (12, 64)
    # 1e-5 of values up to 4: the null context is that of any backend.
    np.testing.assert_allclose(null(shipped), shipped.encoders.text_encoder("")[0], atol=4e-5)
    every = [str(scene) for scene in shapes.scenes(300)]
    ids = shipped.encoders.text_encoder.tokenize(every)  # a cut caption would warn
    assert (ids[:, -1] == shipped.encoders.text_encoder.tokenizer.vocabulary[clip.END]).all()


def test_its_weights_refuse_another_text_encoder():
    other = CLIPText.random(["a dog"], length=12, hidden_dim=64, vocabulary_size=520)
    with pytest.raises(ValueError, match="is of text encoder"):
        presets.load("uvit_tiny_shapes", "pretrained", text_encoder=other)


@pytest.mark.eager
def test_it_draws_what_it_is_told(shipped):
    """On pairs of things that no training picture had; 500 prompts score 0.998, chance 0.43."""
    prompts = [str(scene) for scene in shapes.scenes(60, "test", seed=1)]
    images = shipped.generate(prompts=prompts, seed=1, verbose=0)
    shares = shapes.score(images, prompts)
    # The standard deviation of a mean of 60 pictures is below 0.02.
    assert shares["attributes"] > 0.9
    shuffled = shapes.score(images, prompts[1:] + prompts[:1])
    assert shuffled["attributes"] < 0.55
