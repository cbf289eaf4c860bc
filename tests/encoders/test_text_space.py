"""A model and a text encoder agree, or say so; the empty prompt travels with the model."""

import keras
import numpy as np
import pytest
from keras import ops
from words import Words

from keras_uvit import DiffusionModel, UViT
from keras_uvit.data.contexts import Contexts

pytestmark = [pytest.mark.eager, pytest.mark.once]

TINY = dict(patch_size=2, hidden_dim=16, num_layers=3, num_heads=2)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), "uint8")


def make(**options):
    return DiffusionModel(UViT((4, 4, 1), **TINY, context_shape=(2, 3)), num_steps=3, **options)


def null(model):
    return ops.convert_to_numpy(model.null_context)


def test_setting_a_text_encoder_brings_the_empty_prompt():
    model, words = make(), Words()
    assert not null(model).any()
    model.set_encoders(text_encoder=words)
    np.testing.assert_array_equal(null(model), words([""])[0])
    assert model.context_encoder == "words-1"


@pytest.mark.each_backend
def test_the_empty_prompt_is_saved_with_the_model(tmp_path):
    model = make()
    model.set_encoders(text_encoder=Words())
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(null(again), null(model))
    assert again.context_encoder == "words-1"
    assert again.encoders.text_encoder is None
    again.set_encoders(text_encoder=Words())
    with pytest.raises(ValueError, match="is of text encoder words-2.*learned.*words-1"):
        again.set_encoders(text_encoder=Words(fingerprint="words-2"))


def test_a_model_of_unknown_contexts_keeps_the_null_it_has_learned(tmp_path):
    model = make()
    model.compile()
    model.fit({"image": IMAGES, "context": np.ones((8, 2, 3))}, batch_size=8, verbose=0)
    assert model.context_encoder == "arrays"
    contexts = np.ones((1, 2, 3))
    guided = model.generate(prompts=contexts, guidance_scale=2.0, verbose=0)
    model.set_encoders(text_encoder=Words())
    model.set_encoders(text_encoder=Words(fingerprint="words-2"))  # whose they were is not known
    assert not null(model).any()
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    again.set_encoders(text_encoder=Words())
    assert not null(again).any()
    np.testing.assert_array_equal(
        again.generate(prompts=contexts, guidance_scale=2.0, verbose=0), guided
    )


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


@pytest.mark.parametrize("shape", [(2, 4), (3, 3)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"contexts of shape .*network has context_shape=\(2, 3\)"):
        make().set_encoders(text_encoder=Words(*shape))


def test_a_network_without_text_refuses_an_encoder():
    model = DiffusionModel(UViT((4, 4, 1), **TINY))
    with pytest.raises(ValueError, match=r"reads no text.*context_shape=\(2, 3\)"):
        model.set_encoders(text_encoder=Words())


ABOUT = {"id": "words", "fingerprint": "words-1"}


@pytest.mark.parametrize(
    "other", [len, "clip", {}, Contexts(np.ones((4, 2, 3)), None, np.ones((2, 3)), ABOUT)]
)
def test_what_is_no_text_encoder_is_refused(other):
    with pytest.raises(TypeError, match="A text encoder is encoders.CLIPText"):
        make().set_encoders(text_encoder=other)


def test_a_cache_brings_the_empty_prompt_too():
    contexts = Contexts(np.ones((4, 2, 3)), np.array([[0, 4]]), np.full((2, 3), 5.0), ABOUT)

    class Cache(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.contexts = contexts

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": IMAGES, "context": np.ones((8, 2, 3), "float16")}

    model = make()
    model.compile()
    model.fit(Cache(), verbose=0)
    assert (null(model) == 5.0).all()
    assert model.context_encoder == "words-1"
    model.set_encoders(text_encoder=Words())  # its own, so the null stays
    assert (null(model) == 5.0).all()
    other = make(context_encoder="other")
    other.compile()
    with pytest.raises(ValueError, match="learned the contexts of other"):
        other.fit(Cache(), verbose=0)
