"""`app`: a page in the browser."""

from typing import Any

import click

from keras_uvit_cli.options import MODEL_OPTIONS


@click.command()
@click.argument("model", required=False)
@MODEL_OPTIONS
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to listen at. With 0.0.0.0 everybody in the network can draw; there is no "
    "password.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, help="Port to listen at.")
def app(model: str | None, parts: dict[str, Any], host: str, port: int) -> None:
    """Serve a page in the browser to draw with.

    It draws with MODEL, a preset, a .keras file, or a folder of checkpoints; without it the page
    has all models whose weights ship with the package. A preset has the weights that ship with it,
    unless --weights names others. Nothing is fetched from the network.

    \b
    Examples:
      keras-uvit app
      keras-uvit app runs/photos/model.keras --port 8000
    """
    from keras_uvit.app import serve
    from keras_uvit_cli.inputs import open_models

    serve(open_models(model, parts), host, port)
