"""Low-rank pairs of a model: a file of their own, and back into the kernels."""

import json
from typing import Any

import numpy as np
from keras import ops

from keras_uvit import distribution, io
from keras_uvit.inference import fingerprint_of
from keras_uvit.networks.lora import products
from keras_uvit.networks.transferring import ADAPTABLE, FREE
from keras_uvit.optional import optional
from keras_uvit.training.adapting import adapt
from keras_uvit.training.model import DiffusionModel
from keras_uvit.types import PathLike

FORMAT, VERSION = "keras_uvit lora", 1


def save_lora(model: DiffusionModel, path: PathLike) -> None:
    """Writes what a model with low-rank pairs has learned: the average of all trained weights.

    These are the pairs, and what was made anew or unfrozen beside them, such as a table of labels.
    `load_lora` puts them onto the weights that the model began at.

    Args:
        model: `DiffusionModel` whose network has `lora`.
        path: ending in `.safetensors`.

    Raises:
        ValueError: for a model without pairs, another ending, or weights that are divided among
            processes.
        ImportError: without `pip install "keras-uvit[latent]"`.
    """
    _check_pairs(model)
    safetensors = _safetensors(path)
    distribution.check_whole()
    pairs = list(zip(model.network.weights, model.ema_network.weights))
    trained = {w.path: ops.convert_to_numpy(average) for w, average in pairs if w.trainable}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "network": model.network.get_config(),
        "base": fingerprint_of(average for w, average in pairs if not w.trainable),
    }
    metadata = {"keras_uvit": json.dumps(content)}
    arrays = {name: np.ascontiguousarray(a) for name, a in trained.items()}
    with io.replacing(path) as beside:
        safetensors.save_file(arrays, beside, metadata=metadata)


def load_lora(model: DiffusionModel, path: PathLike, strength: float = 1.0) -> DiffusionModel:
    """A new model: `model` with what `save_lora` has written, to generate or to train on.

    Args:
        model: the `DiffusionModel` that the other one began at, without pairs; it is not changed.
        path: the file.
        strength: float, by which what the pairs add is multiplied; 0 leaves it out. Other weights
            of the file, such as a table of labels, are taken as they are.

    Returns:
        `DiffusionModel`, not compiled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or the pairs were learned on other weights.
        ImportError: without `pip install "keras-uvit[latent]"`.
    """
    arrays, content = _read(path)
    here, there = model.network.get_config(), content["network"]
    here = json.loads(json.dumps(here))
    other = {key for key in there if key not in ("name", *FREE) and there[key] != here.get(key)}
    if other - set(ADAPTABLE):
        raise ValueError(
            f"{path} was learned on a network that differs in {sorted(other - set(ADAPTABLE))}."
        )
    new = adapt(model, **{key: there[key] for key in other}, verbose=0)
    weights = {weight.path: weight for weight in new.network.weights}
    wrong = [k for k, a in arrays.items() if k not in weights or weights[k].shape != a.shape]
    base = fingerprint_of(weight for key, weight in weights.items() if key not in arrays)
    if wrong or base != content["base"]:
        raise ValueError(
            f"{path} was learned on other weights than those of {model.name!r}. Load the model "
            "that the fine-tuning began at."
        )
    for key, weight in weights.items():
        weight.trainable = key in arrays
        if key in arrays:
            weight.assign(strength * arrays[key] if weight.name == "lora_b" else arrays[key])
    new.copy_weights_to_ema()
    return new


def merge_lora(model: DiffusionModel, strength: float = 1.0) -> DiffusionModel:
    """A new model without low-rank pairs: what they add is part of the kernels.

    It computes the same, as fast as a model that never had pairs, and can be saved by
    `convert.save_torch_weights`. It begins at the moving average, and all its weights are trained.

    Args:
        model: `DiffusionModel` whose network has `lora`; it is not changed.
        strength: float, by which what the pairs add is multiplied.

    Returns:
        `DiffusionModel`, not compiled.

    Raises:
        ValueError: for a model without pairs.
    """
    _check_pairs(model)
    new = adapt(model, lora=None, verbose=0)
    weights = {weight.path: weight for weight in new.network.weights}
    for path, product in products(model.ema_network):
        weights[path].assign_add(strength * product)
    new.copy_weights_to_ema()
    return new


def _check_pairs(model):
    if getattr(model.network.config, "lora", None) is None:
        raise ValueError(
            f"{model.name!r} has no low-rank pairs: `training.adapt(model, lora=16)` gives it some."
        )


def _safetensors(path):
    if not str(path).endswith(".safetensors"):
        raise ValueError(f"The name of a file of pairs ends in .safetensors. Received: {path}.")
    return optional("safetensors.numpy", "latent", f"{path} needs safetensors")


def _read(path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    _safetensors(path)
    safetensors = optional("safetensors", "latent", f"{path} needs safetensors")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            content = json.loads((file.metadata() or {}).get("keras_uvit", "{}"))
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}.") from error
    if content.get("format") != FORMAT or content["version"] > VERSION:
        raise ValueError(
            f"{path} is no file of `training.save_lora` that this version reads. Received: "
            f"format {content.get('format')!r}, version {content.get('version')!r}."
        )
    return arrays, content
