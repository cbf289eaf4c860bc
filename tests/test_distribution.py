"""One line takes a script to many devices: the same numbers, on every backend."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_uvit import backend, distribution
from keras_uvit.training import batches, checkpoints

JOB = Path(__file__).parent / "job.py"
NAME = keras.config.backend()
# Sums over 16 samples in another order: float32 rounds by 6e-8 an addition, eight steps follow.
CLOSE = dict(rtol=1e-5)


def command(folder, devices, *more):
    return [str(JOB), str(folder), "--devices", devices, *more]


def environment(devices):
    flags = "--xla_force_host_platform_device_count=8" if devices == "many" else ""
    many = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
    paths = [str(JOB.parents[1]), str(JOB.with_name("alone")), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **many, "PYTHONPATH": os.pathsep.join(paths), "KERAS_BACKEND": NAME}


def start(folder, devices, *more, torchrun=NAME == "torch"):
    """The processes of a job; torchrun's own, where it starts the others."""
    folder.mkdir(parents=True, exist_ok=True)
    if devices == "processes" and torchrun:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        commands = [[*torchrun, f"--master-port={port()}", *command(folder, devices, *more)]]
    elif devices == "processes":
        address = f"localhost:{port()}"
        own = [["--address", address, "--index", str(k)] for k in range(2)]
        commands = [[sys.executable, *command(folder, devices, *more, *part)] for part in own]
    else:
        commands = [[sys.executable, *command(folder, devices, *more)]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen(c, env=environment(devices), **pipes) for c in commands]


def said_by(jobs):
    """The lines of all processes, which must succeed."""
    said = [job.communicate(timeout=400) for job in jobs]
    for job, (_, errors) in zip(jobs, said):
        assert job.returncode == 0, errors[-3000:]
    return [line for out, _ in said for line in out.splitlines()]


def run(folder, devices, *more):
    """What each process of a job reports, process 0 first, and what Keras printed."""
    for old in folder.glob("report-*.json"):
        old.unlink()
    lines = said_by(start(folder, devices, *more))
    return reports_in(folder), [line for line in lines if line.startswith("Epoch")]


def reports_in(folder):
    return [json.loads(file.read_text()) for file in sorted(folder.glob("report-*.json"))]


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# How this backend uses many devices. Keras 3.10 refuses jobs of several JAX processes.
OLD = NAME == "jax" and not hasattr(keras.distribution.DataParallel, "auto_shard_dataset")
WAYS = {"jax": ["many", "processes"], "tensorflow": ["many"], "torch": ["processes"]}[NAME]
WAYS = WAYS[:1] if OLD else WAYS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def one(work):
    return run(work / "one", "one", "--draw")[0][0]


@pytest.fixture(scope="module")
def run_on(work, one):
    """The run on many devices, one way or the other; each is made once."""
    return functools.cache(lambda devices: run(work / devices, devices, "--draw"))


@pytest.fixture(scope="module")
def divided(work, one):
    """The run of two processes that divide the weights."""
    return run(work / "fsdp", "processes", "--layout", "fsdp", "--draw")


# On JAX two processes with whole weights are for `make test-all`: those that divide them are below.
@pytest.fixture(
    scope="module",
    params=[pytest.param(w, marks=pytest.mark.once) if w != WAYS[0] else w for w in WAYS],
)
def many(request, run_on):
    return request.param, *run_on(request.param)


def assert_as_one(report, one):
    for key in ("losses", "each", "weights"):
        np.testing.assert_allclose(report[key], one[key][-len(report[key]) :], **CLOSE)


def test_many_devices_compute_what_one_does(many, one):
    devices, reports, _ = many
    assert len(reports) == (2 if devices == "processes" else 1)
    assert all(report["replicas"] == (8 if devices == "many" and NAME == "jax" else 2)
               for report in reports)  # fmt: skip
    for report in reports:
        assert_as_one(report, one)
        assert report["weights"] == reports[0]["weights"]  # identical, not only close


def test_all_draw_the_same_images(many, one):
    for report in many[1]:
        # A pixel on the edge of rounding may fall to the other side.
        np.testing.assert_allclose(report["images"], one["images"], atol=2)
        assert report["images"] == many[1][0]["images"]


def test_processes_share_the_encoding_and_stay_themselves_outside_training(many):
    assert all(report["encoded"] == 64 and report["alone"] for report in many[1])


def test_only_process_0_talks(many):
    assert [line for line in many[2] if line.startswith("Epoch")] == ["Epoch 1/2", "Epoch 2/2"]


def test_a_run_goes_on_with_another_number_of_devices(work, run_on, one, request):
    middle, folder = "checkpoints/step-00000006", work / "moved"
    if NAME == "jax" and not OLD:
        request.getfixturevalue("divided")
        begun, then = "fsdp", "many"
    else:
        run_on(WAYS[0])
        begun, then = WAYS[0], "one"
    shutil.copytree(work / begun / middle, folder / middle)
    (report,), _ = run(folder, then)
    assert (len(report["losses"]), len(report["each"])) == (1, 2)
    assert_as_one(report, one)


@pytest.mark.skipif(NAME != "jax" or OLD, reason="weights are divided on JAX, Keras 3.11")
def test_weights_divided_among_processes(work, divided, one):
    folder = work / "fsdp"
    reports, lines = divided
    assert lines == ["Epoch 1/2", "Epoch 2/2"]  # of process 0
    assert len(reports) == 2
    for report in reports:
        assert report["encoded"] == 64
        assert report["alone"]
        assert_as_one(report, one)
        np.testing.assert_allclose(report["images"], one["images"], atol=2)
    pieces = sorted(file.name for file in folder.glob("checkpoints/step-00000008/*.h5"))
    assert pieces == ["pieces-0000.h5", "pieces-0001.h5"]
    saved = keras.saving.load_model(folder / "model.keras").ema_network.get_weights()
    sums = [float(np.abs(w.astype("float64")).sum()) for w in saved]
    np.testing.assert_allclose(sums, one["weights"], **CLOSE)


def assert_one_step_was_skipped(reports):
    for report in reports:
        assert report["skipped"] == 1
        assert np.isfinite(report["weights"]).all()
        assert report["weights"] == reports[0]["weights"]


# A loss scale takes another way on TensorFlow, where the skipped update is the optimizer's own.
# In float32 one device takes the same way there, which is tested below in this process.
@pytest.mark.skipif("many" not in WAYS, reason="tested with processes below")
@pytest.mark.parametrize(
    "dtype",
    ["float32"]
    if NAME != "tensorflow"
    else [pytest.param("float32", marks=pytest.mark.once), "mixed_float16"],
)
def test_a_step_that_is_not_finite_on_one_replica_is_skipped_on_all(work, dtype):
    reports, _ = run(work / f"bad-{dtype}", "many", "--bad", "--dtype", dtype)
    assert_one_step_was_skipped(reports)


@pytest.mark.skipif("processes" not in WAYS, reason="one process is tested with checkpoints")
def test_when_one_process_is_asked_to_stop_all_save_and_stop(work):
    """So do those that have skipped a step, which was not finite on one of them."""
    folder = work / "stopped"
    jobs = start(folder, "processes", "--bad", "--epochs", "100000", torchrun=False)
    while not list(folder.glob("checkpoints/step-*")) and jobs[0].poll() is None:
        time.sleep(0.1)
    jobs[1].send_signal(signal.SIGTERM)
    (said,) = [line for line in said_by(jobs) if line.startswith("Asked to stop")]
    saved = folder / "checkpoints" / checkpoints.name(int(re.search(r"step (\d+)", said)[1]))
    assert saved == checkpoints.newest(folder / "checkpoints")
    reports = reports_in(folder)
    assert len(reports) == 2
    assert_one_step_was_skipped(reports)


# In this process ----------------------------------------------------------------------------------


def test_alone_it_is_process_0_of_1():
    assert distribution.process() == (0, 1)
    assert backend.data_shard() == (0, 1)
    assert backend.replicas() == 1


@pytest.mark.parametrize(
    ("data", "batch_size", "named"),
    [
        (np.zeros((32, 4, 4, 1), "uint8"), 10, "batch of 10 .* among 4 devices.* has 8"),
        (np.zeros((32, 4, 4, 1), "uint8"), 24, None),
        (np.zeros((30, 4, 4, 1), "uint8"), 8, "batch of 6 .* among 4 devices.* has 8"),
        ([{"image": np.zeros((6, 4, 4, 1), "uint8")}], None, "batch of 6 "),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch, data, batch_size, named):
    from keras_uvit import DiffusionModel, UViT

    monkeypatch.setattr(backend, "replicas", lambda: 4)
    model = DiffusionModel(UViT((4, 4, 1), 2, 16, num_layers=1, num_heads=2))
    if named is None:
        batches.check_source(model, data, None, batch_size)
        return
    with pytest.raises(ValueError, match=named):
        batches.check_source(model, data, None, batch_size)


@pytest.mark.skipif(NAME != "tensorflow", reason="the other backends have processes")
def test_tensorflow_says_that_it_has_no_processes():
    with pytest.raises(NotImplementedError, match="JAX or PyTorch.*data_parallel"):
        distribution.initialize("localhost:1", 2, 0)


@pytest.mark.skipif(NAME != "torch", reason="the other backends choose devices")
def test_torch_says_how_to_use_several_devices():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        distribution.data_parallel(["cuda:0", "cuda:1"])


@pytest.mark.skipif(NAME != "tensorflow", reason="its strategy may be of one device")
def test_one_device_is_a_distribution_too(monkeypatch):
    import tensorflow as tf

    from keras_uvit import DiffusionModel, UViT

    monkeypatch.setattr(batches, "check_batch", lambda *_: None)  # lets the bad label through
    pictures = {"image": np.zeros((8, 4, 4, 1), "uint8"), "label": np.array([0] * 4 + [3] * 4)}
    distribution.data_parallel(["CPU:0"])
    try:
        network = UViT((4, 4, 1), 2, 16, num_layers=1, num_heads=2, num_classes=3)
        model = DiffusionModel(network)
        model.compile(jit_compile=False)
        model.fit(pictures, batch_size=4, shuffle=False, verbose=0)
    finally:
        tf.distribute.experimental_set_strategy(None)
    numbers = [model.step, model.skipped_steps, model.optimizer.iterations]
    assert [int(keras.ops.convert_to_numpy(number)) for number in numbers] == [2, 1, 1]
    assert all(np.isfinite(weight).all() for weight in network.get_weights())


@pytest.mark.skipif(NAME != "jax", reason="asks JAX for its processes")
@pytest.mark.parametrize(
    ("replicas", "processes", "shards"), [(8, 2, [0, 1]), (2, 4, [0, 0, 1, 1]), (1, 2, [0, 0])]
)
def test_processes_that_share_a_model_copy_read_the_same_data(
    monkeypatch, replicas, processes, shards
):
    module = sys.modules["keras_uvit.backend.jax"]
    monkeypatch.setattr(module, "_distribution", object)
    monkeypatch.setattr(module, "replicas", lambda: replicas)
    for index, shard in enumerate(shards):
        monkeypatch.setattr(module, "process", lambda index=index: (index, processes))
        assert module.data_shard() == (shard, min(replicas, processes))


@pytest.mark.skipif(not OLD, reason="Keras 3.10 on JAX")
def test_keras_3_10_says_that_it_has_no_jobs_of_jax_processes():
    with pytest.raises(RuntimeError, match="Keras 3.11 or later"):
        distribution.initialize("localhost:1", 2, 0)
