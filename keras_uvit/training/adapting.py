"""A trained model as the beginning of another one: of other classes or another image size."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_uvit import progress
from keras_uvit.networks import quantizing
from keras_uvit.networks.transferring import ADAPTABLE, FREE, Transfer, transfer
from keras_uvit.training.model import DiffusionModel

PARTS = {"autoencoder": "latent_encoder", "text_encoder": "context_encoder"}


def adapt(
    model: DiffusionModel,
    *,
    classes: Mapping[int, int] | None = None,
    strict: bool = False,
    verbose: int = 1,
    **network: Any,
) -> DiffusionModel:
    """A new `DiffusionModel` that begins at the moving average of `model`, to be fine-tuned.

    What `networks.transfer` cannot keep is resized or made anew, and printed in three lines.
    Weights that are frozen in `model` stay frozen. With `lora=16` low-rank pairs are added, which
    do not change what the model computes, and they and what was made anew or resized are trained
    alone (LoRA: Hu et al. 2021, arXiv 2106.09685).

    Args:
        model: `DiffusionModel`, which is not changed.
        classes: dict of a new class to the class of `model` whose row of the label table it begins
            with. `None`: the table is kept where both have as many classes.
        strict: bool. Raise unless all weights fit as they are.
        verbose: 0 or 1, whether to print what was kept.
        **network: arguments of the network to change: `num_classes`, `null_label`, `image_shape`,
            `patch_size`, `context_shape` or `lora`; or `dtype` or `remat`, which concern no weight.

    Returns:
        `DiffusionModel` with the settings of `model`, not compiled.

    Raises:
        TypeError: for an argument that cannot be changed.
        ValueError: if a class does not exist, or, with `strict`, if a weight does not fit.

    Example:
        >>> from keras_uvit import UViT
        >>> net = UViT((8, 8, 1), hidden_dim=16, num_layers=3, num_heads=2, num_classes=10)
        >>> adapt(DiffusionModel(net), num_classes=3, verbose=0).network.num_classes
        3
    """
    quantizing.check_whole(model.network, "`adapt`")
    known = (*ADAPTABLE, *FREE)
    unknown = set(network) - set(known)
    if unknown:
        raise TypeError(f"adapt can change {known}. Received: {sorted(unknown)}.")
    old = model.network
    made = type(old).from_config({**old.get_config(), **network})
    config = {**model.get_config(), "latent_encoder": None, "context_encoder": None}
    frozen = set(config.pop("frozen"))
    if (made.null_label is None, made.context_shape) != (old.null_label is None, old.context_shape):
        config["condition_dropout"] = None  # what suits the new conditions
    objects = {"schedule": model.objective.schedule, "flow_map": model.flow_map}
    new = DiffusionModel(**{**config, **objects, "network": made})
    done = begin(new, model.ema_network, classes, strict, verbose)
    take_encoders(new, model)
    if getattr(old.config, "lora", None) == getattr(made.config, "lora", None):
        for weight in new.network.weights:
            if weight.path in done.kept:
                weight.trainable = weight.path not in frozen
    return new


def begin(
    model: DiffusionModel,
    source: keras.Model,
    classes: Mapping[int, int] | None = None,
    strict: bool = False,
    verbose: int = 1,
) -> Transfer:
    """Sets the weights of `model` and its average to those of a network, as far as they fit.

    What is not kept as it is will be trained, beside low-rank pairs too.
    """
    done = transfer(source, model.network, classes, strict)
    model.copy_weights_to_ema()
    for weight in model.network.weights:
        if weight.path in (*done.resized, *done.new):
            weight.trainable = True
    if verbose and not done.is_exact:
        progress.say(done.text())
    return done


def take_encoders(model: DiffusionModel, other: DiffusionModel) -> None:
    """Whose latents and contexts the weights of `other` have learned, and their "no prompt".

    Its encoders are taken too, where the two models need the same.

    Raises:
        ValueError: if the two models have different scales of latents.
    """
    network, before = model.network, other.network
    if network.image_shape[-1] == before.image_shape[-1]:  # else the latents are others
        model.latent_encoder = other.latent_encoder
    if network.context_shape is not None and network.context_shape == before.context_shape:
        model.context_encoder = other.context_encoder
        model.null_context.assign(other.null_context)
    parts = vars(other.encoders).items()
    same = {p: part for p, part in parts if getattr(model, PARTS[p]) == getattr(other, PARTS[p])}
    model.set_encoders(**same)
