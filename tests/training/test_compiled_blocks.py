"""`jit_compile=True` on PyTorch: one program for all blocks of a kind, and the same numbers."""

import sys

import keras
import numpy as np
import pytest
from tiny import diffusion_model, fit

from keras_uvit import DiffusionModel, UNet, backend

if keras.config.backend() != "torch":
    pytest.skip("elsewhere XLA compiles whole steps", allow_module_level=True)

import torch  # noqa: E402

# Code of older versions ends a program in the middle of a block: the numbers are the same, and the
# programs more and smaller.
WHOLE = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 15)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """What torch.compile traces is run as it is: making programs of it takes seconds."""
    torch._dynamo.reset()
    programs, compile = [], torch.compile

    def keep(graph, inputs):
        programs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda f: compile(f, backend=keep, fullgraph=WHOLE, dynamic=False)
    )
    forget = sys.modules[backend.compile_blocks.__module__]._compiled_body.cache_clear
    forget()
    yield programs
    forget()


def made(jit_compile, **options):
    model = diffusion_model(dict(num_layers=5, **options), compiled=False)
    model.compile(jit_compile=jit_compile)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "mixed_bfloat16", "position": "rotary", "qk_norm": True}, {"remat": True}],
    ids=["float32", "bfloat16", "remat"],
)
def test_blocks_and_long_skips_are_two_programs_and_change_no_number(options, traced):
    losses, images = [], []
    for jit_compile in (False, True):
        assert not traced
        model = made(jit_compile, **options)
        losses.append(fit(model)["loss"])
        images.append(model.generate(labels=[0, 2], num_steps=2, guidance_scale=2.0, verbose=0))
    # Two in training, two in sampling.
    assert len(traced) == 4 if WHOLE else len(traced) >= 4
    np.testing.assert_allclose(*losses, rtol=1e-6)  # the same operations
    np.testing.assert_allclose(*images, atol=1)


def test_what_was_chosen_is_kept_and_can_be_changed(traced, tmp_path):
    model = made(True)
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").jit_compile
    model.compile(jit_compile=False)
    fit(model)
    assert not traced


def test_a_network_of_unequal_blocks_is_told_that_it_is_not_compiled():
    network = UNet((8, 8, 1), base_dim=32, head_dim=32, multipliers=(1,), attention_levels=())
    with pytest.warns(UserWarning, match="does nothing for UNet"):
        DiffusionModel(network).compile(jit_compile=True)
