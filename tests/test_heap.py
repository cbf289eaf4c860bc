"""What the allocator of a process does with freed memory."""

import json
import os
import subprocess
import sys

import pytest
from tiny import refused

from keras_uvit.backend import heap

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not heap.is_glibc(), reason="the settings are those of glibc"),
]
# 64 MB taken, written and given back twice: how often does the second time ask the kernel?
PROGRAM = f"""
import ctypes, importlib.util, json, resource
spec = importlib.util.spec_from_file_location("heap", {heap.__file__!r})
heap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heap)
kept, c, size = heap.keep(), ctypes.CDLL(None), ctypes.c_size_t(2**26)
c.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = ctypes.c_void_p(c.malloc(size))
    c.memset(memory, 1, size)
    c.free(memory)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([kept, faults]))
"""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, True),
        ({heap.SWITCH: "1"}, True),
        ({heap.SWITCH: "0"}, False),
        ({"MALLOC_ARENA_MAX": "2"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, False),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off"}, True),
    ],
)
def test_freed_memory_is_kept_unless_the_user_has_set_the_allocator(setting, expected):
    own = ("MALLOC_", "GLIBC_", heap.SWITCH)
    usual = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=usual | setting, capture_output=True, check=True
    )
    kept, faults = json.loads(found.stdout)
    assert kept is expected
    # A page is 4 KiB, or 64 on some machines, unless huge ones are given: 32 at the least.
    assert faults < 8 if expected else faults >= 32


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv(heap.SWITCH, "false")
    refused(ValueError, heap.keep, heap.SWITCH, "0 or 1", "'false'")
