"""`fit` tells the learning rate how long the run is, and the user what does not fit."""

import io
import os
import signal
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT, training
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.training import progress_line
from keras_uvit.training.checkpoints import steps_in
from keras_uvit.training.progress_line import ProgressLine

pytestmark = [pytest.mark.eager, pytest.mark.once]

PICTURES = {"image": np.zeros((24, 4, 4, 1), "uint8")}
RUN = dict(learning_rate=1.0, warmup_steps=0.25, decay_steps="run")


def make(optimizer=RUN, width=16):
    model = DiffusionModel(
        UViT((4, 4, 1), 2, width, num_layers=1, num_heads=2), optimizer=optimizer
    )
    model.compile(jit_compile=False)
    return model


def rates(model, count):
    return [float(model.optimizer.schedule(k)) for k in range(count)]


def expected(run):
    """A quarter of the run up, the rest down."""
    up = run // 4
    down = [0.5 + 0.5 * np.cos(np.pi * (k - up) / (run - up)) for k in range(up, run)]
    return [*(k / up for k in range(up)), *down]


SOURCES = {
    "arrays": (PICTURES, dict(batch_size=6)),
    "own": (ShuffledDataset(PICTURES, 6), {}),
    "generator": (({"image": PICTURES["image"][:6]} for _ in range(99)), dict(steps_per_epoch=4)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_rates_are_parts_of_the_run(source):
    model = make()
    data, options = SOURCES[source]
    model.fit(data, epochs=2, verbose=0, **options)
    np.testing.assert_allclose(rates(model, 8), expected(8), atol=1e-6)  # float32


@pytest.mark.each_backend
@pytest.mark.compiled
def test_a_compiled_step_follows_a_run_that_became_longer():
    model = make(dict(learning_rate=1e-2, warmup_steps=0, decay_steps="run"))
    model.fit(PICTURES, batch_size=24, verbose=0)  # a rate of 1e-2
    before = model.network.get_weights()
    model.fit(PICTURES, batch_size=24, verbose=0)  # the second of two: half of it
    moved = [np.abs(a - b).max() for a, b in zip(model.network.get_weights(), before)]
    # Adam moves no weight by more than about the rate.
    assert 1e-3 < max(moved) < 7e-3


def test_a_run_without_a_length_is_warmed_up_and_stays():
    model = make()
    np.testing.assert_allclose(rates(model, 251)[::125], [0, 0.5, 1])  # of 1,000 steps
    assert float(model.optimizer.schedule(10**6)) == 1.0


def test_a_resumed_run_has_the_length_of_an_uninterrupted_one(tmp_path):
    def fit(epochs, **more):
        model = make()
        keeping = training.Checkpoint(tmp_path, 100)
        data = ShuffledDataset(PICTURES, 6)
        model.fit(data, epochs=epochs, callbacks=[keeping], verbose=0, **more)
        return model

    fit(1)
    assert fit(3).optimizer.schedule.config["run_steps"] == 12


def test_accumulated_batches_are_one_step():
    model = make({**RUN, "gradient_accumulation_steps": 2})
    model.fit(PICTURES, batch_size=6, epochs=4, verbose=0)
    assert model.optimizer.schedule.config["run_steps"] == 8


def test_it_is_saved(tmp_path):
    model = make()
    model.fit(PICTURES, batch_size=6, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.schedule.config == model.optimizer.schedule.config


@pytest.mark.parametrize(
    ("optimizer", "width", "named"),
    [
        (dict(warmup_steps=2500), 512, "ends after 8 .* reaches 6.4e-07 of 0.0002"),
        (dict(learning_rate=1e-4, warmup_steps=0), 16, "0.0001 is meant for wider .* about 0.002"),
    ],
)
def test_what_does_not_fit_the_run_is_said(optimizer, width, named):
    with pytest.warns(UserWarning, match=named):
        make(optimizer, width).fit(PICTURES, batch_size=6, epochs=2, verbose=0)


def test_the_default_fits_every_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(None).fit(PICTURES, batch_size=6, epochs=2, verbose=0)


def test_decay_steps_are_a_number_or_the_run():
    with pytest.raises(ValueError, match='decay_steps must be an int, "run" or None'):
        training.adamw(decay_steps="end")


# The line -----------------------------------------------------------------------------------------


def test_elsewhere_an_epoch_is_a_line(capsys):
    make().fit(PICTURES, batch_size=6, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2  step 4/4  loss ")
    names = [part.split()[0] for part in lines[0].split("  ")]
    assert names[:5] == ["epoch", "step", "loss", "lr", "grad"]
    assert "images/s" in lines[0]
    assert "left" in lines[0]
    assert "left" not in lines[1]
    assert "skipped" not in lines[1]


def test_skipped_steps_and_validation_are_shown(capsys):
    model = make()
    line = ProgressLine(model)
    line.set_params({"epochs": 1, "steps": 2})
    line.on_train_begin()
    line.on_epoch_begin(0)
    line.on_train_batch_end(0, {"loss": 1.0})
    line.on_epoch_end(0, {"loss": 1.0, "skipped_steps": 3.0, "val_loss": 0.5})
    said = capsys.readouterr().out
    assert "3 steps skipped" in said
    assert "val_loss 0.5" in said


def test_a_rate_that_a_callback_lowers_is_shown(capsys):
    model = make(dict(learning_rate=0.5, warmup_steps=0))
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 10)
    model.fit(PICTURES, batch_size=6, epochs=2, callbacks=[lower])
    lines = capsys.readouterr().out.splitlines()
    assert "lr 5.0e-02" in lines[0]
    assert "lr 5.0e-03" in lines[1]


def test_long_runs_are_estimated_after_the_first_steps():
    model, said = make(), io.StringIO()
    line = ProgressLine(model, said)
    line.set_params({"epochs": 100_000, "steps": 1000})
    line.on_train_begin()
    line.on_epoch_begin(0)
    for k in range(progress_line.FIRST_ESTIMATE + 1):
        line._started = line._started and line._started - 1.0  # a second each
        line.on_train_batch_end(k)
    assert "steps per second, about " in said.getvalue()
    assert " h " in said.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(40, "40 s"), (700, "12 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds, words):
    assert progress_line.duration(seconds) == words


# Ctrl-C -------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, capsys):
    class CtrlC(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    keeping = training.Checkpoint(tmp_path, 100)
    with pytest.raises(KeyboardInterrupt):
        make().fit(ShuffledDataset(PICTURES, 6), callbacks=[CtrlC(), keeping], verbose=0)
    (step,) = steps_in(tmp_path)
    said = capsys.readouterr().out
    assert f"Interrupted at step {step}, which is saved in {tmp_path}. Run the same" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert int(ops.convert_to_numpy(training.load_checkpoint(tmp_path).step)) == step
