"""Pictures and sentences of shapes: each is read back from the other exactly."""

import sys

import numpy as np
import pytest

from keras_uvit.data import shapes
from keras_uvit.data.shapes import COLOURS, SHAPES, SIZES, THINGS, Scene, Thing

pytestmark = pytest.mark.once


def kinds(scene):
    return frozenset([(str(scene.first)), str(scene.second)])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("seed", [0, 1])
def test_read_back_undoes_draw(split, seed):
    for k, scene in enumerate(shapes.scenes(400, split, seed)):
        found = shapes.read_back(shapes.draw(scene, [seed, k]))
        assert found in (scene, scene.inverse())
        assert found.relation in ("left of", "above")


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_every_thing_is_read_back_from_every_place(thing):
    other = Thing("large", "green", "square")
    for relation in shapes.INVERSE:
        scene = Scene(thing, relation, other)
        for seed in range(30):
            assert shapes.read_back(shapes.draw(scene, seed)) in (scene, scene.inverse())


def test_parse_undoes_str():
    for scene in shapes.scenes(300):
        assert shapes.parse(str(scene)) == scene
        assert shapes.parse(str(scene.inverse())) == scene.inverse()
        assert scene.inverse().inverse() == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a small red circle",
        "a small red circle left of",
        "a tiny red circle above a",
        "a small red circle above a large blue square above a large blue square",
        "left of ",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="Expected a caption such as"):
        shapes.parse(caption)


def test_the_caption_of_the_page():
    scene = shapes.parse("a small red circle left of a large blue square")
    image = shapes.draw(scene)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    left, right = image[:, :16].astype(int), image[:, 16:].astype(int)
    assert (left[..., 0] > 200).sum() == shapes._mask("circle", 7).sum()
    assert (right[..., 2] > 200).sum() == 11 * 11


def test_splits_share_no_pair_of_things():
    train = {kinds(scene) for scene in shapes.scenes(5000, "train")}
    test = {kinds(scene) for scene in shapes.scenes(1000, "test")}
    assert not train & test
    assert len(test) == 30  # a tenth of 24 x 25 / 2
    assert len(train) == 270
    # What is held out are combinations: each single thing is known.
    assert {thing for pair in test for thing in pair} <= {t for pair in train for t in pair}


def test_scenes_are_a_function_of_split_and_seed():
    assert shapes.scenes(50, "train", 3) == shapes.scenes(50, "train", 3)
    assert shapes.scenes(50, "train", 3) == shapes.scenes(80, "train", 3)[:50]
    assert shapes.scenes(50, "train", 3) != shapes.scenes(50, "train", 4)
    assert shapes.scenes(50, "train", 3) != shapes.scenes(50, "test", 3)


def test_another_split_is_refused():
    with pytest.raises(ValueError, match='"train" or "test". Received: \'all\''):
        shapes.scenes(3, "all")


def test_source():
    source = shapes.source(20, "test", seed=2)
    assert len(source) == 20
    assert source.shape == (32, 32, 3)
    for k, (scene, captions) in enumerate(zip(shapes.scenes(20, "test", 2), source.captions)):
        assert captions == [str(scene), str(scene.inverse())]
        image = source.read(k)["image"]
        np.testing.assert_array_equal(image, source.read(k)["image"])
        assert shapes.read_back(image) in (scene, scene.inverse())


@pytest.mark.parametrize("noise", [5, 20])
def test_reading_bears_a_models_noise(noise):
    random = np.random.default_rng(0)
    for k, scene in enumerate(shapes.scenes(100)):
        image = shapes.draw(scene, k) + random.normal(0, noise, (32, 32, 3))
        found = shapes.read_back(np.clip(image, 0, 255).astype("uint8"))
        assert found in (scene, scene.inverse())


def test_what_shows_not_two_things_is_not_read():
    blank = np.full((32, 32, 3), shapes.BACKGROUND, "uint8")
    assert shapes.read_back(blank) is None
    one = blank.copy()
    one[4:15, 4:15] = COLOURS["red"]
    assert shapes.read_back(one) is None
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), "uint8")
    assert shapes.read_back(noise) is None
    three = one.copy()
    three[20:31, 4:15] = three[4:15, 20:31] = COLOURS["blue"]
    assert shapes.read_back(three) is None
    odd = one.copy()
    odd[18:20, 1:31] = COLOURS["blue"]  # a line is no shape
    assert shapes.read_back(odd) is None


@pytest.mark.parametrize(
    "image", [np.zeros((32, 32, 1), "uint8"), np.zeros((8, 8, 3), "uint8"), np.zeros((32, 32, 3))]
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"Expected \(32, 32, 3\) uint8"):
        shapes.read_back(image)


# Scores -------------------------------------------------------------------------------------------


def drawn(scenes):
    return np.stack([shapes.draw(scene, k) for k, scene in enumerate(scenes)])


def test_true_pictures_score_one_from_either_side():
    scenes = shapes.scenes(50)
    for captions in ([str(s) for s in scenes], [str(s.inverse()) for s in scenes]):
        assert set(shapes.score(drawn(scenes), captions).values()) == {1.0}


def test_one_wrong_attribute_is_counted_as_that():
    asked = Scene(Thing("small", "red", "circle"), "left of", Thing("large", "blue", "square"))
    other = dict(size="large", colour="green", shape="triangle")
    for name, value in other.items():
        thing = Thing(**{**vars(asked.first), name: value})
        score = shapes.score(drawn([Scene(thing, asked.relation, asked.second)]), [str(asked)])
        assert score[name] == 0.5
        assert score["attributes"] == 0.875
        assert score["scene"] == 0.0
        assert score["readable"] == 1.0
    swapped = Scene(asked.second, asked.relation, asked.first)
    score = shapes.score(drawn([swapped]), [str(asked)])
    assert (score["shape"], score["colour"], score["relation"]) == (1.0, 1.0, 0.0)


def test_what_cannot_be_read_is_wrong():
    scene = shapes.scenes(1)[0]
    score = shapes.score(np.zeros((1, 32, 32, 3), "uint8"), [str(scene)])
    assert set(score.values()) == {0.0}


def test_shuffled_captions_score_chance():
    """Attributes at random agree in 1/3, 1/4, 1/2; more here, as the better of two readings counts,
    of which an attribute gains at most what both readings have in common."""
    scenes = shapes.scenes(1500)
    captions = [str(scenes[k]) for k in np.random.default_rng(0).permutation(1500)]
    score = shapes.score(drawn(scenes), captions)
    for name, chance in [("shape", 1 / 3), ("colour", 1 / 4), ("size", 1 / 2), ("relation", 1 / 4)]:
        assert chance < score[name] < chance + 0.25
    assert score["scene"] < 0.03
    assert score["attributes"] < 0.5


def test_scores_need_a_caption_an_image():
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        shapes.score(np.zeros((2, 32, 32, 3), "uint8"), [str(shapes.scenes(1)[0])])
    with pytest.raises(ValueError, match="0 images"):
        shapes.score(np.zeros((0, 32, 32, 3), "uint8"), [])


def test_reading_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(ImportError, match=r"keras-uvit\[data\]"):
        shapes.read_back(shapes.draw(shapes.scenes(1)[0]))


def test_counts():
    assert len(THINGS) == len(SIZES) * len(COLOURS) * len(SHAPES) == 24
