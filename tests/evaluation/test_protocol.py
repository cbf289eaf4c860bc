"""`evaluate`: what it draws, what it records, what it goes on with, what it refuses and when."""

import contextlib
import importlib.metadata
import json
import warnings

import keras
import numpy as np
import pytest
from stubs import StubInception, random_images, reference
from tiny import randomize, refused, uvit

from keras_uvit import DiffusionModel
from keras_uvit.diffusion import samplers
from keras_uvit.diffusion.schedules import VPLinear
from keras_uvit.encoders import SpaceToDepth
from keras_uvit.evaluation import Reference, evaluate, fid, protocol, scores
from keras_uvit.inference import fingerprint

pytestmark = pytest.mark.once

SCORES = ("fid", "sfid", "inception_score", "precision", "recall")
N = 20  # images: two chunks of 8 and one of 4, each in batches of 4
FEW = dict(allow_few=True, usual=0, verbose=0)
CLASSES = 3
PIXELS = dict(image_shape=(8, 8, 3), patch_size=4)
LATENTS = dict(image_shape=(4, 4, 12), patch_size=2)


def make(shape, num_classes=None, autoencoder=None, **options):
    model = DiffusionModel(uvit(**shape, num_classes=num_classes), num_steps=2, **options)
    randomize(model.ema_network, 0.2)
    if autoencoder is not None:
        model.set_encoders(autoencoder=autoencoder)
    return model


@pytest.fixture(scope="module")
def models():
    return {
        "labels": make(PIXELS, CLASSES),
        "nothing": make(PIXELS),
        "grey": make({**PIXELS, "image_shape": (8, 8, 1)}),
        "latents": make(LATENTS, latent_scale=0.5, autoencoder=SpaceToDepth(2, scale=0.5)),
        "latents alone": make(LATENTS, latent_scale=0.5),
    }


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(protocol, "CHUNK", 8)


@pytest.fixture
def undrawn(monkeypatch):
    """Random pixels in place of images, for what does not depend on them."""

    def fake(model, num_images=None, labels=None, *, seed, first, **options):
        return random_images(num_images if labels is None else len(labels), seed=[seed, first])

    monkeypatch.setattr(DiffusionModel, "generate", fake)


@pytest.fixture
def drawn(monkeypatch):
    """The (first, number) of each call of `generate`; raises at the one that `stop` names."""

    class Drawn(list):
        stop = None

    calls, generate = Drawn(), DiffusionModel.generate

    def counted(model, *arguments, **options):
        if len(calls) == calls.stop:
            raise KeyboardInterrupt
        images = generate(model, *arguments, **options)
        calls.append((options.get("first", 0), len(images)))
        return images

    monkeypatch.setattr(DiffusionModel, "generate", counted)
    return calls


def random_labels(n=N, seed=0):
    return np.random.default_rng([seed, 1]).integers(0, CLASSES, n)


def only_scores(found):
    return {key: found[key] and round(found[key], 4) for key in SCORES}


def saved(folder, key="arr_0"):
    return np.concatenate([np.load(path)[key] for path in sorted(folder.glob("*.npz"))])


# What is recorded ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_record_holds_what_the_numbers_depend_on(models, real, measure):
    model = models["labels"]
    record = measure(model, N, seed=3, guidance_scale=1.5)
    assert record.pop("keras_uvit") == importlib.metadata.version("keras-uvit")
    assert all(isinstance(record.pop(key), float) for key in SCORES)
    assert record == {
        "model": model.name,
        "weights": fingerprint(model.ema_network),
        "ema": True,
        "step": 0,
        "global_batch": None,
        "num_images": N,
        "label_protocol": "random",
        "prompts": None,
        "text_encoder": None,
        "context_encoder": None,
        "sampler": "dpm_solver_pp_2m",
        "num_steps": 2,
        "nfe": 2,
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 1.0],
        "seed": 3,
        "image_size": [8, 8],
        "autoencoder": None,
        "latent_scale": None,
        "latent_shift": 0.0,
        "backend": keras.config.backend(),
        "reference": real.hash,
        "reference_images": 40,
        "resize": "half_pixel",
        "inception": "0123456789abcdef",
    }


NUMPYS = dict(seed=np.int64(1), num_steps=np.int32(2), guidance_scale=np.float32(1.5))
HEUN = dict(sampler="heun", num_steps=3, guidance_interval=(0.25, 0.75), guidance_scale=2.0)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("model", "options", "recorded"),
    [
        ("nothing", {}, dict(label_protocol=None, guidance_scale=1.0)),
        ("labels", NUMPYS, NUMPYS),  # which are no JSON
        # Two evaluations a step, but one in the last.
        ("labels", HEUN, HEUN | dict(nfe=5, guidance_interval=[0.25, 0.75])),
        ("labels", dict(labels="balanced", use_ema=False), dict(label_protocol="balanced")),
        ("labels", dict(sampler=samplers.named("ddim", VPLinear(), 3)), dict(nfe=3)),
        ("latents", {}, dict(autoencoder="space-to-depth-2", latent_scale=0.5)),
        ("latents", {}, dict(image_size=[8, 8])),
    ],
)
def test_options_are_recorded_and_a_file_holds_the_record(
    models, measure, tmp_path, model, options, recorded
):
    path = tmp_path / "deep" / "fid.json"
    record = measure(models[model], path=path, **options)
    assert recorded.items() <= record.items()
    assert json.loads(path.read_text()) == record


@pytest.mark.usefixtures("undrawn")
def test_a_reference_gives_the_scores_that_it_has_statistics_for(models, real, measure):
    record = measure(models["nothing"], reference=Reference(real.pool))
    assert [record[key] for key in ("sfid", "precision", "recall")] == [None] * 3
    assert record["fid"] > 0
    assert record["inception_score"] > 1
    assert record["reference_images"] is None
    record = measure(models["nothing"], reference=reference(keep_features=3))  # 4 are needed
    assert (record["precision"], record["recall"]) == (None, None)
    assert record["sfid"] > 0


# What is drawn ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("model", "options", "labels"),
    [
        ("nothing", dict(seed=5), None),
        ("labels", dict(seed=5), random_labels(seed=5)),
        ("labels", dict(labels="balanced"), np.array([0, 1, 2] * 6 + [0, 1])),
        ("nothing", dict(use_ema=False), None),
        ("latents", dict(seed=5), None),
    ],
)
def test_scores_are_those_of_the_images_drawn_by_hand(
    models, real, inception, measure, drawn, tmp_path, model, options, labels
):
    model, seed, use_ema = models[model], options.get("seed", 0), options.get("use_ema", True)
    what = dict(num_images=N) if labels is None else dict(labels=labels)
    images = model.generate(**what, seed=seed, use_ema=use_ema, batch_size=4, verbose=0)
    assert images.shape == (N, 8, 8, 3)
    assert len(np.unique(images.reshape(N, -1), axis=0)) == N
    expected = only_scores(scores([images], N, real, inception, **FEW))

    drawn.clear()
    record = measure(model, N, folder=tmp_path / "a" / "b", **options)
    assert drawn == [(0, 8), (8, 8), (16, 4)]
    assert only_scores(record) == expected
    assert record["weights"] == fingerprint(model.ema_network if use_ema else model.network)
    # The ADM suite's files.
    files = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert files == ["000000.npz", "000008.npz", "000016.npz", "samples.json"]
    np.testing.assert_array_equal(saved(tmp_path / "a" / "b"), images)
    if labels is not None:
        np.testing.assert_array_equal(saved(tmp_path / "a" / "b", "arr_1"), labels)

    inception.batches.clear()
    assert only_scores(measure(model, N, **options)) == expected  # without a folder
    assert inception.batches == [8, 8, 4]
    assert measure(model, N)["fid"] != record["fid"]  # the option matters


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("stop", "missing", "then", "labels", "calls"),
    [
        (1, None, N, "random", [(8, 8), (16, 4)]),
        (2, None, N, "random", [(16, 4)]),
        (None, None, N, "random", []),
        (None, "000008.npz", N, "random", [(8, 8)]),
        (None, None, 28, "random", [(16, 8), (24, 4)]),
        (None, None, 28, "balanced", [(16, 8), (24, 4)]),
        (None, None, 12, "random", []),
    ],
)
def test_an_evaluation_goes_on_in_its_folder(
    models, measure, drawn, tmp_path, stop, missing, then, labels, calls
):
    model, folder = models["labels"], tmp_path / "a"
    whole = measure(model, then, labels=labels, folder=tmp_path / "whole")
    drawn.clear()
    drawn.stop = stop
    with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
        measure(model, N, labels=labels, folder=folder)
    assert drawn == [(0, 8), (8, 8), (16, 4)][:stop]
    if missing:
        (folder / missing).unlink()
    drawn.clear()
    drawn.stop = None
    assert measure(model, then, labels=labels, folder=folder) == whole
    assert drawn == calls
    np.testing.assert_array_equal(saved(folder)[:then], saved(tmp_path / "whole"))
    measure(model, N, labels=labels, folder=folder)
    assert drawn == calls  # fewer images did not take the others away


def by_hand(name):
    return dict(sampler=samplers.named(name, VPLinear(), 3))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, dict(seed=1), "seed was 0, is 1"),
        ({}, dict(guidance_scale=2.0), "guidance_scale was 1.0, is 2.0"),
        ({}, dict(guidance_interval=(0.0, 0.5)), r"was \[0.0, 1.0\], is \[0.0, 0.5\]"),
        ({}, dict(num_steps=3), "num_steps was 2, is 3; nfe was 2, is 3"),
        ({}, dict(sampler="ddim"), "sampler was dpm_solver_pp_2m, is ddim"),
        ({}, dict(labels="balanced"), "label_protocol was random, is balanced"),
        ({}, dict(use_ema=False), r"weights was \w{16}, is \w{16}; ema was True"),
        (by_hand("ddim"), by_hand("dpm_solver_pp_2m"), "sampler was"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(
    models, measure, drawn, tmp_path, before, after, message
):
    measure(models["labels"], 4, folder=tmp_path, **before)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds samples of .* else: .*{message}"):
        measure(models["labels"], 4, folder=tmp_path, **before | after)
    assert drawn == [(0, 4)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.usefixtures("undrawn")
def test_a_saved_model_goes_on_in_its_folder_but_not_with_other_weights(measure, drawn, tmp_path):
    model, folder = make(PIXELS), tmp_path / "images"
    model.global_batch.assign(4)  # as `fit` does
    first = measure(model, 4, folder=folder)
    assert first["global_batch"] == 4
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert measure(loaded, 4, folder=folder) == first
    weight = loaded.ema_network.weights[0]
    weight.assign(weight + 1e-6)
    refused(ValueError, lambda: measure(loaded, 4, folder=folder), "something else: weights was")
    assert drawn == [(0, 4)]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("damage", ["samples.json", "000000.npz", "no samples.json"])
def test_a_damaged_folder_is_named(models, measure, tmp_path, damage):
    measure(models["nothing"], 4, folder=tmp_path)
    path = tmp_path / damage.removeprefix("no ")
    if damage.startswith("no "):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:99])
    refused(ValueError, lambda: measure(models["nothing"], 4, folder=tmp_path), path.name)


# Refusals -----------------------------------------------------------------------------------------

TF1 = dict(inception=StubInception("tf1"))


@pytest.mark.parametrize(
    ("model", "made_with", "options", "words"),
    [
        ("labels", {}, dict(labels="even"), ["balanced", "'even'"]),
        ("nothing", {}, dict(seed=-1), ["seed must be"]),
        ("nothing", {}, dict(steps=3), ["num_steps", "['steps']"]),
        ("nothing", {}, dict(num_images=2048, allow_few=False), ["2048 images are too few"]),
        ("nothing", TF1, {}, ["resize 'tf1'", "has 'half_pixel'"]),
        ("nothing", dict(inception=StubInception(fingerprint="ff")), {}, ["'ff'", "has '0123"]),
        ("nothing", dict(size=16), {}, ["16 x 16", "8 x 8"]),
        ("latents", dict(size=4), {}, ["4 x 4", "8 x 8"]),  # decoded
        ("latents alone", {}, {}, ["pixels", "set_encoders(autoencoder="]),
        ("grey", {}, {}, ["3 channels", "of 1"]),
    ],
)
def test_what_does_not_fit_is_refused_before_drawing(
    models, measure, drawn, tmp_path, model, made_with, options, words
):
    folder = tmp_path / "images"  # stays free for another call
    options = dict(reference=reference(**made_with), folder=folder) | options
    error = TypeError if "steps" in options else ValueError
    refused(error, lambda: measure(models[model], **options), *words)
    assert drawn == []
    assert not folder.exists()


@pytest.mark.parametrize(
    ("known", "count", "words"),
    [
        (reference(), 12, ["Expected 12 images", "8"]),
        (Reference((np.zeros(5), np.eye(5))), 8, ["differ in number"]),
        (reference(**TF1), 8, ["resize 'tf1'", "has 'half_pixel'"]),
        (reference(size=16), 8, ["16 x 16", "8 x 8"]),
    ],
)
def test_images_that_do_not_fit_are_refused(inception, known, count, words):
    images = [random_images(8)]
    refused(ValueError, lambda: scores(images, count, known, inception, **FEW), *words)
    refused(ValueError, lambda: fid(images[0], known, inception), "8 images are too few")


@pytest.mark.usefixtures("undrawn")
def test_fewer_images_than_usual_warn_at_the_callers_line(models, real, inception):
    def call(usual):
        options = FEW | dict(usual=usual)
        return evaluate(models["nothing"], real, inception, 8, **options)

    with pytest.warns(UserWarning, match="FID of 2049 images is larger than of 50000"):
        assert fid(random_images(2049, seed=2), real, inception, verbose=0) > 0
    with pytest.warns(UserWarning, match="FID of 8 images is larger than of 9") as caught:
        call(9)
    assert [w.filename for w in caught if "FID" in str(w.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(8)


def test_fid_is_the_score_and_zero_for_the_images_of_the_reference(real, inception):
    images = random_images(60, seed=4)
    found = scores([images[:50], images[50:]], 60, real, inception, **FEW)
    with pytest.warns(UserWarning, match="do not compare"):
        assert fid(images, real, inception, allow_few=True, verbose=0) == found["fid"] > 0.01
    same = scores([random_images(40, seed=1)], 40, real, inception, **FEW)
    # 1e-6: a covariance of 12 numbers in 16 features has zero eigenvalues; roots round at 1e-8.
    assert same["fid"] < 1e-6
    assert same["sfid"] < 1e-6
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
