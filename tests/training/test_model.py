"""The training step: loss, randomness, moving average, guard, files, sources of data."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.diffusion import schedules
from keras_uvit.diffusion.predictions import PREDICTIONS, target
from keras_uvit.training import adamw, batches, draws

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 4, 4, 1)).astype("uint8")
LABELS = np.arange(24) % 3
DATA = {"image": IMAGES, "label": LABELS}
BACKEND = keras.config.backend()


def make(compiled=True, classes=3, seed=0, network=None, **arguments):
    keras.utils.set_random_seed(seed)
    arguments.setdefault("optimizer", dict(learning_rate=1e-2, warmup_steps=0))
    net = UViT(**{**TINY, "num_classes": classes, **(network or {})})
    model = DiffusionModel(net, seed=seed, **arguments)
    if compiled:
        model.compile()
    return model


def weights(network):
    return [ops.convert_to_numpy(w) for w in network.weights]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def fit(model, data=DATA, **options):
    return model.fit(data, **{"batch_size": 8, "verbose": 0, "shuffle": False, **options}).history


class Perfect(DiffusionModel):
    """Adds up what a perfect network would have to answer, and answers it."""

    def draw(self, x0, objective):
        t, noise, dropped = super().draw(x0, objective)
        self.drawn = (x0, t, noise)
        return t, noise, dropped

    def loss_of_perfect(self, batch):
        network = self.network

        class Oracle:
            num_classes, null_label = network.num_classes, network.null_label
            context_shape = network.context_shape

            def __call__(_, inputs, training=False):
                x0, t, noise = self.drawn
                self.inputs = inputs
                return target(self.objective.prediction, self.objective.schedule, t, x0, noise)

        draws.go_to(self.random, 0, self.step)
        return self.mean_loss(batch, Oracle(), training=True)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_predictor_has_no_loss(prediction):
    model = Perfect(UViT(**TINY, num_classes=3), prediction=prediction)
    assert float(model.loss_of_perfect(DATA)) == 0.0


def test_the_network_sees_the_noisy_image_the_scaled_time_and_dropped_labels():
    many = {"image": np.tile(IMAGES, (100, 1, 1, 1)), "label": np.tile(LABELS, 100)}
    model = Perfect(UViT(**TINY, num_classes=3), condition_dropout=0.3)
    model.loss_of_perfect(many)
    x0, t, noise = (ops.convert_to_numpy(a) for a in model.drawn)
    seen = {key: ops.convert_to_numpy(value) for key, value in model.inputs.items()}
    np.testing.assert_allclose(x0, many["image"] / 127.5 - 1, atol=1e-6)  # float32 rounding
    schedule = model.objective.schedule
    alpha, sigma = (f(t.astype("float64")) for f in (schedule.alpha, schedule.sigma))
    expected = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * noise
    np.testing.assert_allclose(seen["image"], expected, atol=1e-5)  # float32 exp and sqrt
    np.testing.assert_allclose(seen["timestep"], 999 * t, rtol=1e-6)
    dropped = seen["label"] == 3
    assert (seen["label"][~dropped] == many["label"][~dropped]).all()
    # 2,400 draws: four standard deviations of a 30 % share are 3.8 %.
    assert abs(dropped.mean() - 0.3) < 0.038
    assert abs(t.mean() - 0.5) < 0.024  # four standard deviations of a uniform mean
    assert 0 <= t.min() <= t.max() < 1


def test_moments_become_posterior_samples_times_the_scale():
    model = make(latent_scale=0.5, classes=None)
    mean = RNG.standard_normal((2000, 4, 4, 1)).astype("float32")
    moments = np.concatenate([mean, np.full_like(mean, np.log(0.04))], -1)
    x = ops.convert_to_numpy(model.clean({"moments": moments}))
    noise = (x / 0.5 - mean) / 0.2
    # 32,000 numbers: four standard deviations of their mean and deviation.
    assert abs(noise.mean()) < 0.023
    assert abs(noise.std() - 1) < 0.016
    again = ops.convert_to_numpy(model.clean({"moments": moments}))
    assert np.abs(again - x).max() > 0.1  # a new sample at each visit
    latent = ops.convert_to_numpy(model.clean({"latent": mean}))
    np.testing.assert_array_equal(latent, mean)


def test_context_is_dropped_to_the_null_context():
    network = UViT(**TINY, context_shape=(2, 3))
    model = DiffusionModel(network, condition_dropout=0.5)
    model.null_context.assign(np.full((2, 3), 7.0))
    context = RNG.standard_normal((4, 2, 3)).astype("float32")
    dropped = np.array([True, False, True, False])
    out = ops.convert_to_numpy(
        model.condition({"context": context}, ops.convert_to_tensor(dropped))["context"]
    )
    assert (out[dropped] == 7).all()
    np.testing.assert_array_equal(out[~dropped], context[~dropped])


def test_every_step_draws_anew_and_the_same_step_the_same():
    model = make(compiled=False)

    def drawn():
        draws.go_to(model.random, 0, model.step)
        t, noise, _ = model.draw(ops.zeros((4, 4, 4, 1)), model.objective)
        return np.concatenate([ops.convert_to_numpy(t), ops.convert_to_numpy(noise).ravel()])

    first = drawn()
    np.testing.assert_array_equal(first, drawn())
    model.step.assign(1)
    second = drawn()
    draws.go_to(model.random, 1, ops.convert_to_tensor(0, "int32"))
    t, _, _ = model.draw(ops.zeros((4, 4, 4, 1)), model.objective)
    assert np.abs(first - second).min() > 0
    assert np.abs(ops.convert_to_numpy(t) - first[:4]).min() > 0  # validation has its own stream
    assert np.abs(first[:1] - draws_of_other_seed()) > 0


@pytest.mark.eager
def test_the_seed_is_a_part_of_the_state_that_training_keeps():
    """As a constant of the program each seed would be compiled anew."""
    model, other = make(), make(seed=1)
    eight = {key: value[:8] for key, value in DATA.items()}
    base = ops.convert_to_numpy(model.random.state)[0]
    fit(model, eight)
    model.evaluate(eight, batch_size=8, verbose=0)
    assert ops.convert_to_numpy(model.random.state)[0] == base
    assert ops.convert_to_numpy(other.random.state)[0] != base
    model.random.state.assign(other.random.state)  # as loading its weights does
    fit(model, eight)
    assert ops.convert_to_numpy(model.random.state)[0] == base


def draws_of_other_seed():
    model = make(compiled=False, seed=1)
    draws.go_to(model.random, 0, model.step)
    return ops.convert_to_numpy(model.draw(ops.zeros((4, 4, 4, 1)), model.objective)[0])[:1]


@pytest.mark.once
def test_it_learns_one_batch_by_heart():
    model = make(classes=None, prediction="x0")
    one = {"image": np.tile(IMAGES[:1], (64, 1, 1, 1))}
    history = fit(model, one, batch_size=64, epochs=100)
    assert history["loss"][0] > 0.1
    assert np.mean(history["loss"][-10:]) < 0.1 * history["loss"][0]


@pytest.mark.eager
def test_moving_average_follows_its_recurrence():
    model = make(ema_decay=0.5, ema_warmup=False)
    average = weights(model.network)
    for _ in range(3):
        fit(model, {key: value[:8] for key, value in DATA.items()})
        average = [0.5 * a + 0.5 * w for a, w in zip(average, weights(model.network))]
        for ours, expected in zip(weights(model.ema_network), average):
            np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 rounding
    assert not any(w.trainable for w in model.ema_network.weights)


@pytest.mark.once
@pytest.mark.eager
def test_warm_up_of_the_moving_average_is_logged():
    history = fit(make(ema_decay=0.25), epochs=2)  # 3 steps an epoch; the log is after the step
    # Decay of the next step k: min(0.25, (1 + k) / (10 + k)), k = 3 and 6.
    np.testing.assert_allclose(history["ema_decay"], [0.25, 0.25], rtol=1e-6)
    history = fit(make(ema_decay=0.9), epochs=2)
    np.testing.assert_allclose(history["ema_decay"], [4 / 13, 7 / 16], rtol=1e-6)


def test_gradient_accumulation_moves_weights_and_average_on_real_steps_only():
    model = make(compiled=False, ema_decay=0.5, ema_warmup=False)
    model.compile(adamw(1e-2, warmup_steps=0, gradient_accumulation_steps=3))
    before, eight = weights(model.network), {key: value[:8] for key, value in DATA.items()}
    fit(model, eight, epochs=2)
    assert_equal(weights(model.network), before)
    assert_equal(weights(model.ema_network), before)
    fit(model, eight)
    after = weights(model.network)
    assert max(np.abs(a - b).max() for a, b in zip(after, before)) > 1e-3
    for average, a, b in zip(weights(model.ema_network), after, before):
        np.testing.assert_allclose(average, (a + b) / 2, atol=1e-6)  # one step of decay 0.5
    assert int(model.step) == 3
    assert int(model.ema_step) == 1


@pytest.mark.once
def test_warm_up_counts_optimizer_steps_under_accumulation():
    optimizer = adamw(1.0, warmup_steps=4, gradient_accumulation_steps=3)
    saved = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    for rate in (optimizer._learning_rate, saved._learning_rate):
        # The same for all three batches of a step, the last of which makes it.
        assert [float(rate(k)) for k in range(18)] == [
            min(k / 4, 1.0) for k in range(6) for _ in range(3)
        ]


def test_recipe_rates():
    flat, falling = adamw(2.0, warmup_steps=4), adamw(2.0, warmup_steps=4, decay_steps=8)
    at = lambda optimizer, k: float(optimizer._learning_rate(k))  # noqa: E731
    assert [at(flat, k) for k in (0, 1, 4, 1000)] == [0.0, 0.5, 2.0, 2.0]
    # Cosine: half way after half the steps, zero at the end.
    np.testing.assert_allclose([at(falling, k) for k in (4, 8, 12)], [2, 1, 0], atol=1e-6)
    assert adamw(2.0, warmup_steps=0).get_config()["learning_rate"] == 2.0


class Poisoned(DiffusionModel):
    """Whose loss is NaN on the batches numbered in `bad`."""

    def mean_loss(self, batch, network, training):
        loss = super().mean_loss(batch, network, training)
        hit = ops.any(ops.equal(ops.convert_to_tensor(self.bad, "int32"), self.step))
        return ops.where(hit, float("nan"), loss)


def test_non_finite_steps_change_nothing_and_are_counted():
    model = Poisoned(UViT(**TINY, num_classes=3), optimizer=dict(warmup_steps=0))
    model.bad = [0, 1]
    model.compile()
    before = weights(model.network)
    two = {key: value[:16] for key, value in DATA.items()}
    history = fit(model, two)
    assert_equal(weights(model.network), before)
    assert_equal(weights(model.ema_network), before)
    assert history["skipped_steps"] == [2]
    assert np.isnan(history["loss"][0])
    assert int(model.optimizer.iterations) == 0
    history = fit(model, two)  # batches 2 and 3 are good
    assert history["skipped_steps"] == [2]
    assert history["skipped_in_row"] == [0]
    assert np.isfinite(history["loss"][0])
    assert int(model.optimizer.iterations) == 2


@pytest.mark.eager
def test_training_stops_with_an_error_after_too_many_and_keeps_the_weights():
    model = Poisoned(
        UViT(**TINY, num_classes=3), optimizer=dict(warmup_steps=0), max_skipped_steps=4
    )
    model.bad = list(range(1, 100))
    model.compile()
    # Callbacks run beside JAX's steps: the count is read when one gets to it.
    with pytest.raises(FloatingPointError, match="[4-7] steps in a row.*max_skipped_steps"):
        fit(model, epochs=30)
    assert 5 <= int(model.step) <= 8  # it may take a moment to stop
    assert int(model.optimizer.iterations) == 1
    assert all(np.isfinite(w).all() for w in weights(model.network))


def test_a_bad_label_that_slips_past_the_check_skips_the_step(monkeypatch):
    monkeypatch.setattr(batches, "check_batch", lambda *_: None)
    model, bad = make(), {"image": IMAGES[:8], "label": LABELS[:8] + 3}
    if BACKEND == "torch":  # whose lookup refuses it by itself
        with pytest.raises(IndexError):
            fit(model, bad)
    else:
        assert fit(model, bad)["skipped_steps"] == [1]


@pytest.mark.once
def test_the_label_after_the_last_is_an_error_not_no_label(monkeypatch):
    monkeypatch.setattr(batches, "check_batch", lambda *_: None)
    model = make()  # 3 classes: row 3 of the table means "no label"
    bad = {"image": IMAGES[:8], "label": np.full(8, 3)}
    assert fit(model, bad)["skipped_steps"] == [1]


@pytest.mark.eager
def test_evaluation_uses_the_average_repeats_itself_and_does_not_disturb_training():
    a, b = make(), make()
    first = a.evaluate(DATA, batch_size=8, verbose=0)
    assert first == a.evaluate(DATA, batch_size=8, verbose=0)
    fit(a, validation_data=DATA)
    fit(b)
    assert_equal(weights(a.network), weights(b.network))
    for average in a.ema_network.weights:
        average.assign(np.zeros(average.shape))
    assert a.evaluate(DATA, batch_size=8, verbose=0) != first


@pytest.mark.eager
def test_saved_and_loaded_goes_on_as_if_uninterrupted(tmp_path):
    whole, half = make(), make()
    fit(whole)
    history = fit(whole)
    fit(half)
    half.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert resumed.get_config() == half.get_config()
    assert_equal(weights(resumed.network), weights(half.network))
    assert_equal(weights(resumed.ema_network), weights(half.ema_network))
    assert fit(resumed) == history
    assert_equal(weights(resumed.ema_network), weights(whole.ema_network))


@pytest.mark.eager
def test_weight_files_round_trip(tmp_path):
    a, b = make(), make(seed=1)
    fit(a)
    a.save_weights(tmp_path / "a.weights.h5")
    b.load_weights(tmp_path / "a.weights.h5")
    assert_equal(weights(a), weights(b))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = make(), tmp_path / "model.keras"
    model.save(path)
    old = path.read_bytes()

    def die(self, filepath, *_, **__):
        with open(filepath, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save", die)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_config_holds_every_argument():
    model = make(
        compiled=False, schedule=schedules.VPCosine(s=0.01), prediction="v", time_scale=500.0,
        condition_dropout=0.2, latent_scale=0.3, ema_decay=0.5, ema_warmup=False, sampler="ddim",
        num_steps=7, guidance_scale=2.0, max_skipped_steps=3, time_sampling="cosmap",
        loss_weighting="min_snr",
    )  # fmt: skip
    config = model.get_config()
    copy = DiffusionModel.from_config(config)
    assert copy.get_config() == config
    assert copy.objective.schedule == model.objective.schedule
    old = {k: v for k, v in config.items() if k not in ("time_sampling", "loss_weighting")}
    assert DiffusionModel.from_config(old).objective.time_sampling == "uniform"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prediction="noise"), r"prediction must be one of \['epsilon', 'x0'.*'noise'"),
        (dict(time_sampling="cosine"), r"time_sampling must be one of \['uniform', .*'cosine'"),
        (dict(loss_weighting="snr"), r"loss_weighting must be one of \['uniform', 'min_snr'\]"),
        (dict(condition_dropout=1.5), r"in \[0, 1\].*condition_dropout=1.5"),
        (dict(ema_decay=1.0), "ema_decay=1.0"),
        (dict(condition_dropout=0.1, network=dict(null_label=False)), "knows 'none'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(compiled=False, **arguments)


def test_parts_of_the_wrong_kind_are_named():
    with pytest.raises(TypeError, match="must be a UViT.*lacks"):
        DiffusionModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    with pytest.raises(TypeError, match=r"such as .*VPLinear\(\). Received: 'cosine'"):
        make(compiled=False, schedule="cosine")


def test_compile_refuses_another_loss():
    with pytest.raises(ValueError, match="built in.*Leave loss= out"):
        make(compiled=False).compile(loss="mse")


@pytest.mark.eager
@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.once), "mixed_float16"]
)
def test_mixed_precision_trains_like_float32(policy):
    full, mixed = make(), make(network=dict(dtype=policy))
    mixed.network.set_weights(full.network.get_weights())
    a, b = fit(full), fit(mixed)
    # bfloat16 has 8 bits of mantissa: 0.4 % a rounding, a few of them in a row.
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=0.03)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=0.1)
    scaled = isinstance(mixed.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert {keras.backend.standardize_dtype(w.dtype) for w in mixed.network.weights} == {"float32"}


@pytest.mark.eager
def test_loss_scaling_skips_an_overflow_and_lowers_the_scale():
    model = make(compiled=False, network=dict(dtype="mixed_float16"))
    huge = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=2.0**60)
    model.compile(huge)
    before = weights(model.network)
    history = fit(model, {key: value[:8] for key, value in DATA.items()})
    assert history["skipped_steps"] == [1]
    assert_equal(weights(model.network), before)
    assert float(model.optimizer.dynamic_scale) == 2.0**59


@pytest.mark.once
def test_remat_changes_no_gradient():
    a, b = make(network=dict(num_layers=3)), make(network=dict(num_layers=3, remat=True))
    b.network.set_weights(a.network.get_weights())
    for model in (a, b):
        model.compile(keras.optimizers.SGD(1.0))
    losses = [fit(model)["loss"] for model in (a, b)]
    # The same arithmetic in another order.
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for x, y in zip(weights(a.network), weights(b.network)):
        np.testing.assert_allclose(x, y, atol=1e-4)


def sources():
    whole = [{key: value[i : i + 8] for key, value in DATA.items()} for i in (0, 8, 16)]

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return whole[index]

    def tf_data():
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.from_tensor_slices(DATA).batch(8, drop_remainder=True)

    def grain_data():
        import grain

        rows = [{"image": IMAGES[i], "label": LABELS[i]} for i in range(24)]
        return grain.MapDataset.source(rows).batch(8)

    def torch_data():
        import torch

        rows = [({"image": IMAGES[i], "label": LABELS[i]},) for i in range(24)]
        return torch.utils.data.DataLoader(rows, batch_size=8)

    return {
        "arrays": lambda: DATA,
        "PyDataset": Sequence,
        "generator": lambda: (batch for batch in whole),
        "tf.data": tf_data,
        "grain": grain_data,
        "DataLoader": torch_data,
    }


@pytest.fixture(scope="module")
def two_epochs():
    return fit(make(), epochs=2)["loss"]


# Those that Keras hands on by an adapter of each backend's own; the others reach it as a generator.
OF_EACH_BACKEND = ("arrays", "tf.data")


@pytest.mark.parametrize(
    "source",
    [pytest.param(s, marks=[] if s in OF_EACH_BACKEND else pytest.mark.once) for s in sources()],
)
def test_every_source_of_data_gives_the_same_losses(source, two_epochs):
    model = make()
    loss = fit(model, sources()[source](), batch_size=8 if source == "arrays" else None)["loss"]
    np.testing.assert_allclose(loss, two_epochs[:1], rtol=1e-6)  # the same program and data


@pytest.mark.parametrize(
    "options",
    [dict(jit_compile=False)] + ([dict(steps_per_execution=3)] if BACKEND != "torch" else []),
)
def test_ways_to_run_the_step_agree(options, two_epochs):
    model = make(compiled=False)
    model.compile(**options)
    expected = two_epochs
    if BACKEND == "tensorflow" and "jit_compile" in options:  # XLA has its own random numbers
        eager = make(compiled=False)
        eager.compile(run_eagerly=True, jit_compile=False)
        expected = fit(eager, epochs=2)["loss"]
    # The compiler may fuse and reorder sums.
    np.testing.assert_allclose(fit(model, epochs=2)["loss"], expected, rtol=1e-3)


def test_compiled_by_xla_where_there_is_xla():
    model = make()
    assert model.jit_compile == (BACKEND != "torch")
    assert model.get_compile_config()["jit_compile"] is None  # another backend chooses anew
