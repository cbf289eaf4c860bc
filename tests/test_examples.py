"""Every example of the paper's recipes runs to its end, small, and says what it reproduces."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["imagenet256", "imagenet512", "imagenet64", "cifar10", "celeba64", "coco", "shapes"]
NAMES += ["ablations", "cka"]
# They share their code: each is run on one backend, and on each backend one of text.
CHOSEN = {
    "jax": ["imagenet512", "shapes"],
    "tensorflow": ["imagenet256", "coco"],
    "torch": ["imagenet64", "cifar10", "celeba64", "coco"],
}[keras.config.backend()]
FILES = ["model.keras", "ema.weights.h5", "log.csv", "loss.png", "samples.png", "metrics.json"]


def run(name, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": keras.config.backend()},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
    )


def finished(result, out):
    assert result.returncode == 0, result.stderr[-2000:]
    assert [name for name in FILES if not (out / name).stat().st_size] == []
    assert list((out / "grids").glob("epoch-*.png"))
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("name", CHOSEN)
def test_it_runs_to_its_end(tmp_path, name):
    metrics = finished(run(name, "--quick", "--quiet", "--out", tmp_path), tmp_path)
    assert ("class_agreement" in metrics) == (name in ("imagenet256", "imagenet512"))
    assert ("shuffled prompts" in metrics) == (name in ("coco", "shapes"))


@pytest.mark.skipif(keras.config.backend() != "torch", reason="others compile for long")
def test_cka_draws_maps_and_keeps_its_models(tmp_path, monkeypatch):
    result = run("cka", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "cka.png").stat().st_size
    skips = json.loads((tmp_path / "cka.json").read_text())["skips"]
    assert [len(skips[key]["layers"]) for key in ("concat", "none")] == [4, 3]
    assert ["before and after a long skip" in skips[key] for key in skips] == [True, False]
    (kept,) = tmp_path.glob("none-*/model.keras")
    words = ["cka.py", "--models", str(kept), "--out", str(tmp_path / "again")]
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module("cka").main()
    found = json.loads((tmp_path / "again" / "cka.json").read_text())["skips"]
    assert found == {"none": skips["none"]}


@pytest.mark.skipif(keras.config.backend() != "torch", reason="elsewhere two compilations")
def test_ablations_measure_each_variant_once(tmp_path):
    options = ["--quick", "--out", tmp_path, "--num-steps", "2", "4", "--axes"]
    result = run("ablations", *options, "time")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("runs/*.json")}
    assert sorted(rows) == ["AdaLN-0", "base-0"]
    for row in rows.values():
        assert row["steps"] == 44
        assert sorted(row["scores"]) == ["2", "4"]
        assert set(row["scores"]["4"]) == {"agreement", "distance"}
    # AdaLN: four vectors a block instead of a token.
    assert rows["AdaLN-0"]["parameters"] > rows["base-0"]["parameters"]
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + 2 * 2
    assert all((tmp_path / name).stat().st_size for name in ("ablations.png", "steps.png"))
    dates = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")}
    again = run("ablations", *options, "time")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Run " not in again.stdout  # nothing is trained twice
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")} == dates


BAD = {
    "--process 2/2": "K from 0 to N - 1",
    "--num-steps 1": "must be 2 or more",
    "--iterations 0": "must be 1 or more",
    "--reference r.npz": "FID needs --inception and --reference",
    "--data nowhere": "the folder of a cache",
    "--data cifar10 --axes network": "No U-Net of equal cost is known",
    "--iterations 5": r"other settings.*'iterations': \(3000, 5\)",
}


@pytest.mark.parametrize("words", BAD)
def test_ablations_refuse_before_they_train(tmp_path, monkeypatch, capsys, words):
    settings = dict(iterations=3000, data="digits", num_steps=None, num_images=1000)
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "precision": "float32"}))
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--out", str(tmp_path), *words.split()])
    with pytest.raises(SystemExit) as error:
        importlib.import_module("ablations").main()
    assert re.search(BAD[words], f"{error.value} {capsys.readouterr().err}")
    assert not list(tmp_path.glob("runs/*"))


def test_without_latents_it_says_how_to_make_them_and_trains_on_digits(tmp_path):
    """Started without --quick, and stopped when it trains: what follows is that of --quick."""
    command = [sys.executable, "-u", EXAMPLES / "imagenet256.py", "--quiet", "--out", "run"]
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend()}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Training to step"):
                break
        process.kill()
    said = "".join(lines)
    assert lines[-1].startswith("Training to step 3014, batches of 64"), said[-2000:]
    assert "No latents in data/imagenet256" in said
    assert "keras-uvit encode tfds:imagenet2012 data/imagenet256 --image-size 256 --flip" in said
    assert (tmp_path / "run" / "digits-cache" / "manifest.json").is_file()


def test_an_unfinished_cache_is_an_error_and_no_reason_for_a_stand_in(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "plan.json").write_text('{"num_shards": 3}')
    # Batches and networks of the recipe are never made: the cache is looked at first.
    result = run("imagenet256", "--latents", tmp_path / "cache", "--out", tmp_path / "run")
    assert result.returncode != 0
    assert "unfinished: 0 of 3 shards" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches(name):
    text = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    for word in ("Reproduces", "Expect", "Hardware", "Commands", "--quick"):
        assert word in text
    assert ("keras-uvit " in text) == (name not in ("shapes", "cka"))  # whose data are there
