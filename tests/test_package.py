"""Promises about the package as a whole: light import, one place for the backend, true words."""

import ast
import builtins
import doctest
import importlib
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_uvit
import keras_uvit_cli
from keras_uvit import presets

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BACKEND = keras.config.backend()


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
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
    others = {f"keras_uvit.backend.{name}" for name in ("jax", "tensorflow", "torch")}
    others.remove(f"keras_uvit.backend.{BACKEND}")
    others.add("keras_uvit_cli.__main__")  # runs when it is imported
    return ["keras_uvit", *(module.name for module in found if module.name not in others)]


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
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[]", "[]"]


def test_a_missing_backend_is_explained():
    result = run("-c", "import keras_uvit", KERAS_BACKEND="openvino")
    assert "KERAS_BACKEND=jax, tensorflow or torch" in result.stderr


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


@pytest.mark.parametrize("name", ["numpy", "openvino", "unheard_of"])
def test_a_backend_that_does_not_run_is_told_at_import(name):
    result = run("-c", "import keras_uvit", KERAS_BACKEND=name)
    assert "KERAS_BACKEND=jax, tensorflow or torch" in result.stderr
    assert "ImportError" in result.stderr


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def blocks(heading):
    section = README.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_readme_sampling_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("Sample")
    exec(compile(block, "README", "exec"), {})
    assert list(tmp_path.glob("*.png"))


def make_photos(folder):
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / kind / f"{i}.jpg")


def smaller(block, *changes):
    for large, small in changes:
        assert large in block
        block = block.replace(large, small)
    return re.sub(r"epochs=\d+", "epochs=1", block)


def test_readme_training_lines_run(tmp_path, monkeypatch):
    """The first block in short, on two simple classes, ends in pictures of the class asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras_uvit.evaluation.reports, "CLASSIFIER_STEPS", (20, 20))
    rng = np.random.default_rng(0)
    for k in range(80):  # bright above or below
        pixels = rng.integers(0, 60, (16, 16, 3), dtype="uint8")
        pixels[8 * (k % 2) : 8 * (k % 2) + 8] += np.uint8(150)
        folder = tmp_path / "my_photos" / ("above", "below")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(folder / f"{k}.png", pixels)
    simple, own = blocks("Train on your own pictures")
    simple = smaller(
        simple,
        ("image_size=32", "image_size=16"),
        (
            "for_data(photos)",
            "for_data(photos, steps=500, network=dict(hidden_dim=32, num_layers=3, patch_size=8))",
        ),
        (
            'evaluation.report(model, photos, "report")',
            'evaluation.report(model, photos, "report", num_images=20)',
        ),
    )
    made = {}
    exec(compile(simple, "README", "exec"), made)
    above, below = made["images"][:, :8], made["images"][:, 8:]
    brighter = above.mean(axis=(1, 2, 3)) > below.mean(axis=(1, 2, 3))
    assert (brighter == (np.arange(16) % 2 == 0)).mean() > 0.8  # 13 of 16; chance is 8
    for name in ("photos.keras", "samples.png", "report/report.png"):
        assert (tmp_path / name).is_file()
    own = smaller(own, ("hidden_dim=256", "hidden_dim=16"), ("num_layers=9", "num_layers=3"))
    exec(compile(own, "README", "exec"), made)
    (kept,) = blocks("Long runs, many devices")
    tiny = "for_data(photos, network=dict(hidden_dim=16, num_layers=1))"
    exec(compile(smaller(kept, ("for_data(photos)", tiny)), "README", "exec"), made)
    assert list((tmp_path / "runs" / "photos" / "checkpoints").glob("step-*"))


def test_readme_latent_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "my_photos")
    # The weights are a download; a random autoencoder's latents have another scale.
    tiny = keras_uvit.encoders.AutoencoderKL(32, (1, 1, 1, 1), 1, scale=1.0)
    moments = tiny.encode(np.zeros((1, 16, 16, 3), "uint8"), verbose=0)
    tiny.scale = float(1 / np.sqrt(np.exp(moments[..., 4:]).mean()))
    monkeypatch.setattr(keras_uvit.encoders.AutoencoderKL, "from_file", lambda path: tiny)
    (block,) = blocks("Train on latents")
    block = smaller(
        block,
        ("image_size=256", "image_size=32"),
        ("image_shape=(32, 32, 4)", "image_shape=(4, 4, 4)"),
        ("hidden_dim=512", "hidden_dim=16"),
        ("num_layers=13", "num_layers=3"),
    )
    made = {}
    exec(compile(block, "README", "exec"), made)
    assert made["latents"].num_samples == 80
    assert made["images"].shape == (2, 32, 32, 3)


def test_readme_study_lines_run():
    (block,) = blocks("Study")
    made = {}
    exec(compile(smaller(block, ("base_dim=64", "base_dim=32")), "README", "exec"), made)
    assert made["flow"].objective.prediction == "velocity"
    assert made["rival"].network.output_shape == (None, 32, 32, 4)


def test_readme_text_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "captioned_photos"
    make_photos(folder)
    photos = sorted(path.name for path in (folder / "cats").iterdir())
    lines = [json.dumps({"file_name": f"cats/{name}", "captions": ["a cat"]}) for name in photos]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    encoders = keras_uvit.encoders
    tiny = encoders.AutoencoderKL(32, (1, 1, 1, 1), 1, scale=1.0)
    moments = tiny.encode(np.zeros((1, 16, 16, 3), "uint8"), verbose=0)
    tiny.scale = float(1 / np.sqrt(np.exp(moments[..., 4:]).mean()))
    words = encoders.CLIPText.random(["a cat", "a dog"], length=8, hidden_dim=16)
    ship, train = blocks("Text to image")
    exec(compile(ship, "README", "exec"), {})
    assert (tmp_path / "shapes.png").is_file()
    monkeypatch.setattr(encoders.AutoencoderKL, "from_file", lambda path: tiny)
    monkeypatch.setattr(encoders.CLIPText, "from_preset", lambda path: words)
    train = smaller(
        train,
        ("image_size=256", "image_size=32"),
        ("batch_size=32", "batch_size=8"),
        ("image_shape=(32, 32, 4)", "image_shape=(4, 4, 4)"),
        ("hidden_dim=512", "hidden_dim=16"),
        ("num_layers=13", "num_layers=3"),
    )
    made = {}
    exec(compile(train, "README", "exec"), made)
    assert made["latents"].num_samples == 20
    assert made["images"].shape == (2, 32, 32, 3)


def test_readme_blocks_can_follow_one_another():
    """Each makes all that it uses, and caches of different data have different names."""
    caches = []
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        made |= set(re.findall(r"\w+", " ".join(re.findall(r"^.*import (.*)$", block, re.M))))
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert used - made - set(dir(builtins)) == set(), block
        caches += re.findall(r'write_latents\(\w+, "(\w+)"', block)
    assert len(caches) == len(set(caches)) > 1


@pytest.mark.parametrize("name", presets.names())
def test_readme_lists_every_preset_with_its_fid(name):
    row = presets.get(name)
    (line,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
    assert (f"{row.reported_fid:.2f}" if row.reported_fid else "-") in line
    assert f"{row.params / 1e6:.1f}M" in line


def test_readme_file_map_names_every_module():
    for name in modules():
        if not hasattr(importlib.import_module(name), "__path__"):
            assert name.rsplit(".", 1)[1] + ".py" in README, name


def test_digits_example_runs_to_the_end(tmp_path, monkeypatch):
    script = ROOT / "examples" / "digits.py"
    monkeypatch.syspath_prepend(script.parent)
    words = ["digits.py", "--quick", "--quiet", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    keys = "class_agreement frechet_distance frechet_floor within_class_spread train_seconds"
    assert {*keys.split(), "sample_seconds", "backend"} <= metrics.keys()
    assert metrics["backend"] == BACKEND
    for name in ("samples.png", "loss.png", "model.keras", "ema.weights.h5"):
        assert (tmp_path / name).stat().st_size > 1000


def test_help_teaches(monkeypatch, capsys):
    script = ROOT / "examples" / "digits.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", ["digits.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "Expect" in said
    assert "--quick" in said


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
