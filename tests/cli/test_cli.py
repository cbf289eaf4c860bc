"""The command line itself: start-up without Keras, examples in its help, answers to misuse."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
from shell import PICTURES, invoke, misused, refused, run, save_pngs

import keras_uvit
import keras_uvit_cli
from keras_uvit import UViT, distribution, presets
from keras_uvit.diffusion.samplers import SAMPLERS
from keras_uvit_cli import main, options

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


def python(code, **environment):
    """Runs code in a process of its own, where nothing is imported yet."""
    paths = [str(Path(keras_uvit_cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_completion_and_usage_errors_do_not_import_keras():
    result = python("""
import os, sys
from keras_uvit_cli import main

def keras_uvit(*words):
    try:
        main(words, prog_name="keras-uvit")
    except SystemExit as end:
        return end.code

assert keras_uvit("--help") == keras_uvit("train", "--help") == keras_uvit("--version") == 0
assert keras_uvit("nonsense") == keras_uvit("train", "--nonsense") == keras_uvit("train") == 2
assert keras_uvit("generate", "m", "a.png", "--num-steps", "many") == 2
assert keras_uvit("generate", "m", "a.png", "--sampler", "nonsense") == 2
assert keras_uvit("encode", "digits", "cache", "--pixels", "--flip") == 2
os.environ.update(_KERAS_UVIT_COMPLETE="bash_complete", COMP_CWORD="1", COMP_WORDS="keras-uvit tr")
print("Completed:")
keras_uvit()
print([m for m in ("keras", "keras_uvit", "numpy", "jax", "torch") if m in sys.modules])
""")
    assert result.returncode == 0, result.stderr
    *_, completed, imported = result.stdout.splitlines()
    assert completed == "plain,train"
    assert imported == "[]"


def test_a_missing_backend_is_told_without_a_traceback():
    result = python("""
import sys
sys.modules["keras"] = None  # its import fails, as Keras' own does without the backend
from keras_uvit_cli import main
main(["presets"])
""")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: Keras could not start its backend")
    for words in ("KERAS_BACKEND=jax, tensorflow or torch", '"keras-uvit[jax]"', "/cpu"):
        assert words in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_the_script_the_module_and_the_version():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert scripts["scripts"] == {"keras-uvit": "keras_uvit_cli:main"}
    assert run("--version") == f"keras-uvit, version {keras_uvit.__version__}\n"
    result = subprocess.run(
        [sys.executable, "-m", "keras_uvit_cli", "-h"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.startswith("Usage: keras-uvit [OPTIONS] COMMAND")


def test_names_are_those_of_the_library():
    assert tuple(SAMPLERS) == options.SAMPLERS
    assert options.DEVICES == distribution.DEVICES
    assert ("data", *distribution.LAYOUTS) == options.LAYOUTS
    (fast,) = [option for option in main.commands["generate"].params if option.name == "fast"]
    assert f"in {presets.FAST['num_steps']} steps of {presets.FAST['sampler']}, " in fast.help
    assert f"up to t = {presets.FAST['guidance_interval'][1]};" in fast.help


@pytest.mark.parametrize("command", main.commands)
def test_every_commands_help_has_examples_that_are_valid(command):
    """Options exist and take what is written; nothing is run."""
    examples = main.commands[command].help.replace("\\\n", " ").split("\n\n")[-1]
    lines = [shlex.split(line)[1:] for line in examples.splitlines() if "keras-uvit " in line]
    assert lines
    for name, *words in lines:
        assert name == command
        # Files are not there: what is checked is what a person types.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(click.Path, "convert", lambda self, value, *_: value)
            main.commands[command].make_context(command, words)
    assert re.search(rf"^  {command}  .*[^.]\.$", run("--help"), re.M)  # listed, and not cut off


# Misuse and errors --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what commands are pointed at by mistake."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").touch()
    save_pngs(folder / "photos")
    save_pngs(folder / "large", PICTURES.repeat(2, 1).repeat(3, 2))
    np.savez(folder / "a.npz", image=PICTURES)
    (folder / "bad.keras").write_bytes(b"PK\3\4")
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("zwölf".encode("latin-1"))
    UViT(**presets.get("uvit_nano_colour").network).save(folder / "net.keras")
    return folder


@pytest.fixture
def unchanged(place, monkeypatch):
    """In that folder, nothing is written."""
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


MISUSE = [
    ("nonsense", "No such command 'nonsense'"),
    ("generate", "Missing argument 'MODEL'"),
    ("generate m a.png --sampler x", "'x' is not one of 'ddim', 'ddpm'"),
    ("generate m a.png --seed=-1", "-1 is not in the range x>=0"),
    ("generate m a.png --labels 1,,2", "class numbers such as 207,360"),
    ("generate m a.jpg", "ending in .png"),
    ("generate m file", "file is a file; expected a folder"),
    ("generate m file/a.png", "file/a.png cannot be written"),
    ("generate photos a.png --num-images 1", "photos is no model: expected the name of a preset"),
    ("report photos photos out", "photos is no model: expected the name of a preset"),
    ("generate m.keras a.png --weights w.pth", "--weights goes with a preset"),
    # What a preset cannot draw.
    ("generate uvit_nano_digits a.png", "from --labels. Received: none of these options"),
    ("generate uvit_nano_digits a.png --num-images 2", "from --labels. Received: --num-images"),
    ("generate uvit_nano_digits a.png --labels 3,10", "numbered from 0 to 9. Received: 10"),
    ("generate uvit_nano_colour a.png --labels 3", "from --num-images. Received: --labels"),
    ("generate uvit_nano_shapes a.png --labels 3", "from --prompt. Received: --labels"),
    ("generate uvit_nano_latent a.png --labels 2", "pass --autoencoder"),
    ("convert autoencoder gone.pth a.pth", "'gone.pth' does not exist"),
    ("convert autoencoder file a.txt", "ending in .pth or .safetensors or .weights.h5"),
    ("evaluate photos --reference file --inception file --num-images 5", "omit --prompts"),
    ("encode digits c", "Pass --autoencoder FILE to store latents, or --pixels"),
    ("encode digits c --pixels --process 2/2", "expected K/N"),
    ("encode digits c --pixels --autoencoder space-to-depth", "omit --autoencoder and --flip"),
    ("encode digits c --pixels --text file", "has no captions: omit --text"),
    ("encode shapes:8 c --pixels", "has captions: pass --text, or --no-captions"),
    ("encode shapes:0 c --pixels", "such as shapes:20000"),
    ("encode shapes:8 c --pixels --image-size 8", "omit --image-size, --crop, --channels"),
    ("encode coco:photos c --pixels --channels 1", "omit --crop and --channels"),
    ("encode photos c --pixels", "needs --image-size"),
    ("encode a.npz c --pixels --image-size 4", "omit --image-size"),
    ("train model.keras r", "model.keras is a model, not data"),
    ("train uvit_tiny_digits r", "train DATASET FOLDER --preset uvit_tiny_digits"),
    ("train digits r --lora 4", "--lora goes with --from"),
    ("train digits r --from w.pth", "--from needs --steps or --epochs"),
    ("train digits r --from uvit_tiny_digits --steps 1", "goes with --preset"),
    ("train digits r --from model.keras --key ema --steps 1", "goes with --preset"),
    ("train digits r --from model.keras --width 16 --steps 1", "--width and --layers cannot"),
    ("train digits r --image-size 16", "--image-size is for folders"),
    ("train digits r --preset unet_tiny_digits --width 8", "are for U-ViTs"),
    ("train digits r --steps 5 --epochs 7", "Choose one of --steps and --epochs"),
    ("train digits r --preset uvit_nano_digits --hours 1", "--hours goes without --preset"),
    ("train digits r --preset uvit_nano_digits --image-size 9", "--preset"),
    ("train digits r --preset uvit_nano_digits --batch-size 9999", "between 1 and .* 1437"),
    ("train large r --preset uvit_nano_colour", "8x8x3. Pass --image-size 8"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("words", "message"), MISUSE, ids=[words for words, _ in MISUSE])
def test_misuse_gets_one_line_below_the_usage(monkeypatch, words, message):
    monkeypatch.setattr(presets, "load", None)  # nothing is built before
    assert re.search(message, misused(*words.split()))


ERRORS = [
    ("generate uvit_nano_digit a.png", "Unknown preset 'uvit_nano_digit'. Nearest: ['uvit_nano_d"),
    ("evaluate uvit_nano_digit --reference file --inception file", "Nearest: ['uvit_nano_digits'"),
    ("generate gone.keras a.png", "gone.keras"),
    ("generate bad.keras a.png", "bad.keras"),
    ("generate net.keras a.png", "DiffusionModel in net.keras. Received: UViT"),
    ("generate uvit_nano_colour a.png --num-images 1 --weights bad.keras", "bad.keras"),
    ("generate uvit_nano_shapes a.png --prompts empty.txt", "empty.txt has no prompts"),
    (
        "generate uvit_nano_shapes a.png --prompts latin.txt",
        "latin.txt is not a text file in UTF-8",
    ),
    # A source is looked at before CLIP is loaded, which takes long.
    ("encode gone c --pixels --text nowhere", "gone"),
    ("encode coco:gone c --pixels --text nowhere", "gone"),
    ("encode shapes:8 c --pixels --text nowhere", "nowhere"),
    ("train gone run", "No folder at gone. Expected a folder of images"),
    ("train shapes:8 run --preset uvit_nano_shapes", "keras-uvit encode shapes:8 CACHE"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("words", "message"), ERRORS, ids=[words for words, _ in ERRORS])
def test_errors_get_one_line(words, message):
    assert message in refused(*words.split())


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    assert "cannot be written" in misused("generate", "m", tmp_path / "new" / "a.png")


def test_traceback_shows_where_an_error_was_raised(tmp_path):
    result = invoke("--traceback", "generate", "uvit_nano_digit", tmp_path / "a.png")
    assert isinstance(result.exception, ValueError)
    assert "Unknown preset" in str(result.exception)
    misused("--traceback", "encode", "digits", tmp_path / "c")  # misuse stays misuse


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a fault of the program")

    monkeypatch.setattr(presets, "load", broken)
    result = invoke("generate", "uvit_nano_digits", tmp_path / "a.png", "--labels", 1)
    assert isinstance(result.exception, AssertionError)
