"""Makes the caches that `LatentDataset` and `image_shards` read."""

import errno
import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from keras_uvit import backend, progress
from keras_uvit.data import manifest, sources, unfinished
from keras_uvit.pixels import listed
from keras_uvit.types import Array, PathLike
from keras_uvit.version import __version__


def write_latents(
    source: sources.Source | dict[str, Array] | Array,
    path: PathLike,
    autoencoder: Any,
    *,
    text_encoder: Any = None,
    flip: bool = False,
    dtype: str = "float16",
    shard_size: int | None = None,
    batch_size: int = 16,
    process: tuple[int, int] | None = None,
    corrupt: str = "raise",
    verbose: int = 1,
) -> dict[str, Any] | None:
    """Encodes images once, to train on their latents.

    Moments are kept, mean and log-variance, so that each visit draws a new sample of the posterior.
    An interrupted run resumes when it is called again; several processes, on one
    machine or on many that share the folder, divide the shards among them. Samples keep the order
    of the source.

    Args:
        source: `data.sources.Source`, or uint8 images `(n, H, W, C)`, or a dict of them as "image"
            with ints as "label" or texts as "captions".
        path: folder of the cache, made if need be.
        autoencoder: `encoders.AutoencoderKL`, or what has its `encode`, `moments_shape`, `factor`,
            `scale`, `id` and `fingerprint`. With a source of moments (`data.published_pickles`) it
            is the one that made them, or `None`: then `fit` cannot check that it is the model's.
        text_encoder: `encoders.CLIPText`, for a source with captions: the contexts of all of them
            are kept, and the empty prompt's.
        flip: bool. Store each image's mirror image right after it, as the paper does on ImageNet.
            (To mirror latents is not the same as to encode a mirrored image. Captions that say
            left and right become false.)
        dtype: "float16" or "float32", of the stored moments and contexts.
        shard_size: int, images a shard; `None` is 8192, with captions 1024. One shard is in memory,
            and at most one is lost by a kill.
        batch_size: int, images encoded at a time.
        process: (index, count): makes every `count`-th shard, beginning with `index`. `None` is
            the place in the job (`distribution.initialize`), whose processes wait for each other.
        corrupt: "raise" stops at a damaged image; "skip" leaves it out and lists it in the
            manifest.
        verbose: 0, or 1 for the size on disk and a progress bar.

    Returns:
        The manifest, a dict; None while other processes' shards are missing.

    Raises:
        CacheError: if the folder holds a cache made in another way.
        ValueError, TypeError: if the source and the encoders do not fit.
        OSError: if the disk is too small, before anything is encoded, or is full.
    """
    source = source if isinstance(source, sources.Source) else sources.arrays(source)
    if dtype not in ("float16", "float32"):
        raise ValueError(f'dtype must be "float16" or "float32". Received: {dtype!r}.')
    if source.field == "image" and autoencoder is None:
        raise ValueError("A source of images needs an autoencoder.")
    if autoencoder is not None and not hasattr(autoencoder, "moments_shape"):
        raise TypeError(
            "An autoencoder is encoders.AutoencoderKL or has its methods; a path is read by "
            f"AutoencoderKL.from_file. Received: {autoencoder!r}."
        )
    if source.field == "moments" and flip:
        raise ValueError("Moments cannot be mirrored after encoding: flip=True needs images.")

    def encode(samples):
        values = np.stack([sample[source.field] for sample in samples])
        if flip:
            values = np.stack([values, values[:, :, ::-1]], axis=1).reshape(-1, *source.shape)
        if source.field == "moments":
            return values
        return autoencoder.encode(values, batch_size=batch_size, verbose=0)

    plan = _plan(source, "moments", dtype, shard_size, flip, text_encoder)
    if autoencoder is not None:
        plan |= _about(source, autoencoder)
    encoders = encode, text_encoder
    return _write(source, Path(path), plan, encoders, batch_size, process, corrupt, verbose)


def _about(source, autoencoder):
    """What the plan says of the autoencoder, the images it saw and the moments it makes."""
    if source.field == "image":
        shape, image_size = autoencoder.moments_shape(source.shape), source.shape[:2]
    else:
        shape, image_size = source.shape, [n * autoencoder.factor for n in source.shape[:2]]
    return {
        "shape": list(shape),
        "image_size": list(image_size),
        "autoencoder": {
            key: listed(getattr(autoencoder, key, 0.0))  # one of your own may have no shift
            for key in ("id", "fingerprint", "scale", "shift")
        },
    }


def write_images(
    source: sources.Source | dict[str, Array] | Array,
    path: PathLike,
    *,
    text_encoder: Any = None,
    shard_size: int | None = None,
    process: tuple[int, int] | None = None,
    corrupt: str = "raise",
    verbose: int = 1,
) -> dict[str, Any] | None:
    """Decodes and resizes images once, to train on pixels that do not fit in memory.

    Arguments, result and errors are those of `write_latents`. The images are stored as uint8,
    contexts as float16; `image_shards` reads them, and mirrors images as they are read.
    """
    source = source if isinstance(source, sources.Source) else sources.arrays(source)
    if source.field != "image":
        raise ValueError("write_images takes images. Use write_latents for moments.")
    plan = _plan(source, "image", "uint8", shard_size, False, text_encoder)
    plan["image_size"] = list(source.shape[:2])

    def stack(samples):
        return np.stack([sample["image"] for sample in samples])

    encoders = stack, text_encoder
    return _write(source, Path(path), plan, encoders, 256, process, corrupt, verbose)


def _plan(source, field, dtype, shard_size, flip, text_encoder):
    if (source.captions is None) != (text_encoder is None):
        raise ValueError(
            "text_encoder goes with captions, and this source has none."
            if source.captions is None
            else "The source has captions: pass text_encoder, such as encoders.CLIPText, or leave "
            "them out: dataclasses.replace(source, captions=None)."
        )
    if flip and source.captions is not None:
        warnings.warn(
            "flip=True stores mirror images under the same captions: what they say of left and "
            "right becomes false.",
            stacklevel=3,
        )
    if text_encoder is not None and not hasattr(text_encoder, "fingerprint"):
        raise TypeError(f"text_encoder is such as encoders.CLIPText. Received: {text_encoder!r}.")
    if shard_size is None:
        shard_size = 8192 if text_encoder is None else 1024
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1. Received: {shard_size}.")
    plan = {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "keras_uvit": __version__,
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
    if text_encoder is not None:
        plan["text"] = {
            "id": text_encoder.id,
            "fingerprint": text_encoder.fingerprint,
            "clean": getattr(text_encoder, "clean", False),
            "captions": hashlib.sha256(json.dumps(source.captions).encode()).hexdigest()[:16],
            "shape": list(text_encoder.context_shape),
            "dtype": "float16" if field == "image" else dtype,
        }
    return plan


def _write(source, folder, plan, encoders, batch_size, process, corrupt, verbose):
    in_job, process = process is None, process or backend.process()
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process is (index, count), index < count. Received: {process}.")
    if corrupt not in ("raise", "skip"):
        raise ValueError(f'corrupt must be "raise" or "skip". Received: {corrupt!r}.')
    folder.mkdir(parents=True, exist_ok=True)
    unfinished.agree(folder, plan)
    size = plan["shard_size"]
    own = range(index, plan["num_shards"], count)
    rows = {i: np.arange(i * size, min((i + 1) * size, len(source))) for i in own}
    missing = [i for i in own if not unfinished.is_whole(folder, i, plan, len(rows[i]))]
    for i in missing:  # what remains of a damaged one
        (folder / f"{manifest.shard_name(i)}.json").unlink(missing_ok=True)
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
    rows = {i: rows[i] for i in missing}
    _check_space(source, folder, plan, rows, len(own), verbose)
    bar = progress.bar(sum(map(len, rows.values())), verbose, "image")
    for i in missing:
        arrays, skipped = _encode_shard(source, rows[i], plan, encoders, batch_size, corrupt, bar)
        try:
            manifest.write_shard(folder, i, arrays, skipped=skipped, plan=manifest.digest(plan))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"The disk of {folder} is full. Shard {manifest.shard_name(i)} was not written; "
                "earlier shards are complete. Free disk space, then run the same again: it resumes "
                "there.",
            ) from error
    if in_job:
        backend.barrier("shards")
    return unfinished.finish(folder, plan)


def _check_space(source, folder, plan, rows, own, verbose):
    """Says how much disk the missing shards' rows take, and raises where there is not as much."""
    images = sum(map(len, rows.values()))
    parts = {f"{plan['dtype']} {plan['field']}": images * unfinished.copies(plan) * _size(plan)}
    if unfinished.caption_fields(plan):
        captions = sum(len(source.captions[k]) for own_rows in rows.values() for k in own_rows)
        name = f"{plan['text']['dtype']} contexts of {captions} captions"
        parts[name] = (captions + len(rows)) * _size(plan["text"])
    needed, free = sum(parts.values()), shutil.disk_usage(folder).free
    if verbose:
        shares = " + ".join(f"{size / 1e9:.3g} GB {name}" for name, size in parts.items())
        progress.say(
            f"{plan['source_length']} images of {plan['source']} -> {folder}: {own - len(rows)} of "
            f"{own} shards are there, the others take {shares}; {free / 1e9:.3g} GB are free"
        )
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {needed / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free. Nothing was "
            "encoded. Make room or choose another folder.",
        )


def _size(about):
    """Bytes of one array of a plan."""
    return math.prod(about["shape"]) * np.dtype(about["dtype"]).itemsize


def _encode_shard(source, rows, plan, encoders, batch_size, corrupt, bar):
    """The shard's arrays, and its damaged images as [index, reason]."""
    encode, text_encoder = encoders
    copies, labelled = unfinished.copies(plan), unfinished.label_fields(plan)
    encoded, labels, kept, skipped = [], [], [], []
    contexts = []
    if text_encoder is not None:
        contexts.append(text_encoder.null_context[None].astype(plan["text"]["dtype"]))
    for group in source.batches(rows, batch_size, corrupt):
        skipped += [[index, sample] for index, sample in group if isinstance(sample, str)]
        good = [(index, sample) for index, sample in group if not isinstance(sample, str)]
        if good:
            indices, samples = zip(*good)
            names = np.repeat(indices, copies)
            encoded.append(_stored(encode(samples), plan["dtype"], source, names))
            labels += [sample["label"] for sample in samples] if labelled else []
            kept += indices
            if text_encoder is not None:
                texts = [(k, text) for k in indices for text in source.captions[k]]
                names, texts = zip(*texts)
                values = text_encoder(list(texts), batch_size=batch_size)
                contexts.append(_stored(values, plan["text"]["dtype"], source, names))
        bar.add(len(group))
    empty = np.empty((0, *plan["shape"]), plan["dtype"])
    arrays = {plan["field"]: np.concatenate([empty, *encoded])}
    if labelled:
        arrays["label"] = np.repeat(np.array(labels, "int32"), copies)
    if text_encoder is not None:
        counts = np.array([len(source.captions[k]) for k in kept], "int32")
        first = 1 + np.cumsum(counts) - counts
        arrays["captions"] = np.repeat(np.stack([first, counts], 1), copies, 0).astype("i4")
        arrays["context"] = np.concatenate(contexts)
    return arrays, skipped


def _stored(values, dtype, source, names):
    """`values` in the dtype of the cache, or ValueError where it cannot hold them."""
    if dtype == "uint8":
        return values
    limit = np.finfo(dtype).max
    good = np.abs(values).reshape(len(values), -1).max(axis=1) <= limit  # false for NaN
    if not good.all():
        raise ValueError(
            f"Sample {names[int(np.argmin(good))]} of {source.name} is encoded to values that are "
            f"not finite or beyond {dtype}. Look at it and at the encoder's weights."
        )
    return values.astype(dtype)
