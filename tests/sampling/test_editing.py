"""Pictures to start from, masks, inversion, and what is seen on the way."""

import functools

import keras
import numpy as np
import pytest
from tiny import diffusion_model, normal, refused, uvit

from keras_uvit import DiffusionModel, data, presets
from keras_uvit.diffusion import samplers
from keras_uvit.diffusion.schedules import VPCosine
from keras_uvit.encoders import SpaceToDepth
from keras_uvit.sampling import generate

pytestmark = pytest.mark.eager
BACKEND = keras.config.backend()
PICTURES = np.random.default_rng(5).integers(0, 256, (3, 4, 4, 1), "uint8")
# Deterministic or not, with a memory or not; the others are the same on each backend.
FEW = ("ddpm", "heun", "dpm_solver_pp_2m")
EVERY = [
    pytest.param(s, marks=() if s in FEW else pytest.mark.once)
    for s in samplers.SAMPLERS
    if s != "flow_map"  # of models that are trained for it, tests/diffusion/test_flow_map.py
]
HALF = np.array([[0, 0, 1, 1]] * 4)
LATENT_PICTURES = np.random.default_rng(6).integers(0, 256, (2, 8, 8, 1), "uint8")


def lively(model):
    """Fresh weights are so small that labels hardly matter."""
    for weight in model.network.weights:
        weight.assign(5.0 * weight)
    model.copy_weights_to_ema()
    return model


def traces_of(model):
    """How often the loops of a model were traced and compiled."""
    count = "_cache_size" if BACKEND == "jax" else "experimental_get_tracing_count"
    return sum(getattr(loop, count)() for loop in model.sampling_loops.values())


@functools.cache
def model_of(kind):
    if kind == "labels":
        return lively(diffusion_model(compiled=False, num_steps=6))
    keras.utils.set_random_seed(0)
    if kind == "plain":
        return lively(DiffusionModel(uvit(), num_steps=3))
    space = dict(latent_scale=(0.5, 0.7, 0.6, 0.4), latent_shift=(0.1, 0.0, -0.2, 0.3))
    model = lively(DiffusionModel(uvit(image_shape=(4, 4, 4)), **space, num_steps=3))
    if kind == "latents":
        model.set_encoders(autoencoder=SpaceToDepth(2, *space.values()))
    return model


def draw(kind="labels", **options):
    given = {"labels": dict(labels=[0, 1, 2])}.get(kind, {})
    return model_of(kind).generate(**{**given, "verbose": 0, **options})


# Strength -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", EVERY)
def test_strength_one_is_plain_sampling_and_zero_returns_the_picture(sampler):
    edit = functools.partial(draw, sampler=sampler, seed=3, image=PICTURES)
    np.testing.assert_array_equal(edit(strength=1), draw(sampler=sampler, seed=3))
    np.testing.assert_array_equal(edit(strength=0), PICTURES)
    part = edit(strength=0.5)
    assert (part != PICTURES).any()
    assert (part != draw(sampler=sampler, seed=3)).any()


def test_a_picture_is_noised_to_where_the_grid_begins():
    schedule = model_of("labels").objective.schedule
    unit = PICTURES.astype("float32") / 127.5 - 1
    noise, _ = generate.noise_of(3, range(3), (4, 4, 1))
    x = schedule.alpha(0.4) * unit + schedule.sigma(0.4) * noise
    steps = samplers.ddim(schedule, samplers.time_uniform(5, 0.4))
    expected = draw(noise=x, sampler=steps, decode=False)
    edit = functools.partial(draw, strength=0.4, seed=3, decode=False)
    for image in (PICTURES, unit):
        found = edit(image=image, sampler="ddim", num_steps=5)
        np.testing.assert_array_equal(found, expected)
    whole = samplers.ddim(schedule, [1.0, 0.7, *samplers.time_uniform(5, 0.4)])
    np.testing.assert_array_equal(edit(image=PICTURES, sampler=whole), expected)


def test_one_picture_is_for_all_images_and_counts_the_images_of_an_unconditional_model():
    one = draw(image=PICTURES[0], strength=0.5, seed=1)
    np.testing.assert_array_equal(one, draw(image=PICTURES[:1].repeat(3, 0), strength=0.5, seed=1))
    assert len(np.unique(one, axis=0)) == 3
    assert draw("plain", image=PICTURES, strength=0.5).shape == (3, 4, 4, 1)
    assert draw("plain", image=PICTURES[0], strength=0.5, num_images=2).shape == (2, 4, 4, 1)


def test_batches_do_not_change_an_edit():
    options = dict(image=PICTURES, mask=HALF, resamples=2, sampler="ddpm", seed=4, decode=False)
    whole = draw(**options)
    # Up to 16 roundings of float32, as of the same arithmetic in batches of another size.
    atol = 1e-6 * np.abs(whole).max()
    np.testing.assert_allclose(draw(**options, batch_size=2), whole, atol=atol)


def test_latents_start_from_what_the_autoencoder_makes_of_a_picture():
    edit = functools.partial(draw, "latents", image=LATENT_PICTURES)
    np.testing.assert_array_equal(edit(strength=0), LATENT_PICTURES)  # a lossless autoencoder
    latents = edit(strength=0, decode=False)
    encoder = model_of("latents").encoders.autoencoder
    np.testing.assert_array_equal(latents, encoder.sample(encoder.encode(LATENT_PICTURES)))
    assert edit(strength=0.5).shape == LATENT_PICTURES.shape


# Masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resamples", [1, 3])
@pytest.mark.parametrize("sampler", EVERY[:-1])  # all but dpm_solver_pp_3m
def test_what_is_known_comes_back_exactly(sampler, resamples):
    edit = functools.partial(draw, image=PICTURES, sampler=sampler, resamples=resamples)
    images = edit(mask=HALF)
    np.testing.assert_array_equal(images[:, :, :2], PICTURES[:, :, :2])
    assert (images[:, :, 2:] != PICTURES[:, :, 2:]).any()
    each = np.stack([HALF, 1 - HALF, HALF]).astype(bool)
    one_each = edit(mask=each)
    np.testing.assert_array_equal(one_each[~each], PICTURES[~each])
    np.testing.assert_array_equal(one_each[0], images[0])


def test_masks_of_latents_are_of_whole_latents_and_known_pixels_are_pasted():
    mask = np.zeros((8, 8))
    mask[3:, 5:] = 1  # not along the latents' grid of 2 x 2
    images = draw("latents", image=LATENT_PICTURES, mask=mask)
    np.testing.assert_array_equal(images[:, mask == 0], LATENT_PICTURES[:, mask == 0])
    raw = draw("latents", image=LATENT_PICTURES, mask=mask, decode=False)
    kept = draw("latents", image=LATENT_PICTURES, strength=0, decode=False)
    cells = np.zeros((4, 4), bool)
    cells[1:, 2:] = True
    np.testing.assert_array_equal(raw[:, ~cells], kept[:, ~cells])
    assert (raw[:, cells] != kept[:, cells]).all(axis=-1).all()


@pytest.mark.compiled
@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled on torch")
def test_another_mask_picture_strength_or_scale_compiles_nothing():
    model = lively(diffusion_model(compiled=False, num_steps=4))
    edit = functools.partial(model.generate, labels=[0, 1, 2], image=PICTURES, verbose=0)
    edit(mask=HALF, guidance_scale=2.0)
    assert traces_of(model) == 1
    edit(mask=1 - HALF, guidance_scale=lambda t: 1.5 + t, seed=1)
    model.generate(labels=[2, 1, 0], image=PICTURES[::-1], mask=HALF, strength=0.3, verbose=0,
                   guidance_scale=3.0)  # fmt: skip
    assert traces_of(model) == 1
    plain = functools.partial(model.generate, labels=[0, 1, 2], verbose=0)
    plain()
    edit(strength=0.5)
    assert traces_of(model) == 2
    plain(every=1, on_step=lambda *seen: None)  # four calls of one program of one row
    assert traces_of(model) == 3


# Inversion ----------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_picture_comes_back_from_its_noise():
    model = presets.load("uvit_tiny_digits", weights="pretrained")
    digits = data.digits("test")
    image, labels = digits["image"][:12], digits["label"][:12]
    way = dict(sampler="ddim", num_steps=50, verbose=0)
    noise = model.invert(image, labels, **way)
    assert noise.shape == image.shape
    assert 0.6 < noise.std() < 1.1
    again = model.generate(labels=labels, noise=noise, guidance_scale=1.0, **way)
    error = np.mean((again.astype("float64") - image) ** 2)
    assert 10 * np.log10(255**2 / error) > 50  # measured: 59 dB


def test_inversion_of_latents_and_of_guided_models():
    noise = model_of("latents").invert(LATENT_PICTURES, verbose=0)
    assert noise.shape == (2, 4, 4, 4)
    assert noise.dtype == np.float32
    model = model_of("labels")
    invert = functools.partial(model.invert, PICTURES, [0, 1, 2], num_steps=4, verbose=0)
    assert np.abs(invert() - invert(guidance_scale=2.0)).max() > 1e-3
    assert np.abs(invert() - invert(evaluations=1)).max() > 1e-6


# What is seen on the way --------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver_pp_2m"])
def test_looking_changes_nothing(sampler):
    seen = []
    options = dict(sampler=sampler, num_steps=5, guidance_scale=2.0, decode=False)
    plain = draw(**options)
    images = draw(**options, on_step=lambda *step: seen.append(step), every=2)
    # One program of five rows, or three of at most two: the same operations, fused otherwise.
    np.testing.assert_allclose(images, plain, atol=1e-4 * np.abs(plain).max())
    steps = samplers.named(sampler, model_of("labels").objective.schedule, 5)
    assert [(step, t) for step, t, _ in seen] == [(k, steps.t[k]) for k in (1, 3, 4)]
    assert all(denoised.shape == (3, 4, 4, 1) for _, _, denoised in seen)


def test_intermediates_are_the_estimates_and_the_last_ddim_step_is_the_image():
    options = dict(sampler="ddim", num_steps=4, batch_size=2)
    images, film = draw(**options, return_intermediates=True)
    assert film.shape == (4, 3, 4, 4, 1)
    assert film.dtype == np.uint8
    np.testing.assert_array_equal(film[-1], images)
    _, raw = draw(**options, return_intermediates=True, decode=False, every=3)
    assert raw.dtype == np.float32
    assert len(raw) == 2
    _, still = draw(image=PICTURES, strength=0, return_intermediates=True)
    np.testing.assert_array_equal(still, PICTURES[None])  # no steps, one estimate
    seen = []
    draw(**options, on_step=lambda step, t, denoised: seen.append(len(denoised)), every=4)
    assert seen == [2, 1]  # the last batch is filled up, which nobody sees


# What is refused ----------------------------------------------------------------------------------

ONE = dict(labels=[0, 1, 2])
IMAGE = dict(**ONE, image=PICTURES)
PART = dict(**ONE, strength=0.5)
RAW = dict(num_images=1, decode=False)


def black(*shape):
    return np.zeros(shape, "uint8")


BAD = {
    "image of another size": ("labels", dict(**PART, image=black(8, 8, 1)),
                              ValueError, "(4, 4, 1)", "(8, 8, 1)", "Resize"),
    "image of more channels": ("labels", dict(**PART, image=black(4, 4, 3)),
                               ValueError, "(4, 4, 1)"),
    "image of ints": ("labels", dict(**PART, image=black(4, 4, 1).astype(int)),
                      TypeError, "uint8, or float"),
    "image out of range": ("labels", dict(**PART, image=black(4, 4, 1) + 2.0),
                           ValueError, "[-1, 1]"),
    "NaN": ("labels", dict(**PART, image=black(4, 4, 1) * np.nan),
            ValueError, "nan"),
    "another number of images": ("labels", dict(**PART, image=PICTURES[:2]),
                                 ValueError, "image is one for all", "each of 3", "2"),
    "another num_images": ("plain", dict(num_images=2, image=PICTURES, strength=0.5),
                           ValueError, "each of 2", "3"),
    "image alone": ("labels", IMAGE, ValueError, "strength, such as 0.6", "mask"),
    "strength above": ("labels", dict(**IMAGE, strength=1.1), ValueError, "strength", "1.1"),
    "strength below": ("labels", dict(**IMAGE, strength=-0.1), ValueError, "strength", "-0.1"),
    "strength NaN": ("labels", dict(**IMAGE, strength=np.nan), ValueError, "strength", "nan"),
    "strength of no number": ("labels", dict(**IMAGE, strength="0.5"), ValueError, "'0.5'"),
    "strength alone": ("labels", dict(**ONE, strength=0.5), ValueError, "strength goes with"),
    "mask alone": ("labels", dict(**ONE, mask=HALF), ValueError, "mask goes with image="),
    "resamples alone": ("labels", dict(**ONE, resamples=2), ValueError, "resamples goes with"),
    "resamples, no mask": ("labels", dict(**IMAGE, strength=0.5, resamples=2),
                           ValueError, "resamples goes with a mask"),
    "resamples of none": ("labels", dict(**IMAGE, mask=HALF, resamples=0),
                          ValueError, "resamples must be an int >= 1"),
    "mask of another size": ("labels", dict(**IMAGE, mask=np.eye(8)), ValueError, "(4, 4)", "(8,"),
    "mask not of 0 and 1": ("labels", dict(**IMAGE, mask=HALF * 255), ValueError, "255", "> 127"),
    "mask with NaN": ("labels", dict(**IMAGE, mask=HALF * np.nan), ValueError, "nan"),
    "mask of ones": ("labels", dict(**IMAGE, mask=np.ones((4, 4))), ValueError, "1 everywhere"),
    "mask of zeros": ("labels", dict(**IMAGE, mask=np.zeros((4, 4))), ValueError, "0 everywhere"),
    "one of several masks of ones": ("labels", dict(**IMAGE, mask=[HALF, HALF * 0 + 1, HALF]),
                                     ValueError, "1 everywhere"),
    "another number of masks": ("labels", dict(**IMAGE, mask=[HALF, HALF]),
                                ValueError, "mask is one for all", "2"),
    "a long memory": ("labels", dict(**IMAGE, mask=HALF, resamples=2, sampler="dpm_solver_pp_3m"),
                      ValueError, "before the jump"),
    "no autoencoder": ("no encoder", dict(**RAW, image=LATENT_PICTURES, strength=0.5),
                       ValueError, "set_encoders(autoencoder"),
    "picture of a latents' size": ("latents", dict(num_images=1, image=PICTURES, strength=0.5),
                                   ValueError, "(8, 8, 'C')"),
    "picture of more channels": ("latents", dict(image=black(8, 8, 3), strength=0.5),
                                 ValueError, "(8, 8, 3)", "latents of another shape"),
    "noise of another shape": ("labels", dict(**ONE, noise=normal(3, 8, 8, 1)),
                               ValueError, "(n, 4, 4, 1)", "(3, 8, 8, 1)"),
    "noise of ints": ("labels", dict(**ONE, noise=PICTURES), ValueError, "noise is float", "uint8"),
    "noise with NaN": ("labels", dict(**ONE, noise=normal(3, 4, 4, 1) * np.nan), ValueError, "NaN"),
    "other noise": ("labels", dict(**ONE, noise=normal(2, 4, 4, 1)), ValueError, "noise is one"),
    "on_step": ("labels", dict(**ONE, on_step=5), TypeError, "(step, t, denoised)", "5"),
    "every": ("labels", dict(**ONE, every=0), ValueError, "every must be an int >= 1"),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("case", BAD)
def test_bad_edits_are_refused_before_anything_runs(case, monkeypatch):
    kind, options, error, *words = BAD[case]
    monkeypatch.setattr(generate, "_program", None)
    refused(error, lambda: model_of(kind).generate(**options), *words)


INVERSIONS = {
    "noise": (dict(sampler="ddpm"), "deterministic"),
    "memory": (dict(sampler="dpm_solver_pp_2m"), "without a memory"),
    "evaluations": (dict(evaluations=0), "1, 2 or 3"),
    "size": (dict(image=black(8, 8, 1)), "(4, 4, 1)", "(8, 8, 1)"),
    "labels": (dict(labels=None), "generates from `labels`"),
    "one step": (dict(num_steps=1), "at least two steps"),
}


@pytest.mark.once
@pytest.mark.parametrize("case", INVERSIONS)
def test_bad_inversions_are_refused_before_anything_runs(case, monkeypatch):
    options, *words = INVERSIONS[case]
    monkeypatch.setattr(generate, "_program", None)
    options = {"image": PICTURES, "labels": [0, 1, 2], **options}
    refused(ValueError, lambda: model_of("labels").invert(**options), *words)


@pytest.mark.once
def test_inversion_of_a_cosine_schedule_starts_where_sampling_does():
    model = lively(diffusion_model(compiled=False, schedule=VPCosine(), num_steps=4))
    noise = model.invert(PICTURES, [0, 1, 2], verbose=0)
    again = model.generate(labels=[0, 1, 2], noise=noise, sampler="ddim", verbose=0)
    assert again.shape == PICTURES.shape
