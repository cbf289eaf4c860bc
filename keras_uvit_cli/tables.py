"""`presets` and `cost`: what there is, and what it takes."""

import click

from keras_uvit_cli.options import COUNT, PRECISIONS


@click.command("presets")
def show_presets() -> None:
    """List the presets, their size and their published FID.

    \b
    Example:
      keras-uvit presets
    """
    from keras_uvit import presets

    click.echo(f"{'name':26}{'parameters':>12}{'GMACs':>8}{'FID':>7}  paper")
    for name, row in presets.PRESETS.items():
        reported = f"{row.reported_fid:.2f}" if row.reported_fid else "-"
        size = f"{row.params / 1e6:.1f}M"
        click.echo(f"{name:26}{size:>12}{row.gmacs:8.1f}{reported:>7}  {row.paper_name}")


@click.command("cost")
@click.argument("preset", required=False)
@click.option(
    "--batch-size",
    type=COUNT,
    show_default="the preset's; 1 in the table of all presets",
    help="Number of images on each device, for the memory.",
)
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    default="float32",
    help="Number format of the training, for the memory.",
)
def show_cost(preset: str | None, batch_size: int | None, dtype: str) -> None:
    """Show the size, work and memory of PRESET, or of all presets.

    The counts of parameters and multiply-accumulates are those of the network as this package
    builds it, beside the numbers that the paper prints. The memory of training is an estimate, for
    U-ViTs only.

    \b
    Examples:
      keras-uvit cost
      keras-uvit cost uvit_large_imagenet256 --batch-size 32 --dtype mixed_bfloat16
    """
    from keras_uvit_cli import costs

    if preset is None:
        costs.show_all(batch_size or 1, dtype)
    else:
        costs.show_one(preset, batch_size, dtype)
