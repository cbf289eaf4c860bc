"""Measures everything that needs a GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py --out OUT              (on one GPU with 80 GB)
    python benchmarks/gpu.py --out OUT --dry-run    (the same parts at toy sizes, on a CPU)
    python benchmarks/gpu.py --out OUT --parts sample remat --minutes 4

It needs a GPU build of JAX and of PyTorch, and a copy of this repository. Where Keras is missing
and there is no network, run `make gpu-bundle` elsewhere first and bring the folder .gpu-bundle
along: it is then installed into a temporary folder.

The parts are run in this order, the most valuable first, each in processes of its own:

{parts}

A part that uses up its seconds is killed, one that fails is reported, and the next ones are run.
Seconds that a part does not use are there for those after it. OUT then holds

    rows.jsonl   one JSON object per measurement, written as it comes, after one about the machine
    table.md     the tables, which are also printed last
    PART.log     what a part said, one file per part

The exit status is 0 if every part was run to its end and passed.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import parts
import side_by_side
from parts import Part

MINUTES = 8
TRAINING = ("contender", "batch_size", "remat", "seconds", "ratio", "images_per_s", "mfu")
TRAINING += ("peak_gib", "first_seconds")
SAMPLING = ("contender", "num_steps", "images", "seconds", "ratio", "images_per_s")
SAMPLING += ("peak_gib", "first_seconds")
PARITY = ("backend", "case", "precision", "error", "tolerance", "passed")
STEP = "--dtypes bfloat16 --steps 5 --turns 4"
# Where the seconds come from is in README.md. Batch sizes: two processes share 80 GB; a step keeps
# about 0.3 (H/2), 0.2 (L/2) and 0.07 (S/2) GB per image, a quarter more on JAX, and the state of
# H/2 is 10 GB. What compiles comes last, so that a slow compiler costs only its own rows.
PARTS = (
    Part(
        "parity", 90, "answers beside the published program's, float32 and bfloat16",
        "parity.py --backends {backends}", PARITY,
    ),
    Part(
        "train-H", 105, "a training step of U-ViT-H/2, 32x32x4, beside plain PyTorch",
        f"train_step.py --sizes H/2 --batch-sizes 32 {STEP} --contenders {{trained}}",
        TRAINING,
    ),
    Part(
        "train-L", 85, "the same of U-ViT-L/2, and which operations take longest",
        f"train_step.py --sizes L/2 --batch-sizes 64 {STEP} --profile --contenders {{trained}}",
        TRAINING,
    ),
    Part(
        "train-S", 70, "the same of U-ViT-S/2, 32x32x3",
        f"train_step.py --sizes S/2 --batch-sizes 256 {STEP} --contenders {{trained}}", TRAINING,
    ),
    Part(
        "sample", 100, "guided sampling by U-ViT-L/2, 50 steps and presets.FAST",
        "generate.py --size L/2 --dtype bfloat16 --images 32 --turns 2 --contenders {keras} {fast}",
        SAMPLING,
    ),
    Part(
        "remat", 30, "a training step of U-ViT-H/2 that recomputes its blocks",
        f"train_step.py --sizes H/2 --batch-sizes 64 {STEP} --remat --contenders {{trained}}",
        TRAINING,
    ),
)  # fmt: skip
# Options that come later count.
TOY = {
    "parity.py": "",
    "train_step.py": "--sizes tiny --batch-sizes 2 --steps 1 --turns 1",
    "generate.py": "--size tiny --images 2 --num-steps 3 --turns 1",
}
# Dense bfloat16 TFLOP/s of NVIDIA's data sheets; the first name that the device's contains.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


def main():
    options = parse()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    gpu = None if options.dry_run else gpu_facts()
    peak = options.peak or (1 if options.dry_run else peak_of(gpu["gpu"]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts end too
    # A process that was killed may write a moment longer.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        environment = environment_of(scratch, options.dry_run)
        facts = {**(gpu or {"gpu": "none: a dry run"}), "peak_tflops": peak, **versions()}
        parts.keep(out, {"part": "machine", **facts})
        chosen = [commanded(p, options, peak) for p in PARTS if p.name in options.parts]
        outcomes, text = [], ""
        for outcome in parts.run(chosen, options.minutes, out, environment):
            print(f"{outcome.part.name}: {outcome.status}, {outcome.seconds} s", flush=True)
            outcomes.append(outcome)
            text = f"{heading(facts, options.dry_run)}\n\n{parts.summary(outcomes)}\n"
            (out / "table.md").write_text(text, "utf-8")  # now, in case the next part ends the run
    print(text)
    sys.exit(any(outcome.status != "ok" for outcome in outcomes))


def parse():
    names = [part.name for part in PARTS]
    listed = "\n".join(f"    {p.name:10}{p.seconds:4} s   {p.about}" for p in PARTS)
    parser = argparse.ArgumentParser(
        description=__doc__.replace("{parts}", listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--parts", nargs="+", default=names, choices=names, metavar="PART", help="only these (all)"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="the parts' seconds fill them (%(default)s)"
    )
    parser.add_argument("--backends", nargs="+", default=["torch", "jax"], help="(torch jax)")
    parser.add_argument(
        "--peak",
        type=float,
        help="the device's dense bfloat16 TFLOP/s (known for H100, H200, A100)",
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, no GPU used")
    return parser.parse_args()


def compiled(contender):
    """On a GPU eager PyTorch waits for Python. (On a CPU its compiler wants one of C++.)"""
    return "keras-torch-compile" if contender == "keras-torch" else contender


def commanded(part, options, peak):
    """The part with its whole command line."""
    keras = [f"keras-{backend}" for backend in options.backends]
    words = part.command.format(
        backends=" ".join(options.backends),
        keras=" ".join(keras),
        trained=" ".join(keras if options.dry_run else map(compiled, keras)),
        fast=" ".join(f"{name}-fast" for name in keras),
    ).split()
    script = words[0]
    if script == "train_step.py" and peak:
        words += ["--device-tflops", str(peak)]
    if options.dry_run:
        words += TOY[script].split()
    return dataclasses.replace(part, command=tuple(words))


# The machine --------------------------------------------------------------------------------------


def gpu_facts():
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"No GPU: {error}. --dry-run tries every part on the CPU.")
    return dict(zip(("gpu", "driver", "memory"), line.splitlines()[0].split(", ")))


def peak_of(gpu):
    """TFLOP/s; None if unknown, and then no `mfu` is printed."""
    known = [peak for name, peak in PEAKS.items() if name in gpu]
    if not known:
        print(f"The peak of {gpu} is not in the table: there will be no mfu. --peak gives it.")
    return known[0] if known else None


def versions():
    found = {"commit": side_by_side.COMMIT, "python": platform.python_version()}
    for name in ("keras", "jax", "torch", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def environment_of(scratch, dry_run):
    """What the parts' processes see. Installs the bundle where Keras is missing."""
    paths = [str(side_by_side.ROOT), os.environ.get("PYTHONPATH")]
    if importlib.util.find_spec("keras") is None:
        paths.insert(1, install_bundle(f"{scratch}/site"))
        sys.path.append(paths[1])  # for versions()
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        # Two processes share the device.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        # What one part compiled, another need not; nothing is left from an earlier run.
        "JAX_COMPILATION_CACHE_DIR": f"{scratch}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
    }
    if dry_run:
        changes |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # Translated with less care, in half the time.
        changes |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return {**os.environ, **changes}


def install_bundle(target):
    wheels = sorted(map(str, side_by_side.BUNDLE.glob("*.whl")))
    if not wheels:
        sys.exit(f"Keras is not installed, and {side_by_side.BUNDLE} is empty: make gpu-bundle.")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-compile", "--target", target, *wheels], check=True)
    return target


def heading(facts, dry_run):
    lines = ["# Toy sizes on a CPU: the numbers mean nothing"] if dry_run else ["# GPU run"]
    lines += ["", ", ".join(f"{key} {value}" for key, value in facts.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
