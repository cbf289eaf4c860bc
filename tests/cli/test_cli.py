"""The command line itself: start-up without Keras, help, and answers to misuse."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from shell import invoke, misused, refused, run, save_pngs

import keras_uvit
import keras_uvit_cli
from keras_uvit import distribution, presets
from keras_uvit.diffusion.samplers import SAMPLERS
from keras_uvit_cli import main, options

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
COMMANDS = list(main.commands)


# Start-up -----------------------------------------------------------------------------------------


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
    for words in (
        "KERAS_BACKEND=jax, tensorflow or torch",
        'pip install "keras-uvit[jax]"',
        "/cpu",
    ):
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


# Help ---------------------------------------------------------------------------------------------


def all_options():
    for name, command in {"keras-uvit": main, **main.commands}.items():
        for option in command.params:
            if isinstance(option, click.Option):
                yield pytest.param(option, id=f"{name} {option.opts[0]}")


@pytest.mark.parametrize("option", all_options())
def test_every_option_has_a_sentence_of_help(option):
    assert option.help
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    assert len(option.help.split()) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_summary_and_examples_that_are_valid(command):
    """Options exist and take what is written; nothing is run."""
    summary, *_, examples = main.commands[command].help.replace("\\\n", " ").split("\n\n")
    assert re.fullmatch(r"[A-Z].* .* .*\.", summary.replace("\n", " "))
    lines = [shlex.split(line)[1:] for line in examples.splitlines() if "keras-uvit " in line]
    assert lines
    for name, *words in lines:
        assert name == command
        # Files are not there: what is checked is what a person types.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(click.Path, "convert", lambda self, value, *_: value)
            main.commands[command].make_context(command, words)


def test_the_groups_help_names_all_commands_and_the_backends():
    text = run("--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  .*\.$", text, re.M)
    assert "..." not in text.split("\nCommands:")[1]  # no summary is cut off
    assert "KERAS_BACKEND=jax, tensorflow or torch" in text.replace("\n ", "")
    assert set(re.findall(r"^ +keras-uvit (\w+)", text, re.M)) <= set(COMMANDS)


def test_defaults_are_shown():
    text = " ".join(run("train", "--help").split())
    assert "[default: 1000; x>=1]" in text
    assert "[default: (the preset's, or what suits the machine); x>=1]" in text


# Misuse and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense", "No such command 'nonsense'"),
        ("generate", "Missing argument 'MODEL'"),
        ("generate m a.png --sampler x", "'x' is not one of 'ddim', 'ddpm'"),
        ("generate m a.png --seed=-1", "-1 is not in the range x>=0"),
        ("generate m a.png --labels cat", "expected class numbers such as 207,360"),
        ("generate m a.png --labels 1,,2", "expected class numbers such as 207,360"),
        ("generate m a.jpg", "expected a name ending in .png"),
        ("generate m file", "file is a file; expected a folder"),
        ("generate m file/a.png", "file/a.png cannot be written: .*file is not a folder"),
        ("generate m a.png --prompts gone.txt", "'gone.txt' does not exist"),
        ("generate m a.png --autoencoder gone.pth", "'gone.pth' does not exist"),
        ("convert autoencoder gone.pth a.pth", "'gone.pth' does not exist"),
        ("convert autoencoder file a.txt", "ending in .pth or .safetensors or .weights.h5"),
        ("statistics digits a.json --inception file", "ending in .npz. Received: a.json"),
        ("evaluate m --reference file --inception file --out a.txt", "ending in .json"),
        ("encode digits c --pixels --process 3", "expected K/N .*Received: 3"),
        ("encode digits c --pixels --process 2/2", "expected K/N .*Received: 2/2"),
        ("encode digits c --pixels --process=-1/2", "expected K/N .*Received: -1/2"),
        ("encode digits c --pixels --dtype int8", "'int8' is not one of"),
        ("encode digits c --pixels --flip", "omit --autoencoder and --flip"),
        ("encode digits c --pixels --autoencoder space-to-depth", "omit --autoencoder and --flip"),
        ("encode digits c", "Pass --autoencoder FILE to store latents, or --pixels"),
        ("train digits file/run", "file/run cannot be written"),
    ],
)
def test_misuse_gets_one_line_below_the_usage(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert re.search(message, misused(*words.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    assert "cannot be written" in misused("generate", "m", tmp_path / "new" / "a.png")


@pytest.mark.parametrize(
    "words", ["generate NAME a.png", "train digits run --preset NAME", "cost NAME"]
)
def test_an_unknown_preset_is_answered_with_the_nearest(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    line = refused(*words.replace("NAME", "uvit_nano_digit").split())
    assert "Unknown preset 'uvit_nano_digit'. Nearest: ['uvit_nano_digits'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", ["generate PHOTOS a.png --num-images 1", "report PHOTOS PHOTOS out"]
)
def test_pictures_in_place_of_a_model_are_told(tmp_path, words):
    photos = save_pngs(tmp_path / "photos")
    line = misused(*words.replace("PHOTOS", str(photos)).split())
    assert "photos is no model: expected the name of a preset" in line


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
