"""How U-ViT-H/2 would train on 8, 64 and 256 devices, computed on a machine that has none.

    python benchmarks/scale.py                                        (12 minutes, 2 cores, 10 GB)
    python benchmarks/scale.py --preset uvit_small_cifar10 --devices 8 --layouts data fsdp

The whole train step, mixed_bfloat16, recomputing blocks, is compiled by XLA for simulated CPU
devices, and not run: no weight exists. What follows from the program itself, a device and step:

    state      bytes of weights, moving average, optimizer slots and its part of the batch
    whole      of these, weights and their copies that no device count divides ("fsdp")
    kept       bytes that the backward pass needs of the forward pass, as in memory.py, none of
               them divided among the devices of one copy. Gradients come on top, 4 bytes a weight
               divided as the weights are, and what one block needs while it is computed again.
               ("temp" in the JSON is XLA's for CPUs, whose scheduler computes blocks again long
               before it must: no measure of another device.)
    sent       bytes by kind of collective, as XLA's partitioner placed them; collectives.py

and what is predicted from published speeds (LINKS), in two bounds: nothing overlaps, and all
communication is hidden behind computing as far as it can be:

    efficiency   compute / (compute + communication)     compute / max(compute, communication)

where compute is 8 operations a multiply-accumulate (forward, backward, forward again) at --mfu of
the device's peak. 1.00 is `devices` times as fast as one. Latency, the optimizer's own time and
slow neighbours are left out.

Layouts: data (all weights everywhere), fsdp, tensor8 and tensor4 ("tensor" with so many devices a
copy of the weights); see keras_uvit/distribution.py.
"""

import argparse
import collections
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import COMMIT

# peak: bfloat16 operations/s. near: bytes/s each way between `node` neighbours; far: beyond.
# H100 SXM data sheet: 989e12 dense, NVLink 900 GB/s both ways; DGX H100 user guide: 8 GPUs, each
# with a ConnectX-7 of 400 Gb/s. TPU v5p, cloud.google.com/tpu/docs/v5p: 459e12, 1200 GB/s both
# ways on the 6 links of a 3-D torus: a ring along one axis has two of them.
LINKS = {
    "h100": dict(peak=989e12, near=450e9, far=50e9, node=8),
    "v5p": dict(peak=459e12, near=200e9, far=200e9, node=1),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="uvit_huge_imagenet256", help="(%(default)s)")
    add("--devices", type=int, nargs="+", default=[8, 64, 256], help="(8 64 256)")
    add("--layouts", nargs="+", default=["data", "fsdp", "tensor8", "tensor4"], help="(all)")
    add("--batch-size", type=int, default=1024, help="of all devices (%(default)s)")
    add("--num-layers", type=int, help="blocks, for a quick look (those of the preset)")
    add("--mfu", type=float, default=0.4, help="part of the peak reached (%(default)s)")
    add("--row", action="store_true", help=argparse.SUPPRESS)  # this process is of one row
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options)))
        return
    head = ("layout", "devices", "state", "whole", "kept", *SHORT.values())
    heads = "".join(f"{name:>8}" for name in head) + "".join(f"{name:>12}" for name in LINKS)
    print(heads + "   (GB a device, sent GB a device and step; efficiency)")
    for count in options.devices:
        for layout in options.layouts:
            print(table_row(in_own_process(count, layout, options)), flush=True)


SHORT = {
    "all-reduce": "reduce",
    "all-gather": "gather",
    "reduce-scatter": "scatter",
    "all-to-all": "toall",
    "collective-permute": "permute",
}


def in_own_process(count, layout, options):
    """A process has one number of devices; XLA reads it once."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={count}",
            f"--xla_dump_to={folder}",
            "--xla_dump_hlo_pass_re=spmd.*",
            # Least memory, as on accelerators, and no time for machine code that is never run.
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
            "--xla_backend_optimization_level=0",
        ]
        arguments = ["--row", "--devices", str(count), "--layouts", layout]
        for name in ("preset", "batch_size", "num_layers", "mfu"):
            if getattr(options, name) is not None:
                arguments += ["--" + name.replace("_", "-"), str(getattr(options, name))]
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            env={
                **os.environ,
                "KERAS_BACKEND": "jax",
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_COMPILATION_CACHE": "false",  # from a cache XLA writes no dump
                "XLA_FLAGS": " ".join(flags),
                "DUMP": folder,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        sys.exit(f"{layout} on {count} devices failed.")
    return json.loads(done.stdout.splitlines()[-1])


def table_row(row):
    sent = [row["sent"].get(kind, 0) for kind in SHORT]
    numbers = [row["state"], row["whole"], row["kept"], *sent]
    speeds = "".join(f"{'{} - {}'.format(*row['efficiency'][link]):>12}" for link in LINKS)
    cells = "".join(f"{number / 1e9:8.2f}" for number in numbers)
    return f"{row['layout']:>8}{row['devices']:8}{cells}{speeds}\n{json.dumps(row)}"


# In the process of one row --------------------------------------------------------------------


def measure(options):
    """One layout on one number of devices, as a row."""
    import jax
    import keras
    from collectives import collectives  # beside this file
    from memory import kept_by_jax

    from keras_uvit import backend, presets
    from keras_uvit.evaluation import count_macs
    from keras_uvit.training import adamw

    layout, count = options.layouts[0], options.devices[0]
    distribution = choose(layout)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    row = presets.get(options.preset)
    optimizer = adamw(**row.optimizer)
    # Weights and slots are named and described in this scope, and never made.
    with keras.StatelessScope(initialize_variables=False):
        model = make(row, optimizer, options)
        state, batch = abstract(model, distribution, options.batch_size)
        shardings = jax.tree.map(lambda value: value.sharding, state)
        step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
        start = time.perf_counter()
        memory = step.lower(state, batch).compile().memory_analysis()
        kept = kept_by_jax(model.network, 2) - kept_by_jax(model.network, 1)
    sent = collectives(partitioned())
    operations = 8 * count_macs(model.network) * options.batch_size / count
    by_kind = collections.Counter()
    for one in sent:
        by_kind[one.kind] += round(one.bytes)
    return {
        "layout": layout,
        "devices": count,
        "state": memory.argument_size_in_bytes,
        "whole": whole(model, distribution),
        "kept": kept * options.batch_size // backend.replicas(),
        "temp": memory.temp_size_in_bytes,
        "sent": dict(by_kind),
        "efficiency": {
            name: efficiency(sent, operations, options.mfu, **speeds)
            for name, speeds in LINKS.items()
        },
        "compile_seconds": round(time.perf_counter() - start),
        "operations": round(operations),
        "preset": options.preset,
        "num_layers": model.network.config.num_layers,
        "batch_size": options.batch_size,
        "mfu": options.mfu,
        "jax": jax.__version__,
        "keras": keras.__version__,
        "commit": COMMIT,
    }


def choose(layout):
    import keras

    from keras_uvit.distribution import model_parallel

    if layout.startswith("tensor"):
        return model_parallel("tensor", int(layout.removeprefix("tensor")))
    if layout == "fsdp":
        return model_parallel("fsdp")
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    return distribution


def make(row, optimizer, options):
    """The preset's model, with the layout of each weight and slot."""
    network = dict(remat=True)
    if options.num_layers:
        network["num_layers"] = options.num_layers
    model = row.build(network)
    for variable in model.variables:
        variable._initialize_layout()  # else only when made; slots take their weight's
    model.compile(optimizer)
    return model


def abstract(model, distribution, batch_size):
    """State and batch without values, each with its place."""
    import jax

    def value(shape, dtype, layout):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)

    def place(variable):
        return value(variable.shape, variable.dtype, distribution.get_variable_layout(variable))

    def data(shape, dtype="float32"):
        shape = (batch_size, *shape)
        return value(shape, dtype, distribution.get_data_layout(shape))

    state = tuple(
        [place(variable) for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    network, (height, width, channels) = model.network, model.network.image_shape
    batch = {"image": data((height, width, channels))}
    if model.latent_scale:
        batch = {"moments": data((height, width, 2 * channels))}
    if network.num_classes:
        batch["label"] = data((), "int32")
    if network.context_shape:
        batch["context"] = data(network.context_shape)
    return state, batch


def whole(model, distribution):
    """Bytes of weights that the layout would split and cannot, and of their three copies."""
    import keras

    from keras_uvit.distribution import check_layouts

    check_layouts(model.network)
    if isinstance(distribution, keras.distribution.DataParallel):
        return 0  # it splits none
    weights = [w for w in model.network.weights if len(w.shape) > 1]
    return sum(
        4 * 4 * math.prod(weight.shape)  # float32; weight, average, two slots
        for weight in weights
        if any(distribution.get_tensor_layout(weight.path).axes)
        and not any(distribution.get_variable_layout(weight).axes)
    )


def partitioned():
    """The step's program after XLA has divided it: types are still those of the model."""
    files = Path(os.environ["DUMP"]).glob("*jit_train_step*after_spmd-partitioning*.txt")
    return next(files).read_text(encoding="utf-8")


def efficiency(sent, operations, mfu, peak, near, far, node):
    """(without, with full overlap); see the top of the file."""
    compute = operations / (mfu * peak)
    communication = sum(one.bytes / speed(one, near, far, node) for one in sent)
    bounds = (compute / (compute + communication), compute / max(compute, communication))
    return [round(bound, 2) for bound in bounds]


def speed(one, near, far, node):
    """Bytes/s a device of the group. A ring that enters a node once has all its far links."""
    nodes = collections.Counter(device // node for device in one.group)
    if len(nodes) == 1:
        return near
    if one.kind in ("all-to-all", "collective-permute"):
        return far
    return min(near, far * max(nodes.values()))


if __name__ == "__main__":
    main()
