"""How long is it from `python` to the first step and the first image?

    python benchmarks/first_minute.py                    (all backends, U-ViT-S/2: ten minutes)
    python benchmarks/first_minute.py --backends jax --preset uvit_huge_imagenet256

Each number is of a new process, in seconds:

    keras       `import keras`, median of --repeats
    keras_uvit  what `import keras_uvit` takes on top of it, both in one process, likewise
    first step  from the model's first line to the end of the first training step
    again       the same with the compiled programs of the run before: JAX keeps them where
                JAX_COMPILATION_CACHE_DIR says
    image       from the first line to one image of 10 guided steps
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from side_by_side import COMMIT, table

IMPORTS = """
import time; start = time.perf_counter()
import keras; middle = time.perf_counter()
import keras_uvit; end = time.perf_counter()
print(middle - start, end - middle)
"""
STEP = """
import sys, time
import numpy as np, keras
from keras_uvit import presets
start = time.perf_counter()
model = presets.load(sys.argv[1])
model.compile(jit_compile=keras.config.backend() != "torch")
shape, classes = model.network.image_shape, model.network.num_classes
noise = np.random.default_rng(0).standard_normal((2, *shape), "float32")
batch = {"latent": noise} if model.latent_scale else {"image": noise.clip(-1, 1)}
if classes:
    batch["label"] = np.zeros(2, "int32")
model.fit(batch, batch_size=2, verbose=0)
print(time.perf_counter() - start)
"""
IMAGE = """
import sys, time
from keras_uvit import presets
start = time.perf_counter()
model = presets.load(sys.argv[1])
what = dict(labels=[0]) if model.network.num_classes else dict(num_images=1)
model.generate(**what, num_steps=10, decode=False, verbose=0)
print(time.perf_counter() - start)
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--preset", default="uvit_small_cifar10", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="imports (%(default)s)")
    options = parser.parse_args()
    rows = []
    for backend in options.backends:
        imports = [run(IMPORTS, backend) for _ in range(options.repeats)]
        row = {"backend": backend, "preset": options.preset}
        row["keras"], row["keras_uvit"] = (statistics.median(part) for part in zip(*imports))
        with tempfile.TemporaryDirectory() as folder:
            kept = {
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            (row["first step"],) = run(STEP, backend, options.preset, **kept)
            (row["again"],) = run(STEP, backend, options.preset, **kept)
        (row["image"],) = run(IMAGE, backend, options.preset)
        rows.append({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})
        print(json.dumps({**rows[-1], "commit": COMMIT}), flush=True)
    print(table(rows, ["backend", "keras", "keras_uvit", "first step", "again", "image"]))


def run(script, backend, *arguments, **environment):
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**os.environ, **quiet, **environment}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()[-2:]]


if __name__ == "__main__":
    main()
