"""Shared by all tests: the backend's banner, independence of tests, compiled programs kept."""

import gc
import json
import os
from pathlib import Path

# Before JAX is imported. Many tests compile equal programs: this takes a third of the time off, and
# more when the tests run again.
ROOT = Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# The same programs, translated with less care: another third of the time off on JAX.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras  # noqa: E402
import pytest  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"

if keras.config.backend() == "tensorflow":
    # Only the youngest garbage is collected: walking through all that TensorFlow has traced, and
    # freeing its graphs one by one, take minutes. The gigabytes go with the process.
    gc.set_threshold(100_000, 1_000_000, 1_000_000)


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
def golden_cases():
    return json.loads((GOLDEN / "cases.json").read_text())
