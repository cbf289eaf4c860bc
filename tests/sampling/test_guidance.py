"""Kinds of guidance: what they equal, what they change, what they refuse."""

import functools
import types

import keras
import numpy as np
import pytest
from test_editing import lively, traces_of
from tiny import diffusion_model, normal, numpy, refused, uvit

from keras_uvit import DiffusionModel
from keras_uvit.diffusion import FlowMap, samplers
from keras_uvit.diffusion.schedules import LinearPath, VPCosine
from keras_uvit.inference import fingerprint
from keras_uvit.sampling import APG, AutoGuidance, Guidance, Rescale, generate, resolve

pytestmark = pytest.mark.eager
STRONG, WEAK = normal(3, 4, 4, 2), normal(3, 4, 4, 2, seed=1)
W = np.float32(3.0)


def combined(guidance, scale=W):
    return numpy(guidance.combine(*(keras.ops.convert_to_tensor(a) for a in (STRONG, WEAK)), scale))


def norm(images):
    return np.sqrt((images**2).sum(axis=(1, 2, 3)))


@functools.cache
def model_of(kind):
    keras.utils.set_random_seed({"weak": 1}.get(kind, 0))
    if kind in ("labels", "weak"):
        return lively(diffusion_model(compiled=False, seed=int(kind == "weak"), num_steps=6))
    return lively(DiffusionModel(uvit(), num_steps=4))


def draw(kind="labels", **options):
    given = dict(labels=[0, 1, 2]) if kind == "labels" else dict(num_images=3)
    return model_of(kind).generate(**given, **{"verbose": 0, "decode": False, **options})


# How two estimates become one ---------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("guidance", [APG(eta=1.0), Rescale(phi=0.0)])
def test_a_limit_of_each_is_classifier_free_guidance(guidance):
    # 2e-6: a few roundings of float32 numbers up to 10.
    np.testing.assert_allclose(combined(guidance), combined(Guidance()), atol=2e-6)
    np.testing.assert_allclose(combined(Guidance()), WEAK + 3 * (STRONG - WEAK), atol=2e-6)


@pytest.mark.once
@pytest.mark.parametrize("guidance", [Guidance(), APG(), APG(most=0.1), Rescale()])
def test_a_scale_of_one_is_off(guidance):
    # 5e-6: `Rescale` adds 1e-6 to the deviation that it divides by.
    np.testing.assert_allclose(combined(guidance, np.float32(1.0)), STRONG, atol=5e-6)


@pytest.mark.once
def test_apg_moves_across_the_estimate_and_no_further_than_told():
    move = combined(APG()) - STRONG
    across = (move * STRONG).sum(axis=(1, 2, 3)) / (norm(move) * norm(STRONG))
    np.testing.assert_allclose(across, 0, atol=1e-6)  # a cosine
    assert norm(move).min() > 1
    short = combined(APG(eta=1.0, most=0.5)) - STRONG
    np.testing.assert_allclose(norm(short), 2 * 0.5, rtol=1e-4)  # w - 1 = 2
    free = combined(APG(eta=1.0, most=1e3))
    np.testing.assert_allclose(free, combined(Guidance()), atol=2e-6)


@pytest.mark.once
def test_rescaling_gives_back_the_deviation():
    deviation = lambda images: images.std(axis=(1, 2, 3))  # noqa: E731
    full = combined(Rescale(phi=1.0))
    np.testing.assert_allclose(deviation(full), deviation(STRONG), rtol=1e-5)
    assert (deviation(combined(Guidance())) > 2 * deviation(STRONG)).all()
    half = combined(Rescale(phi=0.5))
    np.testing.assert_allclose(half, (full + combined(Guidance())) / 2, atol=2e-6)


# In `generate` ------------------------------------------------------------------------------------


def test_a_function_of_time_is_the_scale_of_each_row():
    two = draw(guidance_scale=2.0)
    np.testing.assert_array_equal(draw(guidance_scale=lambda t: 2.0), two)
    np.testing.assert_array_equal(draw(guidance=Guidance(), guidance_scale=2.0), two)
    part = draw(guidance_scale=2.0, guidance_interval=(0.2, 0.7))
    by_function = draw(guidance_scale=lambda t: 2.0 if 0.2 <= t <= 0.7 else 1.0)
    np.testing.assert_array_equal(by_function, part)
    rising = draw(guidance_scale=lambda t: 3.0 - 2.0 * t)  # more guidance, the less noise
    assert np.abs(rising - two).max() > 0.01


@pytest.mark.parametrize("guidance", [APG(most=0.5), Rescale()])
def test_other_guidance_draws_other_images(guidance):
    plain, free = draw(), draw(guidance_scale=2.0)
    other = draw(guidance_scale=2.0, guidance=guidance)
    assert np.abs(other - free).max() > 0.01
    assert np.abs(other - plain).max() > 0.01


def test_autoguidance_leads_away_from_the_weak_model():
    one_step = samplers.ddim(model_of("labels").objective.schedule, [0.8, 0.0])
    by_weak = functools.partial(draw, sampler=one_step, guidance=AutoGuidance(model_of("weak")))
    strong = draw(sampler=one_step)
    weak = model_of("weak").generate(labels=[0, 1, 2], sampler=one_step, verbose=0, decode=False)
    # Values up to 100 here, rounded in float32.
    np.testing.assert_allclose(by_weak(guidance_scale=0.0), weak, atol=1e-3)
    np.testing.assert_allclose(by_weak(guidance_scale=3.0), weak + 3 * (strong - weak), atol=1e-3)
    # A model is no weaker than itself.
    alone = draw(sampler=one_step, guidance=AutoGuidance(model_of("labels")), guidance_scale=3.0)
    np.testing.assert_allclose(alone, strong, atol=1e-3)


def test_autoguidance_of_a_model_without_conditions():
    weak = lively(DiffusionModel(uvit(num_layers=3)))
    guided = draw("plain", guidance=AutoGuidance(weak), guidance_scale=2.0)
    assert np.abs(guided - draw("plain")).max() > 0.01
    assert np.isfinite(draw("plain", guidance=APG(weak_model=weak), guidance_scale=2.0)).all()


@pytest.mark.compiled
@pytest.mark.skipif(keras.config.backend() == "torch", reason="nothing is compiled on torch")
def test_another_object_of_the_same_numbers_compiles_nothing():
    model = lively(diffusion_model(compiled=False, num_steps=3))
    for guidance in (Rescale(0.5), Rescale(0.5)):
        model.generate(labels=[0], guidance=guidance, guidance_scale=2.0, verbose=0)
    assert traces_of(model) == 1


def weak(**changes):
    """A model that differs from the one of `labels` in `changes`."""
    own = ("schedule", "latent_scale", "latent_shift", "prediction", "flow_map")
    options = {k: changes.pop(k) for k in own if k in changes}
    return AutoGuidance(DiffusionModel(uvit(**{"num_classes": 3, **changes}), **options))


FAST = dict(takes_span=True, takes_guidance=True, schedule=LinearPath(), prediction="velocity")
FAST["flow_map"] = FlowMap(5, guidance=(1.0, 2.0))
BAD = {
    "a number": (dict(guidance=2.0), TypeError, "APG()", "guidance_scale", "2.0"),
    "off": (dict(guidance=AutoGuidance, guidance_scale=1.0), TypeError, "guidance is an object"),
    "weak, off": (lambda: dict(guidance=weak()), ValueError, "guidance_scale", "1.0, off"),
    "schedule": (lambda: dict(guidance=weak(schedule=VPCosine())), ValueError, "VPCosine", "VPLin"),
    "latents": (lambda: dict(guidance=weak(latent_scale=0.5)), ValueError, "latent_scale 0.5"),
    "shift": (lambda: dict(guidance=weak(latent_shift=0.5)), ValueError, "latent_shift 0.5"),
    "guided itself": (lambda: dict(guidance=weak(**FAST)), ValueError, "would be guided itself"),
    "size": (lambda: dict(guidance=weak(image_shape=(8, 8, 1))), ValueError, "(8, 8, 1) instead"),
    "classes": (lambda: dict(guidance=weak(num_classes=4)), ValueError, "num_classes 4 instead"),
    "no model": (lambda: dict(guidance=AutoGuidance(uvit())), TypeError, "a DiffusionModel"),
    "scale of time": (dict(guidance_scale=lambda t: -t), ValueError, ">= 0", "at t ="),
    "no number": (dict(guidance_scale=lambda t: None), ValueError, "None at t = 1"),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("case", BAD)
def test_bad_guidance_is_refused_before_anything_runs(case, monkeypatch):
    options, error, *words = BAD[case]
    options = options() if isinstance(options, types.FunctionType) else options
    options = {"guidance_scale": 1.0 if case == "weak, off" else 2.0, **options}
    monkeypatch.setattr(generate, "_program", None)
    refused(error, lambda: model_of("labels").generate(labels=[0], **options), *words)


@pytest.mark.once
def test_a_weak_model_of_another_encoders_latents_is_refused():
    model, other = (DiffusionModel(uvit(), latent_scale=0.5, num_steps=2) for _ in range(2))
    draw = functools.partial(model.generate, 1, guidance=AutoGuidance(other), decode=False)
    other.latent_encoder = "def"  # the model does not know its own
    assert draw(guidance_scale=2.0, verbose=0).shape == (1, 4, 4, 1)
    model.latent_encoder = "abc"
    refused(ValueError, lambda: draw(guidance_scale=2.0), "latent_encoder def instead of abc")


@pytest.mark.once
def test_the_record_of_a_distance_says_what_guided():
    told = functools.partial(resolve, model_of("labels"), guidance_scale=2.0)
    assert "guidance" not in told().record()
    kind = {"kind": "APG", "eta": 0.5, "most": None, "weak_model": None}
    assert told(guidance=APG(eta=0.5)).record()["guidance"] == kind
    by_weak = told(guidance=AutoGuidance(model_of("weak"))).record()["guidance"]
    assert by_weak == {"kind": "AutoGuidance", "weak_model": fingerprint(model_of("weak"))}
    scales = told(guidance_scale=lambda t: 1.0 + t).record()["guidance_scale"]
    assert (scales[0], len(scales)) == (2.0, 6)


@pytest.mark.once
def test_numbers_of_guidance_are_checked_when_it_is_made():
    for make, word in (
        (lambda: APG(eta=-1), "eta=-1"),
        (lambda: APG(most=0.0), "most=0.0"),
        (lambda: Rescale(phi=1.5), "phi=1.5"),
        (AutoGuidance, "weak_model"),
    ):
        refused(ValueError, make, word)
