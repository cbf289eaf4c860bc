"""The U-Net against PyTorch."""

import numpy as np
import pytest
from tiny import normal, numpy, randomize

from keras_uvit import UNet
from keras_uvit.networks import unet_layers as parts

pytest.importorskip("torch", reason="the oracle is written in PyTorch")
import torch_unet  # noqa: E402


def assert_close(ours, theirs):
    """To 1e-5 of the output's scale: float32 sums in another order."""
    np.testing.assert_allclose(numpy(ours), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize(("width", "dim"), [(12, 12), (12, 40)], ids=["same", "wider"])
def test_a_residual_block_is_that_of_torch(width, dim, resample):
    x, time = normal(2, 4, 6, width), normal(2, 20, seed=1)
    block = parts.UNetBlock(dim, resample)
    block.build(x.shape, time.shape)
    twin = torch_unet.take(torch_unet.Block(width, dim, 20, resample), randomize(block))
    assert_close(block(x, time), torch_unet.answer(twin, x, time))


@pytest.mark.parametrize("context", [None, normal(2, 5, 7, seed=1)], ids=["self", "text"])
def test_attention_is_that_of_torch(context):
    inputs = [normal(2, 4, 6, 12)] + ([] if context is None else [context])
    layer = parts.UNetAttention(3)
    layer.build(*[value.shape for value in inputs])
    twin = torch_unet.Attention(12, 3, None if context is None else 7)
    torch_unet.take(twin, randomize(layer))
    assert_close(layer(*inputs), torch_unet.answer(twin, *inputs))


def test_the_whole_is_that_of_torch():
    network = UNet((4, 6, 3), 8, (1, 2), 1, (1,), 4, num_classes=7, context_shape=(3, 5))
    twin = torch_unet.take(torch_unet.UNet(network.get_config()), randomize(network))
    x = {
        "image": normal(2, 4, 6, 3),
        "timestep": np.array([1, 999], "float32"),
        "context": normal(2, 3, 5, seed=1),
        "label": np.array([0, 1]),
    }
    # Of one program: JAX takes ten times as long for a new network operation by operation.
    assert_close(network.predict_on_batch(x), torch_unet.answer(twin, x))


@pytest.mark.parametrize(("dim", "groups"), [(128, 32), (192, 32), (96, 24), (12, 3), (6, 1)])
def test_there_are_32_groups_or_as_many_as_have_four_channels(dim, groups):
    assert parts.group_norm(dim, "float32", "norm").groups == groups


@pytest.mark.once
def test_a_new_block_adds_nothing():
    x, time = normal(2, 2, 2, 8), normal(2, 6, seed=1)
    np.testing.assert_array_equal(numpy(parts.UNetBlock(8)(x, time)), x)
    np.testing.assert_array_equal(numpy(parts.UNetAttention(2)(x)), x)
