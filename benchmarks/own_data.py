"""Which choices draw good pictures of a small data set of one's own, at equal CPU time?

    python benchmarks/own_data.py --data fashion                  (all candidates, two seeds)
    python benchmarks/own_data.py --data fashion --process 0/2    (and 1/2 beside it)
    python benchmarks/own_data.py --table

Each candidate changes one thing of the base, x0-prediction with batches of 16. A run that is done
is kept, so the same command resumes where it was. Writes --out/DATA/CANDIDATE-SEED.json, and .png
with 40 images at each guidance scale. Fashion-MNIST is read from the files of Debian's package
`dataset-fashion-mnist`, or from the folder that the variable FASHION names.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import time
from pathlib import Path

import keras
import numpy as np
import scenes

from keras_uvit import DiffusionModel, UViT, data, evaluation
from keras_uvit.diffusion.schedules import LinearPath, VPCosine
from keras_uvit.evaluation.classifier import Classifier
from keras_uvit.evaluation.metrics import within_class_spread
from keras_uvit.presets import own_data

DEBIAN = Path(os.environ.get("FASHION", "/usr/share/datasets/fashion-mnist"))


def idx(name):
    raw = gzip.decompress((DEBIAN / f"{name}-ubyte.gz").read_bytes())
    return np.frombuffer(raw, "uint8", offset=16 if "images" in name else 8)


def fashion():
    def part(name):
        images = idx(f"{name}-images-idx3").reshape(-1, 28, 28, 1)
        return {"image": images, "label": idx(f"{name}-labels-idx1").astype("int32")}

    return part("train"), part("t10k")


def shapes():
    """The captioned shapes; the class is the colour and form of the thing on the left or above."""
    known = data.shapes.COLOURS, data.shapes.SHAPES

    def part(split, count):
        source = data.shapes.source(count, split)
        images = np.stack([source.read(k)["image"] for k in range(len(source))])
        things = [data.shapes.read_back(image).first for image in images]
        labels = [
            [*known[0]].index(thing.colour) * len(known[1]) + known[1].index(thing.shape)
            for thing in things
        ]
        return {"image": images, "label": np.array(labels, "int32")}

    return part("train", 5000), part("test", 1000)


DATA = {
    "fashion": fashion,
    "shapes": shapes,
    "digits": lambda: (data.digits("train"), data.digits("test")),
    "scenes": lambda: (scenes.make(200, 0), scenes.make(1000, 1)),
}
COSINE, LINEAR = VPCosine(), LinearPath()
FLOW = dict(schedule=LINEAR, time_sampling="logit_normal")
# What each candidate changes of the base: x0-prediction, cosine schedule, sinusoidal positions,
# batches of 16, learning rate 2e-3, 128 wide, 5 layers.
OBJECTIVES = {
    "x0": {},
    "v": dict(prediction="v"),
    "epsilon": dict(prediction="epsilon"),
    "flow": dict(prediction="velocity", **FLOW),
    "flow, x0": FLOW,
    "x0, logit-normal": dict(time_sampling="logit_normal"),
}
OTHERS = {
    "batch 64": dict(batch=64),
    "learned positions": dict(network=dict(position="learned")),
    "rate 5e-4": dict(rate=5e-4),
    "rate 1e-3": dict(rate=1e-3),
    "rate 4e-3": dict(rate=4e-3),
    "mirrored": dict(flip=True),
    "width 96": dict(network=dict(hidden_dim=96)),
    "width 192": dict(network=dict(hidden_dim=192)),
    "16 patches": dict(patches=16),
    "256 patches": dict(patches=256),
    "qk_norm": dict(network=dict(qk_norm=True)),
    "balanced": dict(network=dict(init="balanced")),
    "flow, balanced": dict(prediction="velocity", network=dict(init="balanced"), **FLOW),
    "16 patches, balanced": dict(patches=16, network=dict(init="balanced")),
    "16 patches, flow, balanced": dict(
        patches=16, prediction="velocity", network=dict(init="balanced"), **FLOW
    ),
}
CANDIDATES = OBJECTIVES | OTHERS
BATCH = 16


def make(task, change, seed, steps):
    """The candidate's model, compiled for a run of so many steps."""
    shape, classes = task["image"].shape[1:], int(task["label"].max()) + 1
    patch = {8: 2, 28: 4, 32: 4, 64: 8}[shape[0]]
    if "patches" in change:
        patch = shape[0] // math.isqrt(change["patches"])
    network = dict(hidden_dim=128, num_layers=5, num_heads=4, position="sinusoidal")
    network |= dict(patch_size=patch, num_classes=classes, **change.get("network", {}))
    own = {"prediction": "x0", "schedule": COSINE}
    own |= {k: v for k, v in change.items() if k in ("prediction", "schedule", "time_sampling")}
    keras.utils.set_random_seed(seed)
    rate = dict(learning_rate=change.get("rate", 2e-3), warmup_steps=0.05, decay_steps="run")
    model = DiffusionModel(
        UViT(shape, **network),
        **own,
        ema_decay=own_data.ema_decay(steps),
        optimizer=dict(beta_1=0.9, beta_2=0.99, **rate),
        seed=seed,
    )
    model.compile()
    return model


def run(name, task, seed, options, judge):
    """Trains a candidate and measures it; writes a row and a picture."""
    (train, test), change = task, CANDIDATES[name]
    batch = change.get("batch", BATCH)
    photos = data.images.in_memory(
        data.sources.arrays(train), batch, flip=change.get("flip", False), seed=seed, verbose=0
    )
    steps = options.steps * BATCH // batch
    if "network" in change or "patches" in change:  # another cost a step: as long as the base
        facts = own_data.facts_of(photos)
        ours, base = (  # of CPU time, which other work does not disturb
            own_data.seconds_per_step(make(train, c, seed, 100), facts, time.process_time)
            for c in (change, {})
        )
        steps = round(steps * base / ours)
    model = make(train, change, seed, steps)
    start = time.process_time()
    history = model.fit(photos_forever(photos), steps_per_epoch=steps // 8, epochs=8, verbose=0)
    minutes = (time.process_time() - start) / 60
    row = dict(candidate=name, data=options.data, seed=seed, steps=steps, batch=batch)
    row |= dict(cpu_minutes=round(minutes, 2))
    row |= dict(loss=[round(float(x), 4) for x in history.history["loss"]])
    labels = np.arange(options.images) % model.network.num_classes
    grids = []
    for w in options.guidance:
        images = model.generate(labels=labels, guidance_scale=w, seed=seed, verbose=0)
        row[f"w={w}"] = score(images, labels, test, judge, train)
        grids.append(images[:40])
    zoom = max(1, 64 // train["image"].shape[1])
    out = file_of(options, name, seed)
    grid = evaluation.image_grid(np.concatenate(grids), 20, zoom)
    evaluation.write_png(out.with_suffix(".png"), grid)
    out.write_text(json.dumps(row) + "\n", encoding="utf-8")
    print(json.dumps(row), flush=True)


def file_of(options, name, seed):
    words = name.replace(" ", "-").replace(",", "")
    return Path(options.out) / options.data / f"{words}-{seed}.json"


def photos_forever(photos):
    for epoch in itertools.count():
        photos.epoch = epoch
        for k in range(len(photos)):
            yield (photos[k],)


def score(images, labels, real, judge, train):
    """What the classifier and its features say of drawn images; `floor` is training pictures'."""
    distance = evaluation.frechet_distance
    count = len(images)
    drawn, there = judge.features(images), judge.features(real["image"][:count])
    found = dict(
        agreement=(judge.classes(images) == labels).mean(),
        distance=distance(drawn, there),
        floor=distance(judge.features(train["image"][:count]), there),
        spread=within_class_spread(drawn, labels)
        / within_class_spread(there, real["label"][:count]),
    )
    return {key: round(float(value), 3) for key, value in found.items()}


def trained_judge(options, train, test):
    """The classifier of this data, kept in --out. (Of scenes it sees more than the models do.)"""
    judge = Classifier(train["image"].shape[1:], int(train["label"].max()) + 1)
    file = Path(options.out) / f"judge-{options.data}.weights.h5"
    if file.exists():
        judge.network.load_weights(file)
    else:
        real = scenes.make(2000, 5) if options.data == "scenes" else train
        judge.fit(real["image"], real["label"])
        judge.network.save_weights(file)
    right = (judge.classes(test["image"]) == test["label"]).mean()
    print(f"The classifier reads {right:.3f} of real test pictures right", flush=True)
    return judge


def table(options):
    """All rows that are there, means over seeds."""
    rows = [
        json.loads(p.read_text(encoding="utf-8"))
        for p in sorted(Path(options.out).glob("*/*.json"))
    ]
    scales = [key for key in rows[0] if key.startswith("w=")]
    print(
        "| data | candidate | seeds | steps | CPU min | "
        + " | ".join(f"agreement, distance, spread at {w}" for w in scales)
        + " |"
    )
    print("|" + "---|" * (5 + len(scales)))
    for data_name, name in dict.fromkeys((r["data"], r["candidate"]) for r in rows):
        own = [r for r in rows if (r["data"], r["candidate"]) == (data_name, name)]
        cells = []
        for w in scales:
            values = {k: [r[w][k] for r in own] for k in ("agreement", "distance", "spread")}
            cells.append(
                ", ".join(
                    f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")
                    for v in values.values()
                )
            )
        minutes = np.mean([r["cpu_minutes"] for r in own])
        print(
            f"| {data_name} | {name} | {len(own)} | {own[0]['steps']} | {minutes:.1f} | "
            + " | ".join(cells)
            + " |"
        )


def main():
    options = parse()
    if options.table:
        table(options)
        return
    (Path(options.out) / options.data).mkdir(parents=True, exist_ok=True)
    train, test = task = DATA[options.data]()
    index, parts = map(int, options.process.split("/"))
    todo = [(c, s) for s in options.seeds for c in options.only][index::parts]
    judge = trained_judge(options, train, test)
    for name, seed in todo:
        if not file_of(options, name, seed).exists():
            run(name, task, seed, options, judge)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=DATA, default="fashion")
    add(
        "--only",
        nargs="*",
        default=list(CANDIDATES),
        metavar="CANDIDATE",
        help=", ".join(CANDIDATES),
    )
    add("--seeds", type=int, nargs="*", default=[0, 1])
    add("--steps", type=int, default=1000, help="of 16 images, or as many images (%(default)s)")
    add("--images", type=int, default=400, help="to draw at each guidance scale (%(default)s)")
    add("--guidance", type=float, nargs="*", default=[1.0, 2.0])
    add("--process", default="0/1", help="0/2 and 1/2 divide the runs among two processes")
    add("--table", action="store_true", help="print what is there as a table")
    add("--out", default="runs/own-data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
