"""Every public function is annotated: parameters and result."""

import importlib
import inspect
import pkgutil

import pytest

import keras_uvit
import keras_uvit_cli

pytestmark = pytest.mark.once


def names():
    for package in (keras_uvit, keras_uvit_cli):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            backend = module.name.removeprefix("keras_uvit.backend.")
            others = {"jax", "tensorflow", "torch"} - {keras_uvit.backend.NAME}
            if backend not in others and not module.name.endswith("__main__"):
                yield module.name


def functions(module):
    """(name, function) of what a module defines, methods and constructors included."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
            for key, method in vars(value).items():
                method = getattr(method, "fget", getattr(method, "__func__", method))
                if inspect.isfunction(method) and (key == "__init__" or not key.startswith("_")):
                    yield f"{name}.{key}", method
        elif inspect.isfunction(value):
            yield name, value


@pytest.mark.parametrize("name", names())
def test_public_functions_are_annotated(name):
    missing = []
    for function_name, function in functions(importlib.import_module(name)):
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        if "." in function_name and parameters and parameters[0].name in ("self", "cls"):
            parameters = parameters[1:]
        missing += [f"{function_name}({p.name})" for p in parameters if p.annotation is p.empty]
        is_constructor = function_name.endswith("__init__")
        if signature.return_annotation is signature.empty and not is_constructor:
            missing.append(f"{function_name} ->")
    assert missing == []
