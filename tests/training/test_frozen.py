"""What users set after construction, frozen layers and weights without decay, is kept in files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT, training
from keras_uvit.training import adamw
from keras_uvit.training.checkpoints import CheckpointError
from keras_uvit.training.optimizers import without_decay

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), "uint8")


def make(change=None, dtype=None):
    network = UViT((4, 4, 1), 2, 16, num_layers=1, num_heads=2, dtype=dtype)
    model = DiffusionModel(network, optimizer=dict(learning_rate=1e-2, warmup_steps=0))
    if change is not None:
        change(model)
    model.compile()
    return model


def fit(model, callbacks=(), **options):
    return model.fit(IMAGES, batch_size=4, callbacks=[*callbacks], verbose=0, **options)


def arrays(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def freeze_a_layer(model):
    model.network.get_layer("mid_block").trainable = False


def freeze_all_but_a_part(model):
    model.network.trainable = False
    model.network.get_layer("mid_block").attention.trainable = True


def freeze_a_weight(model):
    model.network.get_layer("head").bias.trainable = False


def freeze_and_thaw_the_model(model):
    model.trainable = False
    model.trainable = True  # the moving average must not be trained


@pytest.mark.eager
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(freeze_a_layer, marks=pytest.mark.once),
        pytest.param(freeze_all_but_a_part, marks=pytest.mark.once),
        freeze_a_weight,
        pytest.param(freeze_and_thaw_the_model, marks=pytest.mark.once),
    ],
)
def test_what_is_frozen_stays_frozen_in_files(tmp_path, change):
    model = make(change)
    fit(model, [training.Checkpoint(tmp_path / "run")])
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
        states = [arrays(m.optimizer.variables) for m in (model, loaded)]
        for a, b in zip(*states, strict=True):
            np.testing.assert_array_equal(a, b)
    before = arrays(loaded.network.weights)
    fit(loaded)
    moved = [(a != b).any() for a, b in zip(before, arrays(loaded.network.weights))]
    assert moved == expected


@pytest.mark.once
def test_a_run_goes_on_with_the_same_layers_frozen(tmp_path):
    fit(make(freeze_a_layer), [training.Checkpoint(tmp_path)])
    with pytest.raises(CheckpointError, match="differs in .'frozen'"):
        fit(make(), [training.Checkpoint(tmp_path)], epochs=2)
    model = make(freeze_a_layer)
    fit(model, [training.Checkpoint(tmp_path)], epochs=2)
    assert int(ops.convert_to_numpy(model.step)) == 4


@pytest.mark.once
def test_an_optimizer_of_other_weights_is_refused():
    model = make()
    freeze_a_layer(model)
    with pytest.raises(ValueError, match="frozen or unfrozen since. Call compile"):
        fit(model)
    model.compile(model.optimizer)
    with pytest.raises(ValueError, match="with a new optimizer"):
        fit(model)


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_weights_without_decay_are_kept_in_files(tmp_path, dtype):
    model = make(dtype=dtype)
    optimizer = adamw()
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    model.compile(optimizer)
    named = without_decay(model)
    assert named == [v.path for v in model.trainable_variables if v.name in ("bias", "gamma")]
    for _ in range(2):
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        assert without_decay(model) == named
