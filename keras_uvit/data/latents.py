"""Reads caches: batches of moments or pixels at random access, straight from mapped files."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from keras_uvit import progress
from keras_uvit.data import manifest
from keras_uvit.data.contexts import Contexts
from keras_uvit.data.images import ImageDataset
from keras_uvit.data.manifest import CacheError
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.pixels import PerChannel, per_channel
from keras_uvit.types import Array, PathLike


class ShardedArray:
    """Several mapped arrays as one: `a[rows]` gathers rows in any order.

    Args:
        parts: arrays of equal shape but for their length.
    """

    def __init__(self, parts: Iterable[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.shape = (int(self.ends[-1]), *self.parts[0].shape[1:])
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Array) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self[[rows]][0]
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"Rows are in [0, {len(self)}). Received: {rows}.")
        if (np.diff(rows) < 0).any():
            order = np.argsort(rows)
            out = np.empty((len(rows), *self.shape[1:]), self.dtype)
            out[order] = self[rows[order]]
            return out
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        first = 0
        for part, end, stop in zip(self.parts, self.ends, np.searchsorted(rows, self.ends)):
            if first < stop:
                local = rows[first:stop] - (end - len(part))
                # Checked above; with mode="raise" NumPy would copy once more.
                np.take(part, local, axis=0, out=out[first:stop], mode="clip")
            first = stop
        return out


class LatentDataset(ShuffledDataset):
    """Batches of a latent cache for `DiffusionModel.fit`.

    The files are mapped, not loaded. The order of epoch e is a pure function of (seed, e), the
    same on every backend, machine and number of processes.

    Args:
        path: folder that `write_latents` or `keras-uvit encode` made.
        batch_size: int, of all processes together, a multiple of their number; `None` is 16 on a
            CPU and 128 on an accelerator, or all samples where there are fewer.
        labels, captions: "auto" reads them where there are any; None leaves them out.
        scale, shift: floats or one per channel, other ones than the autoencoder had when the cache
            was written: moments are kept without them. See `latent_statistics`.
        seed: int.
        process: (index, count): this process gets the `index`-th of `count` equal parts of each
            batch; `None` is its place in the job.
        verify: bool. Compare all checksums now, reading every file once; otherwise only sizes.
        verbose: 0 or 1. Progress bar of the check.

    Attributes:
        manifest: dict, all that is known of the cache.
        scale, shift, autoencoder_id, fingerprint: the autoencoder's, None where the cache does not
            say.
        statistics: dict of "scale" and "shift", which bring each channel to mean 0 and variance 1,
            measured when the cache was written (see `latent_statistics`); None where that failed.
        image_size: [height, width] in pixels, or None.
        sample_shape: (h, w, 2 C) of the moments.
        num_classes: int, or None without labels.
        num_samples: int, mirror images included.
        contexts: `Contexts`, or None without captions.

    Yields dicts "moments" `(B, h, w, 2 C)` float16 or float32; with classes, "label" `(B,)` int32;
    with captions, "context" `(B, length, width)` of one of the image's captions, at random.

    Raises:
        FileNotFoundError: if there is no cache.
        CacheError: if it is unfinished, damaged (the shard is named), or holds no moments.
    """

    def __init__(
        self,
        path: PathLike,
        batch_size: int | None = None,
        *,
        labels: str | None = "auto",
        captions: str | None = "auto",
        scale: PerChannel | None = None,
        shift: PerChannel | None = None,
        seed: int = 0,
        process: tuple[int, int] | None = None,
        verify: bool = True,
        verbose: int = 1,
    ) -> None:
        self.path = Path(path)
        self.manifest, arrays, contexts = open_cache(
            self.path, "moments", labels, captions, verify, verbose
        )
        super().__init__(arrays, batch_size, seed, process, contexts)
        about = self.manifest["autoencoder"] or {}
        chosen = {"scale": scale, "shift": shift}
        found = {key: about.get(key) if v is None else v for key, v in chosen.items()}
        self.scale, self.shift = (
            None if v is None else per_channel(v, key, key == "scale") for key, v in found.items()
        )
        self.autoencoder_id = about.get("id")
        self.fingerprint = about.get("fingerprint")
        statistics = self.manifest.get("statistics")
        self.statistics = statistics and {key: tuple(v) for key, v in statistics.items()}
        self.image_size = self.manifest["image_size"]
        self.sample_shape = tuple(self.manifest["shape"])
        self.num_classes = self.manifest["num_classes"] if "label" in arrays else None


def image_shards(
    path: PathLike,
    batch_size: int | None = None,
    *,
    labels: str | None = "auto",
    captions: str | None = "auto",
    flip: bool | None = None,
    seed: int = 0,
    process: tuple[int, int] | None = None,
    verify: bool = True,
    verbose: int = 1,
) -> ImageDataset:
    """`ImageDataset` of a folder that `write_images` made, read from mapped files.

    Arguments and errors are those of `LatentDataset`; `flip` mirrors each image with probability
    1/2, drawn again each epoch. `None` does so unless there are captions, which say left and right.
    """
    content, arrays, contexts = open_cache(Path(path), "image", labels, captions, verify, verbose)
    return ImageDataset(
        arrays,
        batch_size,
        flip=contexts is None if flip is None else flip,
        contexts=contexts,
        seed=seed,
        process=process,
        num_classes=content["num_classes"] if "label" in arrays else None,
        class_names=content["class_names"],
    )


def open_cache(
    folder: Path,
    field: str,
    labels: str | None = "auto",
    captions: str | None = "auto",
    verify: bool = True,
    verbose: int = 1,
) -> tuple[dict[str, Any], dict[str, Array], Contexts | None]:
    """The manifest of a cache, its arrays by name, and its `Contexts` or None.

    Raises:
        FileNotFoundError, CacheError: see `LatentDataset`.
    """
    for name, value in [("labels", labels), ("captions", captions)]:
        if value not in ("auto", None):
            raise ValueError(f'{name} must be "auto" or None. Received: {value!r}.')
    content = manifest.read_manifest(folder)
    if content["field"] != field:
        reader = {"moments": "LatentDataset", "image": "image_shards"}[content["field"]]
        raise CacheError(f"{folder} holds {content['field']}: read it with `data.{reader}`.")
    if verify:
        _verify(folder, content["shards"], verbose)
    arrays: dict[str, Array] = {
        field: ShardedArray(_parts(folder, content, field, content["shape"]))
    }
    if labels and content["num_classes"] is not None:
        # Small: into memory.
        arrays["label"] = np.concatenate(_parts(folder, content, "label", (), "int32"))
    has_text = captions and content.get("text") is not None
    return content, arrays, _contexts(folder, content) if has_text else None


def _parts(folder, content, name, shape, dtype=None):
    """One array of every shard."""
    dtype = np.dtype(dtype or content["dtype"])
    return [manifest.open_shard(folder, record, name, shape, dtype) for record in content["shards"]]


def _contexts(folder, content):
    text = content["text"]
    try:
        about = {key: text[key] for key in ("id", "fingerprint")}
        parts = _parts(folder, content, "context", text["shape"], text["dtype"])
    except (KeyError, TypeError) as error:
        raise CacheError(f"{folder / manifest.MANIFEST} is damaged: {error!r}.") from error
    rows = [np.array(part) for part in _parts(folder, content, "captions", (2,), "int32")]
    first = 0
    for own, part in zip(rows, parts):
        if len(own) and not (own.min() >= 1 and own.sum(axis=1).max() <= len(part)):
            raise CacheError(f"{folder} is damaged: a caption is beyond its shard.")
        own[:, 0] += first
        first += len(part)
    array = ShardedArray(parts)
    return Contexts(array, np.concatenate(rows), np.array(array[0]), about)


def _verify(folder, shards, verbose):
    bar = progress.bar(len(shards), verbose, "shard")
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock
        checks = pool.map(lambda record: manifest.damage(folder, record), shards)
        for i, problem in enumerate(checks):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise CacheError(f"{folder / problem}. {manifest.AGAIN}")
            bar.update(i + 1)
