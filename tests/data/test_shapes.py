"""Pictures and sentences of shapes: each is read back from the other exactly."""

import sys

import numpy as np
import pytest
from tiny import refused

from keras_uvit.data import shapes
from keras_uvit.data.shapes import COLOURS, THINGS, Scene, Thing

pytestmark = pytest.mark.once


def kinds(scene):
    return frozenset([(str(scene.first)), str(scene.second)])


def drawn(scenes):
    return np.stack([shapes.draw(scene, k) for k, scene in enumerate(scenes)])


@pytest.mark.parametrize(("split", "seed"), [("train", 0), ("test", 1)])
def test_read_back_undoes_draw_and_parse_undoes_str(split, seed):
    for k, scene in enumerate(shapes.scenes(100, split, seed)):
        found = shapes.read_back(shapes.draw(scene, [seed, k]))
        assert found in (scene, scene.inverse())
        assert found.relation in ("left of", "above")
        assert shapes.parse(str(scene)) == scene == scene.inverse().inverse()
        assert shapes.parse(str(scene.inverse())) == scene.inverse()


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_every_thing_is_read_back_from_every_place(thing):
    other = Thing("large", "green", "square")
    for relation in shapes.INVERSE:
        scene = Scene(thing, relation, other)
        for seed in range(5):
            assert shapes.read_back(shapes.draw(scene, seed)) in (scene, scene.inverse())


def test_the_caption_of_the_page():
    scene = shapes.parse("a small red circle left of a large blue square")
    image = shapes.draw(scene)
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    left, right = image[:, :16].astype(int), image[:, 16:].astype(int)
    assert (left[..., 0] > 200).sum() == shapes._mask("circle", 7).sum()
    assert (right[..., 2] > 200).sum() == 11 * 11


def test_splits_share_no_pair_of_things():
    train = {kinds(scene) for scene in shapes.scenes(5000, "train")}
    test = {kinds(scene) for scene in shapes.scenes(1000, "test")}
    assert not train & test
    assert (len(test), len(train)) == (30, 270)  # a tenth of 24 x 25 / 2, and the rest
    # What is held out are combinations: each single thing is known.
    assert {thing for pair in test for thing in pair} <= {t for pair in train for t in pair}


def test_scenes_are_a_function_of_split_and_seed():
    assert shapes.scenes(50, "train", 3) == shapes.scenes(80, "train", 3)[:50]
    assert shapes.scenes(50, "train", 3) != shapes.scenes(50, "train", 4)
    assert shapes.scenes(50, "train", 3) != shapes.scenes(50, "test", 3)


def test_source():
    source = shapes.source(20, "test", seed=2)
    assert (len(source), source.shape) == (20, (32, 32, 3))
    for k, (scene, captions) in enumerate(zip(shapes.scenes(20, "test", 2), source.captions)):
        assert captions == [str(scene), str(scene.inverse())]
        image = source.read(k)["image"]
        np.testing.assert_array_equal(image, source.read(k)["image"])
        assert shapes.read_back(image) in (scene, scene.inverse())


def test_reading_bears_a_models_noise():
    random = np.random.default_rng(0)
    for k, scene in enumerate(shapes.scenes(100)):
        image = shapes.draw(scene, k) + random.normal(0, 20, (32, 32, 3))
        found = shapes.read_back(np.clip(image, 0, 255).astype("uint8"))
        assert found in (scene, scene.inverse())


def test_what_shows_not_two_things_is_not_read():
    blank = np.full((32, 32, 3), shapes.BACKGROUND, "uint8")
    one = blank.copy()
    one[4:15, 4:15] = COLOURS["red"]
    three = one.copy()
    three[20:31, 4:15] = three[4:15, 20:31] = COLOURS["blue"]
    odd = one.copy()
    odd[18:20, 1:31] = COLOURS["blue"]  # a line is no shape
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), "uint8")
    for image in (blank, one, three, odd, noise):
        assert shapes.read_back(image) is None


def test_true_pictures_score_one_from_either_side():
    scenes = shapes.scenes(20)
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
        assert (score["scene"], score["readable"]) == (0.0, 1.0)
    swapped = Scene(asked.second, asked.relation, asked.first)
    score = shapes.score(drawn([swapped]), [str(asked)])
    assert (score["shape"], score["colour"], score["relation"]) == (1.0, 1.0, 0.0)
    blank = np.zeros((1, 32, 32, 3), "uint8")  # what cannot be read is wrong
    assert set(shapes.score(blank, [str(asked)]).values()) == {0.0}


def test_shuffled_captions_score_chance():
    """Attributes at random agree in 1/3, 1/4, 1/2; more here, as the better of two readings counts,
    of which an attribute gains at most what both readings have in common."""
    scenes = shapes.scenes(300)
    captions = [str(scenes[k]) for k in np.random.default_rng(0).permutation(300)]
    score = shapes.score(drawn(scenes), captions)
    for name, chance in [("shape", 1 / 3), ("colour", 1 / 4), ("size", 1 / 2), ("relation", 1 / 4)]:
        assert chance < score[name] < chance + 0.25
    assert score["scene"] < 0.03
    assert score["attributes"] < 0.5


THING, BLACK = "a small red circle", np.zeros((2, 32, 32, 3), "uint8")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        *(
            (lambda text=text: shapes.parse(text), "Expected a caption such as")
            for text in ("", "left of ", f"{THING} left of", f"a tiny red circle above {THING}")
        ),
        (lambda: shapes.parse(" above ".join([THING] * 3)), "Expected a caption such as"),
        (lambda: shapes.scenes(3, "all"), "'all'"),
        (lambda: shapes.read_back(BLACK[0, ..., :1]), "(32, 32, 1)"),
        (lambda: shapes.read_back(BLACK[0, :8, :8]), "(8, 8, 3)"),
        (lambda: shapes.read_back(BLACK[0] / 2), "float64"),
        (lambda: shapes.score(BLACK, [f"{THING} above {THING}"]), "2 images, 1 captions"),
        (lambda: shapes.score(BLACK[:0], []), "0 images"),
    ],
)
def test_what_is_no_caption_split_or_picture_is_refused(call, word):
    refused(ValueError, call, word)


def test_reading_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    refused(ImportError, lambda: shapes.read_back(BLACK[0]), "keras-uvit[data]")
