"""From noise to images: batches, seeds, guidance, the compiled loop."""

import functools
import inspect
import math
import warnings
from typing import NamedTuple

import numpy as np
from keras import ops, tree

from keras_uvit import backend, progress
from keras_uvit.checks import as_int, nearest
from keras_uvit.networks import halves
from keras_uvit.pixels import from_unit_range
from keras_uvit.process import samplers
from keras_uvit.process.steps import runs_of
from keras_uvit.training import bookkeeping, text_space
from keras_uvit.training.evaluations import Evaluations, Plan


def generate(
    model,
    num_images=None,
    labels=None,
    prompts=None,
    *,
    negative_prompts=None,
    num_steps=None,
    sampler=None,
    guidance_scale=None,
    guidance_interval=(0.0, 1.0),
    guidance_every=1,
    middle_every=1,
    outer_blocks=1,
    seed=0,
    first=0,
    batch_size=None,
    use_ema=True,
    decode=True,
    verbose=1,
    **unknown,
):
    """Draws images from the model.

    Image k depends on `seed` and k alone: not on `batch_size`, and, with a deterministic sampler,
    not on the backend (up to rounding). The whole loop is one compiled program on JAX and
    TensorFlow; another seed, guidance scale or sampler of as many evaluations compiles nothing.

    Args:
        num_images: int, for an unconditional model.
        labels: ints in [0, num_classes), one per image, for a class-conditional model.
        prompts: for a text model: one string an image, or contexts `(n, length, width)`, as
            `model.text_encoder` makes them.
        negative_prompts: what guidance leads away from, in place of the empty prompt: one string
            for all images, one an image, or their contexts.
        num_steps: int, what the sampler makes of it; `None` is the model's default.
        sampler: a name in `process.samplers.SAMPLERS`, or `Steps`; `None` is the model's default.
        guidance_scale: float w, D_u + w (D_c - D_u); 1.0 is off, `None` the model's default.
        guidance_interval: (low, high) in [0, 1]: times at which guidance is on.
        guidance_every: int n. What guidance adds is evaluated at one step in n and kept between.
        middle_every: int n. All blocks run at one step in n; between, what the middle of the
            U-ViT gave then is joined to the outer blocks by their long skips.
        outer_blocks: int. Blocks on each side that run at every step.
        seed: int >= 0.
        first: int >= 0, index of the first image: what one call draws, several calls may share.
        batch_size: int, images at a time; `None` is what is fast here, at most 64.
        use_ema: bool. Sample with the moving average of the weights.
        decode: bool. `False` returns float32 as the network sees it: pixels in [-1, 1], or
            latents times the scale factor.
        verbose: 0 or 1. Progress bar.

    Returns:
        `(n, H, W, C)` uint8 in [0, 255].

    Raises:
        ValueError, TypeError: if the arguments are unknown or do not fit the model, before anything
            is compiled.
    """
    job = _checked(**locals())
    _warn_if_untrained(model)
    network = model.ema_network if use_ema else model.network
    loop, total = _loop(model, network, job), job.total
    weights = [w.value for w in network.variables]
    replicas = backend.replicas()
    at_once = job.batch_size or backend.images_at_once(_widest(model.network))
    size = -(-min(at_once, total) // replicas) * replicas  # every device gets as many
    bar = progress.bar(total, verbose, "image")
    images = []
    for start in range(0, total, size):
        chosen = np.arange(start, start + size)
        rows = np.minimum(chosen, total - 1)  # a ragged last batch is filled up, not recompiled
        noise, seeds = _noise(job.seed, job.first + chosen, model.network.image_shape)
        x = loop(
            weights,
            backend.spread(noise),
            _rows(job.conditions, rows),
            _rows(job.unconditional, rows),
            backend.spread(job.steps.packed(), axis=None),
            backend.spread(np.float32(job.plan.scale), axis=None),
            backend.spread(seeds),
        )
        x = backend.whole(x)[: total - start]
        images.append(_finish(model, x) if decode else x)
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
            stacklevel=3,
        )


class _Job(NamedTuple):
    """What a call of `generate` comes to."""

    conditions: dict  # the network's, one row an image
    unconditional: dict  # the same for the other half of guidance; empty without
    total: int
    steps: samplers.Steps
    plan: Plan
    seed: int
    first: int
    batch_size: int | None


def check(model, **options):
    """Raises what `generate(**options)` would, without drawing anything."""
    given = inspect.signature(generate).bind(model, **options)
    given.apply_defaults()
    _checked(**given.arguments)


def _checked(
    model,
    num_images,
    labels,
    prompts,
    negative_prompts,
    num_steps,
    sampler,
    guidance_scale,
    guidance_interval,
    guidance_every,
    middle_every,
    outer_blocks,
    seed,
    first,
    batch_size,
    decode,
    unknown,
    **_,
):
    """The `_Job` of arguments that fit; nothing is compiled before."""
    for name in unknown:
        known = inspect.signature(generate).parameters
        raise TypeError(f"generate has no argument {name!r}.{nearest(name, known)}")
    bookkeeping.check_pairs(model)
    wants = {"num_images": num_images, "labels": labels, "prompts": prompts}
    conditions, total = _conditions(model, wants)
    if decode and model.latent_scale is not None and model.autoencoder is None:
        raise ValueError(
            "This model makes latents and has no autoencoder to decode them. Set "
            "`model.autoencoder`, or pass decode=False for the latents themselves."
        )
    seed, first = as_int(seed, "seed", 0), as_int(first, "first", 0)
    if batch_size is not None:
        batch_size = as_int(batch_size, "batch_size", 1)
    steps = _steps(model, sampler, num_steps)
    plan = Plan(
        _scale(model, guidance_scale), guidance_interval, guidance_every, middle_every, outer_blocks
    )
    _check_plan(model, plan)
    is_guided = any(kind.guidance != "off" for kind in plan.kinds(steps.t))
    unconditional = _unconditional(model, negative_prompts, total, is_guided)
    return _Job(conditions, unconditional, total, steps, plan, seed, first, batch_size)


def _finish(model, x):
    if model.latent_scale is not None:
        return model.autoencoder.decode(x)
    return from_unit_range(x)


def _conditions(model, wants):
    """The network's conditions, one row an image, and how many images."""
    network = model.network
    asks = ["labels"] if network.num_classes is not None else []
    asks += ["prompts"] if network.context_shape is not None else []
    asks = asks or ["num_images"]
    given = [key for key, value in wants.items() if value is not None]
    if given != asks:
        expected = "`, `".join(asks)
        raise ValueError(f"This model generates from `{expected}`. Received: {given or 'nothing'}.")
    if asks == ["num_images"]:
        return {}, as_int(wants["num_images"], "num_images", 1)
    conditions = {}
    if "labels" in asks:
        conditions["label"] = _labels(network, wants["labels"])
    if "prompts" in asks:
        conditions["context"] = _contexts(model, wants["prompts"], "prompts")
    lengths = {len(value) for value in conditions.values()}
    if len(lengths) > 1:
        raise ValueError(f"There must be a label for each prompt. Received: {sorted(lengths)}.")
    return conditions, lengths.pop()


def _labels(network, labels):
    labels = np.asarray(list(labels) if isinstance(labels, range) else labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be a list of integers. Received: {labels!r}.")
    bad = labels[(labels < 0) | (labels >= network.num_classes)]
    if len(bad):
        raise ValueError(f"labels must be in [0, {network.num_classes}). Received: {bad[0]}.")
    return labels.astype("int32")


def _unconditional(model, negative_prompts, total, is_guided):
    """What guidance leads away from, one row an image."""
    network = model.network
    reads_text = network.context_shape is not None
    if negative_prompts is not None and not reads_text:
        raise ValueError("This model reads no prompts, so it takes no negative_prompts.")
    if negative_prompts is not None and not is_guided:
        raise ValueError(
            "negative_prompts act through guidance, which is off: pass guidance_scale, such as 2.0."
        )
    if not is_guided:
        return {}
    unconditional = {}
    if network.num_classes is not None:
        unconditional["label"] = np.full(total, network.null_label or 0, "int32")
    if negative_prompts is not None:
        context = _contexts(model, negative_prompts, "negative_prompts")
        if len(context) not in (1, total):
            raise ValueError(
                f"negative_prompts are one for all images, or one for each of {total}. "
                f"Received: {len(context)}."
            )
        unconditional["context"] = context if len(context) == total else _Same(context)
    elif reads_text:
        if not text_space.has_null(model):
            raise ValueError(
                "Guidance needs the empty prompt's context, which this model has not met. Set "
                "`model.text_encoder`, assign `model.null_context`, or pass guidance_scale=1.0."
            )
        unconditional["context"] = _Same(ops.convert_to_numpy(model.null_context)[None])
    return unconditional


class _Same:
    """One row for all images."""

    def __init__(self, array):
        self.row = np.asarray(array[np.array([0])])

    def __getitem__(self, rows):
        return np.repeat(self.row, len(rows), axis=0)


class _Prompts:
    """Contexts of prompts, encoded when they are asked for: 30,000 at once would take 7 GB."""

    def __init__(self, encoder, prompts):
        self.encoder, self.tokens = encoder, encoder.tokenize(prompts)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return self.encoder.encode(self.tokens[rows])


def _contexts(model, prompts, name):
    """Prompts as something that gives contexts by rows."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not hasattr(prompts, "__len__"):
        raise TypeError(f"{name} are strings, or contexts. Received: {prompts!r}.")
    shape = ", ".join(map(str, model.network.context_shape))
    if not len(prompts):
        raise ValueError(f"{name} is empty: there is nothing to draw.")
    if all(isinstance(prompt, str) for prompt in prompts):
        if model.text_encoder is None:
            raise ValueError(
                "Prompts as strings need a text encoder: set `model.text_encoder` (such as "
                f"latent.CLIPText), or pass contexts of shape (n, {shape})."
            )
        return _Prompts(model.text_encoder, list(prompts))
    try:
        context = np.asarray(ops.convert_to_numpy(prompts), "float32")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} are strings, or contexts. Received: {prompts!r}.") from error
    if context.ndim != 3 or context.shape[1:] != model.network.context_shape:
        raise ValueError(f"Contexts have shape (n, {shape}). Received: {context.shape}.")
    if not np.isfinite(context).all():
        raise ValueError(f"The contexts in {name} hold NaN or infinity.")
    return context


def _rows(conditions, rows):
    return {key: backend.spread(value[rows]) for key, value in conditions.items()}


def _steps(model, sampler, num_steps):
    sampler = model.sampler if sampler is None else sampler
    if isinstance(sampler, samplers.Steps):
        if num_steps is not None:
            raise ValueError("`Steps` already has its number of steps; leave `num_steps` out.")
        first, latest = sampler.t.max(), model.schedule.t_start
        if first > latest:
            raise ValueError(
                f"These `Steps` start at t = {first}, but {type(model.schedule).__name__}, the "
                f"schedule of this model, at {latest} at most. Make them by `model.schedule`."
            )
        return sampler
    return samplers.named(
        sampler, model.schedule, model.num_steps if num_steps is None else num_steps
    )


def _scale(model, given):
    """Scale of guidance; 1.0, off, where the model's default is for networks of another kind."""
    scale, network = model.guidance_scale if given is None else given, model.network
    if not isinstance(scale, int | float | np.number) or not np.isfinite(scale) or scale < 0:
        raise ValueError(f"guidance_scale must be finite and >= 0. Received: {scale!r}.")
    if scale != 1.0 and network.null_label is None and network.context_shape is None:
        if given is not None:
            raise ValueError(
                f"guidance_scale={scale} needs a network that knows 'no label': num_classes with "
                "null_label=True, trained with condition_dropout > 0. Use guidance_scale=1.0."
            )
        return 1.0
    return scale


def _check_plan(model, plan):
    low, high = plan.interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_interval is (low, high) in [0, 1]. Received: {plan.interval}.")
    for name in ("guidance_every", "middle_every"):
        as_int(getattr(plan, name), name, 1)
    if plan.middle_every > 1:
        halves.check_outer_blocks(model.network, plan.outer_blocks)


def _widest(network):
    """Bytes of the widest tensor that one guided image needs, about.

    Four times a layer's output, as blocks are four times as wide inside, and both halves.
    """
    outputs = (tensor for layer in network.layers for tensor in tree.flatten(layer.output))
    return 2 * 4 * max(4 * math.prod(tensor.shape[1:]) for tensor in outputs)


def _noise(seed, indices, shape):
    """Starting noise `(B, H, W, C)` and a 31-bit seed `(B,)` for later noise, per image."""
    generators = [np.random.default_rng([seed, int(k)]) for k in indices]
    noise = np.stack([g.standard_normal(shape, "float32") for g in generators])
    return noise, np.array([g.integers(2**31) for g in generators], "int32")


def _loop(model, network, job):
    """The compiled loop for this pattern of evaluations, made once.

    Weights are its arguments: where XLA compiles it, one program serves both networks.
    """
    network = model.network if backend.HAS_XLA else network
    pattern = tuple(runs_of(job.plan.kinds(job.steps.t))), job.plan.outer_blocks, network.name
    if pattern not in model._loops:
        kinds = {kind for _, unit in pattern[0] for kind in unit}
        evaluations = Evaluations(model, network, job.plan, kinds)
        run = functools.partial(_run, evaluations, pattern[0])
        model._loops[pattern] = backend.compiled(run)
    return model._loops[pattern]


def _run(evaluations, runs, weights, noise, condition, unconditional, table, scale, seeds):
    given = weights, condition, unconditional, scale
    return samplers.sample(
        [(repeats, [evaluations.of(kind, *given) for kind in unit]) for repeats, unit in runs],
        noise,
        table,
        lambda i: backend.normal_per_image(seeds, i, noise.shape[1:]),
        evaluations.start(noise),
    )
