"""`presets` and `cost`: what is counted, what is published, what is estimated."""

import re

import pytest
from shell import run

from keras_uvit import UViT, evaluation, presets

pytestmark = pytest.mark.once

LARGE = "uvit_large_imagenet256"
MEMORY = (
    *("weights", "gradients", "AdamW's two moments", "moving average"),
    *("activations", "activations with remat", "together", "together with remat"),
)


def table(text):
    """Lines as {name: cells}; cells are what two blanks part."""
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {name: cells for name, *cells in rows}


def test_presets_are_listed_with_parameters_and_fid():
    lines = run("presets").splitlines()
    assert len(lines) == 1 + len(presets.PRESETS)
    for name, row in presets.PRESETS.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        fid = f"{row.reported_fid:.2f}" if row.reported_fid else "-"
        assert line.split()[1:4] == [f"{row.params / 1e6:.1f}M", f"{row.gmacs:.1f}", fid]
        assert line.endswith(row.paper_name)


def test_a_presets_counts_are_beside_the_papers_and_memory_adds_up():
    rows = table(run("cost", LARGE, "--batch-size", 8))
    assert rows["parameters"] == ["286,763,172", "287M"]
    assert rows["GMACs"][:2] == ["76.5", "77"]
    assert rows["GFLOPs"][0] == "459"  # 6 x 76.5
    sizes = {name: float(cells[0]) for name, cells in rows.items() if name in MEMORY}
    assert sizes["weights"] == 1.07  # 4 bytes x 286,763,172 / 2^30
    assert sizes["AdamW's two moments"] == 2.14
    assert sizes["activations"] == 2.80  # as in tests/evaluation/test_memory.py, without attention
    fixed = sum(sizes[name] for name in MEMORY[:4])
    for kept, together in zip(MEMORY[4:6], MEMORY[6:]):
        assert sizes[together] == pytest.approx(fixed + sizes[kept], abs=0.03)  # three digits each
    half = table(run("cost", LARGE, "--batch-size", 8, "--dtype", "mixed_bfloat16"))
    assert half["weights in half precision"][0] == "0.534"
    assert float(half["activations"][0]) < sizes["activations"]


def test_what_is_unknown_is_a_dash_and_the_batch_is_the_presets():
    assert "float32, batch 128" in run("cost", "uvit_small_cifar10")
    assert "-" in table(run("cost", "uvit_mid_coco"))["parameters"]  # which is not in the paper
    other = next(n for n, row in presets.PRESETS.items() if row.architecture is not UViT)
    rows = table(run("cost", other))
    assert rows["activations"][0] == "-"
    assert "together" not in rows


def test_without_a_preset_all_are_listed():
    rows = {line.split()[0]: line.split()[1:] for line in run("cost").splitlines() if line}
    assert set(presets.names()) <= set(rows)
    for name in presets.names():
        row, cells = presets.get(name), rows[name]
        assert cells[0] == f"{row.params:,}"
        assert float(cells[2]) == pytest.approx(row.gmacs, rel=0.005)  # three digits
        assert float(cells[5]) == pytest.approx(20 * row.params / 2**30, rel=0.005)
        is_known = row.architecture is UViT
        assert (cells[6:] == ["-", "-"]) == (not is_known)
        if is_known:
            kept = evaluation.activation_memory(row.network).tokens / 2**30
            assert float(cells[6]) == pytest.approx(kept, rel=0.005)


def test_counts_are_those_that_the_paper_prints():
    known = {name: row for name, row in presets.PRESETS.items() if row.reported_cost[0]}
    assert len(known) >= 10
    for name, row in known.items():
        millions, gmacs = row.reported_cost
        # U-ViTs are the paper's own; what they are compared with is near.
        near = 0.5 if row.architecture is UViT else 0.01 * millions
        assert row.params / 1e6 == pytest.approx(millions, abs=near), name
        assert gmacs is None or row.gmacs == pytest.approx(gmacs, rel=0.01), name
