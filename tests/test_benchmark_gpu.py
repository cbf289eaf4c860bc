"""`benchmarks/gpu.py`: parts within their time, whatever becomes of one; no GPU is needed."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

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
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # killed, and nobody has asked how it ended


# Parts --------------------------------------------------------------------------------------------


def test_parts_fit_eight_minutes_and_eight_files(benchmark_module):
    gpu = benchmark_module("gpu")
    assert sum(part.seconds for part in gpu.PARTS) <= 60 * gpu.MINUTES == 480
    assert len(gpu.PARTS) + len(["rows.jsonl", "table.md"]) <= 8
    assert all((BENCHMARKS / part.command.split()[0]).is_file() for part in gpu.PARTS)


def test_whatever_becomes_of_a_part_its_rows_are_kept_and_the_next_ones_run(
    benchmark_module, monkeypatch, tmp_path
):
    parts = benchmark_module("parts")
    monkeypatch.setattr(parts, "LEAST", 0.1)

    def part(name, code):
        return parts.Part(name, 1, "", ("-c", code), ("part", "n"))

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


def test_a_part_for_which_no_time_is_left_is_not_started(benchmark_module, tmp_path):
    parts = benchmark_module("parts")
    part = parts.Part("late", 60, "", ("-c", "raise SystemExit(1)"))
    (outcome,) = parts.run([part], 1 / 60, tmp_path, dict(os.environ))
    assert outcome.status.startswith("not started")
    assert not (tmp_path / "late.log").exists()


# Contenders ---------------------------------------------------------------------------------------


def test_a_contender_that_ends_is_a_row_and_the_others_are_measured(benchmark_module, monkeypatch):
    side_by_side = benchmark_module("side_by_side")
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


# The whole ----------------------------------------------------------------------------------------


def test_a_dry_run_measures_a_training_step(tmp_path, alone):
    options = ["--dry-run", "--out", tmp_path, "--parts", "train-S", "--backends", BACKEND]
    command = [sys.executable, BENCHMARKS / "gpu.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=500)
    assert done.returncode == 0, done.stdout + (tmp_path / "train-S.log").read_text()[-2000:]
    machine, rival, row, end = rows_of(tmp_path)
    assert (machine["part"], machine["keras"]) == ("machine", keras.__version__)
    assert (rival["contender"], row["contender"]) == ("torch", f"keras-{BACKEND}")
    # Printed with three significant digits: half of the last is at most 0.5 % of the ratio.
    assert row["ratio"] == pytest.approx(row["rival_seconds"] / row["seconds"], rel=0.01)
    assert row["peak_gib"] > 0
    assert end["status"] == "ok"
    assert (tmp_path / "table.md").read_text() in done.stdout


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path]
    nothing = dict(os.environ, PATH=str(tmp_path))  # no nvidia-smi
    done = subprocess.run(command, capture_output=True, text=True, env=nothing, timeout=100)
    assert done.returncode == 1
    assert "--dry-run" in done.stderr
