"""A run that stops anywhere goes on as if it had not, and says what it cannot go on with."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from states import assert_same, state

from keras_uvit import DiffusionModel, UViT, training
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.training import checkpoints
from keras_uvit.training.callbacks import Checkpoint
from keras_uvit.training.checkpoints import CheckpointError, steps_in

BACKEND = keras.config.backend()
ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
PICTURES = {
    "image": RNG.integers(0, 256, (20, 4, 4, 1)).astype("uint8"),
    "label": np.arange(20) % 3,
}
EPOCHS, STEPS, BATCH = 3, 3, 6


def make(seed=0, dtype=None, optimizer=None, **arguments):
    keras.utils.set_random_seed(seed)
    network = UViT((4, 4, 1), 2, 16, num_layers=1, num_heads=2, num_classes=3, dtype=dtype)
    model = DiffusionModel(network, optimizer=dict(learning_rate=1e-2, warmup_steps=2), **arguments)
    # XLA on TensorFlow would compile for longer than all the steps here.
    model.compile(optimizer, jit_compile=BACKEND == "jax")
    return model


class Killed(BaseException):
    """As a signal: nothing may catch it."""


class Kill(keras.callbacks.Callback):
    def __init__(self, epoch, batch, act=None):
        super().__init__()
        self.at, self.act = (epoch, batch), act

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            if self.act is None:
                raise Killed
            self.act()


def fit(model, folder, x=PICTURES, callbacks=(), every_steps=1, epochs=EPOCHS, **options):
    """The run that all tests here are about."""
    keeping = Checkpoint(folder, every_steps, **options.pop("keeping", {}))
    if x is PICTURES:
        options["batch_size"] = BATCH
    return model.fit(x, epochs=epochs, callbacks=[keeping, *callbacks], verbose=0, **options)


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """The model of an undisturbed run, its history and its folder."""
    model, folder = make(), tmp_path_factory.mktemp("peace")
    return model, fit(model, folder).history, folder


@pytest.fixture
def run(peace, tmp_path):
    """A copy of the folder of the finished run."""
    return shutil.copytree(peace[2], tmp_path / "run")


# Exact --------------------------------------------------------------------------------------------


# What each backend does itself is to restore its state. Where in a run that happens is decided by
# Python and NumPy, so one of the cases is for each backend: it compiles a program for every run.
once = pytest.mark.once
EVERYWHERE = [
    pytest.param(at, marks=[] if at == (1, 1) else once)
    for at in itertools.product(range(EPOCHS), range(STEPS))
]
KILLS = {"between": Kill(1, 0), "within": Kill(2, 2)}


@pytest.mark.parametrize("at", EVERYWHERE)
def test_killed_before_any_step_it_ends_the_same(tmp_path, peace, at):
    with pytest.raises(Killed):
        fit(make(), tmp_path, callbacks=[Kill(*at)])
    saved = steps_in(tmp_path)  # if there is nothing, it begins anew
    assert bool(saved) == (at > (0, 0))
    model = make(seed=at[0] + 1 if saved else 0)
    history = fit(model, tmp_path).history
    assert_same(state(model), state(peace[0]))
    for key, values in peace[1].items():  # the means of the epoch that was interrupted too
        assert history[key] == values[at[0] :]


@pytest.mark.once
def test_checkpoints_lie_on_multiples_of_every_steps(tmp_path):
    fit(make(), tmp_path, every_steps=4, keeping={"keep": 9})
    assert steps_in(tmp_path) == [9, 8, 4]


def pictures():
    return ShuffledDataset(PICTURES, BATCH, seed=1)


class Fixed(keras.utils.PyDataset):
    """A data set of a user's, in one order."""

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return {key: value[rows] for key, value in PICTURES.items()}


def stream():
    generator = np.random.default_rng(1)
    while True:
        rows = generator.permutation(20)[:BATCH]
        yield {key: value[rows] for key, value in PICTURES.items()}


def tensorflow_dataset():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(PICTURES).batch(BATCH, drop_remainder=True)


def grain_dataset():
    grain = pytest.importorskip("grain")
    items = [{key: value[k] for key, value in PICTURES.items()} for k in range(20)]
    return grain.MapDataset.source(items).seed(3).shuffle().batch(BATCH, drop_remainder=True)


@pytest.mark.parametrize(
    ("data", "options", "kill"),
    [
        pytest.param(pictures, {}, "between", id="own, between", marks=once),
        pytest.param(pictures, {}, "within", id="own", marks=once),
        # Epochs that are not the data's.
        pytest.param(pictures, {"steps_per_epoch": 4}, "within", id="own, short", marks=once),
        pytest.param(pictures, {"steps_per_epoch": 5}, "within", id="own, long", marks=once),
        pytest.param(Fixed, {}, "within", id="user's", marks=once),
        pytest.param(stream, {"steps_per_epoch": 4}, "within", id="generator", marks=once),
        pytest.param(grain_dataset, {}, "within", id="grain", marks=once),
        pytest.param(tensorflow_dataset, {}, "within", id="tf", marks=once),
        pytest.param(
            lambda: tensorflow_dataset().repeat(),
            {"steps_per_epoch": 4},
            "within",
            id="tf, endless",
            marks=once,
        ),
    ],
)
def test_every_source_goes_on_at_its_place(tmp_path, data, options, kill):
    undisturbed = make()
    losses = fit(undisturbed, tmp_path / "a", data(), **options).history["loss"]
    with pytest.raises(Killed):
        fit(make(), tmp_path / "b", data(), [KILLS[kill]], **options)
    model = make(seed=1)
    assert (
        fit(model, tmp_path / "b", data(), **options).history["loss"] == losses[KILLS[kill].at[0] :]
    )
    assert_same(state(model), state(undisturbed))


@pytest.mark.once
def test_the_loss_scale_is_part_of_it(tmp_path):
    undisturbed = make(dtype="mixed_float16")
    undisturbed.optimizer.dynamic_scale.assign(1024.0)
    fit(undisturbed, tmp_path / "a")
    interrupted = make(dtype="mixed_float16")
    interrupted.optimizer.dynamic_scale.assign(1024.0)
    with pytest.raises(Killed):
        fit(interrupted, tmp_path / "b", callbacks=[Kill(1, 1)])
    model = make(seed=1, dtype="mixed_float16")
    fit(model, tmp_path / "b")
    assert float(ops.convert_to_numpy(model.optimizer.dynamic_scale)) == 1024.0
    assert_same(state(model), state(undisturbed))


@pytest.mark.once
def test_a_learning_rate_that_a_callback_lowered_stays(tmp_path):
    fit(make(optimizer=keras.optimizers.SGD(0.5)), tmp_path, epochs=1)
    lowered = make(optimizer=keras.optimizers.SGD(0.5))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 10)
    fit(lowered, tmp_path, epochs=2, callbacks=[schedule])
    model = make(optimizer=keras.optimizers.SGD(0.5))
    fit(model, tmp_path, epochs=2)
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == np.float32(0.05)


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_begin(self, logs=None):
        self.calls.append("train")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append((epoch, self.params["epochs"], self.params["steps"]))

    def on_train_end(self, logs=None):
        self.calls.append("end")


@pytest.mark.once
def test_callbacks_see_one_run(tmp_path):
    with pytest.raises(Killed):
        fit(make(), tmp_path, callbacks=[Kill(1, 1)])
    seen = Seen()
    model = make()
    history = fit(model, tmp_path, callbacks=[seen])
    assert seen.calls == ["train", (1, 3, 2), (2, 3, 3), "end"]  # of epoch 1 two are left
    assert history is model.history
    assert history.epoch == [1, 2]


def test_a_finished_run_trains_nothing(run, peace):
    seen = Seen()
    model = make(seed=1)
    history = fit(model, run, callbacks=[seen])
    assert (history.history, history.epoch) == ({}, [])
    assert seen.calls == []
    assert_same(state(model), state(peace[0]))


@pytest.mark.once
def test_a_model_that_stops_by_itself_does_not_go_on(tmp_path):
    with pytest.raises(Killed):
        fit(make(), tmp_path, callbacks=[Kill(0, 1)])
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    model = make()
    assert fit(model, tmp_path, callbacks=[stop]).epoch == [0]
    assert steps_in(tmp_path)[0] == STEPS


@pytest.mark.once
def test_what_a_callback_stops_within_an_epoch_goes_on_there(tmp_path, peace):
    model = make()
    stop = Kill(1, 1, lambda: setattr(model, "stop_training", True))
    fit(model, tmp_path, callbacks=[stop], every_steps=100)
    record = checkpoints.read_record(checkpoints.newest(tmp_path))
    assert (record["epoch"], record["batch"], record["step"]) == (1, 2, 5)
    model = make(seed=1)
    fit(model, tmp_path)
    assert_same(state(model), state(peace[0]))


# Killed for real ----------------------------------------------------------------------------------


@pytest.mark.once
def test_a_killed_process_loses_and_repeats_nothing(alone):
    """`benchmarks/faults.py` in short: SIGKILL at a random moment, and inside a save."""
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", "--kills", "2", "--epochs", "6"]
    result = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert (row["curve"], row["state"], row["kills"]) == ("equal", "equal", 2)


@pytest.mark.once
def test_sigterm_saves_after_the_step_and_exits_with_0(tmp_path, peace, capsys):
    before = signal.getsignal(signal.SIGTERM)
    kill = Kill(1, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        fit(make(), tmp_path, callbacks=[kill], every_steps=100)
    assert stopped.value.code == 0
    # The signal came before step 5 of the run, when the checkpoint had seen that it begins.
    assert steps_in(tmp_path) == [5]
    assert "Asked to stop: step 5 is saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    model = make(seed=1)
    fit(model, tmp_path)
    assert_same(state(model), state(peace[0]))


# Files --------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "pieces-0000.h5"),
    "a cut file": lambda folder: os.truncate(folder / "pieces-0000.h5", 100),
    "a missing file": lambda folder: (folder / "pieces-0000.h5").unlink(),
    "a flipped bit in the record": lambda folder: flip(folder / "checkpoint.json"),
    "an empty record": lambda folder: (folder / "checkpoint.json").write_text(""),
    "another step in the record": lambda folder: (folder / "checkpoint.json").write_text(
        (folder / "checkpoint.json").read_text().replace('"step": 9', '"step": 8')
    ),
    "no record": lambda folder: (folder / "checkpoint.json").unlink(),
}


@pytest.mark.once
@pytest.mark.parametrize("how", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_is_used(run, peace, how):
    DAMAGE[how](run / "step-00000009")
    model = make(seed=1)
    with pytest.warns(UserWarning, match="checkpoint of step 9 .* damaged .*the one before"):
        fit(model, run)
    assert (run / "damaged-step-00000009").is_dir()
    assert_same(state(model), state(peace[0]))  # step 9 was made again, from step 8
    assert steps_in(run)[0] == 9


class Windows:
    """`os` as it is there: no folder is opened, and what is synchronized must be writable."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        if Path(path).is_dir() or not flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, flags)


@pytest.mark.once
def test_checkpoints_are_written_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "os", Windows())
    fit(make(), tmp_path, epochs=1)
    assert steps_in(tmp_path)[0] == STEPS


@pytest.mark.once
def test_what_a_killed_save_left_is_no_checkpoint(run, peace):
    (run / "step-00000009").rename(run / "tmp-step-00000009")
    model = make(seed=1)
    fit(model, run)
    assert_same(state(model), state(peace[0]))
    assert not list(run.glob("tmp-*"))


def test_a_record_names_all_variables_and_no_code(peace):
    record = json.loads((peace[2] / "step-00000009" / "checkpoint.json").read_text())
    assert record["step"] == 9
    assert (record["epoch"], record["batch"], record["batch_size"]) == (3, 0, BATCH)
    assert len(record["variables"]) == len(checkpoints._variables(peace[0]))
    with h5py.File(peace[2] / "step-00000009" / "pieces-0000.h5") as file:
        assert len(file) == len(record["variables"])


@pytest.mark.once
def test_the_newest_are_kept(tmp_path):
    fit(make(), tmp_path, keeping={"keep": 2})
    assert steps_in(tmp_path) == [9, 8]


@pytest.mark.once
def test_the_best_is_kept_too(tmp_path):
    losses = iter([0.2, 0.1, 0.3])

    class Score(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["score"] = next(losses)

    fit(make(), tmp_path, callbacks=[Score()], every_steps=1, keeping={"keep": 1, "best": "score"})
    assert steps_in(tmp_path) == [9, 6]


@pytest.mark.once
def test_a_best_that_is_not_in_the_log_is_named(tmp_path):
    with pytest.raises(ValueError, match="best='fid' is not in the log.*'loss'"):
        fit(make(), tmp_path, keeping={"best": "fid"})


def test_a_disk_that_is_too_small_is_named_before_training(tmp_path, monkeypatch):
    small = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(OSError, match="Nothing was trained. Make room"):
        fit(make(), tmp_path)


@pytest.mark.once
def test_a_disk_that_fills_up_leaves_the_older_ones(tmp_path, monkeypatch):
    made = iter(range(100))
    real = checkpoints._write_pieces

    def write(path, variables):
        if next(made) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(path, variables)

    monkeypatch.setattr(checkpoints, "_write_pieces", write)
    with pytest.raises(OSError, match="step 5 could not be written .*No space left.*are complete"):
        fit(make(), tmp_path)
    assert steps_in(tmp_path) == [4, 3, 2]
    assert not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 5)])
def test_pieces_are_put_together_for_any_other_division(tmp_path, shape):
    whole = RNG.standard_normal(shape)
    cuts = [[0, *sorted(RNG.choice(range(1, n), 2, replace=False)), n] for n in shape]
    spans = [[slice(a, b) for a, b in itertools.pairwise(cut)] for cut in cuts]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        for k, part in enumerate(itertools.product(*spans)):
            piece = file.create_dataset(f"0/{k}", data=whole[part])
            piece.attrs["start"] = [s.start for s in part]
        parts = list(file["0"].values())
        for index in ([slice(None)] * len(shape), [slice(1, 3)] * len(shape)):
            part = tuple(index)
            np.testing.assert_array_equal(checkpoints._read(parts, part, shape), whole[part])


# What is refused ----------------------------------------------------------------------------------


def test_resume_may_be_demanded_and_forbidden(tmp_path, run):
    with pytest.raises(ValueError, match="no checkpoint in"):
        fit(make(), tmp_path / "empty", resume=True)
    with pytest.raises(ValueError, match="holds a run up to step-00000009.*another folder"):
        fit(make(), run, resume=False)
    with pytest.raises(ValueError, match="resume must be one of"):
        fit(make(), run, resume="yes")


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (dict(prediction="v"), {}, "differs in .'prediction'"),
        (dict(optimizer=keras.optimizers.SGD(0.1)), {}, "different optimizer.*AdamW.*SGD"),
        (dict(optimizer=training.adamw(1e-3)), {}, "different optimizer.*learning_rate"),
        ({}, dict(x=ShuffledDataset(PICTURES, 4)), "steps_per_epoch=3, now it is 5"),
        ({}, dict(x=ShuffledDataset(PICTURES, 5)), "steps_per_epoch=3, now it is 4"),
    ],
    ids=["model", "optimizer", "its schedule", "batch size", "number of batches"],
)
def test_another_run_is_refused(run, change, options, named):
    with pytest.raises(CheckpointError, match=named):
        fit(make(**change), run, **options)
    assert steps_in(run)[0] == 9


def tuned(learning_rate=1e-2, spare=(), **settings):
    """A constant learning rate, which is a variable; the rest are attributes."""
    optimizer = training.optimizers.AdamW(learning_rate, **settings)
    optimizer.exclude_from_weight_decay(var_names=spare)
    return optimizer


@pytest.mark.once
@pytest.mark.parametrize(
    "change",
    [
        dict(learning_rate=1e-3),
        dict(weight_decay=0.1),
        dict(beta_1=0.5),
        dict(epsilon=1e-3),
        dict(clipnorm=1.0),
        dict(gradient_accumulation_steps=2),
        dict(spare=["bias"]),
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("dtype", [None, "mixed_float16"])
def test_every_changed_setting_of_the_optimizer_is_refused(tmp_path, change, dtype):
    fit(make(optimizer=tuned(), dtype=dtype), tmp_path, epochs=1)
    name = "without_decay" if "spare" in change else next(iter(change))
    with pytest.raises(CheckpointError, match=f"(?s)optimizer.*'{name}'.*load_checkpoint"):
        fit(make(optimizer=tuned(**change), dtype=dtype), tmp_path, epochs=2)
    fit(make(optimizer=tuned(), dtype=dtype), tmp_path, epochs=2)


@pytest.mark.once
def test_the_learning_rate_is_compared_with_that_of_the_begin_or_the_last(tmp_path):
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model = make(optimizer=tuned())
    fit(model, tmp_path, epochs=1, callbacks=[lower])
    fit(model, tmp_path, epochs=2, callbacks=[lower])  # as the callback has left it
    fit(make(optimizer=tuned()), tmp_path, epochs=3, callbacks=[lower])  # as it began
    with pytest.raises(CheckpointError, match="'learning_rate'"):
        fit(make(optimizer=tuned(5e-3)), tmp_path, epochs=4)


@pytest.mark.once
def test_another_encoder_is_refused(tmp_path):
    network = UViT((4, 4, 8), 2, 16, num_layers=1, num_heads=2)
    models = [DiffusionModel(network, latent_scale=1.0, latent_encoder=e) for e in "ab"]
    latents = {"latent": RNG.standard_normal((6, 4, 4, 8)).astype("float32")}
    for model in models:
        model.compile()
    options = dict(batch_size=3, verbose=0, callbacks=[Checkpoint(tmp_path)])
    models[0].fit(latents, **options)
    with pytest.raises(CheckpointError, match="differs in .'latent_encoder'"):
        models[1].fit(latents, **options)


@pytest.mark.once
def test_a_model_that_has_learned_more_is_not_overwritten(run, tmp_path):
    model = make()
    fit(model, tmp_path / "longer", epochs=4)
    with pytest.raises(CheckpointError, match="at step 12, but .* at 9.*lose"):
        fit(model, run)


@pytest.mark.parametrize("options", [dict(every_steps=0), dict(keep=0), dict(every_steps=1.5)])
def test_arguments_are_checked(tmp_path, options):
    with pytest.raises(ValueError, match="must be an int >= 1"):
        Checkpoint(tmp_path, **options)


def test_two_are_refused(tmp_path):
    two = [Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")]
    with pytest.raises(ValueError, match="one Checkpoint"):
        make().fit(PICTURES, callbacks=two, verbose=0)


def test_data_without_a_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must have a length, or fit steps_per_epoch"):
        fit(make(), tmp_path, stream())


def test_arrays_in_their_own_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave shuffle=False out"):
        fit(make(), tmp_path, shuffle=False)


# To sample ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model(peace):
    for path in (peace[2], peace[2] / "step-00000009"):
        model = training.load_checkpoint(path)
        assert_same(state(model), state(peace[0]))
        drawn = [m.generate(labels=[1], num_steps=2, verbose=0) for m in (model, peace[0])]
        np.testing.assert_array_equal(*drawn)


def test_no_checkpoint_and_a_damaged_one_are_named(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="No checkpoint in"):
        training.load_checkpoint(tmp_path / "nothing")
    flip(run / "step-00000009" / "pieces-0000.h5")
    with pytest.raises(CheckpointError, match="step-00000009 is damaged: pieces-0000.h5"):
        training.load_checkpoint(run / "step-00000009")
