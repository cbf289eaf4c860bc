"""What does a network of 8-bit integers cost in quality, and what does it save?

    KERAS_BACKEND=jax python benchmarks/quantize.py   (2 minutes, 2 cores)

The models that ship, before and after `model.quantize("int8")`, draw the same images from the same
noise by 15 steps of dpm_solver_pp_2m, and are scored as benchmarks/shortcuts.py scores. Columns:

    megabytes  of the file that `save` writes (both networks)
    seconds    of one call of `generate` for 64 images, the median of `--turns` after a first one;
               float32 and int8 in turn
    difference mean over pixels, in levels of 255, between float32 and int8
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from shortcuts import Digits, Shapes
from side_by_side import COMMIT, table

from keras_uvit import presets

FEW = dict(sampler="dpm_solver_pp_2m", num_steps=15)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=250, help="digits a seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timed calls (%(default)s)")
    parser.add_argument("--model", choices=("digits", "shapes"), help="one of them alone")
    options = parser.parse_args()
    for name, make in {"digits": Digits, "shapes": Shapes}.items():
        if options.model in (None, name):
            count = options.images if name == "digits" else options.images // 2
            compare(make(count), options)


def compare(task, options):
    models = {"float32": task.model, "int8": presets.load(task.name, weights="pretrained")}
    models["int8"].quantize("int8")
    seconds = in_turn(models, task, options.turns)
    rows, drawn = [], {}
    for name, model in models.items():
        drawn[name] = [draw(model, task.wanted, seed) for seed in range(options.seeds)]
        scores = [task.score(images) for images in drawn[name]]
        pairs = zip(drawn["float32"], drawn[name])
        far = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in pairs]
        row = {"network": name, "megabytes": megabytes(model), "seconds": seconds[name]}
        for key in scores[0]:
            values = [score[key] for score in scores]
            row[key] = float(np.mean(values))
            row[f"{key}_spread"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        row |= {"difference": float(np.mean(far)), "backend": keras.config.backend()}
        rows.append(row | {"model": task.name, "commit": COMMIT})
        print(json.dumps(rows[-1]), flush=True)
    scores = [key for score in task.better for key in (score, f"{score}_spread")]
    print(table(rows, ["network", "megabytes", "seconds", *scores, "difference"]), flush=True)


def draw(model, wanted, seed):
    return model.generate(**wanted, **FEW, seed=seed, verbose=0)


def in_turn(models, task, turns):
    """{name: median seconds of 64 images}: one model after the other, so that both see the same
    machine.
    """
    some = {key: value[:64] for key, value in task.wanted.items()}
    taken = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            draw(model, some, turn)
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def megabytes(model):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return path.stat().st_size / 1e6


if __name__ == "__main__":
    main()
