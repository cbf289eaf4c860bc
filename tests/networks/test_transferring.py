"""Weights of one network in another: what is kept keeps its meaning, what is new adds nothing."""

import numpy as np
import pytest
from tiny import assert_equal, normal, numpy, randomize, refused, uvit, weights

from keras_uvit import UNet
from keras_uvit.networks import transfer
from keras_uvit.networks.transferring import resized

pytestmark = pytest.mark.once

UNET = dict(image_shape=(4, 4, 1), base_dim=8, multipliers=(1,), num_blocks=1, head_dim=4)
UNET |= dict(attention_levels=(0,))


def unet(**changes):
    return UNet(**{**UNET, **changes})


def answer(network, channels=1, size=4, **conditions):
    image = normal(3, size, size, 3)[..., :channels]
    timestep = np.array([1.0, 300.0, 999.0], "float32")
    return numpy(network({"image": image, "timestep": timestep, **conditions}))


@pytest.mark.each_backend
def test_equal_networks_keep_each_weight_bit_by_bit():
    source, network = randomize(uvit(num_classes=3)), uvit(num_classes=3)
    done = transfer(source, network, strict=True)
    assert done.is_exact
    assert done.kept == [weight.path for weight in source.weights]
    assert_equal(weights(network), weights(source))
    network.weights[0].assign(network.weights[0] + 1.0)  # no buffer is shared
    assert (weights(network)[0] != weights(source)[0]).all()


@pytest.mark.each_backend
@pytest.mark.parametrize("make", [uvit, unet])
def test_classes_that_are_named_draw_as_before(make):
    source, network = randomize(make(num_classes=3)), make(num_classes=2)
    done = transfer(source, network, {0: 2, 1: 0})
    assert done.resized == ["label_embed/embeddings"]
    assert done.new == done.left_out == []
    new, old = (np.array(labels, "int32") for labels in ([0, 1, 2], [2, 0, 3]))  # the last: none
    np.testing.assert_array_equal(answer(network, label=new), answer(source, label=old))


def test_a_label_table_is_made_anew_but_for_no_label():
    source = randomize(uvit(num_classes=3))
    for classes, kept in ((None, [0, 1, 2, 3]), ({}, [3])):
        network = uvit(num_classes=3)
        transfer(source, network, classes)
        new, old = (numpy(net.get_layer("label_embed").embeddings) for net in (network, source))
        assert [k for k in range(4) if (new[k] == old[k]).all()] == kept
    network = uvit(num_classes=3, null_label=False)
    assert transfer(source, network).resized == ["label_embed/embeddings"]
    assert_equal(weights(network.get_layer("label_embed"))[0], old[:3])
    done = transfer(network, uvit(num_classes=2, null_label=False))
    assert done.new == ["label_embed/embeddings"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(output_conv=False),
        dict(output_conv="before"),
        dict(patch_embed="conv"),
    ],
    ids=str,
)
def test_a_new_channel_changes_nothing_of_the_others(change):
    source = randomize(uvit(**change))
    network = uvit(image_shape=(4, 4, 3), **change)
    done = transfer(source, network)
    assert done.new == done.left_out == []
    # 1e-5 of values near 1: a sum of twelve numbers, eight of them zero, in another order.
    expected = answer(source)
    np.testing.assert_allclose(answer(network, 3)[..., :1], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1
    back = uvit(**change)
    transfer(network, back)
    assert_equal(weights(back), weights(source))


def test_a_new_channel_changes_nothing_of_the_others_in_a_unet():
    source, network = randomize(unet()), unet(image_shape=(4, 4, 2))
    transfer(source, network)
    np.testing.assert_allclose(answer(network, 2)[..., :1], answer(source), atol=1e-5)  # as above


def test_another_patch_size_makes_both_ends_anew():
    network = uvit(patch_size=1)
    done = transfer(randomize(uvit()), network)
    assert done.new == ["patch_embed/proj/kernel", "head/kernel", "head/bias"]
    assert done.resized == ["position/embeddings"]  # 2x2 patches become 4x4


def test_tokens_keep_their_positions_where_others_come_and_go():
    source = randomize(uvit(num_classes=3))
    network = uvit(context_shape=(2, 3), image_shape=(4, 8, 1))
    done = transfer(source, network)
    assert done.left_out == ["label_embed/embeddings"]
    assert done.new == ["context_embed/kernel", "context_embed/bias"]
    old, new = (numpy(net.get_layer("position").embeddings) for net in (source, network))
    np.testing.assert_array_equal(new[0], old[1])  # time comes first, without a label
    assert len(new) == 1 + 2 + 8
    assert "Resized: position/embeddings.\nMade anew: context_embed" in done.text()
    assert done.text().endswith("left out: label_embed/embeddings.")


def test_bicubic_positions_are_exact_for_quadratics_and_keep_rows_and_columns_apart():
    def table(rows, columns, height, width):
        """Two quadratics of the place, in [0, 1] of the image."""
        y, x = (np.arange(rows) + 0.5) / rows * height, (np.arange(columns) + 0.5) / columns * width
        y, x = np.meshgrid(y, x, indexing="ij")
        return np.stack([x**2 - y, y**2 + 3 * x], axis=-1)

    old, new = table(8, 6, 1, 1), table(12, 24, 1, 1)
    found = resized(old.reshape(48, 2), (8, 6), (12, 24)).reshape(12, 24, 2)
    inside = slice(3, -3), slice(8, -8)  # further than two of the old patches from each edge
    # Float32 rounding of numbers below 4.
    np.testing.assert_allclose(found[inside], new[inside], atol=1e-6)
    np.testing.assert_array_equal(
        resized(old.reshape(48, 2), (8, 6), (8, 6)).reshape(8, 6, 2), np.float32(old)
    )
    ones = resized(np.ones((6, 1)), (2, 3), (5, 2))
    np.testing.assert_allclose(ones, 1, atol=1e-7)  # float32 rounding


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (dict(num_layers=3), {}, ("different network", "in_block_0/", "Only image_shape")),
        (dict(hidden_dim=32), {}, ("different network", "and ")),
        (dict(output_conv=False), {}, ("different network", "output_conv/kernel")),
        (dict(num_classes=2), dict(strict=True), ("strict=True", "Resized: label_embed")),
        (dict(num_classes=2), dict(classes={2: 0}), ("{2: 0}", "no class 2", "below 2")),
        (dict(num_classes=2), dict(classes={0: 3}), ("{0: 3}", "no class 3", "below 3")),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_nothing_changed(change, options, words):
    network = uvit(**{"num_classes": 3, **change})
    before = weights(network)
    refused(ValueError, lambda: transfer(uvit(num_classes=3), network, **options), *words)
    assert_equal(weights(network), before)
