"""What training and sampling of U-ViT need on TPUs, by the compiler for TPUs, without a TPU.

    pip install "libtpu==0.0.42.*" requests         (the compiler; the version that jax[tpu] names)
    python benchmarks/tpu.py                        (L/2 on four chips of v5e, ours and the rival)
    python benchmarks/tpu.py --presets uvit_huge_imagenet256 --topologies v5p:2x2x1 --remat
    python benchmarks/tpu.py --attention            (attention alone, in three forms)

The whole training step in mixed_bfloat16, or with --sample the loop of 50 guided steps, is compiled
for a topology, and not run: no weight exists. Each row is a process. A chip's numbers:

    state      GB of weights, moving average, optimizer slots, and its part of the batch
    temporary  GB that the program needs besides, as the compiler placed them; both must fit into
               the chip's memory (`of`)
    TFLOP      operations of the program, and of these the model's: 6 a multiply-accumulate, 8 with
               --remat, which computes blocks again, 2 when sampling
    sent       GB that collectives of the program give, and how many there are

--layouts: data (all weights everywhere), fsdp, tensor4; see keras_uvit/distribution.py. `plain` is
the rival, the same step in plain JAX (rivals_jax.py), with the layout "data". Compiling takes
minutes of one core: L/2 four, H/2 six to eight; --num-layers takes fewer blocks.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import time

from collectives import BYTES, KINDS
from side_by_side import COMMIT, table

MEMORY = {"v5e": 16, "v5p": 95, "v6e": 32}  # GB of HBM a chip, cloud.google.com/tpu/docs
COLUMNS = ["what", "topology", "layout", "batch", "layers", "state", "temporary", "of",
           "TFLOP", "model's", "sent", "collectives", "compile_s"]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=["uvit_large_imagenet256"], help="(%(default)s)")
    add("--topologies", nargs="+", default=["v5e:2x2"], help="such as v5p:2x2x1 (%(default)s)")
    add("--layouts", nargs="+", default=["data", "plain"], help="(data plain)")
    add("--batch-sizes", type=int, nargs="+", default=[128], help="of all chips (%(default)s)")
    add("--num-layers", type=int, nargs="+", default=[None], help="blocks (those of the preset)")
    add("--remat", action="store_true", help="recompute blocks in the backward pass")
    add("--sample", action="store_true", help="50 guided steps instead of a training step")
    add("--attention", action="store_true", help="attention alone, in three forms")
    add("--dump", help="file for the text of the compiled program")
    add("--row", help=argparse.SUPPRESS)  # this process is of one row
    options = parser.parse_args()
    if options.sample and "plain" in options.layouts:
        parser.error("The rival has no sampling loop: pass --layouts data with --sample.")
    if options.row:
        print(json.dumps(measure(**json.loads(options.row))))
    elif options.attention:
        print(table(attention(), ["tokens", "heads", "width", "dtype", "form", "temporary MB"]))
    else:
        rows = [
            in_own_process(
                preset=preset, topology=topology, layout=layout, batch=batch, layers=layers,
                remat=options.remat, sample=options.sample, dump=options.dump,
            )
            for preset in options.presets
            for topology in options.topologies
            for layout in options.layouts
            for batch in options.batch_sizes
            for layers in options.num_layers
        ]  # fmt: skip
        print(table([row for row in rows if row], COLUMNS))


def in_own_process(**job):
    environment = dict(os.environ, TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", KERAS_BACKEND="jax")
    command = [sys.executable, __file__, "--row", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        # What does not fit into a chip's memory is an error of the compiler, and an answer.
        words = [line for line in done.stderr.splitlines() if "Error" in line or "RESOURCE" in line]
        print(json.dumps({**job, "failed": (words or [done.stderr])[-1][:300]}), flush=True)
        return None
    print(done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


# In the process of one row ------------------------------------------------------------------------


def devices_of(topology):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def measure(preset, topology, layout, batch, layers, remat, sample, dump):
    import jax
    from scale import choose

    from keras_uvit import presets
    from keras_uvit.evaluation import count_macs
    from keras_uvit.training import adamw

    devices = devices_of(topology)
    # What Keras and the package see: the devices of the topology.
    jax.devices, jax.default_backend = lambda *args, **kwargs: list(devices), lambda: "tpu"
    row = presets.get(preset)
    changes = {"remat": remat} | ({"num_layers": layers} if layers else {})
    start = time.perf_counter()
    if layout == "plain":
        lowered, depth, macs = plain(row, changes, devices, batch)
    else:
        import keras

        keras.mixed_precision.set_global_policy("mixed_bfloat16")
        optimizer = adamw(**row.optimizer)  # its counter is made, and no device could hold it
        distribution = choose(layout)
        with keras.StatelessScope(initialize_variables=False):
            model = row.build(changes)
            for variable in model.variables:
                variable._initialize_layout()  # else only when made; slots take their weight's
            model.compile(optimizer)
            lowered = (sampling if sample else training)(model, distribution, batch)
        depth, macs = model.network.config.num_layers, count_macs(model.network)
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if dump:
        with open(dump, "w", encoding="utf-8") as file:
            file.write(text)
    sent = results(text)
    evaluations = 2 * 50 if sample else 1  # guided
    per_mac = 2 if sample else 8 if remat else 6
    return {
        "what": f"{preset}{', remat' if remat else ''}{', 50 guided steps' if sample else ''}",
        "topology": topology,
        "layout": layout,
        "batch": batch,
        "layers": depth,
        "state": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporary": round(memory.temp_size_in_bytes / 1e9, 2),
        "of": MEMORY[topology.partition(":")[0]],
        # A loop's body is counted once.
        "TFLOP": None if sample else round(compiled.cost_analysis()["flops"] / 1e12, 2),
        "model's": round(evaluations * per_mac * macs * batch / len(devices) / 1e12, 2),
        "sent": round(sum(sent) / 1e9, 2),
        "collectives": len(sent),
        "compile_s": round(time.perf_counter() - start),
        "jax": jax.__version__,
        "commit": COMMIT,
    }


def training(model, distribution, batch_size):
    import jax
    from scale import abstract

    state, batch = abstract(model, distribution, batch_size)
    shardings = jax.tree.map(lambda value: value.sharding, state)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    return step.lower(state, batch)


def sampling(model, distribution, batch_size):
    import jax
    from scale import abstract

    from keras_uvit.sampling import export

    _, batch = abstract(model, distribution, batch_size)
    program = export.program_of(model, batch_size, num_steps=50, guidance_scale=1.5, decode=False)
    noise = jax.ShapeDtypeStruct(
        (batch_size, *model.network.image_shape),
        "float32",
        sharding=distribution.get_data_layout((batch_size, 1, 1, 1)).backend_layout,
    )
    weights = [
        [
            jax.ShapeDtypeStruct(
                w.shape, w.dtype, sharding=distribution.get_variable_layout(w).backend_layout
            )
            for w in network.variables
        ]
        for network in program.networks
    ]
    condition = {key: batch[key] for key in ("label", "context") if key in batch}

    def run(weights, **inputs):
        return program(weights, **inputs)

    return jax.jit(run).lower(weights, noise=noise, **condition)


def plain(row, changes, devices, batch_size):
    """The rival's step, with the batch divided among the devices."""
    import jax
    import numpy as np
    import rivals_jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from keras_uvit.evaluation import count_macs

    network = row.new_network(**changes)
    config = network.config
    if row.latent_scale is None or config.context_shape:
        raise SystemExit("The rival is of latents without texts. Pass --layouts data.")
    mesh = Mesh(np.array(devices), ("batch",))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

    def value(shape, dtype="float32", sharding=whole):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = rivals_jax.weights(
        config.image_shape, config.patch_size, config.hidden_dim, config.num_layers,
        config.num_classes,
    )  # fmt: skip
    w = {name: {k: value(shape) for k, shape in own.items()} for name, own in shapes.items()}
    state = (w, w, w, w, value((), "int32"), value((2,), "uint32"))
    height, width, channels = config.image_shape
    batch = {"moments": value((batch_size, height, width, 2 * channels), sharding=parts)}
    if config.num_classes:
        batch["label"] = value((batch_size,), "int32", parts)
    step = functools.partial(
        rivals_jax.step, heads=config.num_heads, patch=config.patch_size, remat=changes["remat"]
    )
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    return lowered, config.num_layers, count_macs(network)


def results(program):
    """Bytes of the result of each collective in the text of a program for TPUs.

    (`collectives.py` reads XLA's program before that, whose collectives are not asynchronous yet.)
    """
    pattern = rf"= (.*?) (?:{'|'.join(KINDS)})(?:-done)?\("  # a start's result has its operand too
    return [
        sum(
            BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side)
            for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            if dtype in BYTES
        )
        for shapes in re.findall(pattern, program)
    ]


# Attention alone ----------------------------------------------------------------------------------


def attention():
    """Temporaries of attention's gradient, batch 32 on one chip of v5e."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", KERAS_BACKEND="jax")
    import jax
    from jax.sharding import SingleDeviceSharding

    from keras_uvit import backend

    forms = {
        "products in float32": backend._attention_by_products,
        "jax.nn": jax.nn.dot_product_attention,
        "splash, tokens added": splash,
    }
    place = SingleDeviceSharding(devices_of("v5e:2x2")[0])
    rows = []
    for length, heads, width, dtype in (
        (257, 8, 64, "bfloat16"),
        (258, 16, 64, "bfloat16"),
        (258, 16, 72, "bfloat16"),
        (334, 8, 64, "bfloat16"),
        (1025, 16, 64, "bfloat16"),
    ):
        x = jax.ShapeDtypeStruct((32, length, heads, width), dtype, sharding=place)
        for name, form in forms.items():

            def total(q, k, v, form=form):
                return form(q, k, v).astype("float32").sum()

            step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
            memory = step.lower(x, x, x).compile().memory_analysis()
            row = {"tokens": length, "heads": heads, "width": width, "dtype": dtype, "form": name}
            rows.append(row | {"temporary MB": round(memory.temp_size_in_bytes / 1e6, 1)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def splash(query, key, value):
    """The TPU kernel that Keras asks for, with tokens added up to a multiple of 128."""
    import jax
    from jax import numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = query.shape[1:]
    padded = -(-length // 128) * 128
    block = next(size for size in (512, 384, 256, 128) if padded % size == 0)
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"]
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((padded, padded))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(**{f"block_{name}": block for name in names}),
    )
    query, key, value = (
        jnp.pad(a, ((0, 0), (0, padded - length), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for a in (query, key, value)
    )
    added = jnp.where(jnp.arange(padded) < length, 0, 1)  # they attend to one another alone
    ids = kernel.SegmentIds(q=added, kv=added)
    scaled = query * query.dtype.type(width**-0.5)
    found = jax.vmap(lambda q, k, v: attend(q, k, v, segment_ids=ids))(scaled, key, value)
    return found.transpose(0, 2, 1, 3)[:, :length]


if __name__ == "__main__":
    main()
