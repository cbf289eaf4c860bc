"""`presets.for_data`: what it chooses, says and refuses."""

import re
import warnings

import keras
import numpy as np
import pytest

from keras_uvit import data, presets
from keras_uvit.data.images import ImageDataset
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.diffusion.schedules import LinearPath, VPCosine
from keras_uvit.presets import own_data

pytestmark = [pytest.mark.once, pytest.mark.eager]

RNG = np.random.default_rng(0)
SMALL = dict(hidden_dim=16, num_layers=1, num_heads=2)


def pictures(count=64, side=16, channels=3, classes=None):
    found = {"image": RNG.integers(0, 256, (count, side, side, channels)).astype("uint8")}
    return found | ({} if classes is None else {"label": np.arange(count) % classes})


def choose(content, **options):
    return presets.for_data(content, network=SMALL, verbose=0, **options)


FLOW = ("velocity", LinearPath(), "logit_normal")


def learned(model):
    objective = model.objective
    return objective.prediction, objective.schedule, objective.time_sampling


@pytest.mark.parametrize(
    ("shape", "most", "patch"),
    [
        ((8, 8, 1), 32, 2),
        ((28, 28, 1), 32, 7),
        ((32, 32, 3), 32, 8),
        ((48, 32, 3), 32, 8),
        ((64, 64, 3), 32, 16),
        ((64, 64, 3), 256, 4),
        ((256, 256, 3), 256, 16),
        ((512, 512, 3), 256, 32),
        ((32, 32, 4), 256, 2),
    ],
)
def test_patches_are_as_small_as_the_machine_can_do(shape, most, patch):
    assert own_data.patch_size(shape, most) == patch


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((28, 28, 1), 7), ((32, 32, 3), 8), ((64, 64, 1), 16), ((64, 64, 3), 8), ((128, 128, 3), 16)],
)
def test_a_patch_is_not_too_large_for_the_width(shape, patch):
    assert own_data.suitable_patch(shape, 128, 32, 64) == patch


@pytest.mark.parametrize("shape", [(31, 31, 3), (64, 37, 3)])
def test_sides_without_a_patch_size_are_named(shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]} cannot be cut .*image_size="):
        own_data.patch_size(shape, 64)


def test_a_patch_size_of_ones_own_is_taken_for_any_sides():
    model = presets.for_data(pictures(side=31), network={**SMALL, "patch_size": 31}, verbose=0)
    assert model.network.get_config()["patch_size"] == 31


@pytest.mark.parametrize("classes", [None, 4])
def test_pixels_with_and_without_classes(classes):
    model = choose(pictures(side=32, classes=classes))
    assert learned(model) == ("x0", VPCosine(), "uniform")
    assert model.network.num_classes == classes
    assert model.condition_dropout == (0.1 if classes else 0.0)
    assert model.guidance_scale == (1.5 if classes else 1.0)
    assert model.planned_steps == 5000
    assert model.compiled


def test_small_patches_learn_by_flow_matching():
    model = choose(pictures(side=8, channels=1))
    assert learned(model) == FLOW


def test_latents_learn_by_flow_matching_at_the_caches_scale(tmp_path):
    from keras_uvit.encoders import SpaceToDepth

    data.write_latents(pictures(classes=3), tmp_path, SpaceToDepth(2, scale=1.7), verbose=0)
    cache = data.LatentDataset(tmp_path, 16, verbose=0)
    model = choose(cache)
    assert learned(model) == FLOW
    assert (model.latent_scale, model.network.image_shape) == (1.7, (8, 8, 12))
    model.fit(cache, epochs=1, verbose=0)


def test_contexts_become_a_text_model():
    content = pictures() | {"context": np.zeros((64, 3, 5), "float32")}
    model = choose(content)
    assert model.network.context_shape == (3, 5)
    assert model.guidance_scale == 2.0


def test_whatever_is_chosen_can_be_changed_and_is_saved(tmp_path):
    changes = dict(guidance_scale=3.0, ema_decay=0.5, steps=7)
    optimizer = dict(learning_rate=0.01)
    model = choose(pictures(), prediction="v", optimizer=optimizer, **changes)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for key, value in changes.items():
        assert getattr(loaded, "planned_steps" if key == "steps" else key) == value
    assert loaded.objective.prediction == "v"
    assert loaded.network.get_config()["hidden_dim"] == 16
    config = loaded.optimizer.schedule.config
    assert (config["learning_rate"], config["decay_steps"]) == (0.01, "run")


def test_fit_makes_the_planned_steps():
    content = pictures()
    # Of 4 batches: parts of epochs, which the end of the data does not cut, then whole epochs.
    for steps, made in ((3, 3), (10, 10), (24, 24), (35, 36)):
        for data_set, more in ((ShuffledDataset(content, 16), {}), (content, {"batch_size": 16})):
            model = choose(content, steps=steps)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Your input ran out of data")
                model.fit(data_set, verbose=0, **more)
            assert int(keras.ops.convert_to_numpy(model.step)) == made


def test_minutes_are_steps_that_a_run_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "seconds_per_step", lambda *_: 0.5)
    made = choose(pictures(), minutes=1, folder=tmp_path)
    monkeypatch.setattr(own_data, "seconds_per_step", lambda *_: 0.1)
    again = choose(pictures(), minutes=1, folder=tmp_path)
    assert made.planned_steps == again.planned_steps == 120
    assert choose(pictures(), minutes=1).planned_steps == 600


def test_steps_are_timed_without_the_first_ones(monkeypatch):
    model, clock, made = choose(pictures(classes=3)), [0.0], []

    def train_on_batch(batch):
        made.append(batch)
        clock[0] += 100.0 if len(made) <= 2 else 0.25  # compiling
        return [0.0]

    monkeypatch.setattr(model, "train_on_batch", train_on_batch)
    monkeypatch.setattr(own_data.time, "perf_counter", lambda: clock[0])
    assert own_data.seconds_per_step(model, own_data.facts_of(pictures(classes=3))) == 0.25
    assert made[0]["image"].shape == (64, 16, 16, 3)
    assert set(made[0]) == {"image", "label"}


def test_processes_of_a_job_take_no_minutes(monkeypatch):
    monkeypatch.setattr(own_data.distribution, "process", lambda: (0, 2))
    with pytest.raises(ValueError, match="pass steps, not minutes"):
        choose(pictures(), minutes=1)


def test_five_lines_say_what_was_chosen(capsys):
    presets.for_data(pictures(2000, classes=4), network=SMALL, steps=100)
    lines = capsys.readouterr().out.splitlines()
    names = ["Data", "Network", "Learning", "Run", "Sampling"]
    assert [line.split(":")[0] for line in lines] == names
    assert "2,000 pictures of 16x16x3, 4 classes" in lines[0]
    assert "100 steps of 64, 3.2 visits" in lines[3]


def test_few_pictures_are_said_to_be_learned_by_heart(capsys):
    presets.for_data(pictures(20, classes=4), network=SMALL)
    said = capsys.readouterr().out
    assert "20 pictures are few: after 5,000 visits" in said
    assert re.search("4 of 4 classes have fewer than 10 pictures, such as class 0 with 5", said)


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (pictures(9), {}, "9 pictures are too few .* at least 10"),
        ({"image": np.full((20, 16, 16, 3), 7, "uint8")}, {}, "all the same"),
        (pictures(), dict(steps=5, minutes=5), "steps or minutes"),
        (pictures(), dict(size="gpu"), r"one of \['cpu', 'accelerator'\]"),
        (iter([]), {}, "data set of known size"),
    ],
)
def test_bad_input_is_named(content, options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        choose(content, **options)


def test_a_set_is_divided_for_validation():
    content = pictures(50, classes=5)
    train, held = ImageDataset(content, 16, flip=True, num_classes=5).split(0.2, seed=1)
    assert (train.num_samples, held.num_samples) == (40, 10)
    assert (train.flip, held.flip, held.batch_size) == (True, False, 10)
    rows = {image.tobytes() for part in (train, held) for image in part.images}
    assert rows == {image.tobytes() for image in content["image"]}
