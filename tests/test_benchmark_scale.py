"""`benchmarks/scale.py` counts the bytes that programs send."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from keras_uvit import backend, presets

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


# Every kind of collective on a mesh of 2 x 4, one of them in a loop. The array is of 64 x 32
# float32, 8192 bytes; an eighth of it 1024.
PROGRAM = """
    import sys

    import jax
    import numpy as np
    from jax import lax
    from jax import numpy as jnp
    from jax.sharding import Mesh, PartitionSpec

    sys.path.insert(0, sys.argv[1])
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
    for one in collectives(program):
        print(one.kind, one.bytes, *one.group)
"""


@pytest.mark.skipif(backend.NAME != "jax", reason="programs of XLA, by JAX")
def test_bytes_sent_are_those_of_a_program_worked_out_by_hand():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), BENCHMARKS],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            *["all-reduce 1536.0 0 1 2 3"] * 5,  # twice 3/4 of 1024, in a loop of 5
            "all-gather 7168.0 0 1 2 3 4 5 6 7",  # 7/8 of 8192
            "reduce-scatter 4096.0 0 4",  # half of 8192
            "all-to-all 3072.0 0 1 2 3",  # 3/4 of 4096
            "collective-permute 4096 0 1",
        ]
    )


def test_an_all_reduce_of_which_parts_are_read_is_a_reduce_scatter():
    sys.path.insert(0, str(BENCHMARKS))
    from collectives import collectives

    program = """ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r, %i, %j), dynamic_slice_sizes={2,4}
}"""
    assert collectives(program) == [("reduce-scatter", 96.0, (0, 2, 4, 6))]
    read_whole = program.replace("dynamic-slice", "slice")
    assert collectives(read_whole) == [("all-reduce", 192.0, (0, 2, 4, 6))]


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{0,3},{1,2}}", (0, 3)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
    ],
)
def test_groups_of_devices(written, group):
    sys.path.insert(0, str(BENCHMARKS))
    from collectives import _group

    assert _group(f"%x), channel_id=1, replica_groups={written}, dimensions={{0}}") == group


@pytest.mark.skipif(backend.NAME != "jax", reason="programs of XLA, by JAX")
def test_scale_predicts_a_row_a_layout(alone):
    small = "--preset uvit_tiny_digits --num-layers 1 --devices 8 --batch-size 64"
    layouts = ["data", "fsdp", "tensor4"]
    network = presets.get("uvit_tiny_digits").new_network(num_layers=1)
    count = sum(math.prod(w.shape) for w in network.weights if len(w.shape) > 1)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "scale.py", *small.split(), "--layouts", *layouts],
        env=alone,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    data, fsdp, tensor = [json.loads(line) for line in lines if line.startswith("{")]
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
