"""What users set after construction, frozen layers and weights without decay, is kept in files."""

import keras
import pytest
from states import EIGHT, kept_in_files
from tiny import assert_equal, diffusion_model, fit, refused, weights

from keras_uvit import training
from keras_uvit.training import checkpoints
from keras_uvit.training.checkpoints import CheckpointError, Place
from keras_uvit.training.optimizers import adamw, settings, without_decay


def made(change, **options):
    model = diffusion_model(compiled=False, **options)
    change(model)
    model.compile()
    return model


def a_layer(model):
    model.freeze("mid_block")


def all_but_a_part(model):
    model.network.trainable = False
    model.network.get_layer("mid_block").attention.trainable = True


def a_weight(model):
    model.network.get_layer("head").bias.trainable = False


def nothing(model):
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True  # the moving average must not be trained


@pytest.mark.eager
@pytest.mark.parametrize(
    "change",
    [a_weight]
    + [pytest.param(c, marks=pytest.mark.once) for c in (a_layer, all_but_a_part, nothing)],
)
def test_what_is_frozen_stays_frozen_in_files(tmp_path, change):
    model = made(change)
    checkpoints.write(model, tmp_path / "run", 0, Place(0, 0, 1, 8), optimizer=settings(model))
    model.save(tmp_path / "model.keras")
    expected = [weight.trainable for weight in model.network.weights]
    for loaded in (
        keras.saving.load_model(tmp_path / "model.keras"),
        training.load_checkpoint(tmp_path / "run"),
    ):
        assert [weight.trainable for weight in loaded.network.weights] == expected
        assert len(loaded.trainable_variables) == sum(expected)
        layers = [network._flatten_layers() for network in (model.network, loaded.network)]
        assert all(a.trainable == b.trainable for a, b in zip(*layers, strict=True) if a.path)
        assert_equal(kept_in_files(loaded), kept_in_files(model))
    before = weights(loaded.network)
    fit(loaded, EIGHT)
    moved = [(a != b).any() for a, b in zip(before, weights(loaded.network))]
    assert moved == expected


@pytest.mark.once
def test_a_run_goes_on_with_the_same_layers_frozen(tmp_path):
    options = dict(callbacks=[training.Checkpoint(tmp_path)], shuffle=True)
    fit(made(a_layer), EIGHT, **options)
    other = made(nothing)
    refused(CheckpointError, lambda: fit(other, EIGHT, **options, epochs=2), "'frozen'")
    model = made(a_layer)
    fit(model, EIGHT, **options, epochs=2)
    assert int(model.step) == 2


@pytest.mark.once
def test_layers_are_frozen_by_patterns_of_their_names():
    patterns = "patch_*", "*_block_0"
    model = made(lambda model: model.freeze(*patterns), network=dict(num_layers=3))
    left = {layer.name for layer in model.network.layers if layer.trainable_weights}
    every = {layer.name for layer in model.network.layers if layer.weights}
    assert every - left == {"patch_embed", "in_block_0", "out_block_0"}
    words = "'attention_*'", "patch_embed, ", "mid_block"
    refused(ValueError, lambda: model.freeze("norm", "attention_*"), *words)
    assert model.network.get_layer("norm").trainable  # of a call that fails, nothing is done
    model.network.trainable = True
    assert len(model.trainable_variables) == len(model.network.weights)


@pytest.mark.once
def test_an_optimizer_of_other_weights_is_refused():
    model = diffusion_model()
    a_layer(model)
    refused(ValueError, lambda: fit(model), "frozen or unfrozen", "compile")
    model.compile(model.optimizer)
    refused(ValueError, lambda: fit(model), "new optimizer")


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_weights_without_decay_are_kept_in_files(tmp_path, dtype):
    model = diffusion_model(compiled=False, network=dict(dtype=dtype))
    optimizer = adamw()
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    model.compile(optimizer)
    named = without_decay(model)
    assert named == [v.path for v in model.trainable_variables if v.name in ("bias", "gamma")]
    for _ in range(2):
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        assert without_decay(model) == named
