"""`evaluate` of text models: prompts, their record, the CLIP score, refusals."""

import keras
import numpy as np
import pytest
from stubs import StubInception, reference
from words import Words

from keras_uvit import DiffusionModel, UViT
from keras_uvit.evaluation import FIDCallback, evaluate, protocol, scores

pytestmark = pytest.mark.once

PROMPTS = [f"picture {k}" for k in range(20)]
FEW = dict(allow_few=True, usual=0, verbose=0)


class StubScore:
    """Gives each image its brightness, and keeps what it was asked."""

    id = "stub"

    def __init__(self):
        self.asked = []

    def __call__(self, images, prompts):
        self.asked += list(prompts)
        return images.reshape(len(images), -1).mean(axis=1)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    network = UViT(
        (8, 8, 3), patch_size=4, hidden_dim=16, num_layers=1, num_heads=2, context_shape=(2, 3)
    )
    model = DiffusionModel(network, num_steps=2)
    model.set_encoders(text_encoder=Words())
    for weight in model.ema_network.weights:
        weight.assign(4.0 * weight)
    return model


@pytest.fixture
def inception():
    return StubInception()


def test_prompts_are_drawn_and_measured(model, inception, monkeypatch):
    monkeypatch.setattr(protocol, "CHUNK", 8)
    real, clip = reference(inception), StubScore()
    options = dict(batch_size=4, guidance_scale=2.0)
    record = evaluate(model, real, inception, prompts=PROMPTS, clip=clip, seed=1, **options, **FEW)
    images = model.generate(prompts=PROMPTS, seed=1, verbose=0, **options)
    found = scores([images], 20, real, inception, **FEW)
    for key, value in found.items():
        assert record[key] == round(value, 4)
    assert clip.asked == PROMPTS
    assert record["clip_score"] == pytest.approx(images.mean(), abs=1e-3)
    assert record["clip"] == "stub"
    assert record["num_images"] == 20
    assert record["text_encoder"] == "words"
    assert record["label_protocol"] is None
    other = evaluate(model, real, inception, prompts=PROMPTS[::-1], **options, **FEW)
    assert other["prompts"] != record["prompts"]
    assert other["fid"] != record["fid"]
    assert "clip_score" not in other


def test_an_interrupted_evaluation_goes_on(model, inception, monkeypatch, tmp_path):
    monkeypatch.setattr(protocol, "CHUNK", 8)
    real = reference(inception)
    words = dict(prompts=PROMPTS, batch_size=4, **FEW)
    whole = evaluate(model, real, inception, **words)
    calls, generate = [], DiffusionModel.generate

    def dies(model, *arguments, **options):
        calls.append(options["first"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(model, *arguments, **options)

    monkeypatch.setattr(DiffusionModel, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, real, inception, folder=tmp_path, **words)
    clip = StubScore()
    again = evaluate(model, real, inception, folder=tmp_path, clip=clip, **words)
    assert calls == [0, 8, 8, 16]
    assert clip.asked == PROMPTS  # of kept images too
    assert again["fid"] == whole["fid"]
    with pytest.raises(ValueError, match="prompts was"):
        evaluate(model, real, inception, folder=tmp_path, **{**words, "prompts": PROMPTS[::-1]})


def test_fewer_prompts_than_usual_are_warned_about(model, inception):
    with pytest.warns(UserWarning, match="larger than of 30000"):
        evaluate(model, reference(inception), inception, prompts=PROMPTS, allow_few=True, verbose=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(), ValueError, "measured on prompts: pass prompts="),
        (dict(prompts=PROMPTS, num_images=30), ValueError, "20 prompts, but num_images=30"),
        (dict(prompts="a dog"), TypeError, "list of strings"),
        (dict(prompts=np.zeros((20, 2, 3))), TypeError, "list of strings"),
        (dict(prompts=PROMPTS, steps=3), TypeError, "steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_drawing(model, inception, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(model, reference(inception), inception, **{**options, **FEW})


def test_prompts_need_a_model_and_an_encoder_of_text(model, inception):
    network = dict(patch_size=4, hidden_dim=16, num_layers=1, num_heads=2)
    plain = DiffusionModel(UViT((8, 8, 3), **network))
    with pytest.raises(ValueError, match="this one reads none"):
        evaluate(plain, reference(inception), inception, prompts=PROMPTS, **FEW)
    with pytest.raises(ValueError, match="this model has none"):
        evaluate(plain, reference(inception), inception, 20, clip=StubScore(), **FEW)
    mute = DiffusionModel(UViT((8, 8, 3), **network, context_shape=(2, 3)))
    with pytest.raises(ValueError, match=r"set_encoders\(text_encoder="):
        evaluate(mute, reference(inception), inception, prompts=PROMPTS, **FEW)


def test_fid_while_training_on_prompts(model, inception, tmp_path):
    callback = FIDCallback(
        reference(inception), inception, tmp_path / "fid.jsonl", prompts=PROMPTS, allow_few=True
    )
    callback.set_model(model)
    callback.set_params({"epochs": 1})
    callback.on_train_begin()
    logs = {}
    callback.on_epoch_end(0, logs)
    assert logs["fid"] > 0
    bad = FIDCallback(
        reference(inception), inception, tmp_path / "x", prompts=PROMPTS, allow_few=True, step=3
    )
    bad.set_model(model)
    with pytest.raises(TypeError, match="Received: \\['step'\\]"):
        bad.on_train_begin()
