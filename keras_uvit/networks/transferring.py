"""The weights of one network in another: of other classes, image size, channels or conditions.

The blocks of both must be the same. What can differ stands at the ends of a network: the table of
labels, the positions, the projection of patches, the head, the projection of a context. Low-rank
pairs (`lora`) may be added to a network that has none.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit.networks.lora import KERNELS

# Arguments in which the two networks may differ.
ADAPTABLE = (
    *("image_shape", "patch_size", "num_classes", "null_label", "context_shape", "lora"),
    *("takes_span", "takes_guidance"),
)
FREE = ("dtype", "remat", "init")  # and those that concern no weight
# Weights that one of the two networks may lack.
OPTIONAL = re.compile(
    r"(label_embed|context_embed|\w+_context|(span|guidance)_mlp_(in|out))/.*|.*/lora_[ab]"
)
# The axes of an image's channels in a weight, as (input, output); None where there is none. Of a
# weight with (P P C) in one axis, they are those after this axis has become (P P, C).
CHANNELS: dict[str, tuple[int | None, int | None]] = {
    "patch_embed/proj/kernel": (1, None),  # (P P, C, D)
    "patch_embed/conv_0/kernel": (2, None),  # (3, 3, C, D)
    "input_conv/kernel": (2, None),  # (3, 3, C, D)
    "head/kernel": (None, 2),  # (D, P P, C)
    "head/bias": (None, 1),  # (P P, C)
    "output_conv/kernel": (2, 3),  # (3, 3, C, C); of a U-Net (3, 3, D, C)
    "output_conv/bias": (None, 0),  # (C,)
}
PATCHES = {"patch_embed/proj/kernel": 0, "head/kernel": 1, "head/bias": 0}  # where (P P C) is


@dataclasses.dataclass
class Transfer:
    """What became of the weights: their paths in the network.

    Attributes:
        kept: as they were, bit by bit.
        resized: parts of them are as they were, or interpolated.
        new: with fresh values.
        left_out: paths of the source for which the network has no place.
    """

    kept: list[str] = dataclasses.field(default_factory=list)
    resized: list[str] = dataclasses.field(default_factory=list)
    new: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether each weight was kept and none left out."""
        return not (self.resized or self.new or self.left_out)

    def text(self) -> str:
        """Three lines: what was kept, what was resized, what was made anew."""
        out = f"; left out: {_listed(self.left_out)}" if self.left_out else ""
        return "\n".join(
            (
                f"Kept: {len(self.kept)} weights of {len(self.kept + self.resized + self.new)}.",
                f"Resized: {_listed(self.resized)}.",
                f"Made anew: {_listed(self.new)}{out}.",
            )
        )


def _listed(paths):
    pairs = [path for path in paths if path.endswith(KERNELS)]
    words = [path for path in paths if path not in pairs]
    words += [f"{len(pairs)} low-rank kernels"] if pairs else []
    return ", ".join(words) or "none"


def transfer(
    source: keras.Model,
    network: keras.Model,
    classes: Mapping[int, int] | None = None,
    strict: bool = False,
) -> Transfer:
    """Sets the weights of `network` to those of `source`, as far as they fit.

    | weight | where it differs |
    |---|---|
    | table of labels | new rows; "no label" is kept, and rows that `classes` names |
    | learned positions | those of patches by bicubic interpolation, row and column by themselves; \
those of label, time and context are kept |
    | patch embedding, head, last convolution | the first channels are kept; what further channels \
of the image add to the tokens starts at zero; new for another patch size |
    | projection of the context | new |
    | low-rank pairs | new, so that the network's output does not change |

    Args:
        source: `UViT` or `UNet`.
        network: another one, with the same blocks.
        classes: dict of a class to the class of `source` whose row it begins with. `None`: the
            table is kept where both have as many classes.
        strict: bool. Raise unless all weights fit as they are.

    Returns:
        `Transfer`.

    Raises:
        ValueError: if the blocks differ, if a class does not exist, or, with `strict`, if anything
            differs. Then nothing is changed.
    """
    old = {weight.path: weight for weight in source.weights}
    new = {weight.path: weight for weight in network.weights}
    _check_classes(source, network, classes)
    done = Transfer(left_out=[path for path in old if path not in new])
    values: dict[str, Any] = {}
    foreign = [path for path in done.left_out if not OPTIONAL.fullmatch(path)]
    for path, weight in new.items():
        there = old.get(path)
        if (
            there is not None
            and there.shape == weight.shape
            and not (path in RESIZED and _differ(source, network, path, classes))
        ):
            done.kept.append(path)
            values[path] = there
        elif OPTIONAL.fullmatch(path) and (there is None or path not in RESIZED):
            done.new.append(path)
        elif there is None or path not in {*RESIZED, *CHANNELS}:
            foreign.append(path)
        else:
            fresh, present = (np.array(ops.convert_to_numpy(w)) for w in (weight, there))
            resize = RESIZED.get(path, _channels)
            value = resize(present, fresh, source, network, path, classes)
            (done.new if value is None else done.resized).append(path)
            if value is not None:
                values[path] = value
    if foreign or strict and not done.is_exact:
        raise ValueError(_reason(done, foreign))
    for path, value in values.items():
        # A copy: JAX must not donate one buffer twice.
        new[path].assign(value if isinstance(value, np.ndarray) else ops.copy(value.value))
    return done


def _reason(done, foreign):
    if not foreign:
        return f"The weights do not fit as they are, and strict=True asks for it. {done.text()}"
    some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
    return (
        f"The weights are those of a different network: {some} differ or are missing. Only "
        f"{', '.join(ADAPTABLE)} can be changed."
    )


def _check_classes(source, network, classes):
    for new, old in (classes or {}).items():
        for number, net in ((new, network), (old, source)):
            if not 0 <= number < (net.num_classes or 0):
                raise ValueError(
                    f"classes={{{new}: {old}}}: there is no class {number}. Expected a dict of "
                    f"classes below {network.num_classes} to classes of the weights, below "
                    f"{source.num_classes}."
                )


def _differ(source, network, path, classes):
    """Whether a weight of equal shape means something else in the two networks."""
    if path == LABELS:
        return classes is not None or source.num_classes != network.num_classes
    return _tokens(source) != _tokens(network)


# How a weight is resized, from its value and a fresh one; None makes it anew ----------------------


def _labels(old, fresh, source, network, path, classes):
    if old.shape[1] != fresh.shape[1]:
        return None
    if classes is None and source.num_classes == network.num_classes:
        classes = {k: k for k in range(network.num_classes)}
    rows = dict(classes or {})
    if None not in (source.null_label, network.null_label):
        rows[network.null_label] = source.null_label
    for to, row in rows.items():
        fresh[to] = old[row]
    return fresh if rows else None


def _positions(old, fresh, source, network, path, classes):
    if old.shape[1] != fresh.shape[1]:
        return None
    (there, patches), (here, wanted) = _tokens(source), _tokens(network)
    for kind, rows in here.items():
        for to, row in zip(rows, there.get(kind, ())):
            fresh[to] = old[row]
    fresh[-math.prod(wanted) :] = resized(old[-math.prod(patches) :], patches, wanted)
    return fresh


def _channels(old, fresh, source, network, path, classes):
    shape = fresh.shape
    if path in PATCHES:
        old, fresh = (
            _split(a, PATCHES[path], net.image_shape[-1])
            for a, net in ((old, source), (fresh, network))
        )
    inputs, outputs = CHANNELS[path]
    common = tuple(slice(min(a, b)) for a, b in zip(old.shape, fresh.shape))
    others = set(range(fresh.ndim)) - {inputs, outputs}
    if any(old.shape[axis] != fresh.shape[axis] for axis in others):
        return None
    if inputs is not None:
        fresh[(slice(None),) * inputs + (slice(old.shape[inputs], None),)] = 0
    fresh[common] = old[common]
    return fresh.reshape(shape)


LABELS = "label_embed/embeddings"
RESIZED: dict[str, Any] = {LABELS: _labels, "position/embeddings": _positions}


def _split(a, axis, channels):
    return a.reshape(*a.shape[:axis], -1, channels, *a.shape[axis + 1 :])


def _tokens(network):
    """Rows of the extra tokens by their kind, and the grid of patches after them."""
    config, rows, first = network.config, {}, 0
    for kind, count in config.extras.items():
        rows[kind] = range(first, first + count)
        first += count
    return rows, config.grid


def resized(vectors: np.ndarray, grid: tuple[int, int], wanted: tuple[int, int]) -> np.ndarray:
    """Vectors on a grid of patches, on another one: bicubic, along columns and along rows.

    Centres of pixels are half-integers, as those of images; the kernel is Keys' of a = -1/2 (Keys
    1981), which is exact for quadratics away from the edges.

    Args:
        vectors: `(rows * columns, D)`.
        grid: pair of ints, (rows, columns).
        wanted: the same of the result.

    Returns:
        float32 `(rows * columns, D)`.
    """
    down, across = (_bicubic(n, m) for n, m in zip(grid, wanted))
    table = vectors.reshape(*grid, -1).astype("float64")
    table = np.einsum("ir,jc,rcd->ijd", down, across, table, optimize=True)
    return table.reshape(math.prod(wanted), -1).astype("float32")


def _bicubic(count, wanted):
    """`(wanted, count)`, by which `count` numbers become `wanted`; the outermost are repeated."""
    place = (np.arange(wanted) + 0.5) * count / wanted - 0.5
    first = np.floor(place).astype(int) - 1
    matrix = np.zeros((wanted, count))
    for k in range(4):
        x = np.abs(place - first - k)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        column = np.clip(first + k, 0, count - 1)
        np.add.at(matrix, (np.arange(wanted), column), np.where(x <= 1, near, far))
    return matrix
