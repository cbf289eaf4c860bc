"""Files that one backend has written are read on the others."""

import importlib.util
import subprocess
import sys

import keras
import pytest

BACKENDS = ("jax", "tensorflow", "torch")
OTHERS = [name for name in BACKENDS if name != keras.config.backend()]


@pytest.mark.once
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in BACKENDS), reason="needs all backends"
)
def test_each_backend_reads_the_files_of_the_others(tmp_path, alone_on):
    """Checkpoint, model, weights, autoencoder, cache of latents and statistics.

    This process is one of the three; it tells the others when all have written.
    """
    import exchange

    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [sys.executable, exchange.__file__, tmp_path]
    processes = [subprocess.Popen(command, env=alone_on(name), **pipes) for name in OTHERS]
    exchange.write(tmp_path / exchange.NAME)
    said = ["" for _ in processes]
    for k, process in enumerate(processes):
        for line in process.stdout:
            said[k] += line
            if line == "written\n":
                break
    for k, process in enumerate(processes):
        said[k] += process.communicate("read\n", timeout=300)[0]
        assert process.returncode == 0, said[k]
    for name in OTHERS:
        exchange.read(tmp_path / name)
