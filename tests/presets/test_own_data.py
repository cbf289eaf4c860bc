"""`presets.for_data`: what it chooses, says and refuses."""

import warnings

import keras
import numpy as np
import pytest
from tiny import numpy, refused

from keras_uvit import data, presets
from keras_uvit.data.images import ImageDataset
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.diffusion.schedules import LinearPath, VPCosine
from keras_uvit.encoders import SpaceToDepth
from keras_uvit.presets import own_data

pytestmark = [pytest.mark.once, pytest.mark.eager]

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (10, 64, 37, 3)).astype("uint8")
SMALL = dict(hidden_dim=16, num_layers=1, num_heads=2)


def pictures(count=64, side=16, channels=3, classes=None, context=None):
    found = {"image": RNG.integers(0, 256, (count, side, side, channels)).astype("uint8")}
    if classes is not None:
        found["label"] = np.arange(count) % classes
    if context is not None:
        found["context"] = np.zeros((count, *context), "float32")
    return found


def choose(content, **options):
    return presets.for_data(content, network=SMALL, verbose=0, **options)


def learned(model):
    objective = model.objective
    return objective.prediction, objective.schedule, objective.time_sampling


@pytest.mark.parametrize(
    ("shape", "most", "patch"),
    [
        ((8, 8, 1), 32, 2),
        ((28, 28, 1), 32, 7),
        ((48, 32, 3), 32, 8),
        ((64, 64, 3), 32, 16),
        ((64, 64, 3), 256, 4),
        ((32, 32, 4), 256, 2),
    ],
)
def test_patches_are_as_small_as_the_machine_can_do(shape, most, patch):
    assert own_data.patch_size(shape, most) == patch


@pytest.mark.parametrize(
    ("shape", "patch"), [((28, 28, 1), 7), ((64, 64, 1), 16), ((64, 64, 3), 8)]
)
def test_a_patch_is_not_too_large_for_the_width(shape, patch):
    assert own_data.suitable_patch(shape, 128, 32, 64) == patch


def test_a_patch_size_of_ones_own_is_taken_for_any_sides():
    model = presets.for_data(pictures(side=31), network={**SMALL, "patch_size": 31}, verbose=0)
    assert model.network.get_config()["patch_size"] == 31


# What a data set has; what is learned of it, with which guidance and how often without a condition.
X0, FLOW = ("x0", VPCosine(), "uniform"), ("velocity", LinearPath(), "logit_normal")
CHOICES = {
    "large patches": (dict(side=32), X0, 1.0, 0.0),
    "classes": (dict(side=32, classes=4), X0, 1.5, 0.1),
    "small patches": (dict(side=8, channels=1), FLOW, 1.0, 0.0),
    "captions": (dict(side=32, context=(3, 5)), X0, 2.0, 0.1),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_learned_depends_on_the_patches_and_the_condition(name):
    content, expected, guidance, dropout = CHOICES[name]
    model = choose(pictures(**content))
    assert learned(model) == expected
    assert (model.guidance_scale, model.condition_dropout) == (guidance, dropout)
    assert model.network.num_classes == content.get("classes")
    assert model.network.context_shape == content.get("context")
    assert (model.planned_steps, model.compiled) == (5000, True)


def test_latents_are_learned_at_the_caches_scale(tmp_path):
    data.write_latents(pictures(classes=3), tmp_path, SpaceToDepth(2, scale=1.7), verbose=0)
    cache = data.LatentDataset(tmp_path, 16, verbose=0)
    model = choose(cache)
    assert learned(model) == X0  # 12 numbers and more a patch, and tokens of 16
    assert (model.latent_scale, model.network.image_shape) == (1.7, (8, 8, 12))
    model.fit(cache, epochs=1, verbose=0)


def test_whatever_is_chosen_can_be_changed_and_is_saved(tmp_path):
    changes = dict(guidance_scale=3.0, ema_decay=0.5)
    optimizer = dict(learning_rate=0.01)
    model = choose(pictures(), prediction="v", optimizer=optimizer, steps=7, **changes)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert {key: getattr(loaded, key) for key in changes} == changes
    assert (loaded.objective.prediction, loaded.planned_steps) == ("v", 7)
    assert loaded.network.get_config()["hidden_dim"] == 16
    config = loaded.optimizer.schedule.config
    assert (config["learning_rate"], config["decay_steps"]) == (0.01, "run")


def test_fit_makes_the_planned_steps():
    content = pictures(side=8)
    shuffled, batches = ShuffledDataset(content, 16), {"batch_size": 16}
    # Of 4 batches: parts of epochs, which the end of the data does not cut, then whole epochs.
    for steps, made, source, more in (
        (3, 3, content, batches), (10, 10, shuffled, {}), (10, 10, content, batches),
        (35, 36, shuffled, {}),
    ):  # fmt: skip
        model = choose(content, steps=steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Your input ran out of data")
            model.fit(source, verbose=0, **more)
        assert int(numpy(model.step)) == made


def test_minutes_are_steps_that_a_run_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "seconds_per_step", lambda *_: 0.5)
    made = choose(pictures(), minutes=1, folder=tmp_path)
    monkeypatch.setattr(own_data, "seconds_per_step", lambda *_: 0.1)
    again = choose(pictures(), minutes=1, folder=tmp_path)
    assert made.planned_steps == again.planned_steps == 120
    assert choose(pictures(), minutes=1).planned_steps == 600


@pytest.mark.parametrize("latent_scale", [None, 1.0])
def test_the_timing_of_a_step_warns_of_nothing(latent_scale):
    model = choose(pictures(), latent_scale=latent_scale)
    facts = own_data.Facts((16, 16, 3), 64, batch_size=4, latent_scale=latent_scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert own_data.seconds_per_step(model, facts) > 0


def test_steps_are_timed_without_the_first_ones(monkeypatch):
    model, clock, made = choose(pictures(classes=3)), [0.0], []

    def train_on_batch(batch):
        made.append(batch)
        clock[0] += 100.0 if len(made) <= 2 else 0.25  # compiling
        return [0.0]

    monkeypatch.setattr(model, "train_on_batch", train_on_batch)
    facts = own_data.facts_of(pictures(classes=3))
    assert own_data.seconds_per_step(model, facts, lambda: clock[0]) == 0.25
    assert made[0]["image"].shape == (64, 16, 16, 3)
    assert set(made[0]) == {"image", "label"}


def test_five_lines_say_what_was_chosen_and_two_more_what_is_scarce(capsys):
    presets.for_data(pictures(2000, side=8, classes=4), network=SMALL, steps=100)
    lines = capsys.readouterr().out.splitlines()
    names = ["Data", "Network", "Learning", "Run", "Sampling"]
    assert [line.split(":")[0] for line in lines] == names
    assert "2,000 pictures of 8x8x3, 4 classes" in lines[0]
    assert "100 steps of 64, 3.2 visits" in lines[3]
    presets.for_data(pictures(20, classes=4), network=SMALL)
    said = capsys.readouterr().out
    assert "20 pictures are few: after 5,000 visits" in said
    assert "4 of 4 classes have fewer than 10 pictures, such as class 0 with 5" in said


@pytest.mark.parametrize(
    ("content", "options", "error", "words"),
    [
        (pictures(9), {}, ValueError, ("9 pictures are too few", "at least 10")),
        ({"image": np.full((20, 16, 16, 3), 7, "uint8")}, {}, ValueError, ("all the same",)),
        (pictures(side=31), {}, ValueError, ("31x31 cannot be cut", "image_size=")),
        ({"image": NOISE}, {}, ValueError, ("64x37 cannot be cut", "image_size=")),
        (pictures(), dict(steps=5, minutes=5), ValueError, ("steps or minutes",)),
        (pictures(), dict(minutes=5), ValueError, ("pass steps, not minutes",)),  # of two processes
        (pictures(), dict(size="gpu"), ValueError, ("one of ['cpu', 'accelerator']",)),
        (iter([]), {}, TypeError, ("data set of known size",)),
    ],
)
def test_bad_input_is_named(monkeypatch, content, options, error, words):
    monkeypatch.setattr(own_data.distribution, "process", lambda: (0, 2))
    refused(error, lambda: choose(content, **options), *words)


def test_a_set_is_divided_for_validation():
    content = pictures(50, classes=5)
    train, held = ImageDataset(content, 16, flip=True, num_classes=5).split(0.2, seed=1)
    assert (train.num_samples, held.num_samples) == (40, 10)
    assert (train.flip, held.flip, held.batch_size) == (True, False, 10)
    rows = {image.tobytes() for part in (train, held) for image in part.images}
    assert rows == {image.tobytes() for image in content["image"]}
