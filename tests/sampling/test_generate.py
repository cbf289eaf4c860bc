"""Sampling: seeds, batches, guidance, one compiled loop."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from words import Words

from keras_uvit import DiffusionModel, UNet, UViT, backend, sampling
from keras_uvit.diffusion import samplers, schedules
from keras_uvit.sampling import generate

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
BACKEND = keras.config.backend()


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = DiffusionModel(UViT(**TINY, num_classes=3), num_steps=6)
    for weight in model.network.weights:
        weight.assign(5.0 * weight)  # fresh weights are so small that labels hardly matter
    model.copy_weights_to_ema()
    return model


def draw(model, labels=(0, 1, 2, 0, 1), **options):
    options = {"decode": False, "verbose": 0, **options}
    return model.generate(labels=list(labels), **options)


def test_output_is_uint8_and_decode_false_is_what_the_network_sees(model):
    images = draw(model, decode=True)
    assert images.shape == (5, 4, 4, 1)
    assert images.dtype == np.uint8
    raw = draw(model)
    assert raw.dtype == np.float32
    np.testing.assert_array_equal(images, np.clip(np.round((raw + 1) * 127.5), 0, 255))


@pytest.mark.parametrize("sampler", ["dpm_solver_pp_2m", "ddpm"])
def test_image_k_depends_on_seed_and_k_only(model, sampler):
    all_at_once = draw(model, sampler=sampler, seed=3)
    in_pieces = draw(model, sampler=sampler, seed=3, batch_size=2)
    # The same arithmetic in batches of another size. Values up to 2000: 16 roundings of float32.
    rounding = 1e-6 * np.abs(all_at_once).max()
    np.testing.assert_allclose(all_at_once, in_pieces, atol=rounding)
    np.testing.assert_array_equal(all_at_once, draw(model, sampler=sampler, seed=3))
    fewer = draw(model, labels=(0, 1), sampler=sampler, seed=3)
    np.testing.assert_allclose(all_at_once[:2], fewer, atol=rounding)
    other = draw(model, sampler=sampler, seed=4)
    assert np.abs(other - all_at_once).max(axis=(1, 2, 3)).min() > 0.05
    same_label = np.abs(all_at_once[0] - all_at_once[3]).max()
    assert same_label > 0.05


@pytest.mark.parametrize("sampler", ["dpm_solver_pp_2m", "ddpm"])
def test_several_calls_share_what_one_draws(model, sampler):
    labels = (0, 1, 2, 0, 1, 2, 0)
    large = draw(model, labels, sampler=sampler, seed=3)
    # The same arithmetic in batches of another size. Values up to 600: 16 roundings of float32.
    rounding = 1e-6 * np.abs(large).max()
    for first, last in [(0, 2), (2, 7), (6, 7)]:
        piece = draw(model, labels[first:last], sampler=sampler, seed=3, first=first, batch_size=2)
        np.testing.assert_allclose(piece, large[first:last], atol=rounding)
    with_numpy = draw(model, labels[2:4], sampler=sampler, seed=3, first=np.int64(2), batch_size=2)
    np.testing.assert_allclose(with_numpy, large[2:4], atol=rounding)
    elsewhere = draw(model, labels[:1], sampler=sampler, seed=3, first=3)
    assert np.abs(elsewhere - large[:1]).max() > 0.05  # `first` is not passed over


def test_the_backend_says_how_many_images_at_once(model, monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "images_at_once", lambda size: asked.append(size) or 2)
    np.testing.assert_array_equal(draw(model, seed=3), draw(model, seed=3, batch_size=2))
    tokens = 1 + 1 + 4  # time, label, patches
    assert asked == [2 * 4 * 4 * tokens * TINY["hidden_dim"]]


def test_images_at_once_stay_below_what_is_mapped_anew():
    fits = {1: 64, 3000: 64, 2**20: 32, 4_210_688: 4, 2**25: 1, 2**40: 1}
    if BACKEND != "torch" or backend.has_accelerator():
        fits = dict.fromkeys(fits, 64)
    assert {size: backend.images_at_once(size) for size in fits} == fits


def test_large_indices_have_noise_of_their_own():
    # Beyond 2^31 and 2^32, where an index in 32 bits would begin again.
    indices = [5, 2**31 + 5, 2**32 + 5]
    noise, seeds = generate.noise_of(0, indices, (2, 2, 1))
    assert len({part.tobytes() for part in noise}) == len(set(seeds.tolist())) == 3
    assert (seeds >= 0).all()


def test_deterministic_samplers_start_from_the_same_noise_on_every_backend():
    noise, seeds = generate.noise_of(0, [0, 7], (2, 2, 1))
    # Numbers of NumPy's generator for the entropy (seed, k): part of the package's promise.
    expected = np.random.default_rng([0, 7]).standard_normal((2, 2, 1), "float32")
    np.testing.assert_array_equal(noise[1], expected)
    assert seeds[0] != seeds[1]


def test_per_image_noise_is_standard_normal_and_differs_by_image_and_step():
    from keras_uvit import backend

    seeds = ops.convert_to_tensor(np.arange(50, dtype="int32") * 1001)
    draws = [
        ops.convert_to_numpy(backend.normal_per_image(seeds, ops.convert_to_tensor(i), (8, 8, 2)))
        for i in range(3)
    ]
    flat = np.stack(draws).reshape(150, 128)
    # 19,200 numbers, four standard deviations.
    assert abs(flat.mean()) < 0.029
    assert abs(flat.std() - 1) < 0.021
    correlations = np.corrcoef(flat) - np.eye(150)
    assert np.abs(correlations).max() < 0.5  # 128 numbers a draw: five standard deviations


def test_guidance_is_linear_in_the_scale_and_one_is_off(model):
    one_step = dict(sampler=samplers.ddim(model.objective.schedule, np.array([0.8, 0.0])))
    d1, d2, d3 = (draw(model, guidance_scale=w, **one_step) for w in (1.0, 2.0, 3.0))
    # D_u + w (D_c - D_u): equal differences. Values up to 30 here, rounded in float32.
    np.testing.assert_allclose(d3 - d2, d2 - d1, atol=2e-3)
    assert np.abs(d2 - d1).max() > 0.01
    zero = draw(model, guidance_scale=0.0, **one_step, labels=(0, 0, 0, 0, 0))
    np.testing.assert_allclose(
        zero, draw(model, guidance_scale=0.0, **one_step), atol=2e-3
    )  # w = 0 does not see the label


def test_guidance_interval_splits_the_loop(model):
    everywhere = draw(model, guidance_scale=2.0)
    np.testing.assert_array_equal(
        everywhere, draw(model, guidance_scale=2.0, guidance_interval=(0.0, 1.0))
    )
    nowhere = draw(model, guidance_scale=2.0, guidance_interval=(0.0, 1e-6))
    np.testing.assert_allclose(nowhere, draw(model), atol=1e-4)  # rounding
    part = draw(model, guidance_scale=2.0, guidance_interval=(0.2, 0.7))
    assert np.abs(part - everywhere).max() > 0.01
    assert np.abs(part - nowhere).max() > 0.01


def test_average_or_raw_weights(model):
    for weight in model.network.weights:
        weight.assign(weight + 0.05)
    averaged, raw = draw(model), draw(model, use_ema=False)
    assert np.abs(averaged - raw).max() > 0.01
    keep = [ops.copy(w.value) for w in model.ema_network.weights]
    model.copy_weights_to_ema()
    np.testing.assert_array_equal(draw(model), raw)
    for weight, value in zip(model.ema_network.weights, keep):
        weight.assign(value)


def traces(model):
    """How often the loops of the model were traced and compiled."""
    loops = model.sampling_loops.values()
    if BACKEND == "jax":
        return sum(loop._cache_size() for loop in loops)
    return sum(loop.experimental_get_tracing_count() for loop in loops)


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled on torch")
def test_another_sampler_seed_scale_or_weights_compiles_nothing(model):
    draw(model, sampler="dpm_solver_pp_2m", num_steps=7, guidance_scale=2.0)
    before = traces(model)
    for sampler in samplers.SAMPLERS:
        steps = 4 if sampler == "heun" else 7  # 7 evaluations either way
        draw(model, sampler=sampler, num_steps=steps, guidance_scale=1.5, seed=5)
    draw(model, sampler="ddim", num_steps=7, guidance_scale=3.0, use_ema=False)
    draw(model, labels=range(3), batch_size=2, num_steps=7, guidance_scale=2.0)  # a new batch size
    ragged = traces(model)
    draw(model, labels=[0, 1, 2, 0, 1], batch_size=2, num_steps=7, guidance_scale=2.0)
    assert ragged == before + 1
    assert traces(model) == ragged


def test_unconditional_models():
    plain = DiffusionModel(UViT(**TINY), num_steps=3)
    assert plain.generate(num_images=2, verbose=0).shape == (2, 4, 4, 1)


def test_latents_are_decoded_by_the_autoencoder():
    class Half:
        scale, id, fingerprint = 0.5, "half", "abc"

        def decode(self, latents):
            return np.full((len(latents), 8, 8, 3), 7, "uint8")

    model = DiffusionModel(UViT(**TINY), latent_scale=0.5, num_steps=3)
    assert model.generate(num_images=3, decode=False, verbose=0).shape == (3, 4, 4, 1)
    with pytest.raises(ValueError, match="no autoencoder.*decode=False"):
        model.generate(num_images=3)
    model.set_encoders(autoencoder=Half())
    assert model.generate(num_images=3, verbose=0).shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_images=3), r"generates from `labels`. Received: \['num_images'\]"),
        (dict(), "Received: nothing"),
        (dict(labels=[0, 3]), r"labels must be in \[0, 3\). Received: 3"),
        (dict(labels=[0, -1]), "Received: -1"),
        (dict(labels=[0.5]), "list of integers"),
        (dict(labels=[]), "list of integers"),
        (dict(labels=[0], prompts=["a"]), r"\['labels', 'prompts'\]"),
        (dict(labels=[0], sampler="dpm_solver++"), "Unknown sampler.*Did you mean 'dpm_solver"),
        (dict(labels=[0], sampler="dpm_solver_pp_3m", num_steps=2), "num_steps of sampler.*>= 3"),
        (dict(labels=[0], num_steps=0), "num_steps.*Received: 0"),
        (dict(labels=[0], num_steps=2.5), "num_steps.*Received: 2.5"),
        (dict(labels=[0], guidance_scale=-1.0), "guidance_scale must be finite and >= 0"),
        (dict(labels=[0], guidance_scale="2"), "guidance_scale must be finite.*'2'"),
        (dict(labels=[0], guidance_interval=(0.7, 0.2)), r"\(low, high\)"),
        (dict(labels=[0], seed=-1), "seed must be an int >= 0"),
        (dict(labels=[0], first=-1), "first must be an int >= 0. Received: -1"),
        (dict(labels=[0], first=1.0), r"first must be an int >= 0. Received: 1\.0"),
        (dict(labels=[0], first="1"), "first must be an int >= 0. Received: '1'"),
        (dict(labels=[0], first=None), "first must be an int >= 0. Received: None"),
        (dict(labels=[0], batch_size=0), "batch_size must be an int >= 1"),
        (dict(labels=[0], batch_size=2.5), "batch_size must be an int.*2.5"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(model, options, message, monkeypatch):
    monkeypatch.setattr(generate, "_loop", None)
    with pytest.raises(ValueError, match=message):
        model.generate(**options)


def test_steps_of_another_schedule_are_refused():
    model = DiffusionModel(UViT(**TINY), schedules.VPCosine())
    steps = samplers.ddim(schedules.VPLinear(), np.linspace(1, 0, 6))
    with pytest.raises(ValueError, match="start at t = 1.0, but VPCosine.* at 0.9946 at most"):
        model.generate(num_images=1, sampler=steps, verbose=0)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("prompt", "prompts"), ("label", "labels"), ("steps", "num_steps"), ("cfg", None)],
)
def test_an_unknown_argument_gets_the_nearest_name(model, wrong, near):
    message = f"no argument {wrong!r}." + (f" Did you mean {near!r}" if near else "$")
    with pytest.raises(TypeError, match=message):
        model.generate(labels=[0], **{wrong: 1})


def test_guidance_without_a_null_label_is_refused():
    model = DiffusionModel(UViT(**TINY, num_classes=3, null_label=False))
    with pytest.raises(ValueError, match="needs a network that knows 'no label'"):
        model.generate(labels=[0], guidance_scale=1.5)


# Text ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    model = DiffusionModel(UViT(**TINY, context_shape=(2, 3)), num_steps=3, guidance_scale=2.0)
    model.set_encoders(text_encoder=Words())
    return model


def told(model, prompts, **options):
    return model.generate(prompts=prompts, **{"verbose": 0, "decode": False, **options})


def test_strings_in_bytes_out(text):
    images = told(text, ["a dog", "a cat"], decode=True)
    assert images.shape == (2, 4, 4, 1)
    assert images.dtype == np.uint8
    assert told(text, "a dog", decode=True).shape == (1, 4, 4, 1)


def test_same_prompt_and_seed_same_image(text):
    images = told(text, ["a dog", "a cat", "a dog"], seed=3)
    np.testing.assert_array_equal(images, told(text, ["a dog", "a cat", "a dog"], seed=3))
    batched = told(text, ["a dog", "a cat", "a dog"], seed=3, batch_size=2)
    np.testing.assert_allclose(batched, images, atol=1e-5)  # other shapes, other rounding
    assert np.abs(images[0] - images[2]).max() > 0.1  # other noise
    assert np.abs(told(text, ["a dog"], seed=4) - images[:1]).max() > 0.1


def test_shuffled_prompts_change_the_images(text):
    images = told(text, ["a dog", "a cat"])
    assert np.abs(told(text, ["a cat", "a dog"]) - images).max(axis=(1, 2, 3)).min() > 1e-3


def test_contexts_may_be_passed_instead(text):
    contexts = text.encoders.text_encoder(["a dog", "a cat"])
    np.testing.assert_array_equal(told(text, contexts), told(text, ["a dog", "a cat"]))
    as_tensor = ops.convert_to_tensor(contexts)
    np.testing.assert_array_equal(told(text, as_tensor), told(text, contexts))


def test_guidance_leads_away_from_the_empty_prompt(text):
    prompts = ["a dog", "a cat"]
    plain = told(text, prompts, guidance_scale=1.0)
    guided = told(text, prompts)
    assert np.abs(plain - guided).max() > 1e-3
    np.testing.assert_array_equal(told(text, prompts, negative_prompts=""), guided)
    # The prompt itself as the negative one leaves nothing to be led away from.
    same = told(text, prompts, negative_prompts=prompts)
    np.testing.assert_allclose(same, plain, atol=1e-4)


@pytest.mark.parametrize("negative", ["a cat", ["a cat", "a cat"], "contexts", "one"])
def test_negative_prompts(text, negative):
    encoder = text.encoders.text_encoder
    negative = {"contexts": encoder(["a cat"] * 2), "one": encoder(["a cat"])}.get(
        negative if isinstance(negative, str) else None, negative
    )
    images = told(text, ["a dog", "a bird"], negative_prompts=negative)
    np.testing.assert_array_equal(
        images, told(text, ["a dog", "a bird"], negative_prompts=["a cat"] * 2)
    )
    assert np.abs(images - told(text, ["a dog", "a bird"])).max() > 1e-3


def test_prompts_are_encoded_as_they_are_drawn(text, monkeypatch):
    sizes = []
    encode = Words.encode
    monkeypatch.setattr(
        Words, "encode", lambda self, tokens, **k: sizes.append(len(tokens)) or encode(self, tokens)
    )
    told(text, ["a dog"] * 5, batch_size=2)
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_images=1), "generates from `prompts`"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=np.zeros((1, 3, 2))), r"shape \(n, 2, 3\). Received: \(1, 3, 2\)"),
        (dict(prompts=np.full((1, 2, 3), np.nan)), "NaN or infinity"),
        (dict(prompts=["a", 3]), "are strings, or contexts"),
        (dict(prompts=5), "are strings, or contexts"),
        (dict(prompts=["a", "b", "c"], negative_prompts=["d", "e"]), "each of 3. Received: 2"),
        (dict(prompts=["a"], negative_prompts="b", guidance_scale=1.0), "act through guidance"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(text, options, message, monkeypatch):
    monkeypatch.setattr(generate, "_loop", None)
    with pytest.raises((ValueError, TypeError), match=message):
        text.generate(**options)


def test_prepare_says_what_generate_would(text, model):
    sampling.prepare(text, prompts=["a dog"], num_steps=2)
    with pytest.raises(ValueError, match="generates from `labels`"):
        sampling.prepare(model, prompts=["a dog"])
    with pytest.raises(TypeError, match="num_stepz"):
        sampling.prepare(model, labels=[0], num_stepz=2)


def test_labels_and_prompts_together():
    network = UViT(**TINY, num_classes=3, context_shape=(2, 3))
    model = DiffusionModel(network, num_steps=2, guidance_scale=2.0)
    model.set_encoders(text_encoder=Words())
    for weight in model.ema_network.weights:
        weight.assign(5.0 * weight)
    images = told(model, ["a dog", "a cat"], labels=[0, 2])
    assert np.abs(images - told(model, ["a dog", "a cat"], labels=[1, 2]))[0].max() > 1e-3
    assert np.abs(images - told(model, ["a bird", "a cat"], labels=[0, 2]))[0].max() > 1e-3
    with pytest.raises(ValueError, match="generates from `labels`, `prompts`"):
        told(model, ["a dog"])
    with pytest.raises(ValueError, match="a label for each prompt"):
        told(model, ["a dog"], labels=[0, 1])


def test_strings_need_a_text_encoder():
    model = DiffusionModel(UViT(**TINY, context_shape=(2, 3)))
    with pytest.raises(ValueError, match=r"need a text encoder.*\(n, 2, 3\)"):
        model.generate(prompts=["a dog"])


def test_guidance_without_a_known_empty_prompt_is_refused():
    model = DiffusionModel(UViT(**TINY, context_shape=(2, 3)), num_steps=3)
    contexts = np.ones((1, 2, 3))
    with pytest.raises(ValueError, match="empty prompt's context, which this model has not met"):
        model.generate(prompts=contexts, guidance_scale=2.0)
    assert told(model, contexts).shape == (1, 4, 4, 1)
    assert told(model, contexts, guidance_scale=2.0, negative_prompts=contexts).any()
    model.null_context.assign(np.ones((2, 3)))
    assert told(model, contexts, guidance_scale=2.0).any()


def test_models_without_text_take_no_negative_prompts(model):
    with pytest.raises(ValueError, match="reads no prompts"):
        model.generate(labels=[0], negative_prompts="a dog")


UNTRAINED = {
    "UViT": lambda: UViT(**TINY),
    "UViT of later work": lambda: UViT(**TINY, norm="rms", mlp="swiglu", position="rotary"),
    "ViT with AdaLN": lambda: UViT(**TINY, time="adaln", skip=None),
    "UNet": lambda: UNet((4, 4, 1), 64, multipliers=(1, 1), attention_levels=(1,)),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", UNTRAINED)
def test_an_untrained_network_is_told_once(kind, tmp_path):
    model = DiffusionModel(UNTRAINED[kind]())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="untrained"):
        loaded.generate(1, num_steps=2, verbose=0)
    with pytest.warns(UserWarning, match="untrained.*pretrained"):
        model.generate(1, num_steps=2, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(1, num_steps=2, verbose=0)
        trained = DiffusionModel(UViT((4, 4, 1), 2, 16, num_layers=1, num_heads=2))
        trained.compile()
        trained.fit({"image": np.zeros((4, 4, 4, 1), "uint8")}, epochs=4, verbose=0)
        trained.generate(1, num_steps=2, verbose=0)
