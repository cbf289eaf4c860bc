"""Any Keras model as the network of a `DiffusionModel`."""

import dataclasses
from typing import Any, Self

import keras
from keras import layers

from keras_uvit.checks import refuses
from keras_uvit.networks.network import Network, NetworkConfig, arguments_of, inputs_of
from keras_uvit.types import Config


@dataclasses.dataclass(frozen=True)
class OwnNetworkConfig(NetworkConfig):
    """The arguments of `OwnNetwork`, which explains them."""

    model: keras.Model
    name: str = dataclasses.field(default="own_network", kw_only=True)

    def __post_init__(self) -> None:
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.model.dtype_policy)
        super().__post_init__()


@keras.saving.register_keras_serializable("keras_uvit")
@refuses({"quantize": "Its layers are your own model's; UViT and UNet can be quantized."})
class OwnNetwork(Network):
    """A Keras model of your own, with what a `DiffusionModel` needs to know of it.

    The model is called with a dict: "image" `(B, H, W, C)` float32, "timestep" `(B,)` float32
    (`time_scale * t`, 0 to 999 for continuous schedules), "label" `(B,)` int32 with `num_classes`,
    "context" `(B, length, width)` float32 with `context_shape`. It returns `(B, H, W, C)`.

    It is saved with the diffusion model, as Keras saves any model: a functional one as it is; a
    class of your own must be registered (`keras.saving.register_keras_serializable`), and its
    `get_config` must return the arguments of its constructor. Name the layers: a run is resumed
    only by a network whose layers have the same names. In mixed precision Keras rounds the inputs
    of a subclassed model, the timestep too: pass `autocast=False` to its `super().__init__`.

    Args:
        model: Keras model, functional or subclassed.
        image_shape: `(H, W, C)`.
        num_classes: int K for labels, `None` for none.
        null_label: bool. Whether the model knows label K as "no label", which classifier-free
            guidance needs.
        context_shape: `(length, width)` of text features, `None` for none.
        dtype: policy of the steps around the model; `None` is that of the model.

    Raises:
        ValueError: if the model returns another shape.

    Example:
        >>> inputs = {"image": keras.Input((8, 8, 1)), "timestep": keras.Input(())}
        >>> x = layers.Conv2D(8, 3, padding="same")(inputs["image"])
        >>> time = layers.Dense(8)(layers.Reshape((1, 1, 1))(inputs["timestep"]))
        >>> output = layers.Conv2D(1, 3, padding="same")(layers.Add()([x, time]))
        >>> OwnNetwork(keras.Model(inputs, output), image_shape=(8, 8, 1)).output_shape
        (None, 8, 8, 1)
    """

    @arguments_of(OwnNetworkConfig)
    def __init__(self, config: OwnNetworkConfig) -> None:
        inputs = inputs_of(config)
        answer = config.model(inputs)
        output = layers.Activation("linear", dtype="float32", name="output")(answer)
        if tuple(output.shape[1:]) != config.image_shape:
            raise ValueError(
                f"The model must return images of shape {config.image_shape}. Received: "
                f"{tuple(output.shape[1:])}."
            )
        super().__init__(config, inputs, output)

    def get_config(self) -> Config:
        config = super().get_config()
        return {**config, "model": keras.saving.serialize_keras_object(config["model"])}

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> Self:
        # Built here, inside the network, as the first time: the names of weights tell where.
        unbuilt = {**config["model"], "build_config": None}
        model = keras.saving.deserialize_keras_object(unbuilt, custom_objects)
        return cls(**{**config, "model": model})
