"""Promises about the package as a whole: light import, one place for the backend, the demo."""

import ast
import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_uvit
import keras_uvit_cli

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
BACKEND = keras.config.backend()


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": BACKEND, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def modules():
    found = [
        *pkgutil.walk_packages(keras_uvit.__path__, "keras_uvit."),
        *pkgutil.walk_packages(keras_uvit_cli.__path__, "keras_uvit_cli."),
    ]
    prefixes = ("keras_uvit.backend.", "keras_uvit.backend.export_")
    names = {"jax", "tensorflow", "torch"} - {BACKEND}
    others = {prefix + name for prefix in prefixes for name in names}
    others.add("keras_uvit_cli.__main__")  # runs when it is imported
    return ["keras_uvit", *(module.name for module in found if module.name not in others)]


# Import -------------------------------------------------------------------------------------------


@pytest.mark.each_backend
def test_import_takes_no_other_backend_and_no_extra():
    others = sorted({"tensorflow", "torch"} - {BACKEND})
    code = f"""
import sys, keras
before = set(sys.modules)  # Keras itself imports scikit-learn and more where they are installed
import keras_uvit
extras = ["sklearn", "PIL", "matplotlib", "safetensors"]
print([m for m in {others} if m in sys.modules])
print([m for m in extras if m in sys.modules and m not in before])
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[]", "[]"]


@pytest.mark.parametrize("name", ["numpy", "unheard_of"])
def test_a_backend_that_does_not_run_is_told_at_import(name):
    result = run("import keras_uvit", KERAS_BACKEND=name)
    assert "KERAS_BACKEND=jax, tensorflow or torch" in result.stderr
    assert "ImportError" in result.stderr


def test_the_backend_is_asked_for_in_one_file():
    question = re.compile(r"(config|backend)\.backend\(\)|KERAS_BACKEND=")
    use = re.compile(r"import (jax|tensorflow)\b")
    asks, uses = (
        {
            path.relative_to(ROOT / "keras_uvit").as_posix()
            for path in (ROOT / "keras_uvit").rglob("*.py")
            if pattern.search(re.sub(r'"[^"]*"', "", path.read_text()))
        }
        for pattern in (question, use)
    )
    assert asks == {"backend/__init__.py"}
    assert {path.split("/")[0] for path in uses} == {"backend"}


# Docstrings, annotations, text --------------------------------------------------------------------


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


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run_and_public_functions_are_annotated(name):
    module, missing = importlib.import_module(name), []
    for function, value in functions(module):
        signature = inspect.signature(value)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        missing += [f"{function}({p.name})" for p in parameters if p.annotation is p.empty]
        if signature.return_annotation is signature.empty and not function.endswith("__init__"):
            missing.append(f"{function} ->")
    assert missing == []
    assert doctest.testmod(module).failed == 0


def text_files_without_encoding(path):
    """Lines that read or write text in the system's own encoding, which on Windows is not UTF-8."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        named = {keyword.arg for keyword in node.keywords}
        if name in ("read_text", "write_text"):
            given = len(node.args) > (name == "write_text")  # as the first, or the second argument
        elif name == "open" and isinstance(node.func, ast.Name):
            mode = node.args[1] if len(node.args) > 1 else ast.Constant("r")
            given = "b" in getattr(mode, "value", "b") or len(node.args) > 3
        else:
            continue
        if not given and "encoding" not in named:
            yield node.lineno


@pytest.mark.parametrize("folder", ["keras_uvit", "keras_uvit_cli", "examples", "benchmarks"])
def test_text_files_are_utf_8(folder):
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := [*text_files_without_encoding(path)])
    }
    assert not found


# The demo -----------------------------------------------------------------------------------------


def test_digits_example_runs_to_the_end(tmp_path, monkeypatch):
    script = ROOT / "examples" / "digits.py"
    monkeypatch.syspath_prepend(script.parent)
    words = ["--quick", "--quiet", "--num-layers", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *words])
    runpy.run_path(str(script), run_name="__main__")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    keys = "class_agreement frechet_distance frechet_floor within_class_spread train_seconds"
    assert {*keys.split(), "sample_seconds"} <= metrics.keys()
    assert metrics["backend"] == BACKEND
    for name in ("samples.png", "loss.png", "model.keras", "ema.weights.h5"):
        assert (tmp_path / name).stat().st_size > 1000
