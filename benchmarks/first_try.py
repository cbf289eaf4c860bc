"""What does somebody get who follows the README with pictures of their own?

    KERAS_BACKEND=torch python benchmarks/first_try.py                  (half an hour, one core)
    KERAS_BACKEND=torch python benchmarks/first_try.py --data scenes    (or fashion, captions)
    KERAS_BACKEND=jax python benchmarks/first_try.py --data scenes --patch-size 4 --steps 2500
    KERAS_BACKEND=jax python benchmarks/first_try.py --data scenes --objective flow

Three data sets, each by `presets.for_data(photos)`, `model.fit(photos)` and, without flags that
choose otherwise, nothing else: the 60,000 clothes of Fashion-MNIST; a folder of 300 pictures in
colour of four kinds of scenes (benchmarks/scenes.py); 3,000 captioned shapes. The first two are
then measured by `evaluation.report`, and of 200 held-out captions the shares of right attributes
are read back.

Appends a row for each to OUT/rows.jsonl, and writes the report's or the samples' picture.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import keras
import scenes
from own_data import fashion
from side_by_side import COMMIT

from keras_uvit import data, evaluation, presets
from keras_uvit.data import shapes
from keras_uvit.presets.own_data import OBJECTIVES

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from shapes import text_encoder  # noqa: E402


def of_fashion(folder, seed):
    source = data.sources.arrays(fashion()[0], "fashion-mnist")
    return data.images.in_memory(source, flip=False, seed=seed, verbose=0), None


def of_scenes(folder, seed):
    scenes.main(folder / "scenes", 300)
    return data.image_folder(folder / "scenes", image_size=32, seed=seed, verbose=0), None


def of_captions(folder, seed):
    source = shapes.source(3000, "train")
    text = text_encoder(source.captions, *presets.get("uvit_tiny_shapes").network["context_shape"])
    data.write_images(source, folder / "cache", text_encoder=text)
    return data.image_shards(folder / "cache", seed=seed, verbose=0), text


def judged(model, photos, text, folder, seed):
    found = evaluation.report(model, photos, folder, seed=seed, verbose=0)
    return {key: value for key, value in found.items() if key != "error"}


def read_back(model, photos, text, folder, seed):
    prompts = [str(scene) for scene in shapes.scenes(200, "test", seed)]
    model.set_encoders(text_encoder=text)
    images = model.generate(prompts=prompts, batch_size=200, seed=seed, verbose=0)
    grid = evaluation.captioned_grid(images[:24], prompts[:24], zoom=3)
    evaluation.write_png(folder / "samples.png", grid)
    return {key: round(value, 3) for key, value in shapes.score(images, prompts).items()}


TASKS = {
    "fashion": (of_fashion, judged),
    "scenes": (of_scenes, judged),
    "captions": (of_captions, read_back),
}


def run(name, out, seed, changes):
    """Trains by what is chosen for a data set, but for `changes`; a row of what came of it."""
    load, measure = TASKS[name]
    folder = out / f"{name}-{keras.config.backend()}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    photos, text = load(folder, seed)
    keras.utils.set_random_seed(seed)
    model = presets.for_data(photos, seed=seed, **changes)
    start = time.process_time()
    losses = model.fit(photos, verbose=2).history["loss"]
    minutes = (time.process_time() - start) / 60
    row = {"data": name, "backend": keras.config.backend(), "seed": seed, "commit": COMMIT}
    config = model.network.get_config()
    row |= {key: config[key] for key in ("patch_size", "hidden_dim")}
    row |= {"prediction": model.objective.prediction, "cpu_minutes": round(minutes, 1)}
    row |= {"steps": int(keras.ops.convert_to_numpy(model.step)), "loss": round(losses[-1], 4)}
    return row | measure(model, photos, text, folder, seed)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=TASKS, nargs="+", default=list(TASKS), help="(all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/first_try"), help="(%(default)s)")
    parser.add_argument("--patch-size", type=int, help="(what is chosen)")
    parser.add_argument("--hidden-dim", type=int, help="(what is chosen)")
    parser.add_argument("--objective", choices=OBJECTIVES, help="(what is chosen)")
    parser.add_argument("--steps", type=int, help="(what is chosen)")
    options = parser.parse_args()
    sizes = {"patch_size": options.patch_size, "hidden_dim": options.hidden_dim}
    network = {key: size for key, size in sizes.items() if size}
    objective, _ = OBJECTIVES.get(options.objective, ({}, ""))
    changes = {"network": network, "steps": options.steps, **objective}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.data:
        for seed in options.seeds:
            row = run(name, options.out, seed, changes)
            print(json.dumps(row), flush=True)
            with open(options.out / "rows.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
