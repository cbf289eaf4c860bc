"""From noise to images: batches, seeds, the compiled loop."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from keras_uvit import backend, progress
from keras_uvit.checks import as_int
from keras_uvit.diffusion import loop, samplers, tables
from keras_uvit.pixels import from_unit_range
from keras_uvit.sampling.conditions import conditions_of, unconditional_of
from keras_uvit.sampling.editing import Edit, edit_of
from keras_uvit.sampling.guidance import (
    Guidance,
    Party,
    check_acts,
    check_guidance,
    denoisers,
    networks_of,
    runs_of,
)
from keras_uvit.sampling.options import SamplingOptions, Scale, resolve
from keras_uvit.types import Array

OnStep = Callable[[int, float, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """The checked arguments of one call of `generate`."""

    conditions: dict  # of the network, one row for each image
    unconditional: dict  # the same for the other half of guidance; empty without
    total: int
    options: SamplingOptions
    steps: samplers.Steps | None  # what the loop runs; None returns what it would start from
    seed: int
    first: int
    batch_size: int | None
    use_ema: bool
    decode: bool
    edit: Edit | None
    noise: np.ndarray | None  # what to start from, in place of the seed's
    on_step: OnStep | None
    every: int | None  # rows between two looks at `denoised`; None looks at none
    keep: bool  # what these looks see is returned too


def prepare(
    model: Any,
    num_images: int | None = None,
    labels: Array | None = None,
    prompts: str | Sequence[str] | Array | None = None,
    *,
    negative_prompts: str | Sequence[str] | Array | None = None,
    num_steps: int | None = None,
    sampler: str | samplers.Steps | None = None,
    guidance_scale: Scale | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance: Guidance | None = None,
    image: Array | None = None,
    strength: float | None = None,
    mask: Array | None = None,
    resamples: int = 1,
    noise: Array | None = None,
    on_step: OnStep | None = None,
    return_intermediates: bool = False,
    every: int = 1,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    use_ema: bool = True,
    decode: bool = True,
) -> Job:
    """Checks the arguments of `DiffusionModel.generate`, which describes them; draws nothing."""
    model.check_weights()
    edit = edit_of(model, image, mask, strength, resamples)
    start = None if noise is None else _noise(model, noise)
    given = {"noise": start}
    if edit is not None:
        given |= {"image": edit.pictures, "mask": edit.mask}
    counts = {name: len(value) for name, value in given.items() if value is not None}
    wants = {"num_images": num_images, "labels": labels, "prompts": prompts}
    conditions, total = conditions_of(model, wants, max(counts.values(), default=None))
    for name, count in counts.items():
        if count not in (1, total):
            raise ValueError(
                f"{name} is one for all images, or one for each of {total}. Received: {count}."
            )
    check_decodes(model, decode)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step is a function (step, t, denoised). Received: {on_step!r}.")
    guidance = Guidance() if guidance is None else guidance
    check_guidance(model, guidance)
    every, looks = as_int(every, "every", 1), on_step is not None or return_intermediates
    options = resolve(
        model,
        sampler,
        num_steps,
        guidance_scale,
        guidance_interval,
        1.0 if strength is None else strength,
        resamples,
        guidance,
    )
    is_guided = bool(options.guided.any())
    check_acts(guidance, is_guided, negative_prompts)
    without = is_guided and guidance.weak_model is None
    return Job(
        conditions,
        unconditional_of(model, negative_prompts, total, without),
        total,
        options,
        None if strength == 0 else options.steps,
        as_int(seed, "seed", 0),
        as_int(first, "first", 0),
        batch_size if batch_size is None else as_int(batch_size, "batch_size", 1),
        use_ema,
        decode,
        edit,
        start,
        on_step,
        every if looks else None,
        return_intermediates,
    )


def prepare_inversion(
    model: Any,
    image: Array,
    labels: Array | None = None,
    prompts: str | Sequence[str] | Array | None = None,
    *,
    sampler: str | samplers.Steps = "ddim",
    evaluations: int = 2,
    guidance_scale: Scale = 1.0,
    **options: Any,
) -> Job:
    """Checks the arguments of `DiffusionModel.invert`: a job from pictures to noise."""
    job = prepare(
        model,
        labels=labels,
        prompts=prompts,
        image=image,
        strength=0.0,
        sampler=sampler,
        guidance_scale=guidance_scale,
        decode=False,
        **options,
    )
    back = tables.backwards(job.options.steps, model.objective.schedule, evaluations)
    return dataclasses.replace(job, steps=back)


def check_decodes(model: Any, decode: bool) -> None:
    """Raises where latents are to be decoded, and nothing decodes them."""
    if decode and model.latent_scale is not None and model.encoders.autoencoder is None:
        raise ValueError(
            "This model makes latents and has no autoencoder to decode them. Call "
            "`model.set_encoders(autoencoder=...)`, or pass decode=False to get the latents."
        )


def draw(model: Any, job: Job, verbose: int = 1) -> Any:
    """The images of a job `(n, H, W, C)`: uint8 pixels, or what the network sees without `decode`;
    with `keep` a tuple of these and the estimates on the way, `(looks, n, H, W, C)`.
    """
    warn_if_untrained(model)
    replicas = backend.replicas()
    at_once = job.batch_size or backend.images_at_once(_widest(model.network))
    size = -(-min(at_once, job.total) // replicas) * replicas  # every device gets as many
    bar = progress.bar(job.total, verbose, "image")
    images, looks = [], []
    for start in range(0, job.total, size):
        last = min(start + size, job.total)
        x, seen = _batch(model, job, np.arange(start, start + size), last - start)
        images.append(x)
        looks.append(seen)
        bar.update(last)
    whole = np.concatenate(images)
    return (whole, np.concatenate(looks, axis=1)) if job.keep else whole


def _batch(model, job, chosen, count):
    """The first `count` of the chosen images, and what was seen of them on the way."""
    rows = np.minimum(chosen, job.total - 1)  # a ragged last batch is filled up, not recompiled
    x, seeds = noise_of(job.seed, job.first + chosen, model.network.image_shape)
    x = x if job.noise is None else job.noise[rows % len(job.noise)]
    known = ()
    if job.edit is not None:
        picture = job.edit.seen(model, rows)
        if job.edit.mask is not None:
            known = (job.edit.drawn(model, rows), picture, x)
        x = _noised(model, job, picture, x)
    looks = [x[:count]]  # without steps
    if job.steps is not None:
        x, looks = _run(model, job, rows, x, seeds, known, count)
    x = x[:count]
    if job.decode:
        x, looks = _finish(model, x), [_finish(model, look) for look in looks]
        x = x if job.edit is None else job.edit.pasted(x, rows[:count])
    return x, looks


def _run(model, job, rows, x, seeds, known, count):
    """From where the sampler starts to where it ends, in as many calls as there are looks."""
    networks = networks_of(model, job.options.guidance, job.use_ema)
    weights = [[w.value for w in network.variables] for _, network in networks]
    given = [_rows(part, rows) for part in (job.conditions, job.unconditional)]
    seeds, known = backend.spread(seeds), [backend.spread(part) for part in known]
    zeros, table, looks = np.zeros_like(x), job.steps.packed(), []
    # As `loop.begin`, on all devices.
    carry = tuple(backend.spread(part) for part in (x, x, zeros, zeros))
    for first in range(0, len(table), job.every or len(table)):
        part = slice(first, first + (job.every or len(table)))
        program = _program(model, job, job.options.asks_twice(job.steps)[part], bool(known))
        now = backend.spread(table[part], axis=None), np.array(first, "int32")
        carry = program(weights, carry, *given, *now, seeds, known)
        if job.every:
            denoised, last = backend.whole(carry[2])[:count], min(part.stop, len(table)) - 1
            if job.on_step is not None:
                job.on_step(last, float(job.steps.t[last]), denoised)
            if job.keep:
                looks.append(denoised)
    return backend.whole(carry[0]), looks


def _noised(model, job, picture, noise):
    """Where a sampler starts from a picture: at the time of its first row; without rows, there."""
    schedule, strength = model.objective.schedule, job.options.strength
    if strength == 0:
        return picture
    if strength >= schedule.t_start:
        return noise
    t = job.steps.t[0]
    x = schedule.alpha(t) * picture + schedule.sigma(t) * noise
    return x.astype("float32")


def warn_if_untrained(model: Any) -> None:
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


def _noise(model, noise):
    """`(n, H, W, C)` float32, checked against the network."""
    shape, given = tuple(model.network.image_shape), np.asarray(ops.convert_to_numpy(noise))
    given = given[None] if given.ndim == 3 else given
    if given.shape[1:] != shape or not len(given) or not np.issubdtype(given.dtype, np.floating):
        raise ValueError(
            f"noise is float, of shape (n, {', '.join(map(str, shape))}), as `invert` gives it. "
            f"Received: {given.dtype} {np.shape(noise)}."
        )
    if not np.isfinite(given).all():
        raise ValueError("noise holds NaN or infinity.")
    return given.astype("float32")


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


def _program(model, job, guided, is_known):
    """The compiled loop for this pattern of guided rows, made once.

    Weights are its arguments: where XLA compiles it, one program serves both networks.
    """
    runs = runs_of(guided)
    networks = [
        (m, m.network if backend.HAS_XLA else network)
        for m, network in networks_of(model, job.options.guidance, job.use_ema)
    ]
    guidance = job.options.guidance
    key = runs, guidance, is_known, tuple(network.name for _, network in networks)
    if key not in model.sampling_loops:

        def run(weights, carry, condition, unconditional, table, first, seeds, known):
            parties = [Party(*pair, values) for pair, values in zip(networks, weights)]
            parts = denoisers(runs, parties, condition, unconditional, guidance)
            shape = carry[0].shape[1:]
            return loop.advance(
                parts,
                carry,
                table,
                lambda i: backend.normal_per_image(seeds, i, shape),
                first,
                tuple(known) or None,
            )

        model.sampling_loops[key] = backend.compiled(run)
    return model.sampling_loops[key]
