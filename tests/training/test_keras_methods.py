"""Each argument and each public method of Keras' models works here, or is refused at once."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT, backend
from keras_uvit.networks.network import FORMATS
from keras_uvit.training import arguments
from keras_uvit.training.callbacks import Checkpoint

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
RNG = np.random.default_rng(0)
DATA = {
    "image": RNG.integers(0, 256, (8, 4, 4, 1)).astype("uint8"),
    "label": np.arange(8) % 3,
}
INPUTS = {"image": DATA["image"] / 255, "timestep": np.ones(8), "label": DATA["label"]}
SHAPES = {name: value.shape for name, value in INPUTS.items()}
BACKEND = keras.config.backend()


def make(**options):
    network = UViT(**TINY, num_classes=3)
    return DiffusionModel(network, optimizer=dict(warmup_steps=0), **options)


def compiled(**options):
    model = make(**options)
    model.compile()
    return model


@pytest.fixture(scope="module")
def shared():
    return compiled()


def steps(model):
    return int(ops.convert_to_numpy(model.step))


def evaluated(model):
    return int(ops.convert_to_numpy(model.test_step_count))


# Arguments ----------------------------------------------------------------------------------------

ONES = np.ones(8)
VALIDATION = dict(validation_data=DATA)
# Of each argument: options that use it, and what shows its effect; None where it is refused.
FIT = {
    "x": (dict(x=DATA), lambda m, h: steps(m) == 2),
    "y": (dict(x=DATA["image"], y=DATA["label"]), lambda m, h: steps(m) == 2),
    "batch_size": (dict(batch_size=np.int64(2)), lambda m, h: steps(m) == 4),
    "epochs": (dict(epochs=np.int64(2)), lambda m, h: h.epoch == [0, 1]),
    "verbose": (dict(verbose=0), lambda m, h: True),
    "callbacks": (
        dict(callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda k, logs: logs.clear())]),
        lambda m, h: True,
    ),
    "validation_split": (
        dict(validation_split=0.25, batch_size=2),
        lambda m, h: (steps(m), evaluated(m)) == (3, 1),
    ),
    "validation_data": (VALIDATION, lambda m, h: "val_loss" in h.history),
    "shuffle": (dict(shuffle=False), lambda m, h: steps(m) == 2),
    "class_weight": (dict(class_weight={0: 1.0, 1: 2.0, 2: 1.0}), None),
    "sample_weight": (dict(sample_weight=ONES), None),
    "initial_epoch": (dict(initial_epoch=1, epochs=2), lambda m, h: h.epoch == [1]),
    "steps_per_epoch": (dict(steps_per_epoch=1), lambda m, h: steps(m) == 1),
    "validation_steps": (dict(validation_steps=1, **VALIDATION), lambda m, h: evaluated(m) == 1),
    "validation_batch_size": (
        dict(validation_batch_size=1, **VALIDATION),
        lambda m, h: evaluated(m) == 8,
    ),
    "validation_freq": (
        dict(validation_freq=2, epochs=2, **VALIDATION),
        lambda m, h: len(h.history["val_loss"]) == 1,
    ),
}
EVALUATE = {
    "x": (dict(x=DATA), lambda m, r: evaluated(m) == 2),
    "y": (dict(x=DATA["image"], y=DATA["label"]), lambda m, r: evaluated(m) == 2),
    "batch_size": (dict(batch_size=2), lambda m, r: evaluated(m) == 4),
    "verbose": (dict(verbose=0), lambda m, r: r > 0),
    "sample_weight": (dict(sample_weight=ONES), None),
    "steps": (dict(steps=np.int64(1)), lambda m, r: evaluated(m) == 1),
    "callbacks": (dict(callbacks=[keras.callbacks.Callback()]), lambda m, r: r > 0),
    "return_dict": (dict(return_dict=True), lambda m, r: list(r) == ["loss"]),
}
PREDICT = {
    "x": (dict(x=INPUTS), lambda m, r: r.shape == (8, 4, 4, 1)),
    "batch_size": (dict(batch_size=8), lambda m, r: r.shape == (8, 4, 4, 1)),
    "verbose": (dict(verbose=0), lambda m, r: len(r) == 8),
    "steps": (dict(steps=1), lambda m, r: len(r) == 4),
    "callbacks": (dict(callbacks=[keras.callbacks.Callback()]), lambda m, r: len(r) == 8),
}
TRAIN_ON_BATCH = {
    "x": (dict(x=DATA), lambda m, r: steps(m) == 1),
    "y": (dict(x=DATA["image"], y=DATA["label"]), lambda m, r: steps(m) == 1),
    "sample_weight": (dict(sample_weight=ONES), None),
    "class_weight": (dict(class_weight={0: 1.0, 1: 2.0, 2: 1.0}), None),
    "return_dict": (dict(return_dict=True), lambda m, r: "grad_norm" in r),
}
TEST_ON_BATCH = {
    "x": (dict(x=DATA), lambda m, r: evaluated(m) == 1),
    "y": (dict(x=DATA["image"], y=DATA["label"]), lambda m, r: evaluated(m) == 1),
    "sample_weight": (dict(sample_weight=ONES), None),
    "return_dict": (dict(return_dict=True), lambda m, r: list(r) == ["loss"]),
}
COMPILE = {
    "optimizer": (
        dict(optimizer="sgd"),
        lambda m, r: isinstance(m.optimizer, keras.optimizers.SGD),
    ),
    "loss": (dict(loss="mse"), None),
    "loss_weights": (dict(loss_weights=[1.0]), None),
    "metrics": (dict(metrics=["mse"]), None),
    "weighted_metrics": (dict(weighted_metrics=["mse"]), None),
    "run_eagerly": (dict(run_eagerly=True), lambda m, r: m.run_eagerly),
    "steps_per_execution": (
        dict(steps_per_execution=2, run_eagerly=False),
        lambda m, r: m.steps_per_execution == 2,
    ),
    "jit_compile": (dict(jit_compile=False), lambda m, r: m.jit_compile is False),
    "auto_scale_loss": (dict(auto_scale_loss=False), lambda m, r: True),
}
METHODS = {
    "fit": (FIT, dict(x=DATA, batch_size=4, verbose=0)),
    "evaluate": (EVALUATE, dict(x=DATA, batch_size=4, verbose=0)),
    "predict": (PREDICT, dict(x=INPUTS, batch_size=4, verbose=0)),
    "train_on_batch": (TRAIN_ON_BATCH, dict(x=DATA)),
    "test_on_batch": (TEST_ON_BATCH, dict(x=DATA)),
    "compile": (COMPILE, {}),
}
CASES = [(method, name) for method, (table, _) in METHODS.items() for name in table]


@pytest.mark.once
@pytest.mark.parametrize("method", METHODS)
def test_the_tables_have_all_arguments_of_keras(method):
    parameters = inspect.signature(getattr(keras.Model, method)).parameters
    assert set(parameters) - {"self", "kwargs"} == set(METHODS[method][0])


@pytest.mark.once
@pytest.mark.parametrize(("method", "name"), CASES)
def test_an_argument_has_its_effect_or_is_refused(method, name):
    table, usual = METHODS[method]
    options, shows = table[name]
    model = compiled()
    if shows is None:
        with pytest.raises(ValueError, match=f"{name} is not supported.*Leave {name}= out"):
            getattr(model, method)(**{**usual, **options})
        assert steps(model) == evaluated(model) == 0
    else:
        assert shows(model, getattr(model, method)(**{**usual, **options}))


@pytest.mark.once
@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("fit", dict(epoch=2), TypeError, "no argument 'epoch'. Did you mean 'epochs'"),
        ("fit", dict(validation=DATA), TypeError, "Did you mean 'validation_"),
        ("fit", dict(epochs=1.5), ValueError, "epochs must be an int >= 0"),
        ("fit", dict(steps_per_epoch=0), ValueError, "steps_per_epoch must be an int >= 1"),
        ("fit", dict(batch_size=0), ValueError, "batch_size must be an int >= 1"),
        ("fit", dict(validation_data=(DATA, None, ONES)), ValueError, "sample_weight is not"),
        ("fit", dict(validation_split=1.5), ValueError, "validation_split=1.5 leaves one part"),
        ("fit", dict(validation_split=0.5, **VALIDATION), ValueError, "not both"),
        ("fit", dict(resume=True), ValueError, "resume=True needs a training.Checkpoint"),
        ("fit", dict(resume="yes"), ValueError, "resume must be one of"),
        ("fit", dict(x=(DATA for _ in range(2))), ValueError, "first has 8. Leave batch_size out"),
        ("evaluate", dict(steps=0), ValueError, "steps must be an int >= 1"),
        ("evaluate", dict(weights=ONES), TypeError, "no argument 'weights'"),
        ("predict", dict(x=DATA["image"]), ValueError, "dict of its inputs.*`generate` draws"),
        ("train_on_batch", dict(x={"image": DATA["image"]}), ValueError, r"one of .* \['label'\]"),
        ("compile", dict(metric=["mse"]), TypeError, "Did you mean 'metrics'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(method, options, error, message):
    model = compiled()
    with pytest.raises(error, match=message):
        getattr(model, method)(**{**METHODS[method][1], **options})
    assert steps(model) == evaluated(model) == int(model.global_batch) == 0


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(initial_epoch=1, epochs=2), "Leave initial_epoch out"),
        (dict(shuffle=False), "leave shuffle=False out"),
        (dict(validation_split=0.25), None),
        (dict(validation_steps=1, **VALIDATION), None),
        (dict(steps_per_epoch=1), None),
        (dict(batch_size=None), None),  # 8 images are fewer than Keras' 32
    ],
)
def test_arguments_beside_a_checkpoint(tmp_path, options, message):
    model = compiled()
    options = {"batch_size": 4, **options, "callbacks": [Checkpoint(tmp_path)], "verbose": 0}
    if message is None:
        model.fit(DATA, **options)
        assert steps(model) > 0
    else:
        with pytest.raises(ValueError, match=message):
            model.fit(DATA, **options)


@pytest.mark.once
def test_a_validation_split_counts_in_the_planned_length():
    model = compiled(planned_steps=12)
    model.fit(DATA, validation_split=0.5, batch_size=4, verbose=0)  # one batch an epoch
    assert steps(model) == 12


@pytest.mark.once
def test_a_network_with_losses_of_its_own_is_refused():
    network = UViT(**TINY)
    network.get_layer("head").kernel.regularizer = keras.regularizers.L2(0.1)
    with pytest.raises(ValueError, match="losses of its own.*kernel_regularizer"):
        DiffusionModel(network)


# Methods ------------------------------------------------------------------------------------------


# What each method is called with; None: a test of its own, below.
WORKS = {
    "build": lambda m: m.build(),
    "build_from_config": lambda m: m.build_from_config(m.get_build_config()),
    "call": lambda m: m(INPUTS),
    "compile": lambda m: make().compile(),
    "compile_from_config": lambda m: make().compile_from_config(m.get_compile_config()),
    "compute_mask": lambda m: m.compute_mask(INPUTS, None),
    "compute_output_shape": lambda m: m.compute_output_shape(SHAPES),
    "compute_output_spec": lambda m: m.compute_output_spec(
        {name: keras.KerasTensor(shape) for name, shape in SHAPES.items()}
    ),
    "count_params": lambda m: m.count_params(),
    "evaluate": lambda m: m.evaluate(DATA, verbose=0),
    "fit": lambda m: m.fit(DATA, verbose=0),
    "from_config": lambda m: type(m).from_config(m.get_config()),
    "get_compile_config": lambda m: m.get_compile_config(),
    "get_config": lambda m: m.get_config(),
    "get_layer": lambda m: m.get_layer("uvit"),
    "get_metrics_result": lambda m: m.get_metrics_result(),
    "get_state_tree": lambda m: m.get_state_tree("numpy_array"),
    "get_weights": lambda m: m.get_weights(),
    "load_weights": None,
    "predict": lambda m: m.predict(INPUTS, verbose=0),
    "predict_on_batch": lambda m: m.predict_on_batch(INPUTS),
    "reset_metrics": lambda m: m.reset_metrics(),
    "save": None,
    "save_weights": None,
    "set_state_tree": lambda m: m.set_state_tree(m.get_state_tree()),
    "set_weights": lambda m: m.set_weights(m.get_weights()),
    "stateless_call": lambda m: m.stateless_call(
        [v.value for v in m.trainable_variables],
        [v.value for v in m.non_trainable_variables],
        INPUTS,
    ),
    "summary": lambda m: m.summary(print_fn=lambda *_, **__: None),
    "symbolic_call": lambda m: m.symbolic_call(
        {name: keras.KerasTensor(shape) for name, shape in SHAPES.items()}
    ),
    "test_on_batch": lambda m: m.test_on_batch(DATA),
    "to_json": lambda m: keras.models.model_from_json(m.to_json()),
    "train_on_batch": lambda m: m.train_on_batch(DATA),
}
# What Keras calls itself, or offers to those who write models and layers.
INSIDE = {
    *("add_variable", "add_weight", "get_build_config", "get_quantization_layer_structure"),
    *("load_own_variables", "make_predict_function", "make_test_function", "make_train_function"),
    *("predict_step", "quantized_build", "quantized_call", "rematerialized_call"),
    *("save_own_variables", "test_step", "train_step"),
}
PYTORCH = {"half", "bfloat16", "double", "type"}  # of its modules


def methods_of_keras():
    own = [cls for cls in keras.Model.__mro__ if cls.__module__.startswith("keras.")]
    names = {name for cls in own for name in vars(cls) if not name.startswith("_")}
    return {name for name in names if callable(getattr(keras.Model, name))}


@pytest.mark.once
def test_the_tables_have_all_methods_of_keras():
    known = {*WORKS, *INSIDE, *arguments.METHODS}
    of_torch = {"forward", "named_parameters", "parameters", "state_dict", "torch_params"}
    assert methods_of_keras() - known - of_torch == set()


@pytest.mark.eager
@pytest.mark.parametrize("name", [name for name, call in WORKS.items() if call])
def test_a_method_works_before_and_after_others(shared, name):
    for _ in range(2):
        WORKS[name](shared)


@pytest.mark.eager
def test_files_work_after_the_other_methods(shared, tmp_path):
    shared.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    shared.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(loaded.get_weights(), shared.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_file_of_another_kind_is_refused(shared, tmp_path):
    with pytest.raises(ValueError, match=r"ends in .keras.*model\.h5"):
        shared.save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
@pytest.mark.parametrize("name", arguments.METHODS)
def test_a_refused_method_changes_nothing(shared, name):
    before, policies = shared.get_weights(), [w.dtype for w in shared.weights]
    with pytest.raises(NotImplementedError, match=f"DiffusionModel.{name} is not supported"):
        getattr(shared, name)("int8")
    assert [w.dtype for w in shared.weights] == policies
    for a, b in zip(shared.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
@pytest.mark.parametrize("name", FORMATS)
def test_the_number_format_of_a_network_stays(shared, name):
    with pytest.raises(NotImplementedError, match=f"UViT.{name} is not supported.*dtype="):
        getattr(shared.network, name)("int8")


@pytest.mark.once
def test_networks_are_exported_where_keras_can_export_dicts(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "EXPORT_FORMATS", ("torch",))
    with pytest.raises(NotImplementedError, match="as 'onnx'. Pass format='torch'"):
        shared.network.export(tmp_path / "network", format="onnx")
    assert not list(tmp_path.iterdir())


def test_freezing_and_thawing_leaves_the_average_alone():
    model = make()
    trained = len(model.trainable_variables)
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert len(model.trainable_variables) == trained
    assert not model.ema_network.trainable_variables


# Changed networks ---------------------------------------------------------------------------------


def with_another_weight(network):
    layer = network.get_layer("head")
    layer.built = False  # as Keras demands it for a weight that is added later
    layer._tracker.unlock()
    layer.add_weight(shape=(2,), name="more")
    layer.built = True


CHANGES = {
    "enable_lora": lambda network: network.get_layer("head").enable_lora(2),
    "quantize": lambda network: network.get_layer("label_embed").quantize("int8"),
    "add_weight": with_another_weight,
}
USES = {
    "DiffusionModel": lambda m: DiffusionModel(m.network),
    "compile": lambda m: m.compile(),
    "fit": lambda m: m.fit(DATA, verbose=0),
    "evaluate": lambda m: m.evaluate(DATA, verbose=0),
    "train_on_batch": lambda m: m.train_on_batch(DATA),
    "generate": lambda m: m.generate(labels=[0], verbose=0),
    "copy_weights_to_ema": lambda m: m.copy_weights_to_ema(),
    "save": lambda m: m.save("never.keras"),
}


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", USES)
def test_a_changed_network_is_refused(change, use):
    model = compiled()
    CHANGES[change](model.network)
    with pytest.raises((ValueError, TypeError), match="changed after it was made"):
        USES[use](model)
