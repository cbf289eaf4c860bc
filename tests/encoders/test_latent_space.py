"""Caches and autoencoders that are not the model's are refused before anything is compiled."""

import re
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from words import Words

from keras_uvit import DiffusionModel, UViT
from keras_uvit.data import LatentDataset, write_latents
from keras_uvit.encoders import AutoencoderKL, SpaceToDepth

pytestmark = pytest.mark.once

# 16x16 grey pictures become 8x8 latents of 4 channels.
TINY = dict(image_shape=(8, 8, 4), patch_size=4, hidden_dim=16, num_layers=1, num_heads=2)
SCALE = 1.7  # pixels uniform in [-1, 1] have standard deviation 0.58
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (16, 16, 16, 1)).astype("uint8")
BACKEND = keras.config.backend()
JIT = BACKEND == "jax"  # TensorFlow's XLA takes longer than all the steps here


def encoder(fingerprint="the-encoder", scale=SCALE, factor=2):
    autoencoder = SpaceToDepth(factor, scale=scale)
    autoencoder.id, autoencoder.fingerprint = f"id-of-{fingerprint}", fingerprint
    return autoencoder


def cache(folder, autoencoder=None, classes=None, pictures=PICTURES, batch_size=8):
    source = {"image": pictures}
    if classes:
        source["label"] = np.arange(len(pictures)) % classes
    write_latents(source, folder, autoencoder or encoder(), verbose=0, batch_size=16)
    return LatentDataset(folder, batch_size, verbose=0)


def make(network=None, latent_scale=SCALE, **arguments):
    return DiffusionModel(
        UViT(**{**TINY, **(network or {})}),
        latent_scale=latent_scale,
        optimizer=dict(warmup_steps=0),
        **arguments,
    )


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    def reached(*_, **__):
        raise AssertionError("training began")

    for name in ("make_train_function", "make_test_function", "train_step"):
        monkeypatch.setattr(DiffusionModel, name, reached)


def refusal(model, *data, **options):
    """The message of the error with which `fit` refuses."""
    model.compile()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model.fit(*data, verbose=0, **options)
    assert int(ops.convert_to_numpy(model.step)) == 0
    return str(caught.value)


def accepted(model, *data, **options):
    """Whether `fit` gets past its checks; see `nothing_is_compiled`."""
    model.compile()
    with pytest.raises(AssertionError, match="training began"):
        model.fit(*data, verbose=0, **options)
    return True


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_compiled")
def test_the_spy_sees_a_cache_that_fits(tmp_path):
    assert accepted(make(), cache(tmp_path))


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_of_another_scale_is_refused(tmp_path):
    text = refusal(make(latent_scale=0.9), cache(tmp_path))
    assert "The cache (id-of-the-encoder) has scale 1.7, the model latent_scale=0.9" in text
    assert "build the model with the same, or choose the other autoencoder" in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_of_another_encoder_is_refused(tmp_path):
    text = refusal(make(latent_encoder="learned"), cache(tmp_path))
    assert "is of encoder the-encoder, the model has learned the latents of encoder learned" in text
    assert "Use the same autoencoder" in text
    assert "model.latent_encoder = None" in text


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(
    ("pictures", "factor", "received"),
    [(PICTURES[:, :8, :8], 2, "(4, 4, 8)"), (PICTURES, 4, "(4, 4, 32)")],
    ids=["size", "factor"],
)
def test_a_cache_of_another_shape_is_refused(tmp_path, pictures, factor, received):
    text = refusal(make(), cache(tmp_path, encoder(factor=factor), pictures=pictures))
    size = pictures.shape[1]
    assert f"holds moments of shape {received}, of {size} x {size} pixels" in text
    assert "the network's latents (8, 8, 4) need (8, 8, 8)" in text
    assert "Encode the images at the network's size, or change its image_shape" in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_of_more_classes_is_refused_and_one_of_fewer_taken(tmp_path):
    dataset = cache(tmp_path, classes=5)
    text = refusal(make(dict(num_classes=3)), dataset)
    assert "The cache has 5 classes, the network num_classes=3" in text
    assert accepted(make(dict(num_classes=5)), dataset)
    assert accepted(make(dict(num_classes=7)), dataset)


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_of_more_classes_is_refused_with_a_remedy(tmp_path):
    assert "num_classes=5" in refusal(make(dict(num_classes=3)), cache(tmp_path, classes=5))


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_with_labels_for_a_network_without_is_refused_with_a_remedy(tmp_path):
    text = refusal(make(), cache(tmp_path, classes=5))
    assert "The network has no labels: drop them or build it with num_classes" in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_without_labels_for_a_network_with_is_refused(tmp_path):
    text = refusal(make(dict(num_classes=3)), cache(tmp_path))
    assert "Received the keys ['moments']" in text
    assert "['label']" in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_latent_cache_for_a_model_of_pixels_is_refused(tmp_path):
    text = refusal(make(latent_scale=None), cache(tmp_path))
    assert "This model works on pixels (latent_scale=None), but The cache is of latents" in text
    assert "latent_scale=1.7" in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_latent_cache_of_another_shape_for_a_model_of_pixels_is_told_so(tmp_path):
    text = refusal(make(dict(image_shape=(16, 16, 1)), latent_scale=None), cache(tmp_path))
    assert "works on pixels" in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_of_unknown_scale_for_a_model_of_pixels_gets_no_empty_advice(tmp_path):
    dataset = cache(tmp_path)
    dataset.scale = dataset.autoencoder_id = dataset.fingerprint = None
    text = refusal(make(latent_scale=None), dataset)
    assert "works on pixels" in text
    assert "Build it with latent_scale=None" not in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_validation_cache_is_checked_too(tmp_path):
    good, other = cache(tmp_path / "a"), cache(tmp_path / "b", encoder("another"))
    text = refusal(make(), good, validation_data=other)
    assert "is of encoder another" in text
    assert "encoder the-encoder" in text


def test_evaluation_checks_its_cache_too(tmp_path):
    model = make(latent_encoder="learned")
    model.compile()
    with pytest.raises(ValueError, match="is of encoder the-encoder"):
        model.evaluate(cache(tmp_path), verbose=0)


def test_the_first_cache_fixes_the_encoder_for_good(tmp_path):
    first, second = cache(tmp_path / "a"), cache(tmp_path / "b", encoder("another"))
    model = make()
    assert model.latent_encoder is None
    model.compile(jit_compile=JIT)
    history = model.fit(first, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert model.latent_encoder == "the-encoder"
    with pytest.raises(ValueError, match="is of encoder another"):
        model.fit(second, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.latent_encoder == "the-encoder"
    with pytest.raises(ValueError, match="is of encoder another"):
        loaded.fit(second, verbose=0)


@pytest.mark.usefixtures("nothing_is_compiled")
def test_without_a_known_encoder_the_next_cache_fixes_it_anew(tmp_path):
    model = make(latent_encoder="learned")
    model.latent_encoder = None
    assert accepted(model, cache(tmp_path, encoder("another")))
    assert model.latent_encoder == "another"


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_refused_cache_does_not_fix_the_encoder(tmp_path):
    grey = np.full_like(PICTURES, 128)  # refused for its standard deviation
    model = make()
    refusal(model, cache(tmp_path, pictures=grey))
    assert model.latent_encoder is None


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_that_does_not_know_its_autoencoder_is_taken(tmp_path):
    dataset = cache(tmp_path)
    dataset.scale = dataset.autoencoder_id = dataset.fingerprint = None  # as its reader sets them
    for encoder_before in ("learned", None):
        model = make(latent_encoder=encoder_before)
        assert accepted(model, dataset)
        assert model.latent_encoder == encoder_before


# Standard deviation -------------------------------------------------------------------------------

NOISE = RNG.standard_normal((16, 8, 8, 4)).astype("float32")


def of_std(key, std):
    """A batch whose latents have this standard deviation, in equal shares of mean and noise."""
    if key == "latent":
        return {"latent": std * NOISE}
    log_variance = np.full_like(NOISE, 2 * np.log(std / np.sqrt(2)))
    return {"moments": np.concatenate([std / np.sqrt(2) * NOISE, log_variance], axis=-1)}


@pytest.mark.usefixtures("nothing_is_compiled")
def test_equal_numbers_are_no_latents():
    assert "All numbers in the first batch of 'latent' are equal" in refusal(
        make(latent_scale=1.0), {"latent": np.ones_like(NOISE)}
    )


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("std", [5.5, 0.18])
@pytest.mark.parametrize("key", ["latent", "moments"])
def test_latents_of_the_wrong_standard_deviation_are_refused_with_the_scale_that_fits(key, std):
    text = refusal(make(latent_scale=1.0), of_std(key, std))
    assert f"The first batch of {key!r}" in text
    assert "diffusion expects about 1" in text
    found, fits = (
        float(re.search(rf"{words} ([\d.]+\d)", text).group(1))
        for words in ("standard deviation", "the scale that fits is")
    )
    # Of 4,096 numbers, and printed with three digits.
    assert found == pytest.approx(std, rel=0.05)
    assert fits == pytest.approx(1 / std, rel=0.05)
    model = make(latent_scale=fits)
    model.compile()
    scaled = {key: fits * of_std(key, std)[key]} if key == "latent" else of_std(key, std)
    with pytest.raises(AssertionError, match="training began"):
        model.fit(scaled, verbose=0)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("latent_scale", [0.18215, 1.0])
def test_moments_are_judged_times_the_scale(latent_scale):
    model = make(latent_scale=latent_scale)
    assert accepted(model, of_std("moments", 1 / latent_scale))
    text = refusal(model, of_std("moments", 5 / latent_scale))
    assert f"times latent_scale={latent_scale}, has standard deviation" in text
    fits = float(re.search(r"fits is ([\d.]+\d)", text).group(1))
    assert fits == pytest.approx(latent_scale / 5, rel=0.05)  # of 4,096 numbers


@pytest.mark.usefixtures("nothing_is_compiled")
def test_latents_that_were_not_scaled_are_told_the_models_scale():
    text = refusal(make(latent_scale=0.18215), of_std("latent", 5.49))
    fits = float(re.search(r"fits is ([\d.]+\d)", text).group(1))
    assert fits == pytest.approx(1 / 5.49, rel=0.05)  # of 4,096 numbers


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("key", ["latent", "moments"])
def test_standard_deviation_one_is_taken_and_other_checks_stay(key):
    model = make(latent_scale=1.0)
    assert accepted(model, of_std(key, 1.0))
    bad = of_std(key, 1.0)
    bad[key][3] = np.nan
    assert "NaN or infinity in 1 of 16 items, the first at index 3" in refusal(model, bad)


@pytest.mark.usefixtures("nothing_is_compiled")
def test_validation_data_of_the_wrong_standard_deviation_are_refused():
    text = refusal(
        make(latent_scale=1.0), of_std("latent", 1.0), validation_data=of_std("moments", 5.5)
    )
    assert "The first batch of 'moments'" in text
    assert "standard deviation 5." in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_of_the_wrong_standard_deviation_is_refused(tmp_path):
    # Scale and encoder agree, but both are wrong.
    text = refusal(make(latent_scale=10.0), cache(tmp_path, encoder(scale=10.0)))
    assert re.search(r"standard deviation 5\.\d", text)
    assert re.search(r"scale that fits is 1\.7", text)  # 1 / 0.577 is 1.73


# Autoencoders -------------------------------------------------------------------------------------


def test_an_autoencoder_of_another_scale_is_refused():
    model = make()
    with pytest.raises(ValueError, match="The autoencoder.*has scale 1.0, the model latent_scale"):
        model.set_encoders(autoencoder=encoder(scale=1.0))
    assert model.encoders.autoencoder is None
    assert model.latent_encoder is None
    model.set_encoders(
        autoencoder=encoder(scale=SCALE * (1 + 1e-7))
    )  # float32 rounding is no other scale


def test_an_autoencoder_of_another_encoder_is_refused_and_the_old_one_stays():
    model = make()
    first = encoder()
    model.set_encoders(autoencoder=first)
    assert model.latent_encoder == "the-encoder"
    with pytest.raises(ValueError, match="The autoencoder.*is of encoder another"):
        model.set_encoders(autoencoder=encoder("another"))
    assert model.encoders.autoencoder is first
    model.set_encoders(autoencoder=None)
    assert model.latent_encoder == "the-encoder"
    model.latent_encoder = None
    model.set_encoders(autoencoder=encoder("another"))
    assert model.latent_encoder == "another"


def test_an_autoencoder_for_a_model_of_pixels_is_refused():
    with pytest.raises(ValueError, match="works on pixels.*latent_scale=1.7"):
        make(latent_scale=None).set_encoders(autoencoder=encoder())


def test_the_autoencoder_must_be_that_of_the_cache(tmp_path):
    model = make()
    model.set_encoders(autoencoder=encoder("another"))
    text = refusal(model, cache(tmp_path))
    assert "is of encoder the-encoder" in text
    assert "encoder another" in text


@pytest.fixture(scope="module")
def kl():
    keras.utils.set_random_seed(1)
    return AutoencoderKL(32, (1, 1), 1, scale=SCALE)


def shift(autoencoder, part):
    """The same autoencoder with other weights in "encoder" or "decoder"."""
    other = AutoencoderKL.from_config(autoencoder.get_config())
    other.set_weights(autoencoder.get_weights())
    weight = getattr(other, part).weights[0]
    weight.assign(weight + 0.1)
    return other


def test_another_decoder_is_taken_and_another_encoder_refused(kl):
    model = make()
    model.set_encoders(autoencoder=kl)
    decoder = shift(kl, "decoder")
    model.set_encoders(autoencoder=decoder)
    assert model.encoders.autoencoder is decoder
    with pytest.raises(ValueError, match="is of encoder"):
        model.set_encoders(autoencoder=shift(kl, "encoder"))
    assert model.encoders.autoencoder is decoder


def facts(model):
    """What the autoencoder's weights must not enter."""
    found = {
        "weights": [id(w) for w in model.weights],
        "trainable": [id(w) for w in model.trainable_variables],
        "variables": len(model.variables),
        "count": model.count_params(),
        "layers": [layer.name for layer in model.layers],
    }
    if BACKEND == "torch":
        found["parameters"] = [id(p) for p in model.parameters()]
        found["state"] = sorted(model.state_dict())
    return found


def test_the_autoencoder_is_no_part_of_the_model(tmp_path, kl):
    model = make(num_steps=2)
    model.compile(jit_compile=JIT)
    before = facts(model)
    model.set_encoders(autoencoder=kl)
    assert facts(model) == before
    weights = kl.get_weights()
    model.fit(of_std("latent", 1.0), verbose=0)
    assert_same(weights, kl.get_weights())
    images = model.generate(num_images=2, verbose=0)
    assert images.shape == (2, 16, 16, 3)
    latents = model.generate(num_images=2, verbose=0, decode=False)
    np.testing.assert_array_equal(images, kl.decode(latents))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.encoders.autoencoder is None
    assert loaded.latent_encoder == kl.fingerprint
    loaded.set_encoders(autoencoder=kl)


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


TEXT = dict(context_shape=(2, 3))
# What a model has, and the encoders that are told of when it is saved and when it is loaded.
LEFT_OUT = {
    "pixels": (dict(latent_scale=None), [], []),
    "latents": ({}, [], ["autoencoder"]),
    "latents and an autoencoder": (dict(autoencoder=1), ["autoencoder"], ["autoencoder"]),
    "pixels and text": (
        dict(latent_scale=None, network=TEXT, text_encoder=1), ["text_encoder"], ["text_encoder"],
    ),
    "contexts of arrays": (
        dict(latent_scale=None, network=TEXT, context_encoder="arrays"), [], [],
    ),
    "both": (
        dict(network=TEXT, autoencoder=1, text_encoder=1), *2 * [["autoencoder", "text_encoder"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_encoders_that_are_left_out_are_told_of_with_how_to_set_them(tmp_path, kl, name):
    arguments, at_saving, at_loading = LEFT_OUT[name]
    encoders = {"autoencoder": kl, "text_encoder": Words()}
    model = make(**{key: value for key, value in arguments.items() if key not in encoders})
    for key in encoders.keys() & arguments.keys():
        model.set_encoders(**{key: encoders[key]})
    path = tmp_path / "m.keras"
    assert told(lambda: model.save(path)) == at_saving
    assert told(lambda: keras.saving.load_model(path)) == at_loading


def told(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    text = "\n".join(str(warning.message) for warning in found)
    return re.findall(r"model's file.*after loading, call `model\.set_encoders\((\w+)=", text)


@pytest.mark.each_backend
@pytest.mark.parametrize("name", ["mine.keras", "mine.weights.h5"])
def test_an_autoencoder_that_keras_saved_is_read_by_its_path(tmp_path, kl, name):
    save = kl.save if name.endswith(".keras") else kl.save_weights
    save(tmp_path / name)
    own = {} if name.endswith(".keras") else kl.config
    again = AutoencoderKL.from_file(tmp_path / name, scale=SCALE, **own)
    assert (again.fingerprint, again.scale) == (kl.fingerprint, SCALE)
    assert_same(again.get_weights(), kl.get_weights())


@pytest.mark.parametrize("name", ["autoencoder", "text_encoder"])
def test_a_path_for_an_encoder_is_told_how_it_is_read(tmp_path, name):
    model = make(TEXT)
    reader = "AutoencoderKL.from_file" if name == "autoencoder" else "CLIPText.from_preset"
    with pytest.raises(TypeError, match=f"is read by {reader}"):
        model.set_encoders(**{name: str(tmp_path / "a")})
    if name == "autoencoder":
        with pytest.raises(TypeError, match=f"is read by {reader}"):
            write_latents(PICTURES, tmp_path / "cache", str(tmp_path / "a"))


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_the_autoencoder_is_not_in_the_models_file(tmp_path, kl, name):
    sizes = []
    model = make(latent_encoder=kl.fingerprint)
    save = model.save if name.endswith(".keras") else model.save_weights
    for autoencoder in (None, kl):
        model.set_encoders(autoencoder=autoencoder)
        save(tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert kl.count_params() * 4 > 500_000
    assert abs(sizes[1] - sizes[0]) < 5000  # bytes of file structure


@pytest.mark.each_backend
def test_loading_weights_leaves_the_autoencoder_alone(tmp_path, kl):
    model = make()
    model.set_encoders(autoencoder=kl)
    model.save_weights(tmp_path / "m.weights.h5")
    other = make()
    own = shift(kl, "decoder")
    other.set_encoders(autoencoder=own)
    weights = own.get_weights()
    other.load_weights(tmp_path / "m.weights.h5")
    assert_same(weights, own.get_weights())


def test_weights_saved_without_an_autoencoder_load_with_one(tmp_path, kl):
    model = make()
    model.save_weights(tmp_path / "m.weights.h5")
    other = make()
    other.set_encoders(autoencoder=kl)
    other.load_weights(tmp_path / "m.weights.h5")
    assert_same(model.get_weights(), other.get_weights())


@pytest.mark.each_backend
def test_an_encoder_that_is_set_as_an_attribute_is_refused(kl):
    model, other = make(), make()
    count = model.count_params()
    model.autoencoder = kl
    with pytest.raises(ValueError, match=r"again, and call `model.set_encoders\(autoencoder="):
        model.generate(num_images=1, verbose=0)
    other.set_encoders(autoencoder=kl)
    assert other.count_params() == count
