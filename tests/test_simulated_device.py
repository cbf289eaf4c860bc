"""Nothing that the package does on PyTorch needs the CPU: a GPU would refuse it."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("the simulated device is one of PyTorch", allow_module_level=True)
import simulated_device


def test_models_train_and_sample_where_a_gpu_would_refuse_as_on_the_cpu(alone):
    command = [sys.executable, simulated_device.__file__]
    run = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert run.returncode == 0, run.stderr[-3000:]
    there = json.loads(run.stdout.splitlines()[-1])
    assert there["refused"] == there["ways"]
    # The same operations on the same CPU; attention in bfloat16 takes another of PyTorch's forms.
    np.testing.assert_allclose(there["results"], simulated_device.work(), rtol=1e-3, atol=1)
