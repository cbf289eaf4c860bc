"""Each private name of another package that ours uses: that it is there, and what to do if not."""

import ast
import inspect
from pathlib import Path

import keras
import pytest

import keras_uvit
from keras_uvit import private

pytestmark = pytest.mark.once

ADAMW = keras.optimizers.AdamW()
# {name: (what has it, what it is for)}. Where a name is gone, look for a public one first, and else
# for what the package does now in the source of what had it.
KERAS = {
    "_flatten_layers": (keras.Layer, "private.layers_in: all layers inside another"),
    "_trainable_variables": (ADAMW, "private.built_for: the weights an optimizer has slots for"),
    "_use_weight_decay": (ADAMW, "private.decays: which weights are excluded"),
    "_loss_tracker": (keras.Model.compile, "private.loss_mean: the mean that the bar shows"),
    "_use_cached_eval_dataset": (keras.Model.fit, "evaluate: whether `fit` is who calls it"),
}
# What `DiffusionModel` overrides, so that Keras calls it there.
OVERRIDDEN = {"tensorflow": "_maybe_symbolic_build", "torch": "_should_torch_compile"}
TORCH = {
    "_foreach_norm": "the norm of all gradients at once",
    "_foreach_lerp_": "the moving average of all weights at once",
    "_fused_adamw_": "AdamW of all weights at once",
}
# Of Keras' optimizer for PyTorch, which `backend.torch.AdamW` extends.
OPTIMIZER = ("_parallel_update_step", "_get_variable_index", "_momentums", "_velocities")


@pytest.mark.parametrize("name", KERAS)
def test_keras_still_has_it(name):
    owner, purpose = KERAS[name]
    if callable(owner) and not isinstance(owner, type):
        there = name in inspect.getsource(inspect.unwrap(owner))
    else:
        there = hasattr(owner, name)
    assert there, f"Keras has no {name} any more, which is for {purpose}."


@pytest.mark.skipif(keras.config.backend() != "torch", reason="it is PyTorch's")
def test_pytorch_still_has_it():
    import torch

    for name, purpose in TORCH.items():
        assert hasattr(torch, name), f"PyTorch has no {name} any more, which is for {purpose}."
    optimizer = type(ADAMW)()
    optimizer.build([])
    for name in OPTIMIZER:
        assert hasattr(optimizer, name), f"Keras' AdamW for PyTorch has no {name} any more."


@pytest.mark.each_backend
@pytest.mark.skipif(keras.config.backend() == "jax", reason="nothing is overridden there")
def test_keras_still_calls_what_is_overridden():
    name = OVERRIDDEN[keras.config.backend()]
    assert hasattr(keras.Model, name), f"Keras does not call {name} any more."


def test_no_other_private_name_is_used():
    package = Path(keras_uvit.__file__).parent
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    stored = ast.FunctionDef | ast.ClassDef
    own = {node.name for node in nodes if isinstance(node, stored)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {node.target.attr for node in nodes if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Attribute)}  # fmt: skip
    used = {node.attr for node in attributes if node.attr.startswith("_")}
    foreign = {name for name in used - own if not name.endswith("__")}
    of_named_tuples = {"_asdict", "_fields", "_replace"}  # documented
    listed = {*KERAS, *TORCH, *OPTIMIZER, *of_named_tuples}
    assert foreign <= listed, "List it here with what it is for, or use a public name."


def test_layers_are_found_inside_others():
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="deep")])
    outer = keras.Sequential([keras.Input((2,)), inner])
    assert "deep" in [layer.name for layer in private.layers_in(outer)]
