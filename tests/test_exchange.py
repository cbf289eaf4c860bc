"""Files that one backend has written are read on the others."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BACKENDS = ("jax", "tensorflow", "torch")
SCRIPT = Path(__file__).parent / "exchange.py"


def begin(folder, environment):
    """A process that writes its files, and reads those of all when it is told to."""
    command = [sys.executable, SCRIPT, folder, *BACKENDS]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


@pytest.mark.once
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in BACKENDS), reason="needs all backends"
)
def test_each_backend_reads_the_files_of_all(tmp_path, alone_on):
    """Checkpoint, model, weights, autoencoder, cache of latents and statistics."""
    processes = [begin(tmp_path, alone_on(name)) for name in BACKENDS]
    said = ["" for _ in processes]
    for k, process in enumerate(processes):
        for line in process.stdout:
            said[k] += line
            if line == "written\n":
                break
        print("read", file=process.stdin, flush=True)
    for k, process in enumerate(processes):
        said[k] += process.communicate(timeout=300)[0]
    for process, text in zip(processes, said):
        assert process.returncode == 0, text
