"""How fast is guided sampling, beside the same network in plain PyTorch?

    python benchmarks/generate.py                                 (all: hours on a small CPU)
    python benchmarks/generate.py --contenders keras-jax --num-steps 5 --turns 3
    python benchmarks/generate.py --contenders keras-jax keras-jax-fast

Classifier-free guidance, so each step is one evaluation of a doubled batch; weights are random,
which changes no time. Keras draws with `generate(decode=False)`: noise, the compiled loop, the way
back to NumPy. The rival (`rivals.py`) is a Python loop over the same network under
`inference_mode`. `ratio` is the rival's time by the row's: above 1 is faster than plain PyTorch.
A contender whose name ends in -fast draws as `presets.FAST` says, with fewer steps than its rival.
(That later calls compile nothing is a test: tests/sampling/test_generate.py.)
"""

import argparse
import functools
import json
import sys

import numpy as np
import side_by_side
from train_step import SIZES, starter_of

KERAS = ["keras-jax", "keras-tensorflow", "keras-torch"]
CONTENDERS = [*KERAS, "torch-compile"]
FAST = [f"{name}-fast" for name in KERAS]
COLUMNS = [
    "size",
    "dtype",
    "images",
    "num_steps",
    "contender",
    "seconds",
    "rival_seconds",
    "ratio",
    "images_per_s",
    "first_seconds",
    "peak_gib",
]
CLASSES, SCALE = 1000, 2.0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS + FAST)
    parser.add_argument("--size", default="S/2", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", help="or bfloat16 (%(default)s)")
    parser.add_argument("--images", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--num-steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        side_by_side.serve(functools.partial(prepare, json.loads(options.contend)))
        return
    job = {key: getattr(options, key) for key in ("size", "dtype", "images", "num_steps")}
    rival, *contenders = (starter_of(__file__, job, n) for n in ("torch", *options.contenders))
    rows = []
    for row in side_by_side.measure(rival, contenders, options.turns):
        if "seconds" in row:
            row["images_per_s"] = round(options.images / row["seconds"], 4)
        rows.append({**job, **row})
        print(json.dumps(rows[-1]), flush=True)
    print(side_by_side.report(rows, COLUMNS))
    sys.exit(any("failed" in row for row in rows))


def prepare(job):
    side = prepare_keras if job["contender"].startswith("keras") else prepare_torch
    return side(job, np.arange(job["images"]) * 7 % CLASSES)


def shape_of(job):
    height, width, _ = SIZES[job["size"]]["image_shape"]
    return {**SIZES[job["size"]], "image_shape": (height, width, 4), "patch_size": 2}


def prepare_keras(job, labels):
    from keras_uvit import DiffusionModel, UViT, presets

    policy = {"bfloat16": "mixed_bfloat16"}.get(job["dtype"], job["dtype"])
    network = UViT(num_classes=CLASSES, dtype=policy, **shape_of(job))
    model = DiffusionModel(network, guidance_scale=SCALE, num_steps=job["num_steps"])
    way = presets.FAST if job["contender"].endswith("-fast") else {}
    num_steps = way.get("num_steps", job["num_steps"])
    options = dict(labels=labels, decode=False, verbose=0)
    return lambda: model.generate(**options, **way), {"num_steps": num_steps}


def prepare_torch(job, labels):
    import torch
    from rivals import PlainUViT, sample

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        network = PlainUViT(num_classes=CLASSES, **shape_of(job)).eval()
    if job["contender"] == "torch-compile":
        network = torch.compile(network)
    height, width, channels = shape_of(job)["image_shape"]
    label = torch.tensor(labels, device=device)
    times = np.linspace(1.0, 0.01, job["num_steps"] + 1)
    dtype = getattr(torch, job["dtype"])

    def turn():
        noise = torch.randn(len(label), channels, height, width, device=device)
        sample(network, noise, label, CLASSES, SCALE, times, dtype).cpu().numpy()

    return turn, {}


if __name__ == "__main__":
    main()
