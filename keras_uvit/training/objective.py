"""The loss of a batch: clean data, random draws, conditions, the weighted error of the network."""

import keras
import numpy as np
from keras import ops

from keras_uvit import backend
from keras_uvit.diffusion import predictions, weighting

DRAWS = 4  # random tensors of a step: posterior, time, noise, condition drop-out
STREAM = 2**30  # numbers of a stream, of which each draw takes one


def begin_random(model):
    """Makes the draws a function of `model.seed`: half of the state, the other half counts steps.

    The seed is no constant of a program, so models that differ in it share a compiled one.
    """
    # Hashed, because torch adds the two halves: neighbouring seeds would overlap.
    base = int(np.random.SeedSequence(model.seed).generate_state(1)[0] >> 2)
    model.random.state.assign(np.array([base, 0], model.random.state.dtype))


def seed_random(model, stream, count):
    """Sets the state that a step draws from: a function of the seed, the stream and its count."""
    state = model.random.state
    place = ops.cast(stream * STREAM + count * DRAWS, state.dtype)
    state.assign(ops.stack([state.value[0], place]))


def loss(model, batch, network, training):
    """Mean over the batch; in validation of uniform times and unweighted, whatever trains."""
    x0 = model.clean(batch)
    t, noise, dropped = model.draw(x0) if training else model.draw(x0, "uniform")
    inputs = {
        "image": predictions.add_noise(model.schedule, t, x0, noise),
        "timestep": model.time_scale * t,
        **model.condition(batch, dropped if training else None),
    }
    output = ops.cast(network(inputs, training=training), "float32")
    target = predictions.target(model.prediction, model.schedule, t, x0, noise)
    name = model.loss_weighting if training else "uniform"
    weight = weighting.loss_weight(name, model.prediction, model.schedule, t)
    mean = ops.mean(predictions.column(weight, x0) * ops.square(output - target))
    if "label" in inputs:
        # A lookup out of range is silent on some devices, and label K would read as "none";
        # NaN makes the step skipped and counted.
        label = ops.cast(batch["label"], "int32")
        valid = ops.all((label >= 0) & (label < network.num_classes))
        mean = ops.where(valid, mean, float("nan"))
    return mean


def clean(model, batch):
    """x0, float32: images to [-1, 1], moments to a posterior sample times `latent_scale`."""
    if "image" in batch:
        image = ops.convert_to_tensor(batch["image"])
        is_bytes = keras.backend.standardize_dtype(image.dtype) == "uint8"
        image = ops.cast(image, "float32")
        return image / 127.5 - 1.0 if is_bytes else image
    if "latent" in batch:
        return ops.cast(batch["latent"], "float32")
    mean, log_variance = ops.split(ops.cast(batch["moments"], "float32"), 2, axis=-1)
    noise = _drawn(model, keras.random.normal, ops.shape(mean))
    std = ops.exp(0.5 * ops.clip(log_variance, -30.0, 20.0))
    return model.latent_scale * (mean + std * noise)


def draw(model, x0, time_sampling=None):
    """Random t `(B,)`, noise like x0, and which conditions to drop, `(B,)` bool.

    Args:
        x0: `(B, H, W, C)`.
        time_sampling: a name in `weighting.TIME_SAMPLINGS`; `None` is the model's.
    """
    count = ops.shape(x0)[:1]
    sampling = weighting.TIME_SAMPLINGS[time_sampling or model.time_sampling]
    t = model.schedule.training_time(sampling(_drawn(model, keras.random.uniform, count)))
    noise = _drawn(model, keras.random.normal, ops.shape(x0))
    dropped = _drawn(model, keras.random.uniform, count) < model.condition_dropout
    return t, noise, dropped


def _drawn(model, distribution, shape):
    # For the global batch, of which each replica takes its part: the numbers of a step do not
    # depend on how many devices there are.
    return backend.drawn(
        lambda shape: distribution(shape, dtype="float32", seed=model.random), shape
    )


def condition(model, batch, dropped=None):
    """The network's "label" and "context" inputs, replaced by "none" where `dropped`."""
    inputs = {}
    if model.network.num_classes is not None:
        label = ops.cast(batch["label"], "int32")
        if dropped is not None and model.network.null_label is not None:
            label = ops.where(dropped, model.network.null_label, label)
        inputs["label"] = label
    if model.network.context_shape is not None:
        context = ops.cast(batch["context"], "float32")
        if dropped is not None:
            null = ops.convert_to_tensor(model.null_context)
            context = ops.where(dropped[:, None, None], null, context)
        inputs["context"] = context
    return inputs
