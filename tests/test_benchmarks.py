"""The benchmarks run, small."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = pytest.mark.once

BACKEND = keras.config.backend()
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark in this process; returns the lines that it prints."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_data_prints_a_table_and_a_json_line_a_row(run, tmp_path):
    small = ["--samples", "128", "--repeats", "1", "--folder", tmp_path]
    head, *lines = run("data.py", *small)
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert "samples/s" in head
    assert [row["rival"] for row in rows] == ["cache", "files", "pickles"]
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())  # what it wrote is gone


@pytest.mark.skipif(BACKEND == "tensorflow", reason="cannot say what its tape keeps")
def test_memory_prints_what_recomputing_saves(run, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the script adds one
    options = ["--preset", "uvit_tiny_digits", *(["--compile"] if BACKEND == "jax" else [])]
    head, *lines = run("memory.py", *options)
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert "kept" in head
    settings = [(d, r) for d in ("float32", "mixed_bfloat16") for r in (False, True)]
    assert [(row["dtype"], row["remat"]) for row in rows] == settings
    for whole, remat in (rows[:2], rows[2:]):
        assert whole["cut"] == 0
        assert 0.6 <= remat["cut"] < 1
        assert 0 < remat["kept_gib"] < whole["kept_gib"]
        assert (whole["compiled_gib"] is not None) == (BACKEND == "jax")
    assert rows[2]["kept_gib"] < rows[0]["kept_gib"]  # half the bytes of most activations


def test_sampling_is_measured_in_turn_with_its_rival(alone):
    contender = f"keras-{BACKEND}"
    small = ["--size", "tiny", "--images", "2", "--num-steps", "3", "--turns", "1"]
    command = [sys.executable, BENCHMARKS / "generate.py", "--contenders", contender, *small]
    done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    rival, row = (json.loads(line) for line in lines if line.startswith("{"))
    assert (rival["contender"], rival["ratio"]) == ("torch", 1)
    assert (row["contender"], row["rival"]) == (contender, "torch")
    # Printed with three significant digits: half of the last is at most 0.5 % of the ratio.
    assert row["ratio"] == pytest.approx(row["rival_seconds"] / row["seconds"], rel=0.01)
    assert row["peak_gib"] > 0
    assert contender in lines[-1]
