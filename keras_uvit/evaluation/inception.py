"""The Inception network that FID is defined on."""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_uvit.convert import load_torch_weights
from keras_uvit.inference import Frozen, fingerprint, load_keras_weights, own_defaults
from keras_uvit.networks.layers import serializable
from keras_uvit.types import Array, PathLike, Tensor

SIZE = 299  # pixels, what every image is resized to
SPATIAL_CHANNELS = 7  # of sFID
CLASSES = 1008
RESIZES = ("half_pixel", "tf1")


# The graph as tables. A branch is a list of convolutions (name, filters, kernel, strides=1) and
# pools; a tuple of two convolutions reads the same input twice and joins the answers. Strided
# convolutions are unpadded, the others keep the size.
def _block_a(pool_filters):
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pool_filters, 1)],
    ]


def _block_b():
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        ["shrink"],
    ]


def _block_c(width):
    wide, tall = (1, 7), (7, 1)
    return [
        [("branch1x1", 192, 1)],
        [
            ("branch7x7_1", width, 1),
            ("branch7x7_2", width, wide),
            ("branch7x7_3", 192, tall),
        ],
        [
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, tall),
            ("branch7x7dbl_3", width, wide),
            ("branch7x7dbl_4", width, tall),
            ("branch7x7dbl_5", 192, wide),
        ],
        ["average", ("branch_pool", 192, 1)],
    ]


def _block_d():
    return [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        ["shrink"],
    ]


def _block_e(pool):
    return [
        [("branch1x1", 320, 1)],
        [
            ("branch3x3_1", 384, 1),
            (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
        ],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ],
        [pool, ("branch_pool", 192, 1)],
    ]


BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),  # a peculiarity of the 2015 graph
}
POOLS = {
    "average": lambda: layers.AveragePooling2D(3, 1, "same"),  # the padding is not counted
    "maximum": lambda: layers.MaxPooling2D(3, 1, "same"),
    "shrink": lambda: layers.MaxPooling2D(3, 2),
}


@serializable
class ConvNorm(layers.Layer):
    """relu(batch norm(convolution)), the norm by its stored statistics.

    Call arguments: x `(B, H, W, C)`. Returns `(B, H', W', filters)`.
    """

    def __init__(
        self,
        filters: int,
        kernel: int | tuple[int, int],
        strides: int = 1,
        padding: str = "same",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters, self.kernel, self.strides, self.padding = filters, kernel, strides, padding
        self.conv = layers.Conv2D(filters, kernel, strides, padding, use_bias=False, name="conv")
        self.norm = layers.BatchNormalization(epsilon=1e-3, name="norm")

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.conv.build(shape)
        self.norm.build(self.conv.compute_output_shape(shape))

    def call(self, x: Tensor) -> Tensor:
        return ops.relu(self.norm(self.conv(x), training=False))

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return self.conv.compute_output_shape(shape)


@serializable
class Resize(layers.Layer):
    """Images of any size in [0, 255] to 299 x 299 in the network's range, without antialiasing.

    Call arguments: images `(B, H, W, 3)` float. Returns `(B, 299, 299, 3)`.
    """

    def __init__(self, resize: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resize = resize

    def call(self, images: Tensor) -> Tensor:
        if self.resize == "half_pixel":
            images = ops.image.resize(
                images, (SIZE, SIZE), "bilinear", antialias=False, data_format="channels_last"
            )
            return images / 127.5 - 1.0
        rows, columns = (ops.convert_to_tensor(_tf1_matrix(n)) for n in images.shape[1:3])
        images = ops.einsum("ih,bhwc->biwc", rows, images)
        return (ops.einsum("jw,biwc->bijc", columns, images) - 128.0) / 128.0

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (shape[0], SIZE, SIZE, shape[3])


def _tf1_matrix(size):
    """`(299, size)`: TensorFlow 1's bilinear resize, source = target * size / 299."""
    source = np.arange(SIZE, dtype="float32") * np.float32(size / SIZE)
    low = source.astype(int)
    weight = source - low.astype("float32")
    matrix = np.zeros((SIZE, size), "float32")
    np.add.at(matrix, (np.arange(SIZE), low), 1 - weight)
    np.add.at(matrix, (np.arange(SIZE), np.minimum(low + 1, size - 1)), weight)
    return matrix


@serializable
class Classifier(layers.Layer):
    """Logits of the 1,008 classes, with the bias and without.

    Call arguments: x `(B, 2048)`. Returns two arrays `(B, 1008)`.
    """

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], CLASSES), name="kernel")
        self.bias = self.add_weight(shape=(CLASSES,), initializer="zeros", name="bias")

    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = ops.matmul(x, self.kernel)
        return logits + self.bias, logits

    def compute_output_shape(
        self, shape: tuple[int | None, ...]
    ) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        return (shape[0], CLASSES), (shape[0], CLASSES)


def _branch(x, block, steps):
    for step in steps:
        if isinstance(step, str):
            x = POOLS[step]()(x)
        elif isinstance(step[0], tuple):
            x = layers.Concatenate()([_branch(x, block, [part]) for part in step])
        else:
            name, filters, kernel, strides = (*step, 1)[:4]
            padding = "same" if strides == 1 else "valid"
            x = ConvNorm(filters, kernel, strides, padding, name=f"{block}_{name}")(x)
    return x


def inception_v3(resize: str) -> keras.Model:
    """Images `(B, H, W, 3)` in [0, 255] to a dict of features; see `InceptionFeatures`."""
    x = image = layers.Input((None, None, 3), name="image")
    x = Resize(resize, name="resize")(x)
    x = ConvNorm(32, 3, 2, "valid", name="Conv2d_1a_3x3")(x)
    x = ConvNorm(32, 3, 1, "valid", name="Conv2d_2a_3x3")(x)
    x = ConvNorm(64, 3, name="Conv2d_2b_3x3")(x)
    x = layers.MaxPooling2D(3, 2)(x)
    x = ConvNorm(80, 1, 1, "valid", name="Conv2d_3b_1x1")(x)
    x = ConvNorm(192, 3, 1, "valid", name="Conv2d_4a_3x3")(x)
    x = layers.MaxPooling2D(3, 2)(x)
    for block, branches in BLOCKS.items():
        parts = [_branch(x, block, steps) for steps in branches]
        if block == "Mixed_6d":
            spatial = parts[0][..., :SPATIAL_CHANNELS]
        x = layers.Concatenate(name=block)(parts)
    pool = layers.GlobalAveragePooling2D(name="pool")(x)
    logits, unbiased = Classifier(name="fc")(pool)
    features = {"pool": pool, "spatial": layers.Flatten(name="spatial")(spatial)}
    features |= {"logits": logits, "logits_unbiased": unbiased}
    return keras.Model(image, features, name="inception")


class InceptionFeatures:
    """What FID and its relatives see of images: the Inception graph of 2015-12-05.

    Szegedy et al. 2015, arXiv 1512.00567, with that file's peculiarities: batch norm epsilon 1e-3,
    average pools that do not count the padding, a maximum pool in the last block, 1,008 classes.

    Args:
        weights: path of pytorch-fid's and torch-fidelity's file
            `pt_inception-2015-12-05-6726825d.pth`, of a `.safetensors` with the same names, or of
            Keras weights (`.weights.h5`). `None` leaves random weights, to try a path: distances
            in their features mean nothing.
        resize: how images come to 299 x 299, bilinear without antialiasing. "half_pixel" as
            pytorch-fid and the paper's program; "tf1" as torch-fidelity and the ADM suite's
            evaluator, TensorFlow 1's. Features differ by 0.1 to 0.5 %.
        batch_size: int, images at a time.

    Call arguments: images `(n, H, W, 3)` uint8 of any size; `batch_size`, `verbose` 0 or 1.
    Returns a dict of float32 arrays:

    * "pool" `(n, 2048)`: pool3, for FID, precision and recall;
    * "spatial" `(n, 2023)`: 7 channels of the 17 x 17 features of Mixed_6d's 1x1 branch, for sFID;
    * "logits" `(n, 1008)`, and "logits_unbiased" without the classifier's bias, on which the ADM
      suite and torch-fidelity compute the Inception Score.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `convert.load_torch_weights`.
    """

    def __init__(
        self, weights: PathLike | None = None, resize: str = "half_pixel", batch_size: int = 32
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {RESIZES}. Received: {resize!r}.")
        self.resize, self.batch_size = resize, batch_size
        with own_defaults("float32"):
            self.network = inception_v3(resize)
        self.network.trainable = False
        self._run = Frozen(self.network)
        if weights is None:
            return
        if str(weights).endswith(".weights.h5"):
            self.load_weights(weights)
        else:
            load_torch_weights(self, weights)

    @property
    def weights(self) -> list[keras.Variable]:
        return self.network.weights

    def load_weights(self, path: PathLike) -> None:
        """Reads Keras weights, `.weights.h5`."""
        load_keras_weights(self.network, path)

    def save_weights(self, path: PathLike, overwrite: bool = True) -> None:
        """Writes Keras weights, `.weights.h5`."""
        self.network.save_weights(path, overwrite=overwrite)

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.network)

    def __call__(
        self, images: Array, batch_size: int | None = None, verbose: int = 1
    ) -> dict[str, np.ndarray]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            hint = " Repeat grey images: x.repeat(3, axis=-1)." if images.shape[-1:] == (1,) else ""
            raise ValueError(
                f"Images have shape (n, H, W, 3), n at least 1. Received: {images.shape}.{hint}"
            )
        if images.dtype != np.uint8:
            raise TypeError(
                "Images are uint8 in [0, 255]: FID is of quantized images. "
                f"Received: dtype {images.dtype}."
            )
        batch_size = self.batch_size if batch_size is None else batch_size
        return self._run(images, batch_size, lambda x: x.astype("float32"), verbose)
