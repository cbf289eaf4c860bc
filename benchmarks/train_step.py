"""How fast is a training step, beside the same network in plain PyTorch?

    python benchmarks/train_step.py                              (all on a CPU: about an hour)
    python benchmarks/train_step.py --sizes S/2 --batch-sizes 8  (ten minutes)
    python benchmarks/train_step.py --contenders keras-jax torch --device-tflops 989

One step is everything that `fit` does for a batch that lies in memory: noise, the network forward
and backward, AdamW, the moving average, the metrics' update. The rivals (`rivals.py`) do the same
without metrics and without checking that the step is finite:

    torch          a plain U-ViT, eager: the one that all others are compared with, in turn
    torch-compile  the same, its loss compiled by torch.compile (keras-torch-compile: the blocks)
    dit            diffusers' DiTTransformer2DModel, with blocks to equal the U-ViT's multiply-adds

`ratio` is the time of "torch" by that of the row: above 1 is faster than plain PyTorch.
`mfu` is 6 floating-point operations per multiply-accumulate and image, by what the device could do
(--device-tflops: 989 for an H100 in bfloat16). One warm-up precedes the turns; `first_seconds` is
the first turn, compiling included. --profile adds, for each, the operations that take longest.
"""

import argparse
import functools
import json
import os
import sys

import side_by_side

SIZES = {
    "tiny": dict(image_shape=(8, 8, 1), hidden_dim=16, num_layers=3, num_heads=2),
    "S/2": dict(image_shape=(32, 32, 3), hidden_dim=512, num_layers=13, num_heads=8),
    "L/2": dict(image_shape=(32, 32, 4), hidden_dim=1024, num_layers=21, num_heads=16),
    "H/2": dict(image_shape=(32, 32, 4), hidden_dim=1152, num_layers=29, num_heads=16),
}
CLASSES = {"tiny": 10, "S/2": None, "L/2": 1000, "H/2": 1000}
# Blocks of a DiT with the multiply-adds of a U-ViT so wide: it has no long skips.
DIT_LAYERS = {"tiny": 3, "S/2": 14, "L/2": 23, "H/2": 31}
KERAS = ["keras-jax", "keras-tensorflow", "keras-torch", "keras-torch-compile"]
CONTENDERS = [*KERAS, "torch-compile", "dit"]
COLUMNS = [
    "size",
    "batch_size",
    "dtype",
    "remat",
    "contender",
    "seconds",
    "rival_seconds",
    "ratio",
    "images_per_s",
    "mfu",
    "first_seconds",
    "peak_gib",
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--sizes", nargs="+", default=["S/2"], choices=list(SIZES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--remat", action="store_true", help="recompute blocks (Keras only)")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--device-tflops", type=float, help="the device's peak, for `mfu`")
    parser.add_argument("--profile", action="store_true", help="name the longest operations")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        side_by_side.serve(functools.partial(prepare, json.loads(options.contend)))
        return
    rows = []
    for size in options.sizes:
        for batch_size in options.batch_sizes:
            for dtype in options.dtypes:
                rows += compare(size, batch_size, dtype, options)
    print(side_by_side.report(rows, COLUMNS))
    sys.exit(any("failed" in row for row in rows))


def compare(size, batch_size, dtype, options):
    job = dict(size=size, batch_size=batch_size, dtype=dtype, steps=options.steps)

    def recomputes(name):
        return options.remat and name.startswith("keras")

    def started(name):
        return starter_of(__file__, {**job, "remat": recomputes(name)}, name)

    rows, contenders = [], [started(name) for name in options.contenders]
    for row in side_by_side.measure(started("torch"), contenders, options.turns, options.profile):
        for key in ("seconds", "fastest", "slowest", "rival_seconds", "ms", "calls"):
            if row.get(key):
                row[key] = round(row[key] / options.steps, 5)
        if "seconds" in row:
            row |= speed(row, batch_size, options.device_tflops)
        rows.append({**row, **job, "remat": recomputes(row["contender"])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def speed(row, batch_size, device_tflops):
    rate = batch_size / row["seconds"]
    flops = 6 * row["gmacs"] * 1e9 * rate
    mfu = round(flops / device_tflops / 1e12, 3) if device_tflops else None
    return {"images_per_s": round(rate, 3), "mfu": mfu}


def starter_of(script, job, name):
    """Starts one contender of a script."""
    command = [script, "--contend", json.dumps({**job, "contender": name})]
    framework = name.split("-")[1] if name.startswith("keras") else "torch"
    return functools.partial(side_by_side.Contender, name, command, framework)


# A contender's side -------------------------------------------------------------------------------


def prepare(job):
    side = prepare_keras if job["contender"].startswith("keras") else prepare_torch
    return side(job)


def data(job):
    import numpy as np

    rng = np.random.default_rng(0)
    size, count = job["size"], job["batch_size"]
    image = rng.standard_normal((count, *SIZES[size]["image_shape"]), "float32")
    label = rng.integers(0, CLASSES[size], count) if CLASSES[size] else None
    return image, label


def prepare_keras(job):
    """The step that `fit` runs, on a batch that lies on the device."""
    from keras import ops

    from keras_uvit import DiffusionModel, UViT
    from keras_uvit.evaluation import count_macs

    policy = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}.get(
        job["dtype"], job["dtype"]
    )
    network = UViT(
        patch_size=2,
        num_classes=CLASSES[job["size"]],
        remat=job["remat"],
        dtype=policy,
        **SIZES[job["size"]],
    )
    model = DiffusionModel(network)
    model.compile(jit_compile=job["contender"] != "keras-torch")
    image, label = data(job)
    batch = {"image": image} if label is None else {"image": image, "label": label}
    step = step_function(model, {key: ops.convert_to_tensor(v) for key, v in batch.items()})

    def turn():
        for _ in range(job["steps"]):
            logs = step()
        float(logs["loss"])  # waits for the device

    return turn, {"gmacs": round(count_macs(network) / 1e9, 3)}


def step_function(model, batch):
    """One call is one step of `fit`, state and all; returns the logs."""
    backend = os.environ["KERAS_BACKEND"]
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    if backend != "jax":
        wrap = iter if backend == "tensorflow" else list
        return lambda: model.train_function(wrap([batch]))
    state = [
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]

    def step():
        nonlocal state
        logs, state = model.train_function(state, iter([batch]))
        return logs

    return step


def prepare_torch(job):
    import torch
    from rivals import DiT, PlainUViT, Trainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = dict(SIZES[job["size"]], patch_size=2, num_classes=CLASSES[job["size"]])
    if job["contender"] == "dit":
        shape["num_layers"] = DIT_LAYERS[job["size"]]
    with torch.device(device):  # 501M random numbers take a CPU seconds
        network = DiT(**shape) if job["contender"] == "dit" else PlainUViT(**shape)
    compiled = job["contender"] == "torch-compile"
    trainer = Trainer(network, compiled, getattr(torch, job["dtype"]))
    image, label = data(job)
    image = torch.tensor(image, device=device).permute(0, 3, 1, 2).contiguous()
    label = None if label is None else torch.tensor(label, device=device)

    def turn():
        for _ in range(job["steps"]):
            loss = trainer.step(image, label)
        float(loss)  # waits for the device, once a turn, as Keras does

    return turn, {"gmacs": round(macs(network, image[:1], label) / 1e9, 3)}


def macs(network, image, label):
    """Multiply-accumulates of one image, counted by PyTorch itself."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # Fused attention on a CPU is not counted; its plain form is.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(image, torch.ones(1, device=image.device), None if label is None else label[:1])
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    main()
