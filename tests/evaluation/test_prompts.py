"""`evaluate` of text models: prompts, their record, the CLIP score, refusals."""

import numpy as np
import pytest
from stubs import random_images
from tiny import refused, uvit
from words import Words

from keras_uvit import DiffusionModel
from keras_uvit.evaluation import FIDCallback, evaluate, protocol, scores

pytestmark = pytest.mark.once

PROMPTS = [f"picture {k}" for k in range(20)]
FEW = dict(allow_few=True, usual=0, verbose=0)
SHAPE = dict(image_shape=(8, 8, 3), patch_size=4)


class StubScore:
    """Gives each image its brightness, and keeps what it was asked."""

    id = "stub"

    def __init__(self):
        self.asked = []

    def __call__(self, images, prompts):
        self.asked += list(prompts)
        return images.reshape(len(images), -1).mean(axis=1)


@pytest.fixture(scope="module")
def models():
    text = dict(**SHAPE, context_shape=(2, 3))
    made = {
        "text": DiffusionModel(uvit(**text), num_steps=2),
        "without an encoder": DiffusionModel(uvit(**text)),
        "without text": DiffusionModel(uvit(**SHAPE)),
    }
    made["text"].set_encoders(text_encoder=Words())
    for weight in made["text"].ema_network.weights:
        weight.assign(4.0 * weight)
    return made


def test_prompts_are_drawn_and_measured(models, real, inception, measure, monkeypatch):
    monkeypatch.setattr(protocol, "CHUNK", 8)
    clip, options = StubScore(), dict(batch_size=4, guidance_scale=2.0)
    record = measure(models["text"], None, prompts=PROMPTS, clip=clip, seed=1, **options)
    images = models["text"].generate(prompts=PROMPTS, seed=1, verbose=0, **options)
    found = scores([images], 20, real, inception, **FEW)
    assert {key: record[key] for key in found} == {k: round(v, 4) for k, v in found.items()}
    assert clip.asked == PROMPTS
    assert record["clip_score"] == pytest.approx(images.mean(), abs=1e-3)
    known = dict(clip="stub", num_images=20, text_encoder="words", label_protocol=None)
    assert known.items() <= record.items()
    other = measure(models["text"], None, prompts=PROMPTS[::-1], **options)
    assert other["prompts"] != record["prompts"]
    assert other["fid"] != record["fid"]
    assert "clip_score" not in other


def test_a_folder_goes_on_with_these_prompts_alone(models, measure, monkeypatch, tmp_path):
    words, clip = dict(num_images=None, folder=tmp_path), StubScore()
    first = measure(models["text"], prompts=PROMPTS, **words)
    monkeypatch.setattr(DiffusionModel, "generate", None)  # not reached
    again = measure(models["text"], prompts=PROMPTS, clip=clip, **words)
    assert clip.asked == PROMPTS  # of kept images too
    assert again["fid"] == first["fid"]
    words["prompts"] = PROMPTS[::-1]
    refused(ValueError, lambda: measure(models["text"], **words), "prompts was")


def test_fewer_prompts_than_usual_are_warned_about(models, real, inception, monkeypatch):
    monkeypatch.setattr(DiffusionModel, "generate", lambda *_, **__: random_images(20))
    with pytest.warns(UserWarning, match="larger than of 30000"):
        evaluate(models["text"], real, inception, prompts=PROMPTS, allow_few=True, verbose=0)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        ("text", {}, ValueError, ["pass prompts="]),
        ("text", dict(prompts=PROMPTS, num_images=30), ValueError, ["20 prompts", "30"]),
        ("text", dict(prompts="a dog"), TypeError, ["list of strings"]),
        ("text", dict(prompts=np.zeros((20, 2, 3))), TypeError, ["list of strings"]),
        ("text", dict(prompts=PROMPTS, steps=3), TypeError, ["steps"]),
        ("without text", dict(prompts=PROMPTS), ValueError, ["this one reads none"]),
        ("without text", dict(num_images=20, clip=StubScore()), ValueError, ["model has none"]),
        ("without an encoder", dict(prompts=PROMPTS), ValueError, ["set_encoders(text_encoder="]),
    ],
)
def test_what_does_not_fit_is_refused_before_drawing(
    models, measure, monkeypatch, model, options, error, words
):
    monkeypatch.setattr(DiffusionModel, "generate", None)  # not reached
    refused(error, lambda: measure(models[model], **{"num_images": None, **options}), *words)


def test_fid_while_training_on_prompts(models, real, inception, tmp_path):
    def begun(**options):
        path = tmp_path / "fid.jsonl"
        options |= dict(every=2, prompts=PROMPTS, allow_few=True)
        callback = FIDCallback(real, inception, path, **options)
        callback.set_model(models["text"])
        callback.set_params({"epochs": 1})
        callback.on_train_begin()
        return callback

    logs = {}
    begun().on_epoch_end(0, logs)  # the last one planned
    assert logs["fid"] > 0
    refused(TypeError, lambda: begun(step=3), "['step']")
