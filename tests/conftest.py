"""Shared by all tests: the backend's banner, independence of tests, compiled programs kept."""

import contextlib
import gc
import importlib.metadata
import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = os.environ.get("KERAS_BACKEND", "tensorflow")

# Before the backend is imported. Many tests compile equal programs: JAX keeps them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests compile more than they compute. These flags make a tiny training step compile in 2 seconds
# instead of 10 on JAX 0.10. XLA ends the process for a flag that it does not know, so the last one
# is for versions in which it was seen to work: JAX 0.12 and TensorFlow 2.19 do not know it.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
KNOWN_TO = {"jax": ["0.7", "0.8", "0.9", "0.10"], "tensorflow": ["2.21"]}


def xla_flags(backend):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # such as tensorflow-cpu
        major, minor, *_ = importlib.metadata.version(backend).split(".")
        if f"{major}.{minor}" in KNOWN_TO.get(backend, []):
            return f"{FLAGS} --xla_cpu_use_fusion_emitters=false"
    return FLAGS


OWN_FLAGS = "XLA_FLAGS" in os.environ
os.environ.setdefault("XLA_FLAGS", xla_flags(NAME))
# `make test` runs two processes on two cores: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import keras  # noqa: E402
import pytest  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"

if keras.config.backend() == "tensorflow":
    # Only the youngest garbage is collected: walking through all that TensorFlow has traced, and
    # freeing its graphs one by one, take minutes. The gigabytes go with the process.
    gc.set_threshold(100_000, 1_000_000, 1_000_000)
    # Grappler rewrites each traced graph, a sixth of the time of tracing it; XLA optimizes anyway.
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def pytest_report_header():
    return f"keras {keras.__version__}, backend {keras.config.backend()}"


@pytest.fixture(autouse=True)
def _independent():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)
    if keras.config.backend() == "tensorflow":
        _forget_programs()


@pytest.fixture(autouse=True)
def _eager(request):
    """Tests marked `eager`, and not `compiled` too, run op by op on TensorFlow.

    Tracing and XLA take seconds a program there, tests of numbers milliseconds. That a program
    computes what its operations do has tests of its own.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    if keras.config.backend() != "tensorflow" or marks & {"eager", "compiled"} != {"eager"}:
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def _forget_programs():
    """TensorFlow keeps a gradient of each program it has traced for ever, and so the program:
    gigabytes in the end, through which Python's garbage collector walks again and again.
    """
    from tensorflow.python.framework import ops

    gradients = ops.gradient_registry._registry
    for name in [name for name in gradients if name.startswith("CustomGradient-")]:
        del gradients[name]


@pytest.fixture(scope="session")
def alone_on():
    """Gives the environment of a child process that sees one backend and no other."""
    paths = [str(ROOT), str(ROOT / "tests" / "alone"), os.environ.get("PYTHONPATH", "")]

    def environment(backend):
        flags = os.environ["XLA_FLAGS"] if OWN_FLAGS else xla_flags(backend)
        own = {"KERAS_BACKEND": backend, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)}
        return {**os.environ, **own}

    return environment


@pytest.fixture(scope="session")
def alone(alone_on):
    return alone_on(NAME)


@pytest.fixture(scope="session")
def golden_cases():
    return json.loads((GOLDEN / "cases.json").read_text())
