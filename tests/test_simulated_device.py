"""Nothing that the package does on PyTorch needs the CPU: a GPU would refuse it."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("the simulated device is one of PyTorch", allow_module_level=True)

SCRIPT = Path(__file__).with_name("simulated_device.py")


@pytest.fixture(scope="module")
def there(alone):
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=alone)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_it_refuses_what_a_gpu_refuses(there):
    assert there["refused"] == there["ways"]


def test_models_train_and_sample_on_it_as_on_the_cpu(there):
    import simulated_device

    # The same operations on the same CPU; attention in bfloat16 takes another of PyTorch's forms.
    np.testing.assert_allclose(there["results"], simulated_device.work(), rtol=1e-3, atol=1)
