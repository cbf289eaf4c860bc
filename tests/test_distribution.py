"""One line takes a script to many devices: the same numbers, on every backend."""

import functools
import json
import re
import shutil
import socket
import subprocess
import sys

import job
import keras
import numpy as np
import pytest
from tiny import IMAGES, diffusion_model, refused, uvit

from keras_uvit import DiffusionModel, backend, distribution
from keras_uvit.training import batches, checkpoints

NAME = keras.config.backend()
# Keras 3.10 refuses jobs of several JAX processes.
OLD = NAME == "jax" and not hasattr(keras.distribution.DataParallel, "auto_shard_dataset")
# Sums over 16 samples in another order: float32 rounds by 6e-8 an addition, eight steps follow.
CLOSE = dict(rtol=1e-5)
# What a backend has: on JAX many devices in a process, and processes that divide the weights or
# have them whole; on TensorFlow the first, on PyTorch the last. A job makes several runs: a process
# takes longer to start than to run.
DRAW, STOP = dict(draw=True), dict(name="stopped", bad=True, epochs=100_000, stop=True)
# A loss scale takes another way on TensorFlow, where the skipped update is the optimizer's own. In
# float32 one device takes the same way there, which is tested below in this process.
BAD = dict(bad=True, epochs=1, dtype="mixed_float16" if NAME == "tensorflow" else "float32")
JOBS = {
    "many": ("many", [dict(DRAW, name="many"), dict(BAD, name="bad")]),
    "divided": ("processes", [dict(DRAW, name="divided", layout="fsdp"), STOP]),
    "processes": ("processes", [dict(DRAW, name="processes")]),
}
# What the first of eight devices holds of some kernels.
PARTS = {
    "uvit fsdp": {"attention_qkv": [48, 18], "attention_proj": [6, 48], "mlp_in": [48, 24]},
    "uvit tensor": {"attention_qkv": [48, 36], "attention_proj": [12, 48], "mlp_in": [48, 48]},
    "unet tensor": {
        "attention_query": [32, 8], "conv_1": [3, 3, 32, 8], "conv_2": [3, 3, 8, 32],
    },
    "lora tensor": {"attention_qkv_lora_b": [2, 36], "attention_proj_lora_a": [12, 2]},
}  # fmt: skip
if NAME == "jax" and not OLD:
    JOBS["many"][1].append(dict(name="moved"))
if NAME == "jax":
    JOBS["many"][1].extend(
        dict(name=name, network=name.split()[0], layout=name.split()[1], epochs=1)
        for name in ("uvit one", "unet one", "lora one", *PARTS)
    )
if NAME == "torch":
    JOBS["processes"][1].append(STOP)
WAYS = {"jax": [*JOBS], "tensorflow": ["many"], "torch": ["processes"]}[NAME]
WAYS = WAYS[:1] if OLD else WAYS


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def commands(folder, devices, runs):
    """Of the processes of a job; torchrun's alone, which starts the others."""
    script, runs = [job.__file__, str(folder), "--devices", devices], [*map(json.dumps, runs)]
    if devices == "many":
        return [[sys.executable, *script, *runs]]
    if NAME == "torch":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port()}"]
        return [[sys.executable, *torchrun, *script, *runs]]
    address = f"localhost:{port()}"
    own = [["--address", address, "--index", str(k)] for k in range(2)]
    return [[sys.executable, *script, *part, *runs] for part in own]


def run(folder, way, environment):
    """What each process reports of each run of a job, process 0 first."""
    devices, runs = JOBS[way]
    if NAME == "torch":
        runs = [dict(run, address=f"localhost:{port()}") if run is STOP else run for run in runs]
    flags = "--xla_force_host_platform_device_count=8" if devices == "many" else ""
    environment = {**environment, "XLA_FLAGS": f"{environment['XLA_FLAGS']} {flags}"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    jobs = [subprocess.Popen(command, **pipes) for command in commands(folder, devices, runs)]
    said = [each.communicate(timeout=400)[0] for each in jobs]
    for each, text in zip(jobs, said):
        assert each.returncode == 0, text[-3000:]
    return {
        run["name"]: [
            json.loads(file.read_text())
            for file in sorted((folder / run["name"]).glob("report-*.json"))
        ]
        for run in runs
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def one(work):
    """The run on one device, in this process."""
    return job.perform(work, dict(DRAW, name="one"))


@pytest.fixture(scope="module")
def run_on(work, one, alone):
    @functools.cache
    def run_on(way):
        if way == "many" and "divided" in WAYS:
            run_on("divided")
            begin_at_the_middle(work, "divided")
        return run(work, way, alone)

    return run_on


def begin_at_the_middle(work, begun):
    middle = "checkpoints/step-00000006"
    shutil.copytree(work / begun / middle, work / "moved" / middle)


# On JAX two processes with whole weights are for `make test-all`.
@pytest.fixture(
    params=[
        pytest.param(way, marks=pytest.mark.once) if k == 2 else way for k, way in enumerate(WAYS)
    ]
)
def many(request, run_on):
    return run_on(request.param)[request.param]


def assert_as_one(report, one):
    for key in ("losses", "each", "weights"):
        np.testing.assert_allclose(report[key], one[key][-len(report[key]) :], **CLOSE)


def test_many_devices_compute_and_draw_what_one_does(many, one):
    """In a process of eight devices on JAX, of two on TensorFlow, and in two processes."""
    together = NAME == "torch" or (NAME == "jax" and len(many) == 2)
    assert len(many) == 1 + together
    for report in many:
        assert report["replicas"] == (8 if NAME == "jax" and not together else 2)
        assert_as_one(report, one)
        # A pixel on the edge of rounding may fall to the other side.
        np.testing.assert_allclose(report["images"], one["images"], atol=2)
        assert (report["encoded"], report["alone"]) == (64, True)  # shared, and themselves
        for key in ("weights", "images"):
            assert report[key] == many[0][key]  # identical, not only close
    talk = [[line for line in each["said"] if line.startswith("Epoch")] for each in many]
    assert talk == [["Epoch 1/2", "Epoch 2/2"], []][: len(many)]  # process 0 alone


def test_a_run_goes_on_with_another_number_of_devices(work, run_on, one):
    reports = run_on(WAYS[0])
    if "moved" not in reports:
        begin_at_the_middle(work, WAYS[0])
        reports = {"moved": [job.perform(work, dict(name="moved"))]}
    (report,) = reports["moved"]
    assert (len(report["losses"]), len(report["each"])) == (1, 2)
    assert_as_one(report, one)


@pytest.mark.skipif("divided" not in WAYS, reason="weights are divided on JAX, Keras 3.11")
def test_divided_weights_are_saved_in_pieces_and_as_a_whole(work, run_on, one):
    run_on("divided")
    pieces = sorted(file.name for file in work.glob("divided/checkpoints/step-00000008/*.h5"))
    assert pieces == ["pieces-0000.h5", "pieces-0001.h5"]
    saved = keras.saving.load_model(work / "divided" / "model.keras").ema_network.get_weights()
    sums = [float(np.abs(w.astype("float64")).sum()) for w in saved]
    np.testing.assert_allclose(sums, one["weights"], **CLOSE)


@pytest.mark.skipif(NAME != "jax", reason="weights are divided on JAX")
@pytest.mark.parametrize("name", PARTS)
def test_eight_devices_that_divide_the_weights_train_as_one_does(run_on, name):
    network, _ = name.split()
    (one,), (many,) = (run_on("many")[key] for key in (f"{network} one", name))
    assert len(one["each"]) == 4
    assert one["each"][0] != one["each"][-1]  # it trains
    np.testing.assert_allclose(many["each"], one["each"], **CLOSE)
    np.testing.assert_allclose(sum(many["weights"]), sum(one["weights"]), **CLOSE)
    middle = "mid_0" if network == "unet" else "mid_block"
    for kernel, part in PARTS[name].items():
        path = f"{middle}_{kernel}" + ("" if network == "lora" else "_kernel")
        for kind in (f"weight {path}", f"average {path}", f"{path}_momentum"):
            (found,) = [shape for key, shape in many["parts"].items() if key.endswith(kind)]
            assert found == part, kind


def assert_one_step_was_skipped(reports):
    for report in reports:
        assert report["skipped"] == 1
        assert np.isfinite(report["weights"]).all()
        assert report["weights"] == reports[0]["weights"]


@pytest.mark.skipif("many" not in WAYS, reason="tested with processes below")
def test_a_step_that_is_not_finite_on_one_replica_is_skipped_on_all(run_on):
    assert_one_step_was_skipped(run_on("many")["bad"])


@pytest.mark.skipif(WAYS == ["many"], reason="one process is tested with checkpoints")
def test_when_one_process_is_asked_to_stop_all_save_and_stop(work, run_on):
    """So do those that have skipped a step, which was not finite on one of them."""
    reports = run_on(WAYS[-1] if NAME == "torch" else "divided")["stopped"]
    assert len(reports) == 2
    (said,) = [
        line for report in reports for line in report["said"] if line.startswith("Asked to stop")
    ]
    folder = work / "stopped" / "checkpoints"
    saved = folder / checkpoints.name(int(re.search(r"step (\d+)", said)[1]))
    assert saved == checkpoints.newest(folder)
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
    monkeypatch.setattr(backend, "replicas", lambda: 4)
    model = DiffusionModel(uvit())
    if named is None:
        batches.check_source(model, data, None, batch_size)
        return
    with pytest.raises(ValueError, match=named):
        batches.check_source(model, data, None, batch_size)


def initialize():
    distribution.initialize("localhost:1", 2, 0)


@pytest.mark.parametrize(
    ("where", "error", "call", "words"),
    [
        (NAME == "tensorflow", NotImplementedError, initialize, "JAX or PyTorch"),
        (NAME == "torch", ValueError, lambda: distribution.data_parallel(["cuda:0", "cuda:1"]),
         "torchrun --nproc-per-node"),
        (NAME != "jax", RuntimeError, distribution.model_parallel, "needs the JAX backend"),
        (OLD, RuntimeError, initialize, "Keras 3.11 or later"),
    ],
)  # fmt: skip
def test_what_a_backend_has_not_is_refused_with_what_it_has(where, error, call, words):
    if not where:
        pytest.skip("another backend's")
    refused(error, call, words)


@pytest.mark.skipif(NAME != "tensorflow", reason="its strategy may be of one device")
def test_one_device_is_a_distribution_too(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(batches, "check_batch", lambda *_: None)  # lets the bad label through
    pictures = {"image": IMAGES[:8], "label": np.array([0] * 4 + [3] * 4)}
    distribution.data_parallel(["CPU:0"])
    try:
        model = diffusion_model(compiled=False)
        model.compile(jit_compile=False)
        model.fit(pictures, batch_size=4, shuffle=False, verbose=0)
    finally:
        tf.distribute.experimental_set_strategy(None)
    numbers = [model.step, model.skipped_steps, model.optimizer.iterations]
    assert [int(keras.ops.convert_to_numpy(number)) for number in numbers] == [2, 1, 1]
    assert all(np.isfinite(weight).all() for weight in model.network.get_weights())


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
