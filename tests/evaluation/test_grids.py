"""Pictures with their captions, alone and while training."""

import numpy as np
import pytest
from words import Words

from keras_uvit import DiffusionModel, UViT
from keras_uvit.evaluation import SampleGridCallback, captioned_grid, read_images

pytestmark = pytest.mark.once

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 30, 100, 3), "uint8")


def test_a_grid_holds_images_and_captions():
    grid = captioned_grid(IMAGES, ["a dog"] * 5, columns=3, zoom=2)
    blank = captioned_grid(IMAGES, [""] * 5, columns=3, zoom=2)
    assert grid.shape == blank.shape
    assert grid.shape[1] == 3 * 200 + 2 * 10
    np.testing.assert_array_equal(grid[:60:2, :200:2], IMAGES[0])
    np.testing.assert_array_equal(grid[:60], blank[:60])
    assert (grid[60:80] != blank[60:80]).any()  # the text


def test_long_captions_take_more_lines_up_to_eight():
    heights = [captioned_grid(IMAGES[:1], ["word " * n]).shape[0] for n in (1, 10, 30, 300, 3000)]
    assert heights[0] < heights[1] < heights[2] <= heights[3] == heights[4]


def test_grey_images_have_grids_too():
    assert captioned_grid(IMAGES[..., :1], list("abcde")).shape[-1] == 3


@pytest.mark.parametrize("captions", [["a"], "abcde", []])
def test_there_is_a_caption_an_image(captions):
    with pytest.raises(ValueError, match="Expected a list of 5 captions"):
        captioned_grid(IMAGES, captions)


def make(**options):
    network = dict(patch_size=4, hidden_dim=16, num_layers=1, num_heads=2, **options)
    return DiffusionModel(UViT((8, 8, 3), **network), num_steps=2)


@pytest.mark.parametrize("prompts", ["a dog", ["a dog"]])
def test_prompts_stand_below_the_images_of_a_training(tmp_path, prompts):
    model = make(context_shape=(2, 3))
    model.set_encoders(text_encoder=Words())
    callback = SampleGridCallback(tmp_path, prompts=prompts, zoom=10)
    callback.set_model(model)
    callback.set_params({"epochs": 1})
    callback.on_train_begin()
    callback.on_epoch_end(0)
    grid = read_images(tmp_path)[0]
    assert grid.shape[1] == 80
    assert grid.shape[0] > 80
    assert (grid[80:] < 128).any()  # the text, black


@pytest.mark.parametrize(
    "options", [dict(prompts=["a dog"]), dict(num_images=2, num_stepz=3), dict(labels=[0])]
)
def test_what_cannot_be_drawn_is_refused_before_training(tmp_path, options):
    model = make()
    model.compile()
    images = np.zeros((8, 8, 8, 3), "uint8")
    with pytest.raises((ValueError, TypeError)):
        model.fit(images, verbose=0, callbacks=[SampleGridCallback(tmp_path, **options)])
    assert int(model.step) == 0
