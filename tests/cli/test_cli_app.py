"""`app`: which models the page gets, and what is refused before one is loaded."""

import sys

import pytest
from shell import misused, refused, run

from keras_uvit import presets

pytestmark = pytest.mark.once


@pytest.fixture
def served(monkeypatch):
    """What the command would serve."""
    calls = []
    monkeypatch.setattr("keras_uvit.app.serve", lambda *arguments: calls.append(arguments))
    return calls


def test_a_preset_has_the_weights_that_ship(served):
    run("app", "uvit_tiny_digits")
    run("app", "uvit_nano_digits", "--host", "0.0.0.0", "--port", 8000)
    (shipped, *where), (nano, *elsewhere) = served
    assert where == ["127.0.0.1", 7860]
    assert elsewhere == ["0.0.0.0", 8000]
    assert [*nano] == ["uvit_nano_digits"]
    biases = [w for w in shipped["uvit_tiny_digits"].network.weights if w.path.endswith("bias")]
    assert any(abs(bias.numpy() if hasattr(bias, "numpy") else bias).sum() for bias in biases)


def test_without_a_model_there_are_all_that_ship_but_for_those_that_lack_a_package(
    served, monkeypatch
):
    loaded = presets.load

    def load(name, *arguments, **options):
        if name.startswith("uvit_tiny_shapes"):
            raise ImportError('pip install "keras-uvit[text]"')
        return loaded(name, *arguments, **options)

    monkeypatch.setattr(presets, "load", load)
    run("app")
    assert [*served[0][0]] == ["uvit_tiny_digits", "uvit_tiny_digits_fast"]


def test_what_cannot_be_served_is_refused(monkeypatch, served):
    assert "--weights goes with a MODEL" in misused("app", "--weights", "pretrained")
    assert "pass --autoencoder" in misused("app", "uvit_nano_latent")
    assert "Unknown preset" in refused("app", "nonsense")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gradio", None)  # its import fails
    assert 'pip install "keras-uvit[app]"' in refused("app", "uvit_tiny_digits")
