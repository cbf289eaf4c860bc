"""Caches and autoencoders that are not the model's are refused before anything is compiled."""

import re
import warnings

import keras
import numpy as np
import pytest
from tiny import assert_equal, normal, numpy, refused, uvit
from words import Words

from keras_uvit import DiffusionModel, presets
from keras_uvit.data import LatentDataset, latent_statistics, sources, write_latents
from keras_uvit.encoders import AutoencoderKL, SpaceToDepth, fitting_scale

pytestmark = pytest.mark.once

# 16x16 grey pictures become 8x8 latents of 4 channels.
SCALE = 1.7  # pixels uniform in [-1, 1] have standard deviation 0.58
PICTURES = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 1)).astype("uint8")
JIT = keras.config.backend() == "jax"  # TensorFlow's XLA takes longer than all the steps here


def encoder(fingerprint="the-encoder", scale=SCALE, factor=2):
    autoencoder = SpaceToDepth(factor, scale=scale)
    autoencoder.id, autoencoder.fingerprint = f"id-of-{fingerprint}", fingerprint
    return autoencoder


def cache(folder, autoencoder=None, classes=None, pictures=PICTURES):
    source = {"image": pictures}
    if classes:
        source["label"] = np.arange(len(pictures)) % classes
    write_latents(source, folder, autoencoder or encoder(), verbose=0, batch_size=16)
    return LatentDataset(folder, 8, verbose=0)


def unknown(folder):
    """A cache that does not know its autoencoder, as its reader sets it."""
    dataset = cache(folder)
    dataset.scale = dataset.shift = dataset.autoencoder_id = dataset.fingerprint = None
    return dataset


def make(network=None, latent_scale=SCALE, **arguments):
    sizes = dict(image_shape=(8, 8, 4), patch_size=4)
    optimizer = dict(warmup_steps=0)
    network = uvit(**{**sizes, **(network or {})})
    return DiffusionModel(network, latent_scale=latent_scale, optimizer=optimizer, **arguments)


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    def reached(*_, **__):
        raise AssertionError("training began")

    for name in ("make_train_function", "make_test_function", "train_step"):
        monkeypatch.setattr(DiffusionModel, name, reached)


def assert_refused(model, *data, words, **options):
    """`fit` raises ValueError with these words, which are returned with the rest of its message."""
    model.compile()
    message = refused(ValueError, lambda: model.fit(*data, verbose=0, **options), *words)
    assert int(numpy(model.step)) == 0
    return message


def assert_accepted(model, *data, **options):
    """`fit` gets past its checks; see `nothing_is_compiled`."""
    model.compile()
    refused(AssertionError, lambda: model.fit(*data, verbose=0, **options), "training began")


# Caches -------------------------------------------------------------------------------------------

# Arguments of the model and of the cache, and what the error says.
REFUSED = {
    "scale": (
        dict(latent_scale=0.9), {},
        ["The cache (id-of-the-encoder) has scale 1.7", "latent_scale=0.9", "build the model with"],
    ),
    "encoder": (
        dict(latent_encoder="learned"), {},
        ["of encoder the-encoder", "of encoder learned", "model.latent_encoder = None"],
    ),
    "size": (
        {}, dict(pictures=PICTURES[:, :8, :8]),
        ["moments of shape (4, 4, 8), of 8 x 8 pixels", "latents (8, 8, 4) need (8, 8, 8)"],
    ),
    "factor": (
        {}, dict(autoencoder=encoder(factor=4)),
        ["moments of shape (4, 4, 32), of 16 x 16 pixels", "change its image_shape"],
    ),
    "more classes": (
        dict(network=dict(num_classes=3)), dict(classes=5),
        ["The cache has 5 classes, the network num_classes=3", "num_classes=5"],
    ),
    "labels for none": ({}, dict(classes=5), ["has no labels", "build it with num_classes"]),
    "no labels": (
        dict(network=dict(num_classes=3)), {}, ["Received the keys ['moments']", "['label']"],
    ),
    "pixels": (dict(latent_scale=None), {}, ["works on pixels", "latent_scale=1.7"]),
    "pixels of another shape": (
        dict(network=dict(image_shape=(16, 16, 1)), latent_scale=None), {}, ["works on pixels"],
    ),
    # Scale and encoder agree, but both are wrong.
    "deviation": (
        dict(latent_scale=10.0), dict(autoencoder=encoder(scale=10.0)),
        ["standard deviation 5.", "scale that fits is 1.7"],  # 1 / 0.577 is 1.73
    ),
    "all the same": (
        {}, dict(pictures=np.full_like(PICTURES, 128)), ["standard deviation", "fits is"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("name", REFUSED)
def test_a_cache_that_does_not_fit_is_refused_and_fixes_nothing(tmp_path, name):
    arguments, options, words = REFUSED[name]
    model = make(**arguments)
    assert_refused(model, cache(tmp_path, **options), words=words)
    assert model.latent_encoder == arguments.get("latent_encoder")


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("known", [5, 7])
def test_a_cache_of_as_many_or_fewer_classes_is_taken(tmp_path, known):
    assert_accepted(make(dict(num_classes=known)), cache(tmp_path, classes=5))


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_cache_that_does_not_know_its_autoencoder_is_taken_for_latents_alone(tmp_path):
    dataset = unknown(tmp_path)
    for before in ("learned", None):
        model = make(latent_encoder=before)
        assert_accepted(model, dataset)
        assert model.latent_encoder == before
    text = assert_refused(make(latent_scale=None), dataset, words=["works on pixels"])
    assert "Build it with latent_scale=None" not in text


@pytest.mark.usefixtures("nothing_is_compiled")
def test_validation_and_evaluation_check_their_cache_too(tmp_path):
    good, other = cache(tmp_path / "a"), cache(tmp_path / "b", encoder("another"))
    words = ["is of encoder another", "encoder the-encoder"]
    assert_refused(make(), good, validation_data=other, words=words)
    model = make(latent_encoder="the-encoder")
    model.compile()
    refused(ValueError, lambda: model.evaluate(other, verbose=0), *words)


def test_the_first_cache_fixes_the_encoder_for_good(tmp_path):
    first, second = cache(tmp_path / "a"), cache(tmp_path / "b", encoder("another"))
    model = make()
    assert model.latent_encoder is None
    model.compile(jit_compile=JIT)
    assert np.isfinite(model.fit(first, verbose=0).history["loss"]).all()
    model.save(tmp_path / "model.keras")
    for trained in (model, keras.saving.load_model(tmp_path / "model.keras")):
        assert trained.latent_encoder == "the-encoder"
        refused(ValueError, lambda trained=trained: trained.fit(second, verbose=0), "of encoder")


@pytest.mark.usefixtures("nothing_is_compiled")
def test_without_a_known_encoder_the_next_cache_fixes_it_anew(tmp_path):
    model = make(latent_encoder="learned")
    model.latent_encoder = None
    assert_accepted(model, cache(tmp_path, encoder("another")))
    assert model.latent_encoder == "another"


# Standard deviation -------------------------------------------------------------------------------

NOISE = normal(16, 8, 8, 4)


def of_std(key, std):
    """A batch whose latents have this standard deviation, in equal shares of mean and noise."""
    if key == "latent":
        return {"latent": std * NOISE}
    log_variance = np.full_like(NOISE, 2 * np.log(std / np.sqrt(2)))
    return {"moments": np.concatenate([std / np.sqrt(2) * NOISE, log_variance], axis=-1)}


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(
    ("key", "latent_scale", "std"),
    [("latent", 1.0, 5.5), ("latent", 0.18215, 0.18), ("moments", 1.0, 0.18),
     ("moments", 0.18215, 5 / 0.18215)],
)  # fmt: skip
def test_a_wrong_standard_deviation_is_refused_with_the_scale_that_fits(key, latent_scale, std):
    batch = of_std(key, std)
    factor = latent_scale if key == "moments" else 1.0  # latents are scaled already
    words = [f"The first batch of {key!r}", "diffusion expects about 1"]
    text = assert_refused(make(latent_scale=latent_scale), batch, words=words)
    assert (f"times latent_scale={latent_scale}, has" in text) == (key == "moments")
    found, fits = (
        float(re.search(rf"{words} ([\d.]+\d)", text).group(1))
        for words in ("standard deviation", "the scale that fits is")
    )
    # Of 4,096 numbers, and printed with three digits.
    assert found == pytest.approx(factor * std, rel=0.05)
    assert fits == pytest.approx(1 / std, rel=0.05)
    scaled = {key: fits * batch[key]} if key == "latent" else batch
    assert_accepted(make(latent_scale=fits), scaled)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("key", ["latent", "moments"])
def test_standard_deviation_one_is_taken_and_other_checks_stay(key):
    model = make(latent_scale=1.0)
    assert_accepted(model, of_std(key, 1.0))
    bad = of_std(key, 1.0)
    bad[key][3] = np.nan
    assert_refused(model, bad, words=["NaN or infinity in 1 of 16 items, the first at index 3"])


@pytest.mark.usefixtures("nothing_is_compiled")
def test_equal_numbers_and_validation_data_are_looked_at_too():
    words = ["All numbers in the first batch of 'latent' are equal"]
    assert_refused(make(latent_scale=1.0), {"latent": np.ones_like(NOISE)}, words=words)
    good, bad = of_std("latent", 1.0), of_std("moments", 5.5)
    words = ["The first batch of 'moments'", "standard deviation 5."]
    assert_refused(make(latent_scale=1.0), good, validation_data=bad, words=words)


@pytest.mark.parametrize("kind", ["array", "source"])
def test_the_scale_that_fits_gives_latents_variance_one(kind):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype("uint8")
    source = images if kind == "array" else sources.arrays(images)
    scale = fitting_scale(SpaceToDepth(2), source, num_images=64, verbose=0)
    scaled = SpaceToDepth(2, scale=scale)
    latents = scaled.sample(scaled.encode(images))
    assert latents.std() == pytest.approx(1.0, rel=1e-3)  # the scale has four digits
    same = np.full_like(images, 7)
    refused(ValueError, lambda: fitting_scale(SpaceToDepth(2), same, verbose=0), "all equal")


def test_the_advice_of_fit_can_be_followed(tmp_path):
    dataset = cache(tmp_path, encoder(scale=0.1))
    text = assert_refused(make(latent_scale=0.1), dataset, words=["scale that fits is 1.7"])
    scale = float(text.split("latent_scale=")[-1].split(",")[0])
    model = make(latent_scale=scale)
    model.compile(jit_compile=JIT)
    model.fit(LatentDataset(tmp_path, 16, scale=scale, verbose=0), verbose=0)
    model.set_encoders(autoencoder=encoder(scale=scale))


# Autoencoders -------------------------------------------------------------------------------------


def test_an_autoencoder_of_another_scale_is_refused():
    model = make()
    words = "The autoencoder", "has scale 1.0, the model latent_scale"
    refused(ValueError, lambda: model.set_encoders(autoencoder=encoder(scale=1.0)), *words)
    assert model.encoders.autoencoder is None
    assert model.latent_encoder is None
    model.set_encoders(autoencoder=encoder(scale=SCALE * (1 + 1e-7)))  # float32 rounding
    pixels = make(latent_scale=None)
    words = "works on pixels", "latent_scale=1.7"
    refused(ValueError, lambda: pixels.set_encoders(autoencoder=encoder()), *words)


def test_an_autoencoder_of_another_encoder_is_refused_and_the_old_one_stays(tmp_path):
    model, first, other = make(), encoder(), encoder("another")
    model.set_encoders(autoencoder=first)
    assert model.latent_encoder == "the-encoder"
    words = "is of encoder another", "encoder the-encoder"
    refused(ValueError, lambda: model.set_encoders(autoencoder=other), "The autoencoder", *words)
    assert model.encoders.autoencoder is first
    assert_refused(model, cache(tmp_path, other), words=words)
    model.set_encoders(autoencoder=None)
    assert model.latent_encoder == "the-encoder"
    model.latent_encoder = None
    model.set_encoders(autoencoder=other)
    assert model.latent_encoder == "another"


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
    model, other = make(), shift(kl, "encoder")
    model.set_encoders(autoencoder=kl)
    decoder = shift(kl, "decoder")
    model.set_encoders(autoencoder=decoder)
    refused(ValueError, lambda: model.set_encoders(autoencoder=other), "is of encoder")
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
    if keras.config.backend() == "torch":
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
    assert_equal(weights, kl.get_weights())
    images = model.generate(num_images=2, verbose=0)
    assert images.shape == (2, 16, 16, 3)
    latents = model.generate(num_images=2, verbose=0, decode=False)
    np.testing.assert_array_equal(images, kl.decode(latents))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.encoders.autoencoder is None
    assert loaded.latent_encoder == kl.fingerprint
    loaded.set_encoders(autoencoder=kl)


TEXT = dict(context_shape=(2, 3))
# What a model has, and the encoders that are told of when it is saved and when it is loaded.
LEFT_OUT = {
    "pixels": (dict(latent_scale=None), [], []),
    "latents": ({}, [], ["autoencoder"]),
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


def test_a_path_for_an_encoder_is_told_how_it_is_read(tmp_path):
    model, path = make(TEXT), str(tmp_path / "a")
    for call, reader in [
        (lambda: model.set_encoders(autoencoder=path), "AutoencoderKL.from_file"),
        (lambda: model.set_encoders(text_encoder=path), "CLIPText.from_preset"),
        (lambda: write_latents(PICTURES, tmp_path / "cache", path), "AutoencoderKL.from_file"),
    ]:
        refused(TypeError, call, "is read by", reader)


@pytest.mark.each_backend
def test_files_of_weights_neither_have_the_autoencoder_nor_change_it(tmp_path, kl):
    path = tmp_path / "m.weights.h5"
    model, other = make(latent_encoder=kl.fingerprint), make()
    sizes = []
    for autoencoder in (None, kl):
        model.set_encoders(autoencoder=autoencoder)
        model.save_weights(path)
        sizes.append(path.stat().st_size)
        decoder = shift(kl, "decoder")
        other.set_encoders(autoencoder=decoder)
        before = decoder.get_weights()
        other.load_weights(path)
        assert_equal(before, decoder.get_weights())
        assert_equal(model.get_weights(), other.get_weights())
    assert kl.count_params() * 4 > 500_000
    assert abs(sizes[1] - sizes[0]) < 5000  # bytes of file structure


@pytest.mark.each_backend
def test_an_encoder_that_is_set_as_an_attribute_is_refused(kl):
    model, other = make(), make()
    count = model.count_params()
    model.autoencoder = kl
    words = "again, and call", "`model.set_encoders(autoencoder="
    refused(ValueError, lambda: model.generate(num_images=1, verbose=0), *words)
    other.set_encoders(autoencoder=kl)
    assert other.count_params() == count


# A scale and a shift for each channel -------------------------------------------------------------


@pytest.mark.each_backend
def test_statistics_of_a_cache_bring_each_channel_to_mean_0_and_variance_1(tmp_path):
    pictures = PICTURES.copy()
    pictures[:, ::2, ::2] //= 8  # the first of four latent channels is dark and even
    cache(tmp_path, pictures=pictures)
    found = latent_statistics(LatentDataset(tmp_path, 8, verbose=0))
    dataset = LatentDataset(tmp_path, 16, **found, verbose=0)
    autoencoder = SpaceToDepth(2, **found)
    autoencoder.id, autoencoder.fingerprint = dataset.autoencoder_id, dataset.fingerprint
    model = DiffusionModel(
        uvit(image_shape=(8, 8, 4)),
        latent_scale=found["scale"],
        latent_shift=list(found["shift"]),
        optimizer=dict(warmup_steps=0),
    )
    model.set_encoders(autoencoder=autoencoder)
    batch = next(iter(dataset))
    x0 = numpy(model.clean(batch))
    # 1e-3: the cache is float16, whose last bit is 5e-4 of a number below 1.
    np.testing.assert_allclose(x0.mean(axis=(0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(x0.std(axis=(0, 1, 2)), 1, atol=1e-3)
    back = autoencoder.decode(x0).astype(int)
    order = [int(np.abs(pictures - image).sum(axis=(1, 2, 3)).argmin()) for image in back]
    assert np.abs(back - pictures[order]).max() <= 1  # float16 again
    # The moments' deviation, exp(-15), times the largest scale, 14, times a normal number.
    np.testing.assert_allclose(autoencoder.sample(batch["moments"]), x0, atol=5e-5)
    model.compile()
    model.fit(dataset, verbose=0)
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="autoencoder"):
        again = keras.saving.load_model(tmp_path / "m.keras")
    assert (again.latent_scale, again.latent_shift) == (found["scale"], found["shift"])
    own = presets.for_data(dataset, steps=1, verbose=0, network=dict(hidden_dim=16, num_layers=1))
    assert (own.latent_scale, own.latent_shift) == (found["scale"], found["shift"])


def test_a_scale_or_a_shift_of_other_channels_is_refused(tmp_path):
    four = (1.0, 1.5, 2.0, 2.5)
    refused(ValueError, lambda: make(latent_scale=four[:3]), "latent_scale", "4 channels", "3 num")
    refused(ValueError, lambda: make(latent_shift=[0, 1]), "latent_shift", "each of 4 channels")
    refused(ValueError, lambda: make(latent_scale=(1, 1, 1, -1)), "positive")
    refused(ValueError, lambda: make(latent_shift=float("nan")), "finite")
    autoencoder = encoder(scale=four)
    words = "has scale (1.0, 1.5, 2.0, 2.5)", "latent_scale=1.7"
    refused(ValueError, lambda: make().set_encoders(autoencoder=autoencoder), *words)
    make(latent_scale=four).set_encoders(autoencoder=autoencoder)
    model = make(latent_shift=0.5)
    words = ["has shift 0.0", "latent_shift=0.5"]
    assert_refused(model, cache(tmp_path), words=words)
    refused(ValueError, lambda: latent_statistics(np.zeros((4, 2, 2, 6)) - 30), "does not vary")
