"""Sampling: seeds, batches, guidance, one compiled loop."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from tiny import diffusion_model, fit, numpy, refused, uvit, weights
from words import Words

from keras_uvit import DiffusionModel, UNet, backend
from keras_uvit.diffusion import samplers, schedules
from keras_uvit.sampling import generate

pytestmark = pytest.mark.eager  # on TensorFlow; flow matching is compiled, and so is what says so
BACKEND = keras.config.backend()
TEXT = dict(context_shape=(2, 3))
KINDS = {  # of the network, of the model
    "labels": (dict(num_classes=3), dict(num_steps=6)),
    "no null label": (dict(num_classes=3, null_label=False), {}),
    "plain": ({}, dict(num_steps=3)),
    "cosine": ({}, dict(schedule=schedules.VPCosine())),
    "latents": ({}, dict(latent_scale=0.5, num_steps=3)),
    "text": (TEXT, dict(num_steps=3, guidance_scale=2.0)),
    "no encoder": (TEXT, dict(num_steps=3)),
    "both": (dict(num_classes=3, **TEXT), dict(num_steps=2, guidance_scale=2.0)),
}


@functools.cache
def model_of(kind):
    network, options = KINDS[kind]
    keras.utils.set_random_seed(0)
    model = DiffusionModel(uvit(**network), **options)
    for weight in model.network.weights:
        weight.assign(5.0 * weight)  # fresh weights are so small that labels hardly matter
    model.copy_weights_to_ema()
    if kind in ("text", "both"):
        model.set_encoders(text_encoder=Words())
    return model


@pytest.fixture
def model():
    return model_of("labels")


def draw(model, labels=(0, 1, 2, 0, 1), **options):
    options = {"decode": False, "verbose": 0, **options}
    return model.generate(labels=list(labels), **options)


def told(model, prompts, **options):
    return model.generate(prompts=prompts, **{"verbose": 0, "decode": False, **options})


def assert_close(a, b, rounding=1e-6):
    """Up to 16 roundings of float32, as of the same arithmetic in batches of another size."""
    np.testing.assert_allclose(a, b, atol=rounding * np.abs(b).max())


def distance(a, b):
    """The largest difference of each image."""
    return np.abs(a - b).max(axis=(1, 2, 3))


def test_output_is_uint8_and_decode_false_is_what_the_network_sees(model):
    images, raw = draw(model, decode=True), draw(model)
    assert (images.shape, images.dtype, raw.dtype) == ((5, 4, 4, 1), np.uint8, np.float32)
    np.testing.assert_array_equal(images, np.clip(np.round((raw + 1) * 127.5), 0, 255))


@pytest.mark.compiled
@pytest.mark.parametrize("sampler", ["dpm_solver_pp_2m", "ddpm"])
def test_image_k_depends_on_seed_and_k_only(model, sampler):
    draws = functools.partial(draw, model, sampler=sampler)
    whole, labels = draws(seed=3), (0, 1, 2, 0, 1)
    np.testing.assert_array_equal(draws(seed=3), whole)
    assert_close(draws(seed=3, batch_size=2), whole)
    for first, last in [(0, 2), (2, 5)]:  # several calls share what one draws
        part = draws(labels[first:last], seed=3, first=np.int64(first), batch_size=2)
        assert_close(part, whole[first:last])
    assert distance(draws(labels[:2], seed=3, first=3), whole[:2]).min() > 0.05
    assert distance(draws(seed=4), whole).min() > 0.05
    assert np.abs(whole[0] - whole[3]).max() > 0.05  # the same label


def test_the_backend_says_how_many_images_at_once(model, monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "images_at_once", lambda size: asked.append(size) or 2)
    np.testing.assert_array_equal(draw(model, seed=3), draw(model, seed=3, batch_size=2))
    tokens = 1 + 1 + 4  # time, label, patches
    assert asked == [2 * 4 * 4 * tokens * 16]


def test_images_at_once_stay_below_what_is_mapped_anew():
    fits = {1: 64, 3000: 64, 2**20: 32, 4_210_688: 4, 2**25: 1, 2**40: 1}
    if BACKEND != "torch" or backend.has_accelerator():
        fits = dict.fromkeys(fits, 64)
    assert {size: backend.images_at_once(size) for size in fits} == fits


@pytest.mark.once
def test_the_first_noise_is_numpys_and_large_indices_have_their_own():
    # Beyond 2^31 and 2^32, where an index in 32 bits would begin again.
    noise, seeds = generate.noise_of(0, [7, 2**31 + 7, 2**32 + 7], (2, 2, 1))
    # Numbers of NumPy's generator for the entropy (seed, k): part of the package's promise.
    expected = np.random.default_rng([0, 7]).standard_normal((2, 2, 1), "float32")
    np.testing.assert_array_equal(noise[0], expected)
    assert len({part.tobytes() for part in noise}) == len(set(seeds.tolist())) == 3
    assert (seeds >= 0).all()


def test_per_image_noise_is_standard_normal_and_differs_by_image_and_step():
    seeds = ops.convert_to_tensor(np.arange(50, dtype="int32") * 1001)
    at = lambda i: backend.normal_per_image(seeds, ops.convert_to_tensor(i), (8, 8, 2))  # noqa: E731
    flat = np.stack([numpy(at(i)) for i in range(3)]).reshape(150, 128)
    # 19,200 numbers, four standard deviations.
    assert abs(flat.mean()) < 0.029
    assert abs(flat.std() - 1) < 0.021
    correlations = np.corrcoef(flat) - np.eye(150)
    assert np.abs(correlations).max() < 0.5  # 128 numbers a draw: five standard deviations


def test_guidance_is_linear_in_the_scale_and_one_is_off(model):
    one_step = dict(sampler=samplers.ddim(model.objective.schedule, np.array([0.8, 0.0])))
    d0, d1, d2, d3 = (draw(model, guidance_scale=w, **one_step) for w in (0.0, 1.0, 2.0, 3.0))
    # D_u + w (D_c - D_u): equal differences. Values up to 30 here, rounded in float32.
    np.testing.assert_allclose(d3 - d2, d2 - d1, atol=2e-3)
    assert np.abs(d2 - d1).max() > 0.01
    other = draw(model, [0] * 5, guidance_scale=0.0, **one_step)
    np.testing.assert_allclose(other, d0, atol=2e-3)  # w = 0 does not see the label


def test_guidance_interval_splits_the_loop(model):
    guided = functools.partial(draw, model, guidance_scale=2.0)
    everywhere = guided()
    np.testing.assert_array_equal(everywhere, guided(guidance_interval=(0.0, 1.0)))
    nowhere = guided(guidance_interval=(0.0, 1e-6))
    np.testing.assert_allclose(nowhere, draw(model), atol=1e-4)  # rounding
    part = guided(guidance_interval=(0.2, 0.7))
    assert np.abs(part - everywhere).max() > 0.01
    assert np.abs(part - nowhere).max() > 0.01


def test_average_or_raw_weights(model):
    own, average = weights(model.network), weights(model.ema_network)
    model.network.set_weights([w + 0.05 for w in own])
    averaged, raw = draw(model), draw(model, use_ema=False)
    assert np.abs(averaged - raw).max() > 0.01
    model.copy_weights_to_ema()
    np.testing.assert_array_equal(draw(model), raw)
    model.network.set_weights(own)
    model.ema_network.set_weights(average)


def traces(model):
    """How often the loops of the model were traced and compiled."""
    loops = model.sampling_loops.values()
    if BACKEND == "jax":
        return sum(loop._cache_size() for loop in loops)
    return sum(loop.experimental_get_tracing_count() for loop in loops)


@pytest.mark.compiled
@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled on torch")
def test_another_sampler_seed_scale_or_weights_compiles_nothing(model):
    draw(model, sampler="dpm_solver_pp_2m", num_steps=7, guidance_scale=2.0)
    before = traces(model)
    for sampler in samplers.SAMPLERS.keys() - {"flow_map"}:  # of models trained for it
        steps = 4 if sampler == "heun" else 7  # 7 evaluations either way
        draw(model, sampler=sampler, num_steps=steps, guidance_scale=1.5, seed=5)
    draw(model, sampler="ddim", num_steps=7, guidance_scale=3.0, use_ema=False)
    draw(model, range(3), batch_size=2, num_steps=7, guidance_scale=2.0)  # a new batch size
    assert traces(model) == before + 1
    draw(model, batch_size=2, num_steps=7, guidance_scale=2.0)  # a ragged last one
    assert traces(model) == before + 1


def test_unconditional_models_and_their_latents():
    class Half:
        scale, id, fingerprint = 0.5, "half", "abc"

        def decode(self, latents):
            return np.full((len(latents), 8, 8, 3), 7, "uint8")

    assert model_of("plain").generate(num_images=2, verbose=0).shape == (2, 4, 4, 1)
    model = model_of("latents")
    refused(ValueError, lambda: model.generate(num_images=3), "no autoencoder", "decode=False")
    assert model.generate(num_images=2, decode=False, verbose=0).shape == (2, 4, 4, 1)
    model.set_encoders(autoencoder=Half())
    assert model.generate(num_images=2, verbose=0).shape == (2, 8, 8, 3)


# Text ---------------------------------------------------------------------------------------------


@pytest.fixture
def text():
    return model_of("text")


def test_strings_in_bytes_out(text):
    images = told(text, "a dog", decode=True)
    assert (images.shape, images.dtype) == ((1, 4, 4, 1), np.uint8)


def test_images_are_those_of_prompt_and_seed(text):
    prompts = ["a dog", "a cat", "a dog"]
    images = told(text, prompts, seed=3)
    np.testing.assert_array_equal(images, told(text, prompts, seed=3))
    assert_close(told(text, prompts, seed=3, batch_size=2), images, 1e-5)
    assert np.abs(images[0] - images[2]).max() > 0.1  # other noise
    assert distance(told(text, prompts, seed=4), images).min() > 0.1
    others = told(text, ["a cat", "a dog", "a cat"], seed=3)
    assert distance(others, images).min() > 1e-3
    contexts = text.encoders.text_encoder(prompts)  # may be passed instead
    for given in (contexts, ops.convert_to_tensor(contexts)):
        np.testing.assert_array_equal(told(text, given, seed=3), images)


def test_guidance_leads_away_from_the_empty_or_the_negative_prompt(text):
    prompts, encoder = ["a dog", "a bird", "a cat"], text.encoders.text_encoder
    plain, guided = told(text, prompts, guidance_scale=1.0), told(text, prompts)
    assert np.abs(plain - guided).max() > 1e-3
    np.testing.assert_array_equal(told(text, prompts, negative_prompts=""), guided)
    # The prompt itself as the negative one leaves nothing to be led away from.
    assert_close(told(text, prompts, negative_prompts=prompts), plain, 1e-5)
    images = told(text, prompts, negative_prompts=["a cat"] * 3)
    assert np.abs(images - guided).max() > 1e-3
    for negative in ("a cat", encoder(["a cat"] * 3), encoder(["a cat"])):
        np.testing.assert_array_equal(told(text, prompts, negative_prompts=negative), images)


def test_prompts_are_encoded_as_they_are_drawn(text, monkeypatch):
    sizes, encode = [], Words.encode
    monkeypatch.setattr(
        Words, "encode", lambda self, tokens, **k: sizes.append(len(tokens)) or encode(self, tokens)
    )
    told(text, ["a dog"] * 5, batch_size=2)
    assert sizes == [2, 2, 2]


def test_labels_and_prompts_together():
    model = model_of("both")
    images = told(model, ["a dog", "a cat"], labels=[0, 2])
    assert distance(images, told(model, ["a dog", "a cat"], labels=[1, 2]))[0] > 1e-3
    assert distance(images, told(model, ["a bird", "a cat"], labels=[0, 2]))[0] > 1e-3


def test_guidance_without_a_known_empty_prompt_is_refused():
    model, contexts = model_of("no encoder"), np.ones((1, 2, 3))
    guided = functools.partial(told, model, contexts, guidance_scale=2.0)
    refused(ValueError, guided, "empty prompt's context", "has not met")
    assert told(model, contexts).shape == (1, 4, 4, 1)
    assert guided(negative_prompts=contexts).any()
    model.null_context.assign(np.ones((2, 3)))
    assert guided().any()


# What is refused ----------------------------------------------------------------------------------

OTHER_STEPS = samplers.ddim(schedules.VPLinear(), np.linspace(1, 0, 6))
ONE, UNGUIDED = dict(labels=[0]), dict(prompts=["a"], guidance_scale=1.0)
REFUSED = [
    ("labels", dict(num_images=3), ValueError, "from `labels`", "['num_images']"),
    ("labels", {}, ValueError, "Received: nothing"),
    ("labels", dict(labels=[0, 3]), ValueError, "labels must be in [0, 3)", "3"),
    ("labels", dict(labels=[0.5]), ValueError, "list of integers"),
    ("labels", dict(labels=[]), ValueError, "list of integers"),
    ("labels", dict(labels=[0], prompts=["a"]), ValueError, "['labels', 'prompts']"),
    ("labels", dict(**ONE, negative_prompts="a"), ValueError, "reads no prompts"),
    ("labels", dict(**ONE, sampler="dpm_solver++"), ValueError, "Unknown", "Did you mean"),
    ("labels", dict(**ONE, sampler="dpm_solver_pp_3m", num_steps=2), ValueError, "steps", ">= 3"),
    ("labels", dict(**ONE, num_steps=0), ValueError, "num_steps", "Received: 0"),
    ("labels", dict(**ONE, guidance_scale=-1.0), ValueError, "must be finite and >= 0"),
    ("labels", dict(**ONE, guidance_scale="2"), ValueError, "must be finite", "'2'"),
    ("labels", dict(**ONE, guidance_interval=(0.7, 0.2)), ValueError, "(low, high)"),
    ("labels", dict(**ONE, seed=-1), ValueError, "seed must be an int >= 0"),
    ("labels", dict(**ONE, first=None), ValueError, "first must be an int >= 0", "None"),
    ("labels", dict(**ONE, batch_size=0), ValueError, "batch_size must be an int >= 1"),
    ("labels", dict(**ONE, label=1), TypeError, "no argument 'label'", "'labels'"),
    ("labels", dict(**ONE, steps=1), TypeError, "no argument 'steps'", "'num_steps'"),
    ("labels", dict(**ONE, cfg=1), TypeError, "no argument 'cfg'."),
    ("no null label", dict(**ONE, guidance_scale=1.5), ValueError, "knows 'no label'"),
    ("cosine", dict(num_images=1, sampler=OTHER_STEPS), ValueError, "t = 1.0", "at 0.9946"),
    ("cosine", dict(num_images=1, sampler=OTHER_STEPS, num_steps=5), ValueError, "out"),
    ("text", dict(num_images=1), ValueError, "generates from `prompts`"),
    ("text", dict(prompts=[]), ValueError, "prompts is empty"),
    ("text", dict(prompts=np.zeros((1, 3, 2))), ValueError, "(n, 2, 3)", "(1, 3, 2)"),
    ("text", dict(prompts=np.full((1, 2, 3), np.nan)), ValueError, "NaN or infinity"),
    ("text", dict(prompts=["a", 3]), TypeError, "are strings, or contexts"),
    ("text", dict(prompts=5), TypeError, "are strings, or contexts"),
    ("text", dict(prompts=["a"] * 3, negative_prompts=["d"] * 2), ValueError, "each of 3", "2"),
    ("text", dict(negative_prompts="b", **UNGUIDED), ValueError, "act through guidance"),
    ("no encoder", dict(prompts=["a"]), ValueError, "need a text encoder", "(n, 2, 3)"),
    ("both", dict(prompts=["a"]), ValueError, "generates from `labels`, `prompts`"),
    ("both", dict(prompts=["a"], labels=[0, 1]), ValueError, "a label for each prompt"),
]


@pytest.mark.once
@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda k: str(REFUSED[k][3]))
def test_bad_requests_are_refused_before_anything_runs(case, monkeypatch):
    kind, options, error, *words = REFUSED[case]
    monkeypatch.setattr(generate, "_program", None)
    said = refused(error, lambda: model_of(kind).generate(**options), *words)
    assert "cfg" not in options or "Did you mean" not in said  # nothing is near


UNTRAINED = {
    "UViT": uvit,
    "UViT of later work": lambda: uvit(norm="rms", mlp="swiglu", position="rotary"),
    "ViT with AdaLN": lambda: uvit(time="adaln", skip=None),
    "UNet": lambda: UNet((4, 4, 1), 64, multipliers=(1, 1), attention_levels=(1,)),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", UNTRAINED)
def test_an_untrained_network_is_told_once(kind, tmp_path):
    model = DiffusionModel(UNTRAINED[kind]())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for untrained in (loaded, model):
        with pytest.warns(UserWarning, match="untrained.*pretrained"):
            untrained.generate(1, num_steps=2, verbose=0)
    fit(trained := diffusion_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(1, num_steps=2, verbose=0)
        trained.generate(labels=[0], num_steps=2, verbose=0)
