"""What layers are made of: their config, initialisers, dense layers, norms, recomputing."""

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import keras
import numpy as np
from keras import initializers, layers, ops

from keras_uvit import backend
from keras_uvit.checks import refuses
from keras_uvit.types import Config, Tensor

DType: TypeAlias = str | keras.DTypePolicy  # of a layer: a policy or its name
Shape: TypeAlias = tuple[Any, ...]  # of a tensor: ints, None where the size is not fixed
Class = TypeVar("Class", bound=type[Any])


def serializable(cls: Class) -> Class:
    """Registers `cls` with Keras; its `get_config` returns the constructor's own arguments.

    The constructor must store each argument as an attribute of the same name, so that the list of
    arguments is written once and cannot drift from the config.
    """
    own = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else ()
    names = [name for name in own if name not in ("self", "kwargs")]

    def get_config(self: Any) -> dict[str, Any]:
        config = super(cls, self).get_config()  # type: ignore[arg-type]
        return {**config, **{name: getattr(self, name) for name in names}}

    cls.get_config = get_config
    return keras.saving.register_keras_serializable("keras_uvit")(cls)


def normal_init() -> initializers.Initializer:
    """N(0, 0.02^2), the published `trunc_normal_(std=.02)`, which cuts at +-2, never reached."""
    return initializers.RandomNormal(stddev=0.02)


def fan_in_init(fan_in: int) -> initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for convolutions, kernel and bias."""
    bound = 1.0 / math.sqrt(fan_in)
    return initializers.RandomUniform(-bound, bound)


def identity_init(shape: Shape, dtype: Any = None) -> Any:
    """The kernel `(3, 3, C, C)` of a convolution that gives what it gets."""
    height, width, channels, _ = shape
    kernel = np.zeros(shape)
    kernel[height // 2, width // 2] = np.eye(channels)
    return ops.convert_to_tensor(kernel, dtype)


# `init` of a network: the initialiser of the kernels that read a block's tokens, from their fan-in.
# Those that write into the tokens are N(0, 0.02^2) always, so that each block begins near the
# identity.
INITS: dict[str, Callable[[int], initializers.Initializer]] = {
    "published": lambda fan_in: normal_init(),
    "balanced": lambda fan_in: initializers.RandomNormal(stddev=fan_in**-0.5),
}


@serializable
@refuses(
    {
        "enable_lora": "Low-rank pairs are part of a network's config: `UViT(..., lora=16)`, or "
        "`training.adapt(model, lora=16)` for a model that is trained."
    }
)
class Dense(layers.Dense):
    """Keras' own, by the product that is fastest on each backend; maybe with a low-rank pair.

    Args:
        units: int, width of the output.
        lora: dict of "rank" and "alpha", or None for no pair; see `networks.lora`.
    """

    def __init__(self, units: int, lora: Config | None = None, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.lora = lora

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        if self.lora is not None:
            width, rank = input_shape[-1], self.lora["rank"]
            first = fan_in_init(width)
            self.lora_a = self.add_weight(shape=(width, rank), initializer=first, name="lora_a")
            self.lora_b = self.add_weight(
                shape=(rank, self.units), initializer="zeros", name="lora_b"
            )

    def call(self, inputs: Tensor) -> Tensor:
        if self.quantization_mode is not None:  # blocks ask by `call`, where Keras asks this
            return self.quantized_call(inputs)
        kernel = ops.convert_to_tensor(self.kernel)
        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        x = backend.project(inputs, kernel, bias)
        if self.lora is not None:
            # Not added to the kernel, whose gradient is then never computed.
            a, b = ops.convert_to_tensor(self.lora_a), ops.convert_to_tensor(self.lora_b)
            low = backend.project(backend.project(inputs, a), b)
            x = x + (self.lora["alpha"] / self.lora["rank"]) * low
        return x if self.activation is None else self.activation(x)

    def save_own_variables(self, store: Any) -> None:
        # All of them: Keras' dense layer knows its own two alone.
        layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        layers.Layer.load_own_variables(self, store)


def dense(
    units: int,
    dtype: DType,
    name: str,
    use_bias: bool = True,
    lora: Config | None = None,
    initializer: initializers.Initializer | None = None,
) -> Dense:
    options: Config = dict(kernel_initializer=initializer or normal_init(), dtype=dtype, name=name)
    return Dense(units, lora, use_bias=use_bias, **options)


def layer_norm(dtype: DType, name: str, affine: bool = True) -> layers.LayerNormalization:
    return layers.LayerNormalization(
        epsilon=1e-5, center=affine, scale=affine, dtype=dtype, name=name
    )


@serializable
class RMSNorm(layers.Layer):
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, statistics in float32, times a learned scale.

    Zhang and Sennrich 2019, arXiv 1910.07467, Eq. 4: a layer norm without centring and bias.

    Args:
        affine: bool. Whether there is the scale, which starts at one.
    """

    def __init__(self, affine: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.affine = affine

    def build(self, input_shape: Shape) -> None:
        self.scale = None
        if self.affine:
            self.scale = self.add_weight(shape=input_shape[-1:], initializer="ones", name="scale")

    def call(self, x: Tensor) -> Tensor:
        # Not ops.rms_normalization: in Keras 3.10 it needs a scale, and its mean is that of the
        # computation's dtype.
        wide = ops.cast(x, "float32")
        normed = wide * ops.rsqrt(ops.mean(ops.square(wide), axis=-1, keepdims=True) + 1e-6)
        if self.scale is not None:
            normed = normed * ops.cast(self.scale, "float32")
        return ops.cast(normed, self.compute_dtype)


def rms_norm(dtype: DType, name: str, affine: bool = True) -> RMSNorm:
    return RMSNorm(affine, dtype=dtype, name=name)


NORMS: dict[str, Callable[..., layers.Layer]] = {"layer": layer_norm, "rms": rms_norm}


def rematerialized(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, whose inside the backward pass computes again instead of keeping it.

    A new closure at each call, tensors as positional arguments: the only form with right gradients
    on all three backends. Nothing random may be drawn inside.
    """
    return keras.remat(lambda *values: function(*values))(*tensors)
