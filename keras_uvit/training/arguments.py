"""What `DiffusionModel` takes of Keras' arguments and methods, and why it refuses the others."""

import inspect
from typing import Any

import keras

from keras_uvit.checks import as_int, nearest
from keras_uvit.diffusion.flow_map import FlowMap
from keras_uvit.networks.network import ATTRIBUTES, FORMATS
from keras_uvit.pixels import per_channel

# Arguments that are whole numbers: the least that each can be.
OF_MODEL = {"seed": 0, "num_steps": 1, "max_skipped_steps": 0, "planned_steps": 1}
OF_METHODS = {
    "batch_size": 1,
    "epochs": 0,
    "initial_epoch": 0,
    "steps": 1,
    "steps_per_epoch": 1,
    "validation_steps": 1,
    "validation_batch_size": 1,
}
BUILT_IN = (
    "The diffusion loss and its metrics are built in: `prediction`, `loss_weighting` and the "
    "schedule choose the loss."
)
EQUAL = (
    "The diffusion loss weighs all images equally: repeat the images that should count more in the "
    "data."
)
REFUSED = {
    **dict.fromkeys(("loss", "metrics", "weighted_metrics", "loss_weights"), BUILT_IN),
    **dict.fromkeys(("sample_weight", "class_weight"), EQUAL),
}
METHODS = {
    **dict.fromkeys(
        ("add_loss", "add_metric", "compute_loss", "stateless_compute_loss", "compute_metrics"),
        f"{BUILT_IN} `evaluate` and `test_on_batch` give the loss.",
    ),
    "export": "Its images come from a loop around the network: `model.export_sampler(path, "
    "format)` writes that whole. A single evaluation is `model.ema_network.export(path, "
    "format=...)`, and a model to load again `model.save(path)`.",
    **FORMATS,
}


def checked(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments `given` to a method that continues Keras' own, with whole numbers as ints.

    Raises:
        TypeError: for an argument that Keras does not have.
        ValueError: for one that would have no effect, or a number that cannot be.
    """
    known = list(inspect.signature(getattr(keras.Model, method)).parameters)
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{method} has no argument {name!r}.{nearest(name, known)}")
        if name in REFUSED and value is not None:
            raise ValueError(f"{name} is not supported. {REFUSED[name]} Leave {name}= out.")
    return {
        name: as_int(value, name, OF_METHODS[name])
        if name in OF_METHODS and value is not None
        else value
        for name, value in given.items()
    }


def check_network(network: Any) -> None:
    """Raises unless a `DiffusionModel` can train this network."""
    missing = [name for name in ATTRIBUTES if not hasattr(network, name)]
    if missing:
        raise TypeError(
            "The network must be a UViT, a UNet, or your own Keras model inside "
            "networks.OwnNetwork(model, image_shape=...). Received: "
            f"{type(network).__name__}, which lacks {missing}."
        )
    if network.losses:
        raise ValueError(
            "The network has losses of its own, such as those of a kernel_regularizer, which the "
            "diffusion loss does not add. Make the network without them."
        )


def check_flow_map(model: Any) -> None:
    """Raises unless network, schedule and loss are what the model's flow map needs."""
    network, flow_map, objective = model.network, model.flow_map, model.objective
    if not isinstance(flow_map, FlowMap | None):
        raise TypeError(
            "flow_map must be such as diffusion.FlowMap(steps=4000), or None. Received: "
            f"{flow_map!r}."
        )
    learns_guidance = flow_map is not None and flow_map.guidance is not None
    if network.takes_guidance != learns_guidance:
        raise ValueError(
            "A network with takes_guidance=True and FlowMap(guidance=(1.0, 8.0)), which trains "
            f"it, need each other. Received: takes_guidance={network.takes_guidance} and "
            f"flow_map={flow_map}."
        )
    if flow_map is None:
        return
    found = {
        "takes_span": network.takes_span,
        "schedule": type(objective.schedule).__name__,
        "prediction": objective.prediction,
        "loss_weighting": objective.loss_weighting,
    }
    wanted = dict(zip(found, (True, "LinearPath", "velocity", "uniform")))
    for name in found:
        if found[name] != wanted[name]:
            raise ValueError(
                "A flow map needs a network made with takes_span=True, schedule=LinearPath(), "
                'prediction="velocity" and loss_weighting="uniform". Received: '
                f"{name}={found[name]!r}."
            )
    if learns_guidance and network.null_label is None and network.context_shape is None:
        raise ValueError(
            "FlowMap.guidance needs a network that knows 'no label': num_classes with "
            "null_label=True, or context_shape. Leave guidance and takes_guidance out."
        )


def check_model(model: Any, has_null: bool) -> None:
    """Raises unless the model's own arguments can be; makes ints of its whole numbers."""
    check_flow_map(model)
    for key, least in OF_MODEL.items():
        if key != "planned_steps" or model.planned_steps is not None:
            setattr(model, key, as_int(getattr(model, key), key, least))
    channels = model.network.image_shape[-1]
    if model.latent_scale is not None:
        model.latent_scale = per_channel(model.latent_scale, "latent_scale", True, channels)
    model.latent_shift = per_channel(model.latent_shift, "latent_shift", channels=channels)
    if not 0 <= model.condition_dropout <= 1 or not 0 <= model.ema_decay < 1:
        raise ValueError(
            "condition_dropout is in [0, 1] and ema_decay in [0, 1). Received: "
            f"condition_dropout={model.condition_dropout}, ema_decay={model.ema_decay}."
        )
    if model.condition_dropout and not has_null:
        raise ValueError(
            f"condition_dropout={model.condition_dropout} needs a network that knows 'none': "
            "null_label=True with num_classes, or context_shape. Use condition_dropout=0."
        )
