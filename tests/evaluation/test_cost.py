"""Parameters and multiply-accumulates against a count by hand and by PyTorch."""

import keras
import numpy as np
import pytest
import torch_unet
from tiny import uvit
from torch.utils.flop_counter import FlopCounterMode

from keras_uvit import UNet, UViT
from keras_uvit.evaluation import count_macs, count_parameters

pytestmark = pytest.mark.once

PATCHES, DIM, PIXELS = 16, 16, 64  # an 8x8x3 image in 2x2 patches
PICTURE = dict(image_shape=(8, 8, 3), hidden_dim=DIM)


def block(tokens, mlp_dim=4 * DIM, kernels=2):
    """qkv and projection, the MLP's layers, and Q K^T and weights V."""
    return tokens * (3 * DIM**2 + DIM**2 + kernels * DIM * mlp_dim) + 2 * tokens**2 * DIM


def by_hand(tokens=PATCHES + 1, skip=2 * DIM**2, conv=True, extra=0, patch_embed=None, **mlp):
    head = PATCHES * DIM * 12
    patch_embed = PATCHES * 12 * DIM if patch_embed is None else patch_embed
    output_conv = PIXELS * 9 * 3 * 3 if conv else 0
    return patch_embed + 3 * block(tokens, **mlp) + tokens * skip + head + output_conv + extra


CASES = {
    "time token": ({}, by_hand()),
    "label token": (dict(num_classes=5), by_hand(PATCHES + 2)),
    "context tokens": (dict(context_shape=(3, 7)), by_hand(PATCHES + 4, extra=3 * 7 * DIM)),
    "adaln": (dict(time="adaln"), by_hand(PATCHES, extra=3 * DIM * 4 * DIM)),
    "time mlp": (dict(time_mlp=True), by_hand(extra=2 * DIM * 4 * DIM)),
    "biases, heads and a recomputation are free": (
        dict(qkv_bias=True, num_heads=4, remat=True),
        by_hand(),
    ),
    "positions are free": (dict(position="sinusoidal"), by_hand()),
    "turning is free": (dict(position="rotary"), by_hand()),
    "norms are free": (dict(qk_norm=True, skip_norm=True, norm="rms"), by_hand()),
    "precision": (dict(dtype="mixed_bfloat16"), by_hand()),
    "gated mlp": (dict(mlp="swiglu"), by_hand(mlp_dim=40, kernels=3)),  # 2/3 of 64, in eights
    "mlp width": (dict(mlp_dim=24), by_hand(mlp_dim=24)),
    "no output conv": (dict(output_conv=False), by_hand(conv=False)),
    "conv of the features": (
        dict(output_conv="before"),
        by_hand(conv=False, extra=PATCHES * 9 * DIM * DIM),
    ),
    "skip add_project": (dict(skip="add_project"), by_hand(skip=DIM**2)),
    "skip project_sum": (dict(skip="project_sum"), by_hand(skip=DIM**2)),
    "skip add": (dict(skip="add"), by_hand(skip=0)),
    "no skip": (dict(skip=None), by_hand(skip=0)),
    # One 3x3 convolution of stride 2 to the full width, then 1x1.
    "conv patches": (
        dict(patch_embed="conv"),
        by_hand(patch_embed=PATCHES * (9 * 3 * DIM + DIM * DIM)),
    ),
    # 8x8x3 -> 4x4x8 -> 2x2x16, then 1x1; 4 patches of 48 numbers.
    "conv patches of four halve twice": (
        dict(patch_embed="conv", patch_size=4, num_layers=1),
        16 * 9 * 3 * 8 + 4 * 9 * 8 * DIM + 4 * DIM * DIM
        + block(5) + 4 * DIM * 48 + PIXELS * 9 * 3 * 3,
    ),
    "conv patches of one keep the size": (
        dict(patch_embed="conv", patch_size=1, num_layers=1),
        PIXELS * (9 * 3 * DIM + DIM * DIM) + block(65) + PIXELS * DIM * 3 + PIXELS * 9 * 3 * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "macs"), CASES.values(), ids=CASES.keys())
def test_macs_are_those_counted_by_hand_and_parameters_those_of_keras(arguments, macs):
    network = uvit(**{**PICTURE, "num_layers": 3, **arguments})
    assert count_macs(network) == macs
    assert count_parameters(network) == network.count_params()


SMALL_UNET = dict(image_shape=(4, 8, 3), base_dim=16, multipliers=(1, 2), num_blocks=1)
SMALL_UNET |= dict(attention_levels=(1,), head_dim=8, num_classes=5, context_shape=(3, 7))


@pytest.mark.parametrize("change", [{}, dict(num_blocks=2, attention_levels=(0,), remat=True)])
def test_macs_of_a_unet_are_those_that_torch_counts(change):
    network = UNet(**{**SMALL_UNET, **change})
    twin = torch_unet.take(torch_unet.UNet(network.get_config()), network)
    inputs = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in network.input.items()}
    with FlopCounterMode(display=False) as counter:
        torch_unet.answer(twin, inputs)
    assert counter.get_total_flops() == 2 * count_macs(network)


def test_the_published_cost_of_a_network_that_is_no_preset():
    # U-ViT-H on 64x64 latents in 2x2 patches; tests/presets counts the others.
    shape = dict(image_shape=(64, 64, 4), hidden_dim=1152, num_layers=29, num_heads=16)
    with keras.StatelessScope(initialize_variables=False):  # shapes only, no memory for weights
        network = UViT(**shape, patch_size=2, num_classes=1000, output_conv=False)
    assert round(count_macs(network) / 1e9) == 582
