"""`benchmarks/scale.py` counts the bytes that programs send."""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from keras_uvit import backend, presets

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = dict(preset="uvit_tiny_digits", num_layers=1, batch_size=64)

# Every kind of collective on a mesh of 2 x 4, one of them in a loop. The array is of 64 x 32
# float32, 8192 bytes; an eighth of it 1024. Then two rows of the benchmark, as `main` would have
# each made in a process of its own.
PROGRAM = """
    import argparse
    import json
    import os
    import pathlib
    import sys

    import jax
    import numpy as np
    from jax import lax
    from jax import numpy as jnp
    from jax.sharding import Mesh, PartitionSpec

    sys.path.insert(0, sys.argv[1])
    import scale
    from collectives import collectives

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("node", "near"))

    def step(x):  # (8, 32) on each device
        def body(carry, _):
            return jnp.sin(lax.psum(carry, "near")), None

        x, _ = lax.scan(body, x, None, length=5)
        gathered = lax.all_gather(x, ("node", "near"), tiled=True)  # (64, 32)
        scattered = lax.psum_scatter(jnp.cos(gathered), "node", tiled=True)  # (32, 32)
        turned = lax.all_to_all(jnp.tan(scattered), "near", 0, 1, tiled=True)  # (8, 128)
        return lax.ppermute(turned, "near", [(0, 1), (1, 2), (2, 3), (3, 0)])

    spec = PartitionSpec(("node", "near"))
    step = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = jax.jit(step).lower(jnp.zeros((64, 32))).compile().as_text()
    print(json.dumps([(one.kind, one.bytes, one.group) for one in collectives(program)]))
    for layout in ("data", "tensor4"):
        for file in pathlib.Path(os.environ["DUMP"]).glob("*jit_train_step*.txt"):
            file.unlink()
        options = argparse.Namespace(**json.loads(sys.argv[2]), layouts=[layout])
        print(json.dumps(scale.measure(options)))
"""


def lines_of(command, environment):
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line[0] in "{["]


@pytest.fixture(scope="module")
def programs(alone, tmp_path_factory):
    """Collectives of the program above, and rows of the benchmark by layout."""
    dump = str(tmp_path_factory.mktemp("dump"))
    flags = f"--xla_force_host_platform_device_count=8 --xla_dump_to={dump}"
    environment = {
        **alone,
        "DUMP": dump,
        "XLA_FLAGS": f"{alone['XLA_FLAGS']} {flags} --xla_dump_hlo_pass_re=spmd.*",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # from a cache XLA writes no dump
    }
    options = json.dumps({**SMALL, "devices": [8], "mfu": 0.4})
    by_hand, *rows = lines_of(["-c", textwrap.dedent(PROGRAM), BENCHMARKS, options], environment)
    small = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    rows += lines_of([BENCHMARKS / "scale.py", *small, "--devices=8", "--layouts", "fsdp"], alone)
    return by_hand, {row["layout"]: row for row in rows}


@pytest.mark.skipif(backend.NAME != "jax", reason="programs of XLA, by JAX")
def test_bytes_sent_are_those_of_a_program_worked_out_by_hand(programs):
    assert sorted(programs[0]) == sorted(
        [
            *[["all-reduce", 1536, [0, 1, 2, 3]]] * 5,  # twice 3/4 of 1024, in a loop of 5
            ["all-gather", 7168, [*range(8)]],  # 7/8 of 8192
            ["reduce-scatter", 4096, [0, 4]],  # half of 8192
            ["all-to-all", 3072, [0, 1, 2, 3]],  # 3/4 of 4096
            ["collective-permute", 4096, [0, 1]],
        ]
    )


@pytest.mark.skipif(backend.NAME != "jax", reason="programs of XLA, by JAX")
def test_scale_predicts_a_row_a_layout(programs):
    network = presets.get(SMALL["preset"]).new_network(num_layers=SMALL["num_layers"])
    count = sum(math.prod(w.shape) for w in network.weights if len(w.shape) > 1)
    data, fsdp, tensor = (programs[1][layout] for layout in ("data", "fsdp", "tensor4"))
    # Four copies in float32; the rest is vectors, counters, and 64 images.
    kernels = 4 * 4 * count
    assert kernels < data["state"] < 1.05 * kernels
    assert kernels / 8 < fsdp["state"] < 1.3 * kernels / 8
    assert kernels / 4 < tensor["state"] < 1.3 * kernels / 4
    # Gradients in bfloat16 go around a ring of 8 twice; "fsdp" gathers weights, sums gradients.
    assert data["sent"]["all-reduce"] == pytest.approx(2 * 7 / 8 * 2 * count, rel=0.05)
    assert fsdp["sent"]["all-gather"] > fsdp["sent"]["reduce-scatter"] > 0
    assert fsdp["sent"].get("all-to-all", 0) == 0  # activations stay where they are
    assert sum(tensor["sent"].values()) > 2 * sum(data["sent"].values())
    for row in (data, fsdp, tensor):
        for low, high in row["efficiency"].values():
            assert 0 < low <= high <= 1


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import collectives

    return collectives


def test_an_all_reduce_of_which_parts_are_read_is_a_reduce_scatter(module):
    program = """ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r, %i, %j), dynamic_slice_sizes={2,4}
}"""
    assert module.collectives(program) == [("reduce-scatter", 96.0, (0, 2, 4, 6))]
    read_whole = program.replace("dynamic-slice", "slice")
    assert module.collectives(read_whole) == [("all-reduce", 192.0, (0, 2, 4, 6))]


def test_groups_of_devices(module):
    for written, group in {
        "{{0,3},{1,2}}": (0, 3),
        "[2,4]<=[8]": (0, 1, 2, 3),
        "[4,2]<=[2,4]T(1,0)": (0, 4),
        "mesh['a'=2,'b'=4] {'b'}": (0, 1, 2, 3),
        "mesh['a'=2,'b'=4] {'a'}": (0, 4),
        "mesh['a'=2,'b'=4] {'a','b'}": (0, 1, 2, 3, 4, 5, 6, 7),
        "mesh['a'=2,'b'=4] {'b':(2)2}": (0, 1),
        "mesh['a'=2,'b'=4] {'b':(1)2}": (0, 2),
        "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": (0, 1, 2, 3),
        "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": (0, 4),
    }.items():
        rest = f"%x), channel_id=1, replica_groups={written}, dimensions={{0}}"
        assert module._group(rest) == group, written
