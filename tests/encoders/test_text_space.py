"""A model and a text encoder agree, or say so; the empty prompt travels with the model."""

import keras
import numpy as np
import pytest
from tiny import DATA, numpy, refused, uvit
from words import Words

from keras_uvit import DiffusionModel
from keras_uvit.data.contexts import Contexts

pytestmark = [pytest.mark.eager, pytest.mark.once]

IMAGES = DATA["image"][:8]


def make(context_shape=(2, 3), **options):
    return DiffusionModel(uvit(context_shape=context_shape), num_steps=3, **options)


def null(model):
    return numpy(model.null_context)


@pytest.mark.each_backend
def test_a_text_encoder_brings_the_empty_prompt_which_is_saved_with_the_model(tmp_path):
    model, words = make(), Words()
    assert not null(model).any()
    model.set_encoders(text_encoder=words)
    np.testing.assert_array_equal(null(model), words([""])[0])
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(null(again), null(model))
    assert again.context_encoder == model.context_encoder == "words-1"
    assert again.encoders.text_encoder is None
    again.set_encoders(text_encoder=Words())
    other = Words(fingerprint="words-2")
    words = "is of text encoder words-2", "learned the contexts of words-1"
    refused(ValueError, lambda: again.set_encoders(text_encoder=other), *words)


def test_a_model_of_unknown_contexts_keeps_the_null_it_has_learned(tmp_path):
    model = make()
    model.compile()
    model.fit({"image": IMAGES, "context": np.ones((8, 2, 3))}, batch_size=8, verbose=0)
    assert model.context_encoder == "arrays"
    options = dict(prompts=np.ones((1, 2, 3)), guidance_scale=2.0, verbose=0)
    guided = model.generate(**options)
    model.set_encoders(text_encoder=Words())
    model.set_encoders(text_encoder=Words(fingerprint="words-2"))  # whose they were is not known
    assert not null(model).any()
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    again.set_encoders(text_encoder=Words())
    assert not null(again).any()
    np.testing.assert_array_equal(again.generate(**options), guided)


def test_an_assigned_null_stays():
    model = make()
    model.null_context.assign(np.full((2, 3), 7.0))
    model.set_encoders(text_encoder=Words())
    assert (null(model) == 7.0).all()


def test_a_model_made_from_a_config_gets_the_null_of_its_encoder():
    words = Words()
    for model in (make(context_encoder="words-1"), make()):
        model.set_encoders(text_encoder=words)
        fresh = DiffusionModel.from_config(model.get_config())
        fresh.set_encoders(text_encoder=words)
        np.testing.assert_array_equal(null(fresh), words.null_context)


ABOUT = {"id": "words", "fingerprint": "words-1"}
CONTEXTS = Contexts(np.ones((4, 2, 3)), np.array([[0, 4]]), np.full((2, 3), 5.0), ABOUT)


@pytest.mark.parametrize(
    ("shape", "other", "error", "words"),
    [
        ((2, 3), Words(2, 4), ValueError, ("shape (2, 4)", "has context_shape=(2, 3)")),
        ((2, 3), Words(3, 3), ValueError, ("shape (3, 3)", "has context_shape=(2, 3)")),
        (None, Words(), ValueError, ("reads no text", "context_shape=(2, 3)")),
        ((2, 3), len, TypeError, ("A text encoder is encoders.CLIPText",)),
        ((2, 3), "clip", TypeError, ("A text encoder is encoders.CLIPText", "'clip'")),
        ((2, 3), CONTEXTS, TypeError, ("A text encoder is encoders.CLIPText",)),
    ],
)
def test_what_is_no_text_encoder_of_the_model_is_refused(shape, other, error, words):
    refused(error, lambda: make(shape).set_encoders(text_encoder=other), *words)


class Cache(keras.utils.PyDataset):
    contexts = CONTEXTS

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"image": IMAGES, "context": np.ones((8, 2, 3), "float16")}


def test_a_cache_brings_the_empty_prompt_too():
    model, other = make(), make(context_encoder="other")
    model.compile()
    model.fit(Cache(), verbose=0)
    assert (null(model) == 5.0).all()
    assert model.context_encoder == "words-1"
    model.set_encoders(text_encoder=Words())  # its own, so the null stays
    assert (null(model) == 5.0).all()
    other.compile()
    refused(ValueError, lambda: other.fit(Cache(), verbose=0), "learned the contexts of other")
