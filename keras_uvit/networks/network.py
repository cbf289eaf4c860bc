"""What networks share: their conditions, and how a config makes them again."""

import itertools
from typing import Any, Self

import keras
from keras import initializers, layers

from keras_uvit import backend
from keras_uvit.checks import plain, refuses
from keras_uvit.types import Config, PathLike, Tensor

# What a `DiffusionModel` asks a network for.
ATTRIBUTES = ("image_shape", "num_classes", "null_label", "context_shape")

_CHOSEN = (
    "The number format of a network is chosen when it is made, such as "
    '`UViT(..., dtype="mixed_bfloat16")`.'
)
# `quantize` is Keras'; the others are those of PyTorch's modules, of which Keras would not know.
FORMATS = dict.fromkeys(("quantize", "half", "bfloat16", "double", "type"), _CHOSEN)


@refuses(FORMATS)
class Network(keras.Model):
    """A functional Keras model that its config makes again.

    Args:
        config: arguments of the subclass, as `config_of` gives them.
        inputs: of the functional graph, as `inputs_of` gives them.
        output: of the functional graph, `(B, H, W, C)` float32.
    """

    def __init__(self, config: Config, inputs: dict[str, Tensor], output: Tensor) -> None:
        super().__init__(inputs, output, name=config["name"])
        self.dtype_policy = keras.dtype_policies.get(config["dtype"])
        self.autocast = False  # mixed precision must not round the timestep
        self.config = config
        self.image_shape, self.context_shape = config["image_shape"], config["context_shape"]
        self.num_classes = config["num_classes"]
        self.null_label = self.num_classes if config["null_label"] else None

    def export(self, filepath: PathLike, format: str = "tf_saved_model", **kwargs: Any) -> None:
        """As `keras.Model.export`, in the formats in which Keras can export a dict of inputs."""
        formats = backend.EXPORT_FORMATS
        if formats is not None and format not in formats:
            raise NotImplementedError(
                f"On this backend Keras cannot export a dict of inputs as {format!r}. Pass "
                f"format={formats[0]!r}, or export on another backend."
            )
        super().export(filepath, format=format, **kwargs)

    def get_config(self) -> Config:
        return dict(self.config)

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> Self:
        return cls(**config)


def copy_of(network: keras.Model, name: str) -> keras.Model:
    """A network of the same config under another name, with weights of its own.

    Raises:
        TypeError: for a network that its config does not make again: it could not be loaded.
    """
    try:
        copy = type(network).from_config({**network.get_config(), "name": name})
        same = [w.shape for w in copy.weights] == [w.shape for w in network.weights] and all(
            getattr(copy, key) == getattr(network, key) for key in ATTRIBUTES
        )
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise TypeError(_not_made_again(network)) from error
    if not same:
        raise TypeError(_not_made_again(network))
    return copy


def check_copy(network: keras.Model, copy: keras.Model) -> None:
    """Raises unless each weight of a network still has its place in the copy."""
    kinds = ([(w.name, tuple(w.shape), w.dtype) for w in net.weights] for net in (network, copy))
    for k, (weight, other) in enumerate(itertools.zip_longest(*kinds)):
        if weight != other:
            raise ValueError(
                f"Weight {k} of the network is {weight}, and of its moving average {other}: a "
                "layer was changed after it was made, such as by enable_lora, quantize or "
                "add_weight. This is not supported: use the network as its config makes it."
            )


def _not_made_again(network):
    return (
        f"{network.name!r} is not made again by its config, so it could not be loaded from a file. "
        "Expected a UViT or a UNet of which no layer was changed after it was made, such as by "
        "enable_lora, or your own Keras model inside networks.OwnNetwork(model, image_shape=...). "
        f"Received: {type(network).__name__}."
    )


def config_of(arguments: dict[str, Any]) -> Config:
    """The `locals()` of a constructor as a config: shapes are tuples, numbers are Python's own.

    Raises:
        ValueError: if the shapes or the number of classes cannot be.
    """
    config = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
    for key, value in config.items():
        config[key] = plain(tuple(value) if isinstance(value, list) else value)
    config["dtype"] = keras.dtype_policies.get(config["dtype"]).name
    image, context, classes = (config[k] for k in ("image_shape", "context_shape", "num_classes"))
    if not _is_shape(image, 3):
        raise ValueError(
            f"image_shape must be (height, width, channels), channels last. Received: {image}."
        )
    if classes is not None and classes < 1:
        raise ValueError(
            "num_classes must be at least 1, or None for a network without labels. "
            f"Received: {classes}."
        )
    if context is not None and not _is_shape(context, 2):
        raise ValueError(f"context_shape must be (length, width). Received: {context}.")
    return config


def _is_shape(shape, length):
    return isinstance(shape, tuple) and len(shape) == length and min(shape) >= 1


def inputs_of(config: Config) -> dict[str, Tensor]:
    """The inputs of a network by name: "image", "timestep" and its conditions."""
    inputs = {
        "image": keras.Input(config["image_shape"], dtype="float32", name="image"),
        "timestep": keras.Input((), dtype="float32", name="timestep"),
    }
    if config["context_shape"]:
        inputs["context"] = keras.Input(config["context_shape"], dtype="float32", name="context")
    if config["num_classes"] is not None:
        inputs["label"] = keras.Input((), dtype="int32", name="label")
    return inputs


def label_embedding(config: Config, dim: int) -> layers.Embedding:
    """The table of labels, with a last row for "no label" if `null_label`: N(0, 1) as PyTorch's."""
    return layers.Embedding(
        config["num_classes"] + int(config["null_label"]),
        dim,
        embeddings_initializer=initializers.RandomNormal(stddev=1.0),
        dtype=config["dtype"],
        name="label_embed",
    )
