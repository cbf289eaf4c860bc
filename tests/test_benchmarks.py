"""The benchmarks run, small; `gpu.py` runs its parts within their time, whatever becomes of one."""

import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import keras
import pytest
from tiny import refused

pytestmark = pytest.mark.once

BACKEND = keras.config.backend()
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"child": %d}' % child.pid, flush=True)
print('{"cut', end="", flush=True)
time.sleep(60)
"""
SIDE = """
import os, side_by_side
side_by_side.serve(lambda: (%s, {"gmacs": 1}))
"""


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def run(module, monkeypatch, capsys):
    """Runs a benchmark in this process; returns what it prints, and the rows that are in it."""

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        lines = capsys.readouterr().out.splitlines()
        return lines, [json.loads(line) for line in lines if line.startswith("{")]

    return run


def test_data_prints_a_table_and_a_json_line_a_row(run, tmp_path):
    small = ["--samples", "128", "--repeats", "1", "--folder", tmp_path]
    lines, rows = run("data.py", *small)
    assert "samples/s" in lines[0]
    assert [row["rival"] for row in rows] == ["cache", "files", "pickles"]
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())  # what it wrote is gone


@pytest.mark.skipif(BACKEND == "tensorflow", reason="cannot say what its tape keeps")
def test_memory_prints_what_recomputing_saves(run, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the script adds one
    options = ["--preset", "uvit_tiny_digits", *(["--compile"] if BACKEND == "jax" else [])]
    lines, rows = run("memory.py", *options)
    assert "kept" in lines[0]
    settings = [(d, r) for d in ("float32", "mixed_bfloat16") for r in (False, True)]
    assert [(row["dtype"], row["remat"]) for row in rows] == settings
    for whole, remat in (rows[:2], rows[2:]):
        assert whole["cut"] == 0
        assert 0.6 <= remat["cut"] < 1
        assert 0 < remat["kept_gib"] < whole["kept_gib"]
        assert (whole["compiled_gib"] is not None) == (BACKEND == "jax")
    assert rows[2]["kept_gib"] < rows[0]["kept_gib"]  # half the bytes of most activations


# Contenders ---------------------------------------------------------------------------------------


def test_a_contender_that_ends_is_a_row_and_the_others_are_measured(module, monkeypatch):
    side_by_side = module("side_by_side")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))

    def started(name, turn):
        return functools.partial(side_by_side.Contender, name, ["-c", SIDE % turn], "none")

    rival = started("rival", "lambda: None")
    others = [started("broken", "lambda: os._exit(1)"), started("sound", "lambda: None")]
    rows = list(side_by_side.measure(rival, others, turns=1))
    assert [row["contender"] for row in rows] == ["rival", "broken", "sound"]
    assert ["failed" in row for row in rows] == [False, True, False]
    assert (rows[2]["rival"], rows[2]["gmacs"]) == ("rival", 1)
    assert "**broken failed**" in side_by_side.report(rows, ["contender"])
    broken_rival = started("rival", "lambda: os._exit(1)")
    lost, row = side_by_side.measure(broken_rival, others[1:], turns=1)
    assert "failed" in lost
    assert (row["contender"], row["ratio"]) == ("sound", None)


def assert_compared(rows, contender):
    rival, row = rows
    assert (rival["contender"], rival["ratio"]) == ("torch", 1)
    assert (row["contender"], row["rival"]) == (contender, "torch")
    # Printed with three significant digits: half of the last is at most 0.5 % of the ratio.
    assert row["ratio"] == pytest.approx(row["rival_seconds"] / row["seconds"], rel=0.01)
    assert row["peak_gib"] > 0


def test_sampling_is_measured_in_turn_with_its_rival(module, run, monkeypatch):
    """Both in this process: in processes of their own is the dry run below."""
    side_by_side, generate = module("side_by_side"), module("generate")

    class Contender:
        process = types.SimpleNamespace(poll=lambda: None)

        def __init__(self, name, command, framework):
            self.name, self.seconds = name, []
            self.draw, self.about = generate.prepare(json.loads(command[-1]))

        def turn(self):
            self.seconds.append(side_by_side.timed(self.draw))
            self.about["peak_gib"] = side_by_side.peak_gib()

        def stop(self):
            pass

    monkeypatch.setattr(side_by_side, "Contender", Contender)
    contender = f"keras-{BACKEND}"
    small = ["--size", "tiny", "--images", "2", "--num-steps", "3", "--turns", "1"]
    lines, rows = run("generate.py", "--contenders", contender, *small)
    assert_compared(rows, contender)
    assert contender in lines[-1]


# Parts of gpu.py ----------------------------------------------------------------------------------


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # killed, and nobody has asked how it ended


def test_parts_fit_eight_minutes_and_eight_files_and_want_a_gpu(module, monkeypatch, tmp_path):
    gpu = module("gpu")
    assert sum(part.seconds for part in gpu.PARTS) <= 60 * gpu.MINUTES == 480
    assert len(gpu.PARTS) + len(["rows.jsonl", "table.md"]) <= 8
    assert all((BENCHMARKS / part.command.split()[0]).is_file() for part in gpu.PARTS)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    refused(SystemExit, gpu.gpu_facts, "--dry-run")


def test_whatever_becomes_of_a_part_its_rows_are_kept_and_the_next_ones_run(
    module, monkeypatch, tmp_path
):
    parts = module("parts")
    monkeypatch.setattr(parts, "LEAST", 0.1)

    def part(name, code, seconds=1):
        return parts.Part(name, seconds, "", ("-c", code), ("part", "n"))

    todo = [
        part("hangs", HANGS),
        part("fails", "print('{\"n\": 1}'); print('words'); raise SystemExit(3)"),
        part("works", "print('{\"n\": 2}')"),
    ]
    outcomes = list(parts.run(todo, 12 / 60, tmp_path, dict(os.environ)))
    statuses = [outcome.status for outcome in outcomes]
    assert statuses == ["out of time after 4 s", "failed with exit status 3", "ok"]
    *_, summary = rows_of(tmp_path)
    assert (summary["part"], summary["status"]) == ("works", "ok")
    assert [row["n"] for row in rows_of(tmp_path) if "n" in row] == [1, 2]
    assert (tmp_path / "fails.log").read_text() == "words\n"
    assert not is_running(outcomes[0].rows[0]["child"])
    text = parts.summary(outcomes)
    assert "## fails: failed with exit status 3" in text
    assert "| works | 2 |" in text
    monkeypatch.setattr(parts, "LEAST", 5)
    (late,) = parts.run([part("late", "1 / 0", 60)], 1 / 60, tmp_path, dict(os.environ))
    assert late.status.startswith("not started")
    assert not (tmp_path / "late.log").exists()


def test_a_dry_run_measures_a_training_step(tmp_path, alone):
    options = ["--dry-run", "--out", tmp_path, "--parts", "train-S", "--backends", BACKEND]
    command = [sys.executable, BENCHMARKS / "gpu.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=500)
    assert done.returncode == 0, done.stdout + (tmp_path / "train-S.log").read_text()[-2000:]
    machine, *rows, end = rows_of(tmp_path)
    assert (machine["part"], machine["keras"]) == ("machine", keras.__version__)
    assert_compared(rows, f"keras-{BACKEND}")
    assert end["status"] == "ok"
    assert (tmp_path / "table.md").read_text() in done.stdout
