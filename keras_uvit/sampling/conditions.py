"""What is drawn: labels and prompts as the network's inputs, one row for each image."""

from typing import Any

import numpy as np
from keras import ops

from keras_uvit.checks import as_int
from keras_uvit.encoders import compatibility


def conditions_of(
    model: Any, wants: dict[str, Any], count: int | None = None
) -> tuple[dict[str, Any], int]:
    """The network's conditions, one row for each image, and how many images there are.

    Args:
        wants: dict of "num_images", "labels" and "prompts", as `generate` takes them.
        count: int, as many images as there are pictures to start from; None without them. It
            replaces a `num_images` that is not given.
    """
    network = model.network
    asks = ["labels"] if network.num_classes is not None else []
    asks += ["prompts"] if network.context_shape is not None else []
    asks = asks or ["num_images"]
    if asks == ["num_images"] and wants["num_images"] is None:
        wants = {**wants, "num_images": count}
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


def unconditional_of(
    model: Any, negative_prompts: Any, total: int, is_guided: bool
) -> dict[str, Any]:
    """What guidance leads away from, one row for each image; empty without guidance."""
    network = model.network
    reads_text = network.context_shape is not None
    if negative_prompts is not None and not reads_text:
        raise ValueError("This model reads no prompts, so it takes no negative_prompts.")
    if negative_prompts is not None and network.takes_guidance:
        raise ValueError(
            "This network takes the guidance scale as an input and is asked once a step, so it "
            "leads away from the empty prompt alone: leave negative_prompts out."
        )
    if negative_prompts is not None and not is_guided:
        raise ValueError(
            "negative_prompts act through guidance, which is off: pass guidance_scale, such as 2.0."
        )
    if not is_guided:
        return {}
    unconditional: dict[str, Any] = {}
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
        if not compatibility.has_null(model):
            raise ValueError(
                "Guidance needs the empty prompt's context, which this model has not met. Call "
                "`model.set_encoders(text_encoder=...)`, assign `model.null_context`, or pass "
                "guidance_scale=1.0."
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
        if model.encoders.text_encoder is None:
            raise ValueError(
                "Prompts as strings need a text encoder: call "
                "`model.set_encoders(text_encoder=encoders.CLIPText.from_preset(...))`, or pass "
                f"contexts of shape (n, {shape})."
            )
        return _Prompts(model.encoders.text_encoder, list(prompts))
    try:
        context = np.asarray(ops.convert_to_numpy(prompts), "float32")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} are strings, or contexts. Received: {prompts!r}.") from error
    if context.ndim != 3 or context.shape[1:] != model.network.context_shape:
        raise ValueError(f"Contexts have shape (n, {shape}). Received: {context.shape}.")
    if not np.isfinite(context).all():
        raise ValueError(f"The contexts in {name} hold NaN or infinity.")
    return context
