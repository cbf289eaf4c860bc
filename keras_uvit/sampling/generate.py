"""From noise to images: batches, seeds, the compiled loop."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from keras_uvit import backend, progress
from keras_uvit.checks import as_int
from keras_uvit.diffusion import samplers
from keras_uvit.pixels import from_unit_range
from keras_uvit.sampling.conditions import conditions_of, unconditional_of
from keras_uvit.sampling.guidance import denoiser
from keras_uvit.sampling.options import SamplingOptions, resolve
from keras_uvit.types import Array


@dataclasses.dataclass(frozen=True)
class Job:
    """The checked arguments of one call of `generate`."""

    conditions: dict  # of the network, one row for each image
    unconditional: dict  # the same for the other half of guidance; empty without
    total: int
    options: SamplingOptions
    seed: int
    first: int
    batch_size: int | None
    use_ema: bool
    decode: bool


def prepare(
    model: Any,
    num_images: int | None = None,
    labels: Array | None = None,
    prompts: str | Sequence[str] | Array | None = None,
    *,
    negative_prompts: str | Sequence[str] | Array | None = None,
    num_steps: int | None = None,
    sampler: str | samplers.Steps | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    use_ema: bool = True,
    decode: bool = True,
) -> Job:
    """Checks the arguments of `DiffusionModel.generate`, which describes them; draws nothing."""
    model.check_weights()
    wants = {"num_images": num_images, "labels": labels, "prompts": prompts}
    conditions, total = conditions_of(model, wants)
    if decode and model.latent_scale is not None and model.encoders.autoencoder is None:
        raise ValueError(
            "This model makes latents and has no autoencoder to decode them. Call "
            "`model.set_encoders(autoencoder=...)`, or pass decode=False to get the latents."
        )
    options = resolve(model, sampler, num_steps, guidance_scale, guidance_interval)
    return Job(
        conditions,
        unconditional_of(model, negative_prompts, total, bool(options.guided.any())),
        total,
        options,
        as_int(seed, "seed", 0),
        as_int(first, "first", 0),
        batch_size if batch_size is None else as_int(batch_size, "batch_size", 1),
        use_ema,
        decode,
    )


def draw(model: Any, job: Job, verbose: int = 1) -> np.ndarray:
    """The images of a job: uint8 pixels, or what the network sees without `decode`."""
    _warn_if_untrained(model)
    network = model.ema_network if job.use_ema else model.network
    loop, total = _loop(model, network, job.options), job.total
    weights = [w.value for w in network.variables]
    replicas = backend.replicas()
    at_once = job.batch_size or backend.images_at_once(_widest(model.network))
    size = -(-min(at_once, total) // replicas) * replicas  # every device gets as many
    bar = progress.bar(total, verbose, "image")
    images = []
    for start in range(0, total, size):
        chosen = np.arange(start, start + size)
        rows = np.minimum(chosen, total - 1)  # a ragged last batch is filled up, not recompiled
        noise, seeds = noise_of(job.seed, job.first + chosen, model.network.image_shape)
        x = loop(
            weights,
            backend.spread(noise),
            _rows(job.conditions, rows),
            _rows(job.unconditional, rows),
            backend.spread(job.options.steps.packed(), axis=None),
            backend.spread(np.float32(job.options.guidance_scale), axis=None),
            backend.spread(seeds),
        )
        x = backend.whole(x)[: total - start]
        images.append(_finish(model, x) if job.decode else x)
        bar.update(min(start + size, total))
    return np.concatenate(images)


def _warn_if_untrained(model):
    """Once a model, and not in the middle of a run. Networks begin with most biases at zero, and
    training moves them all: their values tell, whatever way the weights came.
    """
    if model.warned_untrained or int(ops.convert_to_numpy(model.step)):
        return
    model.warned_untrained = True
    biases = [w for w in model.ema_network.weights if w.path.endswith("/bias")]
    zero = [not np.any(ops.convert_to_numpy(bias)) for bias in biases[:8]]
    if sum(zero) > len(zero) / 2:
        warnings.warn(
            "This network is untrained: what it draws is noise. Train it with `fit`, or load "
            'weights, such as `presets.load(name, weights="pretrained")` for those that ship with '
            "the package, or weights=PATH.",
            stacklevel=4,
        )


def _finish(model, x):
    if model.latent_scale is not None:
        return model.encoders.autoencoder.decode(x)
    return from_unit_range(x)


def _rows(conditions, rows):
    return {key: backend.spread(value[rows]) for key, value in conditions.items()}


def _widest(network):
    """Bytes of the widest tensor that one guided image needs, about.

    Four times a layer's output, as blocks are four times as wide inside, and both halves.
    """
    outputs = (tensor for layer in network.layers for tensor in tree.flatten(layer.output))
    return 2 * 4 * max(4 * math.prod(tensor.shape[1:]) for tensor in outputs)


def noise_of(seed: int, indices: Array, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Starting noise `(B, H, W, C)` and a 31-bit seed `(B,)` for later noise, per image."""
    generators = [np.random.default_rng([seed, int(k)]) for k in indices]
    noise = np.stack([g.standard_normal(shape, "float32") for g in generators])
    return noise, np.array([g.integers(2**31) for g in generators], "int32")


def _loop(model, network, options):
    """The compiled loop for this pattern of guided rows, made once.

    Weights are its arguments: where XLA compiles it, one program serves both networks.
    """
    network = model.network if backend.HAS_XLA else network
    runs = tuple((bool(on), len(list(rows))) for on, rows in itertools.groupby(options.guided))
    key = runs, network.name
    if key not in model.sampling_loops:

        def loop(weights, noise, condition, unconditional, table, scale, seeds):
            given = model, network, weights, condition
            parts = [
                (count, denoiser(*given, unconditional if is_guided else {}, scale))
                for is_guided, count in runs
            ]
            return samplers.sample(
                parts,
                noise,
                table,
                lambda i: backend.normal_per_image(seeds, i, noise.shape[1:]),
            )

        model.sampling_loops[key] = backend.compiled(loop)
    return model.sampling_loops[key]
