"""`fit` tells the learning rate how long the run is, and the user what does not fit."""

import io
import warnings

import keras
import numpy as np
import pytest
from tiny import DATA, diffusion_model, fit

from keras_uvit import training
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.training import progress_line, run_length
from keras_uvit.training.progress_line import ProgressLine

pytestmark = pytest.mark.once

RUN = dict(learning_rate=1.0, warmup_steps=0.25, decay_steps="run")
FLAT = dict(learning_rate=0.5, warmup_steps=0)


def rates(model, steps):
    return [float(model.optimizer.schedule(k)) for k in steps]


BATCHES = [{key: value[:6] for key, value in DATA.items()}] * 99
SOURCES = {
    "arrays": (DATA, dict(batch_size=6)),
    "own": (ShuffledDataset(DATA, 6), {}),
    "generator": ((batch for batch in BATCHES), dict(steps_per_epoch=4)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_rates_are_parts_of_the_run(source, tmp_path):
    model = diffusion_model(optimizer=RUN)
    data, options = SOURCES[source]
    model.fit(data, epochs=2, verbose=0, **options)
    # Of 8 steps a quarter up, the rest down.
    expected = [0, 0.5, *(0.5 + 0.5 * np.cos(np.pi * k / 6) for k in range(6))]
    np.testing.assert_allclose(rates(model, range(8)), expected, atol=1e-6)  # float32
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.schedule.config == model.optimizer.schedule.config


@pytest.mark.each_backend
def test_a_compiled_step_follows_a_run_that_became_longer():
    model = diffusion_model(compiled=False, optimizer={**FLAT, "decay_steps": "run"})
    model.optimizer_config["learning_rate"] = 1e-2
    model.compile(jit_compile=keras.config.backend() == "jax")  # elsewhere XLA takes longer
    fit(model, batch_size=24)  # a rate of 1e-2
    before = model.network.get_weights()
    fit(model, batch_size=24)  # the second of two: half of it
    moved = [np.abs(a - b).max() for a, b in zip(model.network.get_weights(), before)]
    # Adam moves no weight by more than about the rate.
    assert 1e-3 < max(moved) < 7e-3


def test_a_run_without_a_length_is_warmed_up_and_stays():
    model = diffusion_model(optimizer=RUN)
    np.testing.assert_allclose(rates(model, (0, 125, 250, 10**6)), [0, 0.5, 1, 1])  # of 1,000


def test_accumulated_batches_are_one_step_and_a_resumed_run_is_as_long_as_a_whole_one(tmp_path):
    for epochs in (1, 3):
        model = diffusion_model(optimizer={**RUN, "gradient_accumulation_steps": 2})
        keeping = training.Checkpoint(tmp_path, 100)
        fit(model, ShuffledDataset(DATA, 6), batch_size=None, epochs=epochs, callbacks=[keeping])
    assert model.optimizer.schedule.config["run_steps"] == 6


@pytest.mark.parametrize(
    ("optimizer", "width", "named"),
    [
        (dict(warmup_steps=2500), 512, "ends after 8 .* reaches 6.4e-07 of 0.0002"),
        (dict(learning_rate=1e-4, warmup_steps=0), 16, "0.0001 is meant for wider .* about 0.002"),
    ],
)
def test_what_does_not_fit_the_run_is_said(optimizer, width, named):
    model = diffusion_model(dict(hidden_dim=width), optimizer=optimizer)
    with pytest.warns(UserWarning, match=named):
        run_length.tell(model, 8)


def test_the_default_fits_every_run():
    model = diffusion_model(optimizer=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, epochs=2)


def test_decay_steps_are_a_number_or_the_run():
    with pytest.raises(ValueError, match="decay_steps.*'end'"):
        training.adamw(decay_steps="end")


# The line -----------------------------------------------------------------------------------------


def test_elsewhere_an_epoch_is_a_line_which_shows_a_rate_that_a_callback_lowers(capsys):
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 10)
    fit(diffusion_model(optimizer=FLAT), epochs=2, verbose="auto", callbacks=[lower])
    first, last = capsys.readouterr().out.splitlines()
    assert last.startswith("epoch 2/2  step 3/3  loss ")
    assert [part.split()[0] for part in first.split("  ")][:5] == [
        "epoch",
        "step",
        "loss",
        "lr",
        "grad",
    ]
    assert "images/s" in first
    assert "left" in first
    assert "lr 5.0e-02" in first
    assert "lr 5.0e-03" in last
    assert "left" not in last
    assert "skipped" not in last


def line_of(epochs, steps):
    said = io.StringIO()
    line = ProgressLine(diffusion_model(optimizer=RUN), said)
    line.set_params({"epochs": epochs, "steps": steps})
    line.on_train_begin()
    line.on_epoch_begin(0)
    return line, said


def test_skipped_steps_and_validation_are_shown():
    line, said = line_of(1, 2)
    line.on_train_batch_end(0, {"loss": 1.0})
    line.on_epoch_end(0, {"loss": 1.0, "skipped_steps": 3.0, "val_loss": 0.5})
    assert "3 steps skipped" in said.getvalue()
    assert "val_loss 0.5" in said.getvalue()


def test_long_runs_are_estimated_after_the_first_steps():
    line, said = line_of(100_000, 1000)
    for k in range(progress_line.FIRST_ESTIMATE + 1):
        line._started = line._started and line._started - 1.0  # a second each
        line.on_train_batch_end(k)
    assert "steps per second, about " in said.getvalue()
    assert " h " in said.getvalue()


def test_durations():
    words = {40: "40 s", 700: "12 min", 12_000: "3 h 20 min"}
    assert {seconds: progress_line.duration(seconds) for seconds in words} == words
