"""Running commands in this process, and pictures and captions for them."""

import numpy as np
from click.testing import CliRunner
from PIL import Image

from keras_uvit.data import shapes
from keras_uvit_cli import main

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 8, 8, 3)).astype("uint8")
SCENES = [str(scene) for scene in shapes.scenes(40)]


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="keras-uvit")


def run(*words):
    """What a command that succeeds prints."""
    result = invoke(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*words, code=1):
    """The error message of a command that fails: one line, below the usage if `code` is 2."""
    result = invoke(*words)
    assert isinstance(result.exception, SystemExit), repr(result.exception)  # no traceback
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("Error: "), result.stderr
    if code == 1:
        assert len(lines) == 1, result.stderr
    return lines[-1]


def misused(*words):
    return refused(*words, code=2)


def save_pngs(folder, images=PICTURES, classes=()):
    for k, image in enumerate(images):
        place = folder / classes[k % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{k:02d}.png")
    return folder
