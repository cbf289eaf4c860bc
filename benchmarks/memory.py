"""What training keeps for the backward pass, with and without `remat`.

    KERAS_BACKEND=jax python benchmarks/memory.py            (10 s: traced, never run)
    KERAS_BACKEND=jax python benchmarks/memory.py --compile  (minutes: compiled, never run)
    KERAS_BACKEND=torch python benchmarks/memory.py          (a minute, 6 GB: runs forward)

One U-ViT, float32 and mixed_bfloat16, the loss a mean square. A column a question:

    kept      GiB that the backward pass needs of the forward pass, for the whole batch. JAX: the
              residuals of `jax.vjp`. PyTorch: storages seen by `saved_tensors_hooks`, at batch 1
              and 2. Weights and their copies in bfloat16 are left out, being the same for every
              batch: it is what the second half of a doubled batch adds.
    cut       by how much `remat` lowers `kept`
    compiled  GiB of temporary memory in XLA's program for loss and gradients, gradients left out;
              only --compile. XLA's default scheduler for CPUs runs ahead and hides the gain, so
              it is turned off here; GPUs and TPUs have another.

Attention is that of a CPU, whose backward pass keeps the L x L weights of every head. An
accelerator's fused attention keeps none, so the network without `remat` keeps less there.

Aim: `remat` cuts 60 % of `kept` or more.
"""

import argparse
import json
import math
import os

FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()

import keras  # noqa: E402  (after the flag, which XLA reads once)
from keras import ops  # noqa: E402
from side_by_side import COMMIT  # noqa: E402

from keras_uvit import UViT, presets  # noqa: E402

BACKEND = keras.config.backend()
GIB = 2**30


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="uvit_large_imagenet256", help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="also compile it, on JAX only")
    options = parser.parse_args()
    if BACKEND == "tensorflow" or (options.compile and BACKEND != "jax"):
        parser.error("KERAS_BACKEND must be jax or torch, and jax with --compile.")
    for row in compare(options):
        print(json.dumps(row))


def compare(options):
    rows = []
    print(f"{'dtype':16}{'remat':>6}{'kept':>8}{'cut':>6}{'compiled':>10}")
    for dtype in ("float32", "mixed_bfloat16"):
        for remat in (False, True):
            row = {"dtype": dtype, "remat": remat, **measure(dtype, remat, options)}
            whole = rows[-1]["kept_gib"] if remat else row["kept_gib"]
            row["cut"] = round(1 - row["kept_gib"] / whole, 3)
            compiled = row["compiled_gib"]
            compiled = "-" if compiled is None else f"{compiled:.2f}"
            print(f"{dtype:16}{remat!s:>6}{row['kept_gib']:8.2f}{row['cut']:6.0%}{compiled:>10}")
            about = {"preset": options.preset, "batch_size": options.batch_size}
            rows.append({**row, **about, "backend": BACKEND, "commit": COMMIT})
    return rows


def measure(dtype, remat, options):
    arguments = {**presets.get(options.preset).network, "dtype": dtype, "remat": remat}
    batch, compiled = options.batch_size, None
    if BACKEND == "jax":
        with keras.StatelessScope(initialize_variables=False):  # shapes only, no weights
            network = UViT(**arguments)
        kept = kept_by_jax(network, 2 * batch) - kept_by_jax(network, batch)
        if options.compile:
            compiled = round(compiled_by_jax(network, batch) / GIB, 4)
    else:
        network = UViT(**arguments)
        kept = batch * (kept_by_torch(network, 2) - kept_by_torch(network, 1))
    return {"kept_gib": round(kept / GIB, 4), "compiled_gib": compiled}


def inputs(network, batch, make):
    """The network's inputs, each `make(shape, dtype)`."""
    return {
        key: make((batch, *tensor.shape[1:]), tensor.dtype) for key, tensor in network.input.items()
    }


def jax_loss(network, batch):
    """The loss as a function of the trainable weights and inputs, and what stands for both."""
    import jax

    def loss(weights, values):
        output, _ = network.stateless_call(weights, [], values, training=True)
        return ops.mean(ops.square(output))

    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in network.trainable_variables]
    return loss, weights, inputs(network, batch, jax.ShapeDtypeStruct)


def kept_by_jax(network, batch):
    """Bytes of `jax.vjp`'s residuals, each once, without the weights themselves."""
    import jax
    from jax.extend.core import Literal

    loss, weights, values = jax_loss(network, batch)
    program = jax.make_jaxpr(lambda w, x: jax.vjp(lambda w: loss(w, x), w)[1])(weights, values)
    kept = {v for v in program.jaxpr.outvars if not isinstance(v, Literal)}
    kept -= set(program.jaxpr.invars)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def compiled_by_jax(network, batch):
    """Bytes of temporary memory of the compiled gradient."""
    import jax

    loss, weights, values = jax_loss(network, batch)
    program = jax.jit(jax.value_and_grad(loss)).lower(weights, values).compile()
    return program.memory_analysis().temp_size_in_bytes


def kept_by_torch(network, batch):
    """Bytes of the storages that autograd saves, each once, without the weights themselves."""
    import torch

    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes(), tensor  # alive: no address comes twice
        return tensor

    values = inputs(network, batch, ops.zeros)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ops.mean(ops.square(network(values, training=True)))
    for weight in network.weights:
        storages.pop(weight.value.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in storages.values())


if __name__ == "__main__":
    main()
