"""The benchmarks run, small."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_data_prints_a_table_and_a_json_line_a_row(tmp_path):
    small = ["--samples", "128", "--repeats", "1", "--folder", tmp_path]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "data.py", *small],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    head, *lines = result.stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert "samples/s" in head
    assert [row["rival"] for row in rows] == ["cache", "files", "pickles"]
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())  # what it wrote is gone
