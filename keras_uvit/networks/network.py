"""What networks share: their conditions, and how a config makes them again."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self

import keras
from keras import initializers, layers

from keras_uvit import backend
from keras_uvit.checks import nearest, plain, refuses
from keras_uvit.networks import quantizing
from keras_uvit.networks.basics import DType
from keras_uvit.networks.lora import train_pairs_alone
from keras_uvit.types import Config, PathLike, Tensor

Arguments = ParamSpec("Arguments")

# What a `DiffusionModel` asks a network for.
ATTRIBUTES = (
    "image_shape",
    "num_classes",
    "null_label",
    "context_shape",
    "takes_span",
    "takes_guidance",
)

_CHOSEN = (
    "The number format of a network is chosen when it is made, such as "
    '`UViT(..., dtype="mixed_bfloat16")`.'
)
# Those of PyTorch's modules, of which Keras would not know.
FORMATS = dict.fromkeys(("half", "bfloat16", "double", "type"), _CHOSEN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The arguments that all networks take; a subclass adds its own. Checked when it is made.

    Lists become tuples, numbers of NumPy Python's own, and `dtype` the name of a policy.

    Raises:
        ValueError: if the shapes or the number of classes cannot be.
    """

    image_shape: tuple[int, int, int]
    num_classes: int | None = None
    null_label: bool = True
    context_shape: tuple[int, int] | None = None
    takes_span: bool = False
    takes_guidance: bool = False
    dtype: DType | None = None
    quantization: str | None = None
    name: str

    def __post_init__(self) -> None:
        for key, value in self.arguments().items():
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, key, plain(value))
        object.__setattr__(self, "dtype", keras.dtype_policies.get(self.dtype).name)
        if not _is_shape(self.image_shape, 3):
            raise ValueError(
                "image_shape must be (height, width, channels), channels last. Received: "
                f"{self.image_shape}."
            )
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                "num_classes must be at least 1, or None for a network without labels. "
                f"Received: {self.num_classes}."
            )
        if self.context_shape is not None and not _is_shape(self.context_shape, 2):
            raise ValueError(
                f"context_shape must be (length, width). Received: {self.context_shape}."
            )

    def arguments(self) -> Config:
        """The arguments by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _is_shape(shape, length):
    return isinstance(shape, tuple) and len(shape) == length and min(shape) >= 1


def arguments_of(
    config: Callable[Arguments, Any],
) -> Callable[[Callable[[Any, Any], None]], Callable[Concatenate[Any, Arguments], None]]:
    """A decorator: the constructor takes the arguments of `config`, and gets the config."""

    known = inspect.signature(config).parameters

    def decorate(init):
        @functools.wraps(init)
        def constructor(self: Any, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            for name in kwargs.keys() - known.keys():
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}.{nearest(name, known)}"
                )
            init(self, config(*args, **kwargs))

        of_self, *_ = inspect.signature(init).parameters.values()
        parameters = [of_self, *known.values()]
        constructor.__signature__ = inspect.Signature(parameters)
        return constructor

    return decorate


@refuses(FORMATS)
class Network(keras.Model):
    """A functional Keras model that its config makes again.

    Args:
        config: the arguments of the subclass.
        inputs: of the functional graph, as `inputs_of` gives them.
        output: of the functional graph, `(B, H, W, C)` float32.
    """

    def __init__(self, config: NetworkConfig, inputs: dict[str, Tensor], output: Tensor) -> None:
        super().__init__(inputs, output, name=config.name)
        self.dtype_policy = keras.dtype_policies.get(config.dtype)
        self.config = config
        self.image_shape, self.context_shape = config.image_shape, config.context_shape
        self.num_classes = config.num_classes
        self.null_label = self.num_classes if config.null_label else None
        self.takes_span, self.takes_guidance = config.takes_span, config.takes_guidance
        if getattr(config, "lora", None):
            train_pairs_alone(self)
        del self.quantize  # Keras' wrapper of the method below: its own checks would come first
        if config.quantization is not None:  # as it was saved; the kernels are read after this
            self.config = dataclasses.replace(config, quantization=None)
            self.quantize(config.quantization)

    def quantize(self, mode: str = "int8") -> None:
        """Makes the kernels of dense layers 8-bit integers, in place: for sampling, not training.

        A network inside a `DiffusionModel` is quantized with its moving average by
        `DiffusionModel.quantize`.

        Args:
            mode: "int8"; Keras' other modes are refused.

        Raises:
            ValueError: for another mode, or a network that cannot be quantized; nothing is changed.
        """
        quantizing.check_mode(self, mode)
        quantizing.quantize_layers(self, mode)
        self.config = dataclasses.replace(self.config, quantization=mode)

    def export(self, filepath: PathLike, format: str = "tf_saved_model", **kwargs: Any) -> None:
        """As `keras.Model.export`, in the formats that can be read again.

        Args:
            filepath: path to write.
            format: "tf_saved_model" on JAX and TensorFlow, "litert" on TensorFlow, "torch" on
                PyTorch.
            **kwargs: as those of Keras, such as `verbose`, or on PyTorch `dynamic_shapes`, without
                which the program takes one image.

        Raises:
            NotImplementedError: for another format; nothing is written.
        """
        formats = backend.EXPORT_FORMATS
        if format not in formats:
            raise NotImplementedError(
                f"On {backend.NAME} Keras cannot export a network as {format!r}. Pass format="
                f"{' or '.join(map(repr, formats))}. To ONNX, `DiffusionModel.export_sampler` "
                "exports the whole sampling loop."
            )
        super().export(filepath, format=format, **kwargs)

    def get_config(self) -> Config:
        return self.config.arguments()

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
                "add_weight. This is not supported: use the network as its config makes it; "
                "`training.adapt(model, lora=16)` gives it low-rank pairs, and "
                "`model.quantize('int8')` quantizes both."
            )


def _not_made_again(network):
    return (
        f"{network.name!r} is not made again by its config, so it could not be loaded from a file. "
        "Expected a UViT or a UNet of which no layer was changed after it was made, such as by "
        "enable_lora, or your own Keras model inside networks.OwnNetwork(model, image_shape=...). "
        f"Received: {type(network).__name__}."
    )


def inputs_of(config: NetworkConfig) -> dict[str, Tensor]:
    """The inputs of a network by name: "image", "timestep" and its conditions."""
    inputs = {
        "image": keras.Input(config.image_shape, dtype="float32", name="image"),
        "timestep": keras.Input((), dtype="float32", name="timestep"),
    }
    if config.context_shape:
        inputs["context"] = keras.Input(config.context_shape, dtype="float32", name="context")
    if config.num_classes is not None:
        inputs["label"] = keras.Input((), dtype="int32", name="label")
    for name in ("span", "guidance"):
        if getattr(config, f"takes_{name}"):
            inputs[name] = keras.Input((), dtype="float32", name=name)
    return inputs


def label_embedding(config: NetworkConfig, num_classes: int, dim: int) -> layers.Embedding:
    """The table of labels, with a last row for "no label" if `null_label`: N(0, 1) as PyTorch's."""
    return layers.Embedding(
        num_classes + int(config.null_label),
        dim,
        embeddings_initializer=initializers.RandomNormal(stddev=1.0),
        dtype=config.dtype,
        name="label_embed",
    )
