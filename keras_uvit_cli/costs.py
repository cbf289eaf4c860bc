"""What networks and their training cost, as text for `keras-uvit cost`."""

import click

from keras_uvit import evaluation, presets
from keras_uvit.networks import UViT

GIB = 2**30


def show_one(preset: str, batch_size: int | None, dtype: str) -> None:
    """Prints work and memory of one preset; `batch_size` None is the preset's."""
    row = presets.get(preset)
    click.echo(f"{preset}: {row.paper_name}\n")
    _work(row)
    _memory(row, batch_size or row.batch_size, dtype)


def show_all(batch_size: int, dtype: str) -> None:
    """Prints a line for each preset."""
    head = ("parameters", "paper", "GMACs", "paper", "GFLOPs", "state", "kept", "remat")
    click.echo(_line("name", *head))
    for name, row in presets.PRESETS.items():
        millions, gmacs = row.reported_cost
        state = sum(evaluation.state_memory(row.params, dtype).values())
        tokens, _, remat = _kept(row, batch_size, dtype)
        memory = [_gib(size) for size in (state, tokens, remat)]
        counts = (f"{row.params:,}", _or_dash(millions, "M"), f"{row.gmacs:.3g}", _or_dash(gmacs))
        click.echo(_line(name, *counts, f"{6 * row.gmacs:.3g}", *memory))
    click.echo(
        f"""
GMACs: 1e9 multiply-accumulates of one image's forward pass; the papers call these "GFLOPs".
GFLOPs: 1e9 operations to train on one image, 6 x GMACs. paper: as the paper prints it, - if not.
state: GiB of weights, gradients, AdamW's moments and the moving average. kept: GiB of activations
kept for the backward pass of a batch of {batch_size} in {dtype}, with fused attention. remat: the
same with remat=True, which costs 8 x GMACs. Memory is an estimate."""
    )


def _line(name, params, millions, gmacs, paper, flops, *memory):
    counts = f"{name:27}{params:>12}{millions:>7}{gmacs:>9}{paper:>7}{flops:>8}"
    return counts + "".join(f"{x:>10}" for x in memory)


def _work(row):
    millions, gmacs = row.reported_cost
    forward, training = "forward pass of one image", "training on one image: 6 x GMACs"
    rows = [
        ("", "counted", "paper", ""),
        ("parameters", f"{row.params:,}", _or_dash(millions, "M"), ""),
        ("GMACs", f"{row.gmacs:.4g}", _or_dash(gmacs), f'{forward}; "GFLOPs" in the paper'),
        ("GFLOPs", f"{6 * row.gmacs:.4g}", "", f"{training}, with remat 8 x"),
    ]
    for name, counted, paper, note in rows:
        click.echo(f"{name:26}{counted:>12}{paper:>8}  {note}".rstrip())


def _memory(row, batch_size, dtype):
    state = evaluation.state_memory(row.params, dtype)
    tokens, attention, remat = _kept(row, batch_size, dtype)
    notes = {name: f"{size // row.params} bytes per weight" for name, size in state.items()}
    rows = {
        **state,
        "activations": tokens,
        "activations with remat": remat,
        "attention not fused": attention,
    }
    notes["activations"] = "kept for the backward pass, with fused attention"
    notes["attention not fused"] = "in addition, on a CPU without remat"
    click.echo(f"\n{f'{dtype}, batch {batch_size}':26}{'GiB':>12}          estimates")
    for name, size in rows.items():
        click.echo(f"{name:26}{_gib(size):>12}          {notes.get(name, '')}".rstrip())
    if tokens is not None:
        fixed = sum(state.values())
        click.echo(f"{'together':26}{_gib(fixed + tokens):>12}")
        click.echo(f"{'together with remat':26}{_gib(fixed + remat):>12}")


def _kept(row, batch_size, dtype):
    """Bytes of activations, of attention that is not fused, of activations with `remat`."""
    if row.architecture is not UViT:
        return None, None, None
    config = {**row.network, "dtype": dtype}
    remat = evaluation.activation_memory({**config, "remat": True}, batch_size)
    return *evaluation.activation_memory(config, batch_size), remat.tokens


def _gib(size):
    return "-" if size is None else f"{size / GIB:.3g}"


def _or_dash(number, unit=""):
    return "-" if number is None else f"{number}{unit}"
