"""Each argument and each public method of Keras' models works here, or is refused at once."""

import functools
import inspect

import keras
import numpy as np
import pytest
from keras.callbacks import LambdaCallback
from states import EIGHT, fresh
from tiny import assert_equal, diffusion_model, refused, weights

from keras_uvit import DiffusionModel
from keras_uvit.networks.network import FORMATS
from keras_uvit.training import arguments
from keras_uvit.training.callbacks import Checkpoint

IMAGES, LABELS = EIGHT["image"], EIGHT["label"]
INPUTS = {"image": IMAGES / 255, "timestep": np.ones(8), "label": LABELS}
SHAPES = {name: value.shape for name, value in INPUTS.items()}


def counts(model):
    """Batches that were trained and evaluated."""
    return int(model.step), int(model.test_step_count)


# Arguments ----------------------------------------------------------------------------------------

ONES = np.ones(8)
VALIDATION = dict(validation_data=EIGHT)
BOTH = dict(x=IMAGES, y=LABELS)
EMPTY = dict(callbacks=[LambdaCallback(on_epoch_end=lambda epoch, logs: logs.clear())])
ALL = (8, 4, 4, 1)
# Of each argument: options that use it, and what shows its effect: the counts, or what is returned.
FIT = {
    "x": (dict(x=EIGHT), (2, 0)),
    "y": (BOTH, (2, 0)),
    "batch_size": (dict(batch_size=np.int64(2)), (4, 0)),
    "epochs": (dict(epochs=np.int64(2)), lambda history: history.epoch == [0, 1]),
    "verbose": (dict(verbose=0), (2, 0)),
    "callbacks": (EMPTY, (2, 0)),
    "validation_split": (dict(validation_split=0.25, batch_size=2), (3, 1)),
    "validation_data": (VALIDATION, lambda history: "val_loss" in history.history),
    "shuffle": (dict(shuffle=False), (2, 0)),
    "initial_epoch": (dict(initial_epoch=1, epochs=2), lambda history: history.epoch == [1]),
    "steps_per_epoch": (dict(steps_per_epoch=1), (1, 0)),
    "validation_steps": (dict(validation_steps=1, **VALIDATION), (2, 1)),
    "validation_batch_size": (dict(validation_batch_size=1, **VALIDATION), (2, 8)),
    "validation_freq": (
        dict(validation_freq=2, epochs=2, **VALIDATION),
        lambda history: len(history.history["val_loss"]) == 1,
    ),
}
EVALUATE = {
    "x": (dict(x=EIGHT), (0, 2)),
    "y": (BOTH, (0, 2)),
    "batch_size": (dict(batch_size=2), (0, 4)),
    "verbose": (dict(verbose=0), lambda loss: loss > 0),
    "steps": (dict(steps=np.int64(1)), (0, 1)),
    "callbacks": (EMPTY, lambda loss: loss > 0),
    "return_dict": (dict(return_dict=True), lambda logs: list(logs) == ["loss"]),
}
PREDICT = {
    "x": (dict(x=INPUTS), lambda output: output.shape == ALL),
    "batch_size": (dict(batch_size=8), lambda output: output.shape == ALL),
    "verbose": (dict(verbose=0), lambda output: output.shape == ALL),
    "steps": (dict(steps=1), lambda output: len(output) == 4),
    "callbacks": (EMPTY, lambda output: output.shape == ALL),
}
TRAIN_ON_BATCH = {
    "x": (dict(x=EIGHT), (1, 0)),
    "y": (BOTH, (1, 0)),
    "return_dict": (dict(return_dict=True), lambda logs: "grad_norm" in logs),
}
TEST_ON_BATCH = {
    "x": (dict(x=EIGHT), (0, 1)),
    "y": (BOTH, (0, 1)),
    "return_dict": (dict(return_dict=True), lambda logs: list(logs) == ["loss"]),
}
USUAL = dict(batch_size=4, verbose=0)
METHODS = {
    "fit": (FIT, dict(x=EIGHT, **USUAL)),
    "evaluate": (EVALUATE, dict(x=EIGHT, **USUAL)),
    "predict": (PREDICT, dict(x=INPUTS, **USUAL)),
    "train_on_batch": (TRAIN_ON_BATCH, dict(x=EIGHT)),
    "test_on_batch": (TEST_ON_BATCH, dict(x=EIGHT)),
    "compile": ({}, {}),
}
COMPILE = dict(steps_per_execution=2, run_eagerly=False, jit_compile=False, auto_scale_loss=False)
NOT_SUPPORTED = {
    "fit": dict(class_weight={0: 1.0, 1: 2.0, 2: 1.0}, sample_weight=ONES),
    "evaluate": dict(sample_weight=ONES),
    "predict": {},
    "train_on_batch": dict(class_weight={0: 1.0, 1: 2.0, 2: 1.0}, sample_weight=ONES),
    "test_on_batch": dict(sample_weight=ONES),
    "compile": dict(loss="mse", loss_weights=[1.0], metrics=["mse"], weighted_metrics=["mse"]),
}


@pytest.mark.once
@pytest.mark.parametrize("method", METHODS)
def test_every_argument_of_keras_has_its_effect_or_is_refused(method):
    table, usual = METHODS[method]
    for name, value in NOT_SUPPORTED[method].items():
        model = fresh()
        call = functools.partial(getattr(model, method), **{**usual, name: value})
        refused(ValueError, call, f"{name} is not supported", f"Leave {name}= out")
        assert counts(model) == (0, 0)
    for name, (options, shows) in table.items():
        model = fresh()
        returned = getattr(model, method)(**{**usual, **options})
        assert shows(returned) if callable(shows) else counts(model) == shows, name
    works = {"optimizer", *COMPILE} if method == "compile" else table
    parameters = inspect.signature(getattr(keras.Model, method)).parameters
    assert set(parameters) - {"self", "kwargs"} == {*works, *NOT_SUPPORTED[method]}


@pytest.mark.once
def test_arguments_of_compile_have_their_effect():
    model = diffusion_model()
    model.compile("sgd", **COMPILE)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    for name in ("steps_per_execution", "run_eagerly", "jit_compile"):
        assert getattr(model, name) == COMPILE[name]
    model.compile(run_eagerly=True)
    assert model.run_eagerly


KEEPING = [Checkpoint("never")]
REFUSED = [
    ("fit", dict(epoch=2), TypeError, "no argument 'epoch'", "'epochs'"),
    ("fit", dict(epochs=1.5), ValueError, "epochs must be an int >= 0"),
    ("fit", dict(steps_per_epoch=0), ValueError, "steps_per_epoch must be an int >= 1"),
    ("fit", dict(validation_data=(EIGHT, None, ONES)), ValueError, "sample_weight is not"),
    ("fit", dict(validation_split=1.5), ValueError, "validation_split=1.5"),
    ("fit", dict(validation_split=0.5, **VALIDATION), ValueError, "not both"),
    ("fit", dict(validation_split=0.5, x=[EIGHT]), ValueError, "come in batches"),
    ("fit", dict(resume=True), ValueError, "needs a training.Checkpoint"),
    ("fit", dict(callbacks=KEEPING, initial_epoch=1), ValueError, "Leave initial_epoch out"),
    ("fit", dict(x=(EIGHT for _ in range(2))), ValueError, "first has 8", "batch_size out"),
    ("evaluate", dict(steps=0), ValueError, "steps must be an int >= 1"),
    ("predict", dict(x=IMAGES), ValueError, "dict of its inputs", "`generate` draws"),
    ("train_on_batch", dict(x={"image": IMAGES}), ValueError, "one of", "['label']"),
    ("compile", dict(metric=["mse"]), TypeError, "Did you mean 'metrics'"),
    ("compile", dict(optimizer=keras.optimizers.SGD(use_ema=True)), ValueError, "use_ema out"),
]


@pytest.mark.once
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]}-{case[3][:30]}")
def test_what_cannot_be_is_refused_before_anything_is_changed(case):
    method, options, error, *words = case
    model = fresh()
    call = functools.partial(getattr(model, method), **{**METHODS[method][1], **options})
    refused(error, call, *words)
    assert (*counts(model), int(model.global_batch)) == (0, 0, 0)


@pytest.mark.once
def test_arguments_beside_a_checkpoint(tmp_path):
    for name, (options, shows) in FIT.items():
        if name in ("validation_split", "validation_steps", "steps_per_epoch", "batch_size"):
            model = fresh()
            keeping = Checkpoint(tmp_path / name)
            model.fit(EIGHT, **{**USUAL, **options, "callbacks": [keeping]})
            assert counts(model) == shows
    model.fit(EIGHT, callbacks=[Checkpoint(tmp_path)], verbose=0)  # fewer images than Keras' 32


@pytest.mark.once
def test_a_validation_split_counts_in_the_planned_length():
    model = diffusion_model(planned_steps=12)
    model.fit(EIGHT, validation_split=0.5, **USUAL)  # one batch an epoch
    assert counts(model)[0] == 12


# Methods ------------------------------------------------------------------------------------------


SYMBOLIC = {name: keras.KerasTensor(shape) for name, shape in SHAPES.items()}
# What each backend computes in its own way.
COMPUTES = {
    "call": lambda m: m.call(INPUTS),
    "evaluate": lambda m: m.evaluate(EIGHT, verbose=0),
    "fit": lambda m: m.fit(EIGHT, verbose=0),
    "predict": lambda m: m.predict(INPUTS, verbose=0),
    "predict_on_batch": lambda m: m.predict_on_batch(INPUTS),
    "set_state_tree": lambda m: m.set_state_tree(m.get_state_tree()),
    "stateless_call": lambda m: m.stateless_call(
        [v.value for v in m.trainable_variables],
        [v.value for v in m.non_trainable_variables],
        INPUTS,
    ),
    "test_on_batch": lambda m: m.test_on_batch(EIGHT),
    "train_on_batch": lambda m: m.train_on_batch(EIGHT),
}
WORKS = {
    "build": lambda m: m.build(),
    "build_from_config": lambda m: m.build_from_config(m.get_build_config()),
    "compile": lambda m: diffusion_model(compiled=False).compile(),
    "compile_from_config": lambda m: diffusion_model().compile_from_config(m.get_compile_config()),
    "compute_mask": lambda m: m.compute_mask(INPUTS, None),
    "compute_output_shape": lambda m: m.compute_output_shape(SHAPES),
    "compute_output_spec": lambda m: m.compute_output_spec(SYMBOLIC),
    "count_params": lambda m: m.count_params(),
    "from_config": lambda m: type(m).from_config(m.get_config()),
    "get_layer": lambda m: m.get_layer("uvit"),
    "get_metrics_result": lambda m: m.get_metrics_result(),
    "get_state_tree": lambda m: m.get_state_tree("numpy_array"),
    "reset_metrics": lambda m: m.reset_metrics(),
    "set_weights": lambda m: m.set_weights(m.get_weights()),
    "summary": lambda m: m.summary(print_fn=lambda *_, **__: None),
    "symbolic_call": lambda m: m.symbolic_call(SYMBOLIC),
    "to_json": lambda m: keras.models.model_from_json(m.to_json()),
}
# Seen above and in other tests.
USED = {
    "quantize",
    "get_compile_config",
    "get_config",
    "get_weights",
    "load_weights",
    "save",
    "save_weights",
}
# What Keras calls itself, or offers to those who write models and layers.
INSIDE = {
    *("add_variable", "add_weight", "get_build_config", "get_quantization_layer_structure"),
    *("load_own_variables", "make_predict_function", "make_test_function", "make_train_function"),
    *("predict_step", "quantized_build", "quantized_call", "rematerialized_call"),
    *("save_own_variables", "test_step", "train_step"),
}
OF_TORCH = {"forward", "named_parameters", "parameters", "state_dict", "torch_params"}


@pytest.mark.once
def test_the_tables_have_all_methods_of_keras():
    own = [cls for cls in keras.Model.__mro__ if cls.__module__.startswith("keras.")]
    names = {name for cls in own for name in vars(cls) if not name.startswith("_")}
    methods = {name for name in names if callable(getattr(keras.Model, name))}
    known = {*COMPUTES, *WORKS, *USED, *INSIDE, *OF_TORCH, *arguments.METHODS}
    assert methods - known == set()


@pytest.mark.eager
@pytest.mark.parametrize("table", [COMPUTES, pytest.param(WORKS, marks=pytest.mark.once)])
def test_methods_work_before_and_after_others(table):
    model = fresh()
    for _ in range(2):
        for call in table.values():
            call(model)


@pytest.mark.once
def test_the_file_of_another_kind_is_refused(tmp_path):
    refused(ValueError, lambda: fresh().save(tmp_path / "model.h5"), "ends in .keras", "model.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_refused_method_changes_nothing():
    model = fresh()
    before, policies = weights(model), [w.dtype for w in model.weights]
    for owner, names in ((model, arguments.METHODS), (model.network, FORMATS)):
        kind = type(owner).__name__
        for name in names:
            call = getattr(owner, name)
            refused(NotImplementedError, lambda: call("int8"), f"{kind}.{name} is not")  # noqa: B023
    assert [w.dtype for w in model.weights] == policies
    assert_equal(weights(model), before)


# Changed networks ---------------------------------------------------------------------------------


def with_another_weight(network):
    layer = network.get_layer("head")
    layer.built = False  # as Keras demands it for a weight that is added later
    layer._tracker.unlock()
    layer.add_weight(shape=(2,), name="more")
    layer.built = True


CHANGES = {
    "enable_lora": lambda network: network.get_layer("label_embed").enable_lora(2),
    "quantize": lambda network: network.get_layer("label_embed").quantize("int8"),
    "add_weight": with_another_weight,
}
USES = {
    "DiffusionModel": lambda m: DiffusionModel(m.network),
    "compile": lambda m: m.compile(),
    "fit": lambda m: m.fit(EIGHT, verbose=0),
    "evaluate": lambda m: m.evaluate(EIGHT, verbose=0),
    "train_on_batch": lambda m: m.train_on_batch(EIGHT),
    "generate": lambda m: m.generate(labels=[0], verbose=0),
    "copy_weights_to_ema": lambda m: m.copy_weights_to_ema(),
    "save": lambda m: m.save("never.keras"),
}


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_refused(change):
    model = diffusion_model()
    CHANGES[change](model.network)
    for use in USES.values():
        refused((ValueError, TypeError), lambda: use(model), "changed after it was made")  # noqa: B023
