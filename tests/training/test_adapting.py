"""A trained model becomes the beginning of another one, which trains on other data."""

import numpy as np
import pytest
from tiny import DATA, assert_equal, diffusion_model, fit, numpy, randomize, refused, uvit, weights
from words import Words

from keras_uvit import DiffusionModel, training
from keras_uvit.diffusion.schedules import VPCosine
from keras_uvit.training import adapt

SHAPE = (4, 8, 1)
WIDE = {"image": np.tile(DATA["image"], (1, 1, 2, 1)), "label": np.arange(24) % 5}


@pytest.mark.eager
def test_a_model_begins_at_the_average_of_another_and_trains_on_other_data(capsys):
    model = diffusion_model(schedule=VPCosine(), prediction="v", ema_decay=0.5, seed=3)
    fit(model)
    before = weights(model.network)
    new = adapt(model, num_classes=5, image_shape=SHAPE, classes={4: 1})
    kept = len(model.network.weights)
    assert capsys.readouterr().out == (
        f"Kept: {kept - 2} weights of {kept}.\n"
        "Resized: label_embed/embeddings, position/embeddings.\n"
        "Made anew: none.\n"
    )
    config, old = new.get_config(), model.get_config()
    assert {key for key in config if config[key] != old[key]} == {"network"}
    assert_equal(weights(new.ema_network), weights(new.network))
    for layer in ("mid_block", "head"):
        layers = (m.get_layer(layer) for m in (new.network, model.ema_network))
        assert_equal(*map(weights, layers))
    tables = [m.get_layer("label_embed").embeddings for m in (new.network, model.ema_network)]
    assert_equal(numpy(tables[0])[[4, 5]], numpy(tables[1])[[1, 3]])
    new.compile()
    assert np.isfinite(fit(new, WIDE)["loss"]).all()
    assert_equal(weights(model.network), before)  # nothing is shared


@pytest.mark.once
def test_frozen_weights_stay_frozen_but_for_new_ones():
    model = diffusion_model(compiled=False)
    for name in ("label_embed", "head"):
        model.network.get_layer(name).trainable = False
    new = adapt(model, num_classes=2, verbose=0)
    frozen = [weight.path for weight in new.network.weights if not weight.trainable]
    assert frozen == ["head/kernel", "head/bias"]


@pytest.mark.once
def test_conditions_come_and_go():
    model = diffusion_model(compiled=False, condition_dropout=0.3)
    assert adapt(model, num_classes=2, verbose=0).condition_dropout == 0.3
    plain = adapt(model, num_classes=None, verbose=0)
    assert plain.condition_dropout == 0
    assert adapt(plain, num_classes=2, verbose=0).condition_dropout == 0.1


@pytest.mark.once
def test_encoders_go_along_where_they_fit():
    words = Words()
    model = DiffusionModel(uvit(context_shape=words.context_shape))
    model.set_encoders(text_encoder=words)
    randomize(model.network)
    new = adapt(model, image_shape=SHAPE, verbose=0)
    assert new.encoders.text_encoder is words
    assert new.context_encoder == words.fingerprint
    assert_equal(numpy(new.null_context), numpy(model.null_context))
    other = adapt(model, context_shape=(5, 2), verbose=0)
    assert other.context_encoder is None
    assert other.encoders.text_encoder is None


@pytest.mark.once
def test_what_cannot_be_changed_is_named():
    model = diffusion_model(compiled=False)
    refused(TypeError, lambda: training.adapt(model, hidden_dim=32), "can change", "['hidden_dim']")
    call = lambda: adapt(model, num_classes=2, strict=True)  # noqa: E731
    refused(ValueError, call, "strict=True", "label_embed")
