"""Makes the caches that `LatentDataset` and `image_shards` read."""

import errno
import importlib.metadata
import math
import re
import shutil
from pathlib import Path

import keras
import numpy as np

from keras_uvit.data import manifest, sources
from keras_uvit.data.manifest import CacheError

OWN_FILE = re.compile(r"\d{5}-\w+\.npy|manifest\.json")
LEFT_OVER = re.compile(r"tmp-\d+-(\d{5}(-\w+)?|plan|manifest)\.(npy|json)")


def write_latents(
    source,
    path,
    autoencoder,
    *,
    flip=False,
    dtype="float16",
    shard_size=8192,
    batch_size=16,
    process=(0, 1),
    corrupt="raise",
    verbose=1,
):
    """Encodes images once, to train on their latents.

    Moments are kept, mean and log-variance, so that the posterior is sampled anew at each visit.
    An interrupted run goes on where it was when it is called again; several processes, on one
    machine or on many that share the folder, divide the shards among them. Samples keep the order
    of the source.

    Args:
        source: `data.sources.Source`, or uint8 images `(n, H, W, C)`, or a dict of them as "image"
            and ints as "label".
        path: folder of the cache, made if need be.
        autoencoder: `latent.AutoencoderKL`, or what has its `encode`, `moments_shape`, `factor`,
            `scale`, `id` and `fingerprint`. With a source of moments (`data.published_pickles`) it
            is the one that made them, or `None`: then `fit` cannot check that it is the model's.
        flip: bool. Store each image's mirror image right after it, as the paper does on ImageNet.
            (To mirror latents is not the same as to encode a mirrored image.)
        dtype: "float16" or "float32", of the stored moments.
        shard_size: int, images a shard. One shard is in memory, and at most one is lost by a kill.
        batch_size: int, images encoded at a time.
        process: (index, count): makes every `count`-th shard, beginning with `index`.
        corrupt: "raise" stops at a damaged image; "skip" leaves it out and lists it in the
            manifest.
        verbose: 0, or 1 for the size on disk and a progress bar.

    Returns:
        The manifest, a dict; None while other processes' shards are missing.

    Raises:
        CacheError: if the folder holds a cache made in another way.
        ValueError, TypeError: if the source and the autoencoder do not fit.
        OSError: if the disk is too small, before anything is encoded, or is full.
    """
    source = source if isinstance(source, sources.Source) else sources.arrays(source)
    if dtype not in ("float16", "float32"):
        raise ValueError(f'dtype must be "float16" or "float32". Received: {dtype!r}.')
    if source.field == "image" and autoencoder is None:
        raise ValueError("A source of images needs an autoencoder.")
    if source.field == "moments" and flip:
        raise ValueError("Moments cannot be mirrored after encoding: flip=True needs images.")

    def encode(samples):
        values = np.stack([sample[source.field] for sample in samples])
        if flip:
            values = np.stack([values, values[:, :, ::-1]], axis=1).reshape(-1, *source.shape)
        if source.field == "moments":
            return values
        return autoencoder.encode(values, batch_size=batch_size, verbose=0)

    plan = _plan(source, "moments", dtype, shard_size, flip)
    if autoencoder is not None:
        plan |= _about(source, autoencoder)
    return _write(source, Path(path), plan, encode, batch_size, process, corrupt, verbose)


def _about(source, autoencoder):
    """What the plan says of the autoencoder, the images it saw and the moments it makes."""
    if source.field == "image":
        shape, image_size = autoencoder.moments_shape(source.shape), source.shape[:2]
    else:
        shape, image_size = source.shape, [n * autoencoder.factor for n in source.shape[:2]]
    return {
        "shape": list(shape),
        "image_size": list(image_size),
        "autoencoder": {key: getattr(autoencoder, key) for key in ("id", "fingerprint", "scale")},
    }


def write_images(source, path, *, shard_size=8192, process=(0, 1), corrupt="raise", verbose=1):
    """Decodes and resizes images once, to train on pixels that do not fit in memory.

    Arguments, result and errors are those of `write_latents`. The images are stored as uint8;
    `image_shards` reads them and mirrors them as they are read.
    """
    source = source if isinstance(source, sources.Source) else sources.arrays(source)
    if source.field != "image":
        raise ValueError("write_images takes images. Use write_latents for moments.")
    plan = _plan(source, "image", "uint8", shard_size, flip=False)
    plan["image_size"] = list(source.shape[:2])

    def stack(samples):
        return np.stack([sample["image"] for sample in samples])

    return _write(source, Path(path), plan, stack, 256, process, corrupt, verbose)


def _plan(source, field, dtype, shard_size, flip):
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1. Received: {shard_size}.")
    return {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "keras_uvit": importlib.metadata.version("keras-uvit"),
        "source": source.name,
        "source_length": len(source),
        "field": field,
        "shape": list(source.shape),
        "dtype": dtype,
        "image_size": None,
        "autoencoder": None,
        "num_classes": source.num_classes,
        "class_names": source.class_names,
        "flip": "stored" if flip else "none",
        "shard_size": shard_size,
        "num_shards": math.ceil(len(source) / shard_size),
    }


def _copies(plan):
    """Samples an image."""
    return 2 if plan["flip"] == "stored" else 1


def _write(source, folder, plan, encode, batch_size, process, corrupt, verbose):
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process is (index, count), index < count. Received: {process}.")
    if corrupt not in ("raise", "skip"):
        raise ValueError(f'corrupt must be "raise" or "skip". Received: {corrupt!r}.')
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, plan)
    size = plan["shard_size"]
    own = range(index, plan["num_shards"], count)
    rows = {i: np.arange(i * size, min((i + 1) * size, len(source))) for i in own}
    missing = [i for i in own if not _is_whole(folder, i, plan, len(rows[i]))]
    for i in missing:  # what remains of a damaged one
        (folder / f"{manifest.shard_name(i)}.json").unlink(missing_ok=True)
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
    rows = {i: rows[i] for i in missing}
    _check_space(
        folder, plan, sum(map(len, rows.values())), len(own) - len(missing), len(own), verbose
    )
    bar = keras.utils.Progbar(sum(map(len, rows.values())), verbose=verbose, unit_name="image")
    for i in missing:
        arrays, skipped = _encode_shard(source, rows[i], plan, encode, batch_size, corrupt, bar)
        try:
            manifest.write_shard(folder, i, arrays, skipped=skipped, plan=manifest.digest(plan))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"The disk of {folder} is full. Shard {manifest.shard_name(i)} was not written; "
                "those before it are whole. Make room and run the same again: it goes on there.",
            ) from error
    return _finish(folder, plan)


def _agree(folder, plan):
    """Writes the plan, or raises CacheError where the folder has another one."""
    path = folder / manifest.PLAN
    if not path.is_file():
        _check_nothing_else(folder, plan)
        manifest.write_json(path, plan)
    there = manifest.read_json(path)
    other = [key for key in plan if key != "keras_uvit" and there.get(key) != plan[key]]
    if other:
        changed = "; ".join(f"{key} was {there.get(key)}, is {plan[key]}" for key in other)
        raise CacheError(
            f"{folder} holds a cache made in another way: {changed}. Choose another folder, or "
            "delete this one."
        )


def _check_nothing_else(folder, plan):
    """Raises where a folder without a plan has files that are not of this plan's shards."""
    records = list(folder.glob("[0-9]*.json"))
    ours = {file.stem for file in records if _record(file).get("plan") == manifest.digest(plan)}
    foreign = [
        file
        for file in [*records, *folder.glob("*.npy"), *folder.glob(manifest.MANIFEST)]
        if file.stem not in ours
        and not LEFT_OVER.fullmatch(file.name)
        and not (ours and OWN_FILE.fullmatch(file.name))  # of a shard that was not finished
    ]
    if foreign:
        raise CacheError(
            f"{folder} holds .npy files of something else, or .json files. Choose an empty one."
        )


def _record(path):
    """A shard's record; an empty dict for one that is damaged or missing."""
    try:
        return manifest.read_json(path)
    except (CacheError, OSError):
        return {}


def _is_whole(folder, index, plan, images):
    """Whether a shard is there, made by this plan, by its checksums."""
    record = _record(folder / f"{manifest.shard_name(index)}.json")
    try:
        return (
            record["plan"] == manifest.digest(plan)
            and record["count"] == (images - len(record["skipped"])) * _copies(plan)
            and {*record["files"]} == {plan["field"], *_labels(plan)}
            and manifest.damage(folder, record) is None
        )
    except (KeyError, TypeError, AttributeError):  # a damaged record
        return False


def _labels(plan):
    return [] if plan["num_classes"] is None else ["label"]


def _check_space(folder, plan, images, done, own, verbose):
    sample = math.prod(plan["shape"]) * np.dtype(plan["dtype"]).itemsize
    needed, free = images * _copies(plan) * sample, shutil.disk_usage(folder).free
    if verbose:
        print(  # noqa: T201
            f"{plan['source_length']} images of {plan['source']} -> {folder}: "
            f"{done} of {own} shards are there, the others take "
            f"{needed / 1e9:.3g} GB ({plan['dtype']} {plan['field']}); {free / 1e9:.3g} GB are free"
        )
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {needed / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free. Nothing was "
            "encoded. Make room or choose another folder.",
        )


def _encode_shard(source, rows, plan, encode, batch_size, corrupt, bar):
    """The shard's arrays, and its damaged images as [index, reason]."""
    encoded, labels, skipped = [], [], []
    for group in source.batches(rows, batch_size, corrupt):
        skipped += [[index, sample] for index, sample in group if isinstance(sample, str)]
        good = [(index, sample) for index, sample in group if not isinstance(sample, str)]
        if good:
            indices, samples = zip(*good)
            encoded.append(_stored(encode(samples), plan, indices))
            if _labels(plan):
                ids = np.array([sample["label"] for sample in samples], "int32")
                labels.append(np.repeat(ids, _copies(plan)))
        bar.add(len(group))
    arrays = {
        plan["field"]: np.concatenate([np.empty((0, *plan["shape"]), plan["dtype"]), *encoded])
    }
    if _labels(plan):
        arrays["label"] = np.concatenate([np.empty((0,), "int32"), *labels])
    return arrays, skipped


def _stored(values, plan, indices):
    """`values` in the plan's dtype, or ValueError where it cannot hold them."""
    if plan["dtype"] == "uint8":
        return values
    limit = np.finfo(plan["dtype"]).max
    good = np.abs(values).reshape(len(values), -1).max(axis=1) <= limit  # false for NaN
    if not good.all():
        index = indices[int(np.argmin(good)) // _copies(plan)]
        raise ValueError(
            f"Sample {index} of {plan['source']} has moments that are not finite or beyond "
            f"{plan['dtype']}. Look at the image and at the autoencoder's weights."
        )
    return values.astype(plan["dtype"])


def _finish(folder, plan):
    """Writes the manifest where no shard is missing; whoever comes last does it."""
    records = [folder / f"{manifest.shard_name(i)}.json" for i in range(plan["num_shards"])]
    if not all(path.is_file() for path in records):
        return None
    shards = [manifest.read_json(path) for path in records]
    count = sum(shard["count"] for shard in shards)
    if not count:
        raise CacheError(f"Not one image of {plan['source']} could be read.")
    content = {**manifest.read_json(folder / manifest.PLAN), "count": count, "shards": shards}
    try:
        manifest.write_json(folder / manifest.MANIFEST, content)
    except FileNotFoundError:  # another process finished, and cleared ours away
        if not (folder / manifest.MANIFEST).is_file():
            raise
    for left in folder.glob("tmp-*"):  # of killed processes
        if LEFT_OVER.fullmatch(left.name):
            left.unlink(missing_ok=True)
    return content
