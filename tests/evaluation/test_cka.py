"""CKA against its definitions, written out with centring matrices and traces, and of U-ViTs."""

import keras
import numpy as np
import pytest
from tiny import numpy, randomize, refused, uvit

from keras_uvit import DiffusionModel
from keras_uvit.diffusion.schedules import VPLinear
from keras_uvit.evaluation import CKA, block_names, cka_of_layers, layer_outputs, linear_cka

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
ROUNDING = 1e-12  # of float64, times a few hundred additions


def related(n=12, p=5, q=7, seed=0):
    """Features of the same samples that share some of what they say."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) + 3.0
    return x, x @ rng.normal(size=(p, q)) + 2.0 * rng.normal(size=(n, q))


def hsic(k, l):
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ l @ h) / (n - 1) ** 2


def hsic_1(k, l):
    n = len(k)
    k, l = (a * (1 - np.eye(n)) for a in (k, l))
    one = np.ones(n)
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + sums - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def by_definition(batches, hsic):
    """CKA of batches of (x, y), with means of `hsic` over them."""
    grams = [(x @ x.T, y @ y.T) for x, y in batches]
    xy, xx, yy = (
        np.mean([hsic(pair[i], pair[j]) for pair in grams]) for i, j in ((0, 1), (0, 0), (1, 1))
    )
    return xy / np.sqrt(xx * yy)


FORMS = pytest.mark.parametrize("unbiased", [False, True])


@FORMS
@pytest.mark.parametrize(("n", "p", "q"), [(4, 3, 2), (12, 5, 7), (9, 40, 1)])
def test_it_is_the_definition(unbiased, n, p, q):
    x, y = related(n, p, q)
    expected = by_definition([(x, y)], hsic_1 if unbiased else hsic)
    # Of 4 samples, HSIC_1's three terms are a thousand times what is left of them.
    assert linear_cka(x, y, unbiased) == pytest.approx(expected, abs=1000 * ROUNDING)


@FORMS
def test_rotations_scales_and_shifts_change_nothing(unbiased):
    x, y = related()
    rotation, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    expected = linear_cka(x, y, unbiased)
    assert 0.1 < expected < 0.9
    for moved in (x @ rotation, -300.0 * x, x + RNG.normal(size=5)):
        assert linear_cka(moved, y, unbiased) == pytest.approx(expected, abs=ROUNDING)
        assert linear_cka(x, moved, unbiased) == pytest.approx(1.0, abs=ROUNDING)
    assert linear_cka(y, x, unbiased) == pytest.approx(expected, abs=ROUNDING)


def test_features_far_from_the_origin_are_centred_first():
    x, y = related()
    # Squares of 1e8 round at 2: uncentred Gram matrices would hold nothing of x.
    assert linear_cka(x + 1e8, y) == pytest.approx(linear_cka(x, y), abs=1e-6)


# Batches ------------------------------------------------------------------------------------------


def layers_of(n, seed):
    """Three layers of features of n samples, of different widths."""
    x, y = related(n, seed=seed)
    return [x, y, np.tanh(x @ RNG.normal(size=(5, 4)))]


def test_batches_give_the_means_of_the_definition():
    rows = [layers_of(n, seed) for seed, n in enumerate((8, 8, 5))]  # a ragged last one too
    columns = [layers[::-1][:2] for layers in rows]
    cka, own = CKA(), CKA()
    for a, b in zip(rows, columns):
        cka.update(a, b)
        own.update(a)
    expected = [
        [by_definition([(a[i], b[j]) for a, b in zip(rows, columns)], hsic_1) for j in range(2)]
        for i in range(3)
    ]
    np.testing.assert_allclose(cka.result(), expected, atol=ROUNDING)
    # Columns are layers 2 and 1 of the same.
    np.testing.assert_allclose(own.result()[:, [2, 1]], expected, atol=ROUNDING)
    np.testing.assert_allclose(np.diag(own.result()), 1.0, atol=ROUNDING)
    np.testing.assert_array_equal(own.result(), own.result().T)
    assert own.result().dtype == "float64"


GOOD = RNG.normal(size=(6, 3))
NAN = np.where(np.arange(18).reshape(6, 3) == 4, np.nan, GOOD)


@FORMS
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (GOOD[:5], ["same n samples", "[(6, 3), (5, 3)]"]),
        (GOOD[:, 0], ["(n, p) and (n, q)", "[(6, 3), (6,)]"]),
        (NAN, ["NaN or infinity"]),
        (NAN - np.inf, ["NaN or infinity"]),
        (np.full((6, 3), 0.1), ["same for all samples"]),
    ],
)
def test_features_without_similarity_are_named(unbiased, x, words):
    refused(ValueError, lambda: linear_cka(x, GOOD, unbiased), words[0])
    refused(ValueError, lambda: linear_cka(GOOD, x, unbiased), *words)
    batch = ([GOOD, x], None) if unbiased else ([GOOD], [x])
    refused(ValueError, lambda: CKA().update(*batch), *words)


def test_what_does_not_fit_the_estimate_is_refused():
    assert 0 < linear_cka(GOOD[:3], GOOD[:3, 1:]) < 1
    few = GOOD[:3], GOOD[:3, 1:]
    refused(ValueError, lambda: linear_cka(*few, unbiased=True), "needs 4 samples", "Received: 3")
    cka = CKA()
    refused(ValueError, cka.result, "before the first `update`")
    cka.update([GOOD, GOOD**2])
    words = "2 by 1 layers after 2 by 2"
    refused(ValueError, lambda: cka.update([GOOD, GOOD**2], [GOOD]), words)


# Of models ----------------------------------------------------------------------------------------

NAMES = ["in_block_0", "mid_block", "skip_0", "out_block_0"]
DATA = {
    "image": RNG.integers(0, 256, (9, 4, 4, 1)).astype("uint8"),
    "label": np.arange(9) % 3,
}


def make(latent_scale=None, **network):
    network = {"hidden_dim": 8, "num_layers": 3, "num_classes": 3, **network}
    schedule = VPLinear(0.1, 20.0)
    model = DiffusionModel(uvit(**network), schedule=schedule, latent_scale=latent_scale)
    randomize(model.ema_network)  # fresh blocks hardly matter
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def eager(monkeypatch):
    """Nothing is compiled, which takes XLA most of a test's time."""
    monkeypatch.setattr("keras_uvit.backend.compiled", lambda function: function)


def noised(t, seed=0):
    """x_t of `DATA` by hand: the noise of image k is that of a generator of its own."""
    generators = [np.random.default_rng([seed, k]) for k in range(9)]
    noise = np.stack([g.standard_normal((4, 4, 1), "float32") for g in generators])
    alpha = np.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)
    x = alpha * (DATA["image"] / 127.5 - 1.0) + np.sqrt(1 - alpha**2) * noise
    return x.astype("float32")


@pytest.mark.each_backend
@pytest.mark.parametrize("use_ema", [True, False])
def test_outputs_are_the_networks_own(model, use_ema):
    network = model.ema_network if use_ema else model.network
    inputs = {
        "image": noised(0.3, seed=5),
        "timestep": np.full(9, 999 * 0.3, "float32"),
        "label": DATA["label"].astype("int32"),
    }
    taps = keras.Model(network.input, [network.get_layer(name).output for name in NAMES])
    expected = [numpy(x).reshape(9, -1) for x in taps(inputs, training=False)]
    batches = list(layer_outputs(model, DATA, 0.3, seed=5, use_ema=use_ema, batch_size=4))
    assert [[x.shape for x in batch] for batch in batches] == [[(n, 6 * 8)] * 4 for n in (4, 4, 1)]
    for k, name in enumerate(NAMES):
        found = np.concatenate([batch[k] for batch in batches])
        # Float32 rounding, compiled and not; values are of size 1 to 10.
        np.testing.assert_allclose(found, expected[k], atol=2e-5, err_msg=name)


def test_blocks_and_long_skips_are_named_in_order(model):
    assert block_names(model.network) == NAMES
    assert block_names(uvit(num_layers=5, skip="add")) == [
        *("in_block_0", "in_block_1", "mid_block", "skip_0", "out_block_0", "skip_1"),
        "out_block_1",
    ]
    assert block_names(uvit(num_layers=3, skip=None)) == [NAMES[k] for k in (0, 1, 3)]


@pytest.mark.each_backend
@pytest.mark.usefixtures("eager")
def test_a_models_map_is_cka_over_its_outputs(model):
    cka = CKA()
    for batch in layer_outputs(model, DATA, 0.3, batch_size=5):
        cka.update(batch)
    found = cka_of_layers(model, DATA, 0.3, batch_size=5)
    np.testing.assert_array_equal(found, cka.result())
    assert found.shape == (4, 4)
    part = cka_of_layers(model, DATA, 0.3, ["mid_block", "skip_0"], batch_size=5)
    np.testing.assert_array_equal(part, found[1:3, 1:3])


@pytest.mark.usefixtures("eager")
def test_two_models_are_compared_on_the_same_noise(model):
    other = make(skip=None)
    found = cka_of_layers(model, DATA, 0.9, other=other, batch_size=9)
    assert found.shape == (4, 3)
    rows = next(layer_outputs(model, DATA, 0.9))
    columns = next(layer_outputs(other, DATA, 0.9))
    expected = [[linear_cka(x, y, unbiased=True) for y in columns] for x in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 features


@pytest.mark.usefixtures("eager")
def test_moments_stand_for_their_means():
    latents = make(image_shape=(4, 4, 2), num_classes=None, latent_scale=0.5)
    mean = RNG.normal(size=(5, 4, 4, 2), scale=2.0).astype("float32")
    moments = {"moments": np.concatenate([mean, np.full_like(mean, -9.0)], axis=-1)}
    (found,) = layer_outputs(latents, moments, 0.5)
    (expected,) = layer_outputs(latents, {"latent": 0.5 * mean}, 0.5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("eager")
def test_mixed_precision_does_not_round_the_timestep(model):
    near = [np.concatenate(next(layer_outputs(model, DATA, t)), axis=1) for t in (0.996, 0.9955)]
    keras.config.set_dtype_policy("mixed_bfloat16")  # the policy of models made from now on
    try:
        taps = next(layer_outputs(model, DATA, 0.996))
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(np.concatenate(taps, axis=1), near[0])
    assert not np.array_equal(*near)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(t=1.5), ["[0, 1]", "1.5"]),
        (dict(layers=["nothing"]), ["nothing"]),
        (dict(layers=[]), ["name some layers"]),
        (dict(batch_size=8), ["9 images in batches of 8", "leave 1"]),
        (dict(batch_size=0), ["9 images in batches of 0"]),
        (dict(data={"image": DATA["image"]}), ["has one of", "label"]),
        (dict(data={**DATA, "label": np.full(9, 3)}), ["Labels must be in [0, 3)"]),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(model, options, words, monkeypatch):
    monkeypatch.setattr("keras_uvit.inference.Frozen.__init__", lambda *_: None)
    options = {"data": DATA, "t": 0.5, **options}
    refused(ValueError, lambda: cka_of_layers(model, **options), *words)
