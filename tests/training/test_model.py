"""The training step: its average, its guard, its precision, files, sources of data."""

import keras
import numpy as np
import pytest
import states
from keras import ops
from states import EIGHT, HALF, STEPS, fresh, kept_in_files, state
from tiny import DATA, assert_equal, diffusion_model, fit, numpy, refused, uvit, weights

from keras_uvit import DiffusionModel
from keras_uvit.diffusion import schedules
from keras_uvit.training import adamw, batches

BACKEND = keras.config.backend()
XLA = BACKEND != "torch"

# The average --------------------------------------------------------------------------------------


def test_the_moving_average_follows_its_recurrence():
    model = fresh()
    average = weights(model.network)
    for k in range(3):
        history = fit(model, EIGHT)
        decay = (1 + k) / (10 + k)
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights(model.network))]
        for ours, expected in zip(weights(model.ema_network), average):
            np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 rounding
        # The log is after the step.
        np.testing.assert_allclose(history["ema_decay"], (2 + k) / (11 + k), rtol=1e-6)
    assert not any(weight.trainable for weight in model.ema_network.weights)


@pytest.mark.once
def test_the_decay_rises_to_its_limit():
    model = diffusion_model(compiled=False, ema_decay=0.25)
    for step, decay in ((1, 2 / 11), (3, 0.25), (9, 0.25)):
        model.ema_step.assign(step)
        assert float(model.current_ema_decay()) == pytest.approx(decay)


def test_gradient_accumulation_moves_weights_and_average_on_real_steps_only():
    model = diffusion_model(compiled=False, ema_decay=0.5, ema_warmup=False)
    optimizer = adamw(1e-2, warmup_steps=0, gradient_accumulation_steps=3)
    model.compile(optimizer, jit_compile=BACKEND == "jax")  # XLA takes longer than all the steps
    before = weights(model.network)
    for epochs in (2, 1):
        assert_equal([*weights(model.network), *weights(model.ema_network)], before * 2)
        fit(model, EIGHT, epochs=epochs)
    after = weights(model.network)
    assert max(np.abs(a - b).max() for a, b in zip(after, before)) > 1e-3
    fit(model, EIGHT)  # the first batch of the next step
    assert_equal(weights(model.network), after)
    for average, a, b in zip(weights(model.ema_network), after, before):
        np.testing.assert_allclose(average, (a + b) / 2, atol=1e-6)  # one step of decay 0.5
    assert (int(model.step), int(model.ema_step)) == (4, 1)


def own_draw(x0, objective):
    """Time and noise that are functions of the sample, so that no batch can change them."""
    total = ops.sum(x0, axis=(1, 2, 3))
    t = 0.5 + 0.4 * ops.sin(7.0 * total)
    noise = ops.sin(50.0 * x0 + 3.0 * ops.cos(total)[:, None, None, None])
    return t, noise, ops.zeros(ops.shape(total), "bool")


@pytest.mark.once
def test_accumulated_gradients_are_the_large_batch():
    ends = []
    for parts in (1, 2, 6):
        model = diffusion_model(compiled=False, ema_decay=0.5, ema_warmup=False)
        for i, weight in enumerate(model.network.weights):  # so that no gradient is near zero
            weight.assign(weight + 0.1 * np.random.default_rng(i).standard_normal(weight.shape))
        model.draw, start = own_draw, weights(model.network)
        rates = dict(learning_rate=1e-3, warmup_steps=2, decay_steps=6)
        model.compile(adamw(**rates, gradient_accumulation_steps=parts if parts > 1 else None))
        fit(model, batch_size=24 // parts, epochs=5)
        assert int(model.optimizer.iterations) == int(model.ema_step) == 5
        ends.append([*weights(model.network), *weights(model.ema_network)])
    for end in ends[1:]:
        for a, b in zip(ends[0], end):
            # Sums of gradients in another order: 1e-7 of them, more where Adam divides a small one.
            np.testing.assert_allclose(a, b, atol=1e-5)
    moved = [np.abs(a - b).max() for a, b in zip(ends[0], start)]
    assert min(moved) > 1e-3  # a hundred times what would be overlooked


# The guard ----------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Labels that `fit` would refuse; the first after the classes means "no label"."""
    monkeypatch.setattr(batches, "check_batch", lambda *_: None)
    return dict(DATA, label=np.full(24, 3))


def kept(model):
    """What a step that is not finite leaves alone."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return [*weights(model.network), *weights(model.ema_network), *map(numpy, optimizer.variables)]


def test_steps_whose_loss_is_not_finite_change_nothing_and_are_counted(unchecked):
    model = fresh()
    fit(model, EIGHT)  # a good one, so that no slot is zero
    before = kept(model)
    history = fit(model, unchecked)
    assert_equal(kept(model), before)
    assert history["skipped_steps"] == history["skipped_in_row"] == [STEPS]
    assert np.isnan(history["loss"][0])
    history = fit(model)
    assert (history["skipped_steps"], history["skipped_in_row"]) == ([STEPS], [0])
    assert np.isfinite(history["loss"][0])
    assert int(model.optimizer.iterations) == 1 + STEPS


def test_training_stops_with_an_error_after_too_many_and_keeps_the_weights(unchecked, monkeypatch):
    model = fresh()
    monkeypatch.setattr(model, "max_skipped_steps", 4)
    fit(model, EIGHT)
    before = kept(model)
    # Callbacks run beside JAX's steps: the count is read when one gets to it.
    with pytest.raises(FloatingPointError, match="[4-7] steps in a row.*max_skipped_steps"):
        fit(model, unchecked, epochs=30)
    assert 5 <= int(model.step) <= 8  # it may take a moment to stop
    assert_equal(kept(model), before)


def test_a_bad_label_that_slips_past_the_check_skips_the_step(unchecked):
    model, bad = fresh(), dict(EIGHT, label=EIGHT["label"] + 3)
    if BACKEND == "torch":  # whose lookup refuses it by itself
        with pytest.raises(IndexError):
            fit(model, bad)
    else:
        assert fit(model, bad)["skipped_steps"] == [1]


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.once), "mixed_float16"]
)
def test_mixed_precision_trains_like_float32(policy):
    a = fit(fresh())
    mixed = fresh(network=dict(dtype=policy))
    b = fit(mixed)
    # bfloat16 has 8 bits of mantissa: 0.4 % a rounding, a few of them in a row.
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=0.03)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=0.1)
    scaled = isinstance(mixed.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert {keras.backend.standardize_dtype(w.dtype) for w in mixed.network.weights} == {"float32"}


def test_a_gradient_that_overflows_float16_is_skipped_and_training_goes_on():
    model = fresh(**HALF)
    fit(model, EIGHT)  # a good one, so that no slot is zero
    scale, before = model.optimizer.dynamic_scale, kept(model)
    scale.assign(2.0**60)
    history = fit(model)
    assert_equal(kept(model), before)
    assert history["skipped_steps"] == history["skipped_in_row"] == [STEPS]
    assert float(scale) == 2.0 ** (60 - STEPS)  # halved at each
    scale.assign(2.0**10)
    history = fit(model)
    assert (history["skipped_steps"], history["skipped_in_row"]) == ([STEPS], [0])
    assert np.isfinite([history["loss"], history["grad_norm"]]).all()
    assert int(model.optimizer.inner_optimizer.iterations) == 1 + STEPS
    moved = [np.abs(a - b).max() > 0 for a, b in zip(kept(model), before)]
    assert np.mean(moved) > 0.9  # all but the learning rate


def test_a_weight_that_overflows_float16_stops_training_with_its_name_for_it(monkeypatch):
    model = fresh(**HALF)
    monkeypatch.setattr(model, "max_skipped_steps", 3)
    fit(model)
    kernel = model.network.get_layer("mid_block").mlp_in.kernel
    kernel.assign(ops.full(kernel.shape, 7e4))  # float16 ends at 65504
    before = kept(model)
    # Callbacks run beside JAX's steps: the count is read when one gets to it.
    with pytest.raises(FloatingPointError, match="[3-7] steps in a row.*float16 overflow"):
        fit(model, epochs=20)
    assert_equal(kept(model), before)
    assert all(np.isfinite(numpy(a)).all() for a in model.optimizer.variables)


# Evaluation and files -----------------------------------------------------------------------------


def test_evaluation_uses_the_average_repeats_itself_and_does_not_disturb_training():
    model, options = fresh(), dict(batch_size=8, verbose=0)
    first = model.evaluate(DATA, **options)
    assert first == model.evaluate(DATA, **options)
    fit(model, validation_data=DATA)
    validated, model = weights(model.network), fresh()
    fit(model)
    assert_equal(weights(model.network), validated)
    model.ema_network.set_weights([np.zeros(w.shape) for w in model.ema_network.weights])
    assert model.evaluate(DATA, **options) != first


def test_the_seed_is_a_part_of_the_state_that_training_keeps():
    """As a constant of the program each seed would be compiled anew."""
    model, other = fresh(), DiffusionModel(uvit(), seed=1)
    base = numpy(model.random.state)[0]
    fit(model, EIGHT)
    model.evaluate(EIGHT, batch_size=8, verbose=0)
    assert numpy(model.random.state)[0] == base
    assert numpy(other.random.state)[0] != base
    model.random.state.assign(other.random.state)  # as loading its weights does
    fit(model, EIGHT)
    assert numpy(model.random.state)[0] == base


@pytest.mark.eager
def test_a_loaded_model_goes_on_as_if_uninterrupted(tmp_path):
    model = fresh()
    fit(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    saved = kept_in_files(model)
    history = fit(model)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    assert_equal(kept_in_files(loaded), saved)
    assert fit(loaded) == history
    assert_equal(state(loaded), state(model))
    model.load_weights(tmp_path / "model.weights.h5")
    assert_equal(weights(model), saved[: len(model.weights)])


@pytest.mark.once
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = fresh(), tmp_path / "model.keras"
    model.save(path)
    old = path.read_bytes()

    def die(self, filepath, *_, **__):
        with open(filepath, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save", die)
    refused(OSError, lambda: model.save(path), "No space left")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.once
def test_config_holds_every_argument():
    model = diffusion_model(
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


REFUSED = [
    (dict(prediction="noise"), ValueError, "prediction must be one of", "'noise'"),
    (dict(time_sampling="cosine"), ValueError, "time_sampling must be one of", "'cosine'"),
    (dict(loss_weighting="snr"), ValueError, "loss_weighting must be one of", "'snr'"),
    (dict(condition_dropout=1.5), ValueError, "in [0, 1]", "condition_dropout=1.5"),
    (dict(ema_decay=1.0), ValueError, "[0, 1)", "ema_decay=1.0"),
    (dict(condition_dropout=0.1, network=dict(null_label=False)), ValueError, "knows 'none'"),
    (dict(schedule="cosine"), TypeError, "VPLinear()", "'cosine'"),
]


@pytest.mark.once
@pytest.mark.parametrize(("arguments", "error", "words"), [(a, e, w) for a, e, *w in REFUSED])
def test_arguments_that_do_not_fit_are_named(arguments, error, words):
    refused(error, lambda: diffusion_model(compiled=False, **arguments), *words)


@pytest.mark.once
def test_networks_that_do_not_fit_are_named():
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    refused(TypeError, lambda: DiffusionModel(other), "must be a UViT", "lacks")
    network = uvit()
    network.get_layer("head").kernel.regularizer = keras.regularizers.L2(0.1)
    refused(ValueError, lambda: DiffusionModel(network), "losses of its own")


# One step is the same however it is run -----------------------------------------------------------


@pytest.mark.once
def test_it_learns_one_batch_by_heart():
    model = DiffusionModel(
        uvit(), prediction="x0", optimizer=dict(learning_rate=1e-2, warmup_steps=0)
    )
    model.compile()
    one = {"image": np.tile(DATA["image"][:1], (64, 1, 1, 1))}
    loss = fit(model, one, batch_size=64, epochs=100)["loss"]
    assert loss[0] > 0.1
    assert np.mean(loss[-10:]) < 0.1 * loss[0]


@pytest.mark.once
def test_remat_changes_no_gradient():
    ends = []
    for remat in (False, True):
        model = diffusion_model(network=dict(num_layers=3, remat=remat), compiled=False)
        model.compile(keras.optimizers.SGD(1.0))
        ends.append((fit(model)["loss"], weights(model.network)))
    # The same arithmetic in another order.
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-4)
    for x, y in zip(ends[0][1], ends[1][1], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.fixture(scope="module")
def losses():
    return fit(fresh())["loss"]


# Those that Keras hands on by an adapter of each backend's own; the others reach it as a generator.
AS_GENERATORS = (
    states.Batches,
    lambda: (batch for batch in states.BATCHES),
    states.grain_data,
    states.torch_data,
)


@pytest.mark.parametrize(
    "source", [states.tf_data, *(pytest.param(s, marks=pytest.mark.once) for s in AS_GENERATORS)]
)
def test_every_source_of_data_gives_the_losses_of_arrays(source, losses):
    loss = fit(fresh(), source(), batch_size=None)["loss"]
    np.testing.assert_allclose(loss, losses, rtol=1e-6)  # the same program and data


@pytest.mark.parametrize(
    "options", [dict(jit_compile=False)] + ([dict(steps_per_execution=3)] if XLA else [])
)
def test_ways_to_run_the_step_agree(options, losses):
    if BACKEND == "tensorflow" and "jit_compile" in options:  # XLA has its own random numbers
        eager = diffusion_model(compiled=False)
        eager.compile(run_eagerly=True, jit_compile=False)
        losses = fit(eager)["loss"]
    model = diffusion_model(compiled=False)
    model.compile(**options)
    # The compiler may fuse and reorder sums.
    np.testing.assert_allclose(fit(model)["loss"], losses, rtol=1e-3)


def test_compiled_by_xla_where_there_is_xla():
    model = fresh()
    assert model.jit_compile == XLA
    assert model.get_compile_config()["jit_compile"] is None  # another backend chooses anew
