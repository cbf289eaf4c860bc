"""Can the model of shapes learn a new colour from 20 pictures?

    KERAS_BACKEND=jax python benchmarks/new_colour.py --out runs/new_colour   (50 minutes, one core)

`uvit_tiny_shapes` has seen four colours. It is trained on 20 pictures with one grey thing each, in
four ways: all weights at two learning rates; all weights, with 20 pictures of the old colours
between them; low-rank pairs, with those too. After 50, 150 and 400 steps of 20 images it draws 96
captions with other grey things (`new`: the share of right attributes, and of right colours), and 96
held-out captions of old colours (`old`: attributes), each with three seeds. Writes rows.json, a
table and samples.png.

A caption has room for 12 tokens, and "grey" is two, so the relations are "above" and "below".
"""

import argparse
import itertools
import json
from pathlib import Path

import keras
import numpy as np
from side_by_side import COMMIT, table

from keras_uvit import data, evaluation, presets, training
from keras_uvit.data import shapes
from keras_uvit.data.shapes import Scene, Thing

NAME = "uvit_tiny_shapes"
GREY = (150, 150, 150)
PICTURES, PROMPTS, BATCH = 20, 96, 20
STEPS = (0, 50, 150, 400)
WAYS = {
    "all weights, 5e-4": dict(rate=5e-4),
    "all weights, 1e-4": dict(rate=1e-4),
    "all weights, 2e-4, old pictures too": dict(rate=2e-4, old=True),
    "LoRA of rank 8, 1e-3, old pictures too": dict(rate=1e-3, old=True, lora=8),
}


GREY_THINGS = [Thing(*k) for k in itertools.product(shapes.SIZES, ["grey"], shapes.SHAPES)]
# Made before `shapes` knows of grey, which would be among them.
OLD_SCENES = shapes.scenes(PICTURES, "train"), shapes.scenes(PROMPTS, "test", seed=1)
EVERY = [*itertools.product(GREY_THINGS, ("above", "below"), shapes.THINGS)]
GREY_SCENES = [
    Scene(*EVERY[k]) for k in np.random.default_rng(0).permutation(len(EVERY))[: PICTURES + PROMPTS]
]


def source(scenes):
    return data.sources.Source(
        "shapes with grey",
        len(scenes),
        (shapes.SIDE, shapes.SIDE, 3),
        lambda k: {"image": shapes.draw(scenes[k], seed=k)},
        captions=[[str(scene)] for scene in scenes],
    )


def run(way, seed, prompts, out):
    """The scores after each number of steps, and the last images of the new prompts."""
    options = WAYS[way]
    keras.utils.set_random_seed(seed)
    model = presets.load(NAME, weights="pretrained", seed=seed)
    text = model.encoders.text_encoder
    if "lora" in options:
        model = training.adapt(model, lora=options["lora"], verbose=0)
        model.set_encoders(text_encoder=text)
    scenes = GREY_SCENES[:PICTURES] + (OLD_SCENES[0] if "old" in options else [])
    cache = out / f"cache-{len(scenes)}"
    data.write_images(source(scenes), cache, text_encoder=text, verbose=0)
    dataset = data.image_shards(cache, BATCH, seed=seed, verbose=0)
    model.compile(training.adamw(options["rate"], warmup_steps=20))
    found = {}
    for before, after in itertools.pairwise((0, *STEPS)):
        if after > before:
            model.fit(dataset, epochs=(after - before) // len(dataset), verbose=0)
        images = {
            key: model.generate(prompts=texts, seed=seed, verbose=0)
            for key, texts in prompts.items()
        }
        new, old = (shapes.score(images[key], prompts[key]) for key in ("new", "old"))
        found[after] = {"new": new["attributes"], "colour": new["colour"], "old": old["attributes"]}
    return found, images["new"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/new_colour"), help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument(
        "--only", nargs="*", default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shapes.COLOURS["grey"] = GREY
    shapes.THINGS.extend(GREY_THINGS)
    prompts = {"new": GREY_SCENES[PICTURES:], "old": OLD_SCENES[1]}
    prompts = {key: [str(scene) for scene in scenes] for key, scenes in prompts.items()}
    rows, pictures = [], []
    for way in options.only:
        runs, drawn = zip(*(run(way, k, prompts, options.out) for k in range(options.seeds)))
        pictures.append(drawn[0][:12])
        for step in STEPS:
            row = {"way": way, "steps": step}
            for key in ("new", "colour", "old"):
                values = [found[step][key] for found in runs]
                row[key] = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
            rows.append(row | {"backend": keras.config.backend(), "commit": COMMIT})
            print(json.dumps(rows[-1]), flush=True)
    (options.out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows, ["way", "steps", "new", "colour", "old"]))
    grid = evaluation.image_grid(np.concatenate(pictures), columns=12, zoom=2)
    evaluation.write_png(options.out / "samples.png", grid)


if __name__ == "__main__":
    main()
