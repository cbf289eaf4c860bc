"""How fast latents are read: the cache beside one `.npy` file a sample.

    KERAS_BACKEND=torch python benchmarks/data.py            (half a minute, 0.8 GB of disk)

Moments of 32x32x8 in batches of 64, shuffled, from the page cache, one process; no model, no
device. Rivals are read in turn, A B C A B C ..., each for a whole epoch; medians. A row:

    cache      `data.LatentDataset`, float16 shards
    files      one float16 `.npy` a sample, `np.load`, stacked
    pickles    the published layout: one pickled pair of float32 moments and label a sample

Aims: the cache at 30 times `files`, and 5,000 samples/s, what U-ViT-S/2 could train on at most.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from side_by_side import COMMIT

from keras_uvit import data

SHAPE = (32, 32, 8)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each (%(default)s)")
    parser.add_argument("--folder", help="where to write the samples (a temporary folder)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for row in compare(folder, options):
            print(json.dumps(row))
    finally:
        shutil.rmtree(folder)


def compare(folder, options):
    moments, labels = write(folder, options.samples)
    dataset = data.LatentDataset(folder / "cache", options.batch_size, verbose=0)
    batches = [dataset.rows(0, k) for k in range(len(dataset))]

    def from_cache(k, rows):
        return dataset[k]

    def from_files(k, rows):
        read = [np.load(folder / "files" / f"{i}.npy") for i in rows]
        return {"moments": np.stack(read), "label": labels[rows]}

    def from_pickles(k, rows):
        read = [np.load(folder / "pickles" / f"{i}.npy", allow_pickle=True) for i in rows]
        stacked = np.stack([pair[0] for pair in read]).transpose(0, 2, 3, 1)
        return {"moments": stacked, "label": np.array([pair[1] for pair in read])}

    rivals = {"cache": from_cache, "files": from_files, "pickles": from_pickles}
    for read in rivals.values():  # warms the page cache, and checks that all read the same
        batch = read(0, batches[0])
        np.testing.assert_array_equal(batch["moments"].astype("float16"), moments[batches[0]])
        np.testing.assert_array_equal(batch["label"], labels[batches[0]])
    seconds = {name: [] for name in rivals}
    for _ in range(options.repeats):
        for name, read in rivals.items():
            start = time.perf_counter()
            for k, rows in enumerate(batches):
                read(k, rows)
            seconds[name].append(time.perf_counter() - start)
    return table(seconds, len(batches) * options.batch_size, options)


def write(folder, count):
    """The same random moments in the three layouts."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((count, *SHAPE), "float32").astype("float16")
    labels = rng.integers(0, 1000, count).astype("int32")
    source = data.sources.Source(
        "random",
        count,
        SHAPE,
        lambda i: {"moments": moments[i], "label": int(labels[i])},
        num_classes=1000,
        field="moments",
    )
    data.write_latents(source, folder / "cache", None, shard_size=2048, verbose=0)
    for name in ("files", "pickles"):
        (folder / name).mkdir()
    for i in range(count):
        np.save(folder / "files" / f"{i}.npy", moments[i])
        pair = np.empty(2, object)
        pair[:] = [moments[i].transpose(2, 0, 1).astype("float32"), int(labels[i])]
        np.save(folder / "pickles" / f"{i}.npy", pair)
    return moments, labels


def table(seconds, samples, options):
    speeds = {name: samples / statistics.median(times) for name, times in seconds.items()}
    print(f"{'rival':10}{'samples/s':>12}{'MB/s':>8}{'cache is':>12}")
    rows = []
    for name, speed in speeds.items():
        megabytes = speed * np.prod(SHAPE) * (4 if name == "pickles" else 2) / 1e6
        ratio = speeds["cache"] / speed
        print(f"{name:10}{speed:12,.0f}{megabytes:8,.0f}{ratio:11.1f}x")
        rows.append(
            {
                "rival": name,
                "samples_per_second": round(speed),
                "cache_ratio": round(ratio, 1),
                "samples": samples,
                "batch_size": options.batch_size,
                "repeats": options.repeats,
                "machine": platform.processor() or platform.machine(),
                "numpy": np.__version__,
                "commit": COMMIT,
            }
        )
    return rows


if __name__ == "__main__":
    main()
