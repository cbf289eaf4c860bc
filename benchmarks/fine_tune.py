"""Is fine-tuning worth it: digits 5 to 9 by a model of digits 0 to 4, and from scratch?

    KERAS_BACKEND=jax python benchmarks/fine_tune.py --out OUT --rates     (learning rates first)
    KERAS_BACKEND=jax python benchmarks/fine_tune.py --out OUT

A small U-ViT is trained on the digits 0 to 4 by flow matching, as `presets.for_data` would. Then
the digits 5 to 9 are learned in three ways, with three seeds each: all weights from there, low-rank
pairs and the table of labels alone, and a model that begins at random weights. The table of labels
is made anew in each case. After 100, 300 and 1,000 steps 250 digits are drawn: `right` is how many
of them a classifier of real digits reads as the digit that was asked for, `distance` the Fréchet
distance of their pixels to the real ones. A run that is done is kept, so the same command resumes.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
from sklearn.svm import SVC

from keras_uvit import DiffusionModel, UViT, data, evaluation, presets, progress, training
from keras_uvit.presets.own_data import OBJECTIVES

NETWORK = dict(image_shape=(8, 8, 1), hidden_dim=64, num_layers=5, num_heads=4, num_classes=5)
BATCH = 32
BASE_STEPS = 3000
STEPS = (100, 300, 1000)
SEEDS = (0, 1, 2)
# The learning rates that were best of RATES after 100 steps with another seed (--rates); of LoRA
# also the lowest, because 8e-3 is not stable for 1,000 steps.
WAYS = {
    "all weights, rate 2e-3": 2e-3,
    "LoRA, rate 2e-3": 2e-3,
    "LoRA, rate 8e-3": 8e-3,
    "from scratch, rate 8e-3": 8e-3,
}
RATES, RATES_SEED = (2e-3, 4e-3, 8e-3), 9
RANK = 8


def digits(split, first):
    """Five classes of the bundled digits, numbered from 0."""
    both = data.digits(split)
    wanted = (both["label"] >= first) & (both["label"] < first + 5)
    return {"image": both["image"][wanted], "label": both["label"][wanted] - first}


def batches(arrays, seed):
    """Endless batches, in a new order each time around."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(arrays["label"]))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            yield {key: value[rows] for key, value in arrays.items()}


def fresh(seed):
    return DiffusionModel(UViT(**NETWORK), **OBJECTIVES["flow"][0], ema_decay=0.99, seed=seed)


def base(folder):
    path = folder / "digits-0-to-4.keras"
    if not path.exists():
        model = fresh(0)
        model.compile(training.adamw(2e-3, warmup_steps=100, decay_steps=BASE_STEPS - 100))
        for _, batch in zip(range(BASE_STEPS), batches(digits("train", 0), 0)):
            model.train_on_batch(batch)
        model.save(path)
    return keras.saving.load_model(path, compile=False)


def begun(way, folder, seed):
    if way.startswith("from scratch"):
        return fresh(seed)
    lora = dict(lora=RANK) if way.startswith("LoRA") else {}
    model = training.adapt(base(folder), classes={}, verbose=0, **lora)
    model.seed = seed
    return model


def run(way, rate, folder, seed):
    keras.utils.set_random_seed(seed)
    model = begun(way, folder, seed)
    model.compile(training.adamw(rate, warmup_steps=20))
    labels = np.repeat(np.arange(5), 50)
    train, test = digits("train", 5), digits("test", 5)
    reader = SVC().fit(train["image"].reshape(-1, 64) / 255.0, train["label"])
    real = np.concatenate([part["image"] for part in (train, test)]).reshape(-1, 64) / 255.0
    source, result, pictures, seconds = batches(train, seed), {}, {}, []
    for step in range(1, max(STEPS[:1] if seed == RATES_SEED else STEPS) + 1):
        start = time.perf_counter()
        keras.ops.convert_to_numpy(model.train_on_batch(next(source))[0])
        seconds.append(time.perf_counter() - start)
        if step in STEPS:
            images = model.generate(labels=labels, seed=seed, verbose=0, **presets.FAST)
            flat = images.reshape(-1, 64) / 255.0
            right = float((reader.predict(flat) == labels).mean())
            distance = float(evaluation.frechet_distance(flat, real))
            result[step] = dict(right=right, distance=distance)
            pictures[str(step)] = images[::50]
    weights = [sum(int(np.prod(w.shape)) for w in model.trainable_variables)]
    return dict(result=result, seconds=float(np.median(seconds)), weights=weights[0]), pictures


def measured(way, rate, folder, seed):
    path = folder / f"{way.split(',')[0].replace(' ', '-')}-{rate:g}-{seed}.json"
    if not path.exists():
        found, pictures = run(way, rate, folder, seed)
        np.savez(path.with_suffix(".npz"), **pictures)
        path.write_text(json.dumps(found), encoding="utf-8")
        progress.say(f"{path.stem}: {found['result']}")
    found = json.loads(path.read_text(encoding="utf-8"))
    found["images"] = np.load(path.with_suffix(".npz"))
    return found


def table(folder):
    lines = [
        f"| | weights | {' | '.join(map(str, STEPS))} | ms a step |",
        "|---" * (3 + len(STEPS)) + "|",
    ]
    for way, rate in WAYS.items():
        runs = [measured(way, rate, folder, seed) for seed in SEEDS]
        cells = []
        for step in map(str, STEPS):
            values = [[r["result"][step][key] for r in runs] for key in ("distance", "right")]
            (d, spread), right = (np.mean(values[0]), np.ptp(values[0]) / 2), np.mean(values[1])
            cells.append(f"{d:.2f} ± {spread:.2f}, {right:.2f}")
        ms = 1000 * np.median([r["seconds"] for r in runs])
        lines.append(f"| {way} | {runs[0]['weights']:,} | {' | '.join(cells)} | {ms:.1f} |")
    return "\n".join(lines)


def picture(folder, path):
    """A row for each way and seed: five digits after each number of steps."""
    rows = []
    for way, rate in WAYS.items():
        for seed in SEEDS:
            images = measured(way, rate, folder, seed)["images"]
            rows.append(np.concatenate([images[str(step)] for step in STEPS]))
    grid = evaluation.image_grid(np.concatenate(rows), columns=len(rows[0]), zoom=4)
    evaluation.write_png(path, grid)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="fine_tune", type=Path)
    parser.add_argument("--rates", action="store_true", help="compare learning rates, one seed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    base(options.out)
    if options.rates:
        for way in WAYS:
            for rate in RATES:
                measured(way, rate, options.out, RATES_SEED)
        return
    progress.say(table(options.out))
    picture(options.out, options.out / "fine_tune.png")


if __name__ == "__main__":
    main()
