"""What `fit` accepts, and the checks that come before anything is compiled.

A batch is a dict: one of

* "image": `(B, H, W, C)`, uint8 in [0, 255] or float in [-1, 1], for models of pixels;
* "latent": `(B, h, w, c)` float, already multiplied by the scale factor;
* "moments": `(B, h, w, 2 c)` float, mean and log-variance as the autoencoder gives them: a new
  posterior sample is drawn at each visit, and multiplied by the model's `latent_scale`;

and, where the network asks for it,

* "label": `(B,)` integers in [0, num_classes);
* "context": `(B, length, width)` float text features.

`fit(images)` and `fit(images, labels)` are short for dicts with "image" and "label".
"""

import itertools
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend
from keras_uvit.encoders import compatibility
from keras_uvit.pixels import PerChannel
from keras_uvit.training import arguments
from keras_uvit.types import Tensor

Batch = dict[str, Any]
DATA = ("image", "latent", "moments")


def as_dict(data: Any) -> Batch:
    """A batch as a dict, from what Keras hands to `train_step` or a user to `fit`."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    arguments.checked("fit", {"sample_weight": weight})
    if not isinstance(x, dict):
        return {"image": x} if y is None else {"image": x, "label": y}
    if y is not None:
        raise ValueError('Batches are dicts: put labels under "label" and leave `y` out.')
    return x


def check_source(model: Any, x: Any, y: Any = None, batch_size: int | None = None) -> Any:
    """Checks training or validation data, and returns it in a form that Keras takes.

    Arrays are checked whole, and are one dict then, with `y` among them; of anything else (tf.data,
    Grain, `PyDataset`, `DataLoader`, generator) the first batch is. Keras wants tuples from a
    generator, so its dicts are wrapped.
    """
    if isinstance(x, types.GeneratorType):
        first = _plain(next(x, None))
        x = (as_tuple(_plain(batch)) for batch in itertools.chain([first], x))
    elif x is None or is_arrays(x):
        first = x = x if x is None else _plain(as_dict((x, y)))
    elif isinstance(x, str) or not (hasattr(x, "__iter__") or hasattr(x, "__getitem__")):
        raise TypeError(
            "Training and evaluation need arrays, or data that come in batches, such as "
            "`data.image_folder(path, image_size)`, `data.LatentDataset(path, batch_size)` or "
            f"`data.images.in_memory(source)`. Received: {x!r:.200}."
        )
    elif isinstance(x, keras.utils.PyDataset):
        if _is_cache(x):
            compatibility.check_cache(model, x)
        first = x[0]
    else:
        first = next(iter(x), None)
        is_loader = type(x).__module__.startswith("torch.")
        if is_loader and isinstance(first, dict) and not backend.TAKES_LOADERS_OF_DICTS:
            raise ValueError(
                "Keras takes a DataLoader only if it yields tuples: let the data set return "
                "`(item,)` instead of `item`."
            )
    if first is None:
        raise ValueError("The data set is empty: it gave no batch.")
    first = as_dict(first)
    check_batch(model, first)
    length = len(next(iter(first.values())))
    _check_division(x, length, batch_size)
    if not is_arrays(x) and batch_size not in (None, length * backend.data_shard()[1]):
        raise ValueError(
            f"The data come in batches, whose size batch_size={batch_size} cannot change: the "
            f"first has {length}. Leave batch_size out."
        )
    if _is_cache(x):
        compatibility.check_latents(model, x, "The cache")
    if getattr(x, "contexts", None) is not None:
        compatibility.check_contexts(model, x.contexts, "The cache")
    return x


def adopt(model: Any, x: Any) -> None:
    """Notes in a model whose latents and contexts it is going to learn from checked data `x`."""
    if _is_cache(x):
        compatibility.adopt_latents(model, x)
    if getattr(x, "contexts", None) is not None:
        compatibility.adopt_contexts(model, x.contexts)
    elif model.network.context_shape is not None and model.context_encoder is None:
        compatibility.adopt_arrays(model)


def clean(
    batch: Batch,
    latent_scale: PerChannel | None,
    normal: Callable[[Any], Tensor],
    latent_shift: PerChannel = 0.0,
) -> Tensor:
    """x0 of a batch, float32 `(B, H, W, C)`.

    Images come to [-1, 1]; moments become latent_scale (z - latent_shift) of a sample z of the
    posterior.

    Args:
        batch: dict, as above.
        latent_scale: float or one per channel, or None for a model of pixels.
        normal: function of a shape to standard normal numbers.
        latent_shift: float or one per channel.
    """
    if "image" in batch:
        image = ops.convert_to_tensor(batch["image"])
        is_bytes = keras.backend.standardize_dtype(image.dtype) == "uint8"
        image = ops.cast(image, "float32")
        return image / 127.5 - 1.0 if is_bytes else image
    if "latent" in batch:
        return ops.cast(batch["latent"], "float32")
    mean, log_variance = ops.split(ops.cast(batch["moments"], "float32"), 2, axis=-1)
    std = ops.exp(0.5 * ops.clip(log_variance, -30.0, 20.0))
    scale, shift = (
        ops.convert_to_tensor(np.asarray(v, "float32")) for v in (latent_scale, latent_shift)
    )
    return scale * (mean + std * normal(ops.shape(mean)) - shift)


def condition(
    batch: Batch, network: Any, null_context: Tensor | None, dropped: Tensor | None = None
) -> dict[str, Tensor]:
    """The "label" and "context" inputs of a network, replaced by "none" where `dropped`.

    Args:
        batch: dict, as above.
        network: what the model trains.
        null_context: `(length, width)`, the context of "none"; or None without contexts.
        dropped: `(B,)` bool, or None to keep all.
    """
    inputs = {}
    if network.num_classes is not None:
        label = ops.cast(batch["label"], "int32")
        if dropped is not None and network.null_label is not None:
            label = ops.where(dropped, network.null_label, label)
        inputs["label"] = label
    if network.context_shape is not None:
        context = ops.cast(batch["context"], "float32")
        if dropped is not None:
            null = ops.convert_to_tensor(null_context)
            context = ops.where(dropped[:, None, None], null, context)
        inputs["context"] = context
    return inputs


def _check_division(x, length, batch_size):
    """Raises unless every device gets equally many samples of each batch."""
    replicas, (_, processes) = backend.replicas(), backend.data_shard()
    if is_arrays(x):
        size = batch_size or 32
        sizes = {min(size, length), length % size}
    else:
        sizes = {length * processes}
    uneven = [size for size in sizes if size % replicas]
    if uneven:
        near = max(1, round(uneven[0] / replicas)) * replicas
        raise ValueError(
            f"A batch of {uneven[0]} cannot be divided among {replicas} devices; the nearest that "
            f"can has {near}. (batch_size is that of all devices together; arrays whose last batch "
            "is smaller must be cut.)"
        )


def _is_cache(x):
    return hasattr(x, "sample_shape")  # tf.data has a `fingerprint` too


def as_tuple(batch: Any) -> tuple:
    return batch if isinstance(batch, tuple) else (batch,)


def is_arrays(x: Any) -> bool:
    """Whether it is all of the data, and not something that yields batches."""
    return isinstance(x, dict | np.ndarray) or ops.is_tensor(x)


def _plain(batch):
    """The batch in types that all backends have: no big-endian numbers, no uint64 on PyTorch."""
    if not isinstance(batch, dict):
        return batch
    plain = dict(batch)
    for key, value in batch.items():
        if isinstance(value, np.ndarray):
            dtype = value.dtype.newbyteorder("=")
            dtype = "int64" if key == "label" and dtype == "uint64" else dtype
            plain[key] = value.astype(dtype, copy=False)
    return plain


def split(arrays: Batch, share: float) -> tuple[Batch, Batch]:
    """The arrays without their last part, and this part, as Keras' `validation_split` takes it."""
    length = len(next(iter(arrays.values())))
    first = math.floor(length * (1 - share))
    if not 0 < first < length:
        raise ValueError(
            f"validation_split={share} leaves one part of {length} images without any. It is a "
            "share between 0 and 1."
        )
    before = {key: value[:first] for key, value in arrays.items()}
    return before, {key: value[first:] for key, value in arrays.items()}


def check_inputs(network: keras.Model, x: Any) -> Any:
    """Checks what `predict` is given, as Keras loses the weights on JAX where arrays do not fit.

    Returns it in a form that Keras takes.
    """
    if not is_arrays(x):
        return x
    wanted = {tensor.name: tuple(tensor.shape[1:]) for tensor in network.inputs}
    given = x if isinstance(x, dict) else {"x": x}
    given = {name: tuple(ops.shape(value)[1:]) for name, value in given.items()}
    if given != wanted:
        raise ValueError(
            "predict gives what the network gives for a dict of its inputs, whose shapes without "
            f"the batch are {wanted}. Received: {given}. (`generate` draws images.)"
        )
    return _plain(x)


def check_batch(model: Any, batch: Batch) -> None:
    """Raises unless `batch` is what `model` can be trained on: keys, shapes, dtypes, ranges."""
    _check_batched(batch, model.network.image_shape[-1])
    wanted = [key for key in ("label", "context") if key in _inputs(model)]
    data = [key for key in DATA if key in batch]
    unknown = sorted(set(batch) - {*DATA, *wanted})
    missing = [key for key in wanted if key not in batch]
    if len(data) != 1 or unknown or missing:
        raise ValueError(
            f"A batch for this model has one of {DATA} and {wanted or 'nothing else'}. Received "
            f"the keys {sorted(batch)}."
            + (
                " The network has no labels: drop them or build it with num_classes."
                if "label" in unknown
                else ""
            )
        )
    (key,) = data
    arrays = {name: ops.convert_to_numpy(value) for name, value in batch.items()}
    foreign = [name for name, value in arrays.items() if not value.dtype.isnative]
    if foreign:
        raise ValueError(
            f"{foreign} have a foreign byte order, which JAX and PyTorch cannot read. "
            'Convert the batches: `x.astype(x.dtype.newbyteorder("="))`.'
        )
    lengths = {name: value.shape[0] if value.ndim else 0 for name, value in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            f"All parts of a batch have the same, positive length. Received: {lengths}."
        )
    _check_data(model, key, arrays[key])
    if "label" in arrays:
        _check_labels(model.network.num_classes, arrays["label"])
    if "context" in arrays:
        _check_shape("context", arrays["context"], model.network.context_shape)
        _check_finite("context", arrays["context"])


def _check_batched(batch, channels):
    for key in {*DATA} & {*batch}:
        if len(batch[key].shape) == 3 and batch[key].shape[-1] in (channels, 2 * channels):
            raise ValueError(
                f"Expected batches. Received a single sample: {key!r} of shape "
                f"{tuple(batch[key].shape)}. Batch it: `dataset.batch(32)` for tf.data and Grain, "
                "`torch.utils.data.DataLoader(dataset, batch_size=32)` for PyTorch, `x[None]` for "
                "one array."
            )


def _inputs(model):
    return {tensor.name for tensor in model.network.inputs}


def _check_data(model, key, value):
    if (key == "image") != (model.latent_scale is None):
        space = "pixels" if model.latent_scale is None else "latents"
        keys = "'image'" if model.latent_scale is None else "'latent' or 'moments'"
        raise ValueError(
            f"This model works on {space} (latent_scale={model.latent_scale}), so its batches "
            f"have {keys}. Received: {key!r}."
        )
    height, width, channels = model.network.image_shape
    _check_shape(key, value, (height, width, channels * (2 if key == "moments" else 1)))
    if key == "image" and value.dtype == np.uint8:
        return
    if not np.issubdtype(value.dtype, np.floating) and value.dtype.name != "bfloat16":
        kinds = "uint8 or float" if key == "image" else "float"
        raise TypeError(f"{key!r} must be {kinds}. Received: dtype {value.dtype}.")
    _check_finite(key, value)
    if key != "image":
        compatibility.check_std(model, key, value)
        return
    low, high = float(value.min()), float(value.max())
    if low < -1.001 or high > 1.001:
        raise ValueError(
            "Float images are in [-1, 1]. Received values in "
            f"[{low:.4g}, {high:.4g}]; pass uint8, or x / 127.5 - 1."
        )
    if low >= 0 and value.size > 1000:
        warnings.warn(
            "All float images are >= 0. Images are expected in [-1, 1]; if yours are in "
            "[0, 1], pass 2 x - 1.",
            stacklevel=2,
        )


def _check_shape(key, value, shape):
    if tuple(value.shape[1:]) != tuple(shape):
        hint = ""
        if value.ndim == 4 and tuple(value.shape[1:]) == (shape[-1], *shape[:-1]):
            hint = " Channels come last: np.transpose(x, (0, 2, 3, 1))."
        if (*value.shape[1:], 1) == tuple(shape):
            hint = " Add the axis of channels: x[..., None]."
        raise ValueError(
            f"{key!r} must have shape (batch, {', '.join(map(str, shape))}). "
            f"Received: {tuple(value.shape)}.{hint}"
        )


def _check_finite(key, value):
    bad = ~np.isfinite(np.asarray(value, "float32").reshape(len(value), -1)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{key!r} holds NaN or infinity in {bad.sum()} of {len(value)} items, the first at "
            f"index {int(np.argmax(bad))}."
        )


def _check_labels(num_classes, labels):
    if labels.ndim == 2 and labels.shape[1] == num_classes and num_classes > 1:
        raise ValueError(
            f"Labels are integers, not one-hot rows. Received shape {labels.shape}; "
            "use np.argmax(labels, axis=1)."
        )
    if labels.ndim != 1:
        raise ValueError(f"Labels must have shape (batch,). Received: {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Labels must be integers. Received: dtype {labels.dtype}.")
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        raise ValueError(
            f"Labels must be in [0, {num_classes}). Received {labels[bad][0]} at index "
            f"{int(np.argmax(bad))}. (The 'no label' row is added by the model itself.)"
        )
