"""Low-rank pairs beside the kernels of a network (LoRA: Hu et al. 2021, arXiv 2106.09685).

A dense layer with a pair computes x W + b + (alpha / rank) (x A) B (their Eq. 3), A `(in, rank)`,
B `(rank, out)`. B starts at zero, so that a new pair adds nothing. `basics.Dense` has the pair;
here is which layers get one, what of a network is then trained, and how a pair becomes part of its
kernel.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit.checks import as_int
from keras_uvit.types import Config

KERNELS = ("lora_a", "lora_b")


def checked(lora: Any, targets: tuple[str, ...]) -> Config | None:
    """The argument `lora` of a network in full: a dict of "rank", "alpha" and "targets".

    Args:
        lora: None, a rank, or a dict of "rank", and maybe "alpha" and "targets".
        targets: the parts of the network that can have pairs; all of them are the default.

    Raises:
        ValueError: if there is no such argument or part, or a number cannot be.
    """
    if lora is None:
        return None
    given = dict(lora) if isinstance(lora, dict) else {"rank": lora}
    unknown = given.keys() - {"rank", "alpha", "targets"}
    if unknown or "rank" not in given:
        raise ValueError(
            'lora must be a rank or a dict of "rank", "alpha" and "targets", of which the rank is '
            f"needed. Received: {lora!r}."
        )
    rank = as_int(given["rank"], "The rank of lora", 1)
    chosen = tuple(given.get("targets", targets))
    if not chosen or not set(chosen) <= set(targets):
        raise ValueError(f"The targets of lora must be some of {targets}. Received: {chosen}.")
    return {"rank": rank, "alpha": float(given.get("alpha", rank)), "targets": chosen}


def pair_of(lora: Config | None, target: str) -> Config | None:
    """`lora` for the layers of a part, None where this part has no pairs."""
    return lora if lora and target in lora["targets"] else None


def train_pairs_alone(network: keras.Model) -> None:
    """Freezes all weights but the pairs."""
    for weight in network.weights:
        weight.trainable = weight.name in KERNELS


def products(network: keras.Model) -> Iterator[tuple[str, np.ndarray]]:
    """(path of a kernel, what its pair adds to it), `(in, out)` float32."""
    lora = network.config.lora
    weights = {weight.path: weight for weight in network.weights}
    for path, weight in weights.items():
        if weight.name == "lora_a":
            layer = path.removesuffix("lora_a")
            a, b = (ops.convert_to_numpy(weights[layer + name]) for name in KERNELS)
            yield f"{layer}kernel", lora["alpha"] / lora["rank"] * (a @ b)
