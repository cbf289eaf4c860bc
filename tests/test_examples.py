"""Every example of the paper's recipes runs, small, and says what it reproduces."""

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_uvit import evaluation, presets, training
from keras_uvit.data.manifest import CacheError
from keras_uvit.training.batches import check_source

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["imagenet256", "imagenet512", "imagenet64", "cifar10", "celeba64", "coco", "shapes"]
# They share their code: each backend runs one of them to its end.
WHOLE = {"jax": "imagenet512", "tensorflow": "imagenet256", "torch": "coco"}
FILES = ["model.keras", "ema.weights.h5", "log.csv", "loss.png", "samples.png", "metrics.json"]


@pytest.fixture
def run(monkeypatch):
    """Runs an example in this process, as its command does in one of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def test_one_runs_to_its_end(run, tmp_path):
    name = WHOLE[keras.config.backend()]
    run(name, "--quick", "--quiet", "--batch-size", 128, "--out", tmp_path)
    assert [name for name in FILES if not (tmp_path / name).stat().st_size] == []
    assert list((tmp_path / "grids").glob("epoch-*.png"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert ("class_agreement" in metrics) == name.startswith("imagenet")
    assert ("shuffled prompts" in metrics) == (name == "coco")


class Training(Exception):
    """Raised where an example would begin to train."""


@pytest.fixture
def until_training(run, monkeypatch):
    """Runs an example until it would train; returns the model, the dataset and the steps."""

    def train(model, dataset, out, iterations, **_):
        raise Training(model, dataset, iterations)

    def until_training(name, *arguments):
        monkeypatch.setattr(training, "train", train)
        with pytest.raises(Training) as reached:
            run(name, *arguments)
        return reached.value.args

    return until_training


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_each_makes_a_model_that_fits_its_data(until_training, tmp_path, name):
    model, dataset, iterations = until_training(name, "--quick", "--out", tmp_path)
    check_source(model, dataset, None, None)
    assert 1 <= iterations < 1000
    assert model.network.count_params() < 200_000


@pytest.mark.once
def test_cka_draws_maps_and_keeps_its_models(run, tmp_path):
    run("cka", "--quick", "--out", tmp_path)
    assert (tmp_path / "cka.png").stat().st_size
    skips = json.loads((tmp_path / "cka.json").read_text())["skips"]
    assert [len(skips[key]["layers"]) for key in ("concat", "none")] == [4, 3]
    assert ["before and after a long skip" in skips[key] for key in skips] == [True, False]
    (kept,) = tmp_path.glob("none-*/model.keras")
    run("cka", "--models", kept, "--out", tmp_path / "again")
    found = json.loads((tmp_path / "again" / "cka.json").read_text())["skips"]
    assert found == {"none": skips["none"]}


@pytest.mark.once
def test_ablations_measure_each_variant_once(run, monkeypatch, tmp_path, capsys):
    import tasks

    network = tasks.Task._network  # of the base's kind, smaller
    monkeypatch.setattr(
        tasks.Task, "_network", lambda self, change: network(self, {**change, "width": 0.25})
    )
    options = ["--quick", "--out", tmp_path, "--num-steps", "2", "4", "--axes", "time"]
    run("ablations", *options)
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("runs/*.json")}
    assert sorted(rows) == ["AdaLN-0", "base-0"]
    for row in rows.values():
        assert row["steps"] == 22
        assert sorted(row["scores"]) == ["2", "4"]
        assert set(row["scores"]["4"]) == {"agreement", "distance"}
    # AdaLN: four vectors a block instead of a token.
    assert rows["AdaLN-0"]["parameters"] > rows["base-0"]["parameters"]
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + 2 * 2
    assert all((tmp_path / name).stat().st_size for name in ("ablations.png", "steps.png"))
    dates = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")}
    capsys.readouterr()
    run("ablations", *options)
    assert "Run " not in capsys.readouterr().out  # nothing is trained twice
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")} == dates


BAD = {
    "--process 2/2": "K from 0 to N - 1",
    "--num-steps 1": "must be 2 or more",
    "--reference r.npz": "FID needs --inception and --reference",
    "--data nowhere": "the folder of a cache",
    "--data cifar10 --axes network": "No U-Net of equal cost is known",
    "--iterations 5": r"other settings.*'iterations': \(3000, 5\)",
}


@pytest.mark.once
def test_ablations_refuse_before_they_train(run, tmp_path, capsys):
    settings = dict(iterations=3000, data="digits", num_steps=None, num_images=1000)
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "precision": "float32"}))
    for words, message in BAD.items():
        with pytest.raises(SystemExit) as error:
            run("ablations", "--out", tmp_path, *words.split())
        assert re.search(message, f"{error.value} {capsys.readouterr().err}"), words
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.once
def test_without_latents_it_says_how_to_make_them_and_trains_on_digits(
    until_training, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    until_training("imagenet256", "--quiet", "--out", "run")  # not --quick
    said = capsys.readouterr().out
    assert "Training to step 3014, batches of 64" in said
    assert "No latents in data/imagenet256" in said
    assert "keras-uvit encode tfds:imagenet2012 data/imagenet256 --image-size 256 --flip" in said
    assert (tmp_path / "run" / "digits-cache" / "manifest.json").is_file()


@pytest.mark.once
def test_an_unfinished_cache_is_an_error_and_no_reason_for_a_stand_in(run, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "plan.json").write_text('{"num_shards": 3}')
    # Batches and networks of the recipe are never made: the cache is looked at first.
    with pytest.raises(CacheError, match="unfinished: 0 of 3 shards"):
        run("imagenet256", "--latents", tmp_path / "cache", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_fashion_trains_what_suits_the_data_and_reports(run, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28)).astype("uint8")
    content = (images, np.arange(200) % 10), None
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: content)
    monkeypatch.setattr(evaluation.reports, "CLASSIFIER_STEPS", (10, 10))
    monkeypatch.setattr(presets, "for_data", functools.partial(presets.for_data, num_steps=2))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # nothing is copied to the real one
    run("fashion", "--quick", "--out", tmp_path / "run")
    assert len(list((tmp_path / "run" / "grids").glob("epoch-*.png"))) == 7  # 20 steps, 3 each
    for name in ("report.png", "report.json", "model.keras", "log.csv"):
        assert (tmp_path / "run" / name).stat().st_size


@pytest.mark.once
@pytest.mark.parametrize("name", [*NAMES, "ablations", "cka", "fashion", "digits"])
def test_help_teaches(name):
    text = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    for word in ("Reproduces", "Expect", "Hardware", "Commands", "--quick"):
        assert word in text
    own = ("shapes", "cka", "fashion", "digits")  # whose data are there
    assert ("keras-uvit " in text) == (name not in own)


@pytest.mark.once
def test_editing_draws_and_measures(run, tmp_path):
    run("editing", "--quick", "--out", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["known pixels that came back"] == 1.0
    assert found["completed, read as the scan's class, 4 resamples"] == 1.0  # of six
    assert found["recoloured, scenes right"] == 1.0  # of six; 100 of 100 were measured
    names = {path.name for path in tmp_path.iterdir()}
    films = {"film-digits.png", "film-shapes.png", "film.webp"}
    assert names == {"digits.png", "shapes.png", "metrics.json"} | films
