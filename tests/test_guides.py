"""The guide runs, small, and has the form that keras-io asks for."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

GUIDES = sorted((Path(__file__).parents[1] / "guides").glob("*.py"))
HEADER = ("Title", "Author", "Date created", "Last modified", "Description", "Accelerator")
SMALLER = [(r"EPOCHS = \d+", "EPOCHS = 1"), (r"hidden_dim=\d+", "hidden_dim=16")]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_header_and_cells(path):
    text = path.read_text(encoding="utf-8")
    header, *body = ast.parse(text).body
    names = [line.partition(":")[0] for line in header.value.value.strip().splitlines()]
    assert names == [*HEADER]
    assert len([node for node in body if isinstance(node, ast.Expr)]) > 5
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch, capsys):
    text = path.read_text(encoding="utf-8")
    for large, small in SMALLER:
        text, changes = re.subn(large, small, text)
        assert changes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    made = {}
    exec(compile(text, path.name, "exec"), made)
    assert made["completed"].shape == (10, 8, 8, 1)
    assert (made["completed"][:, :4] == made["scans"][:, :4]).all()
    assert "The loaded model draws the same digit: True" in capsys.readouterr().out
    assert (tmp_path / "digits.keras").stat().st_size > 10_000
