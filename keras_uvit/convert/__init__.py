"""Foreign checkpoints to Keras weights and back; the only place that knows foreign names."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_uvit.convert import autoencoder, clip, inception, uvit
from keras_uvit.convert.files import read_tensors, write_tensors
from keras_uvit.networks import quantizing
from keras_uvit.types import PathLike

# A module a class of network: `entries(network)` lists (published name, Keras variable, layout),
# `normalized(tensors, network)` brings the names of the files in circulation to those.
FAMILIES = {
    "UViT": uvit,
    "AutoencoderKL": autoencoder,
    "InceptionFeatures": inception,
    "CLIPTextEncoder": clip,
    "CLIPBackbone": clip,
}


def load_torch_weights(network: Any, path: PathLike, key: str | None = None) -> None:
    """Loads a published checkpoint (`.pth`, or `.safetensors` with the same names).

    Strict: every array of the file is used once and every weight of the network is set, or nothing
    is changed. Pickled code is never run.

    Args:
        network: one of

            * `UViT` in the published form (the defaults; `output_conv`, `qkv_bias`, `time_mlp` and
              conditions as the checkpoint has them), or a `DiffusionModel`, whose moving average
              is set too;
            * `encoders.AutoencoderKL`, from the published program's file or diffusers' layout;
            * `evaluation.InceptionFeatures`, from pytorch-fid's or torch-fidelity's file;
            * keras-hub's `CLIPTextEncoder` or `CLIPBackbone`, from Hugging Face's file.
        path: the file.
        key: str, which part of a file with several, such as "ema"; see `read_tensors`. A file of
            one part needs none, and "module." in front of all names is taken off.

    Raises:
        FileNotFoundError, ImportError: see `read_tensors`.
        TypeError: for another network.
        ValueError: if the file is damaged or foreign, or names and shapes do not match; the
            message lists missing, extra and wrong-shaped keys.
    """
    target, family = _family(network)
    tensors = family.normalized(read_tensors(path, key), target)
    entries = list(family.entries(target))
    new = _matched(entries, tensors, Path(path).name)
    for variable, value in new:
        # A copy: JAX would keep using the mapped file itself.
        variable.assign(np.array(value))
    if target is not network:
        network.copy_weights_to_ema()


def save_torch_weights(network: Any, path: PathLike) -> None:
    """Writes a checkpoint that the published program loads; `load_torch_weights` undoes it exactly.

    Args:
        network: as for `load_torch_weights`; of a `DiffusionModel` the moving average is written,
            as published checkpoints are.
        path: ending in `.pth` or `.safetensors`.

    Raises:
        TypeError: for another network.
        ValueError: for another ending, or a network that has no published form.
    """
    target, family = _family(network)
    quantizing.check_whole(target, "A published file")
    target = network.ema_network if target is not network else target
    tensors = {
        name: layout.to_torch(keras.ops.convert_to_numpy(variable))
        for name, variable, layout in family.entries(target)
    }
    write_tensors(tensors, path)


def _family(network):
    """The network itself, of a `DiffusionModel` too, and the module that knows its names."""
    target = network.network if hasattr(network, "ema_network") else network
    name = type(target).__name__
    if name not in FAMILIES:
        raise TypeError(f"There are published weights for {list(FAMILIES)}. Received: {name}.")
    return target, FAMILIES[name]


def _matched(entries, tensors, file_name):
    """[(variable, value)], or ValueError with all that does not match."""
    names = {name for name, _, _ in entries}
    problems = [f"missing: {sorted(names - set(tensors))}"] if names - set(tensors) else []
    if set(tensors) - names:
        problems.append(f"extra: {sorted(set(tensors) - names)}")
    new = []
    for name, variable, layout in entries:
        if name not in tensors:
            continue
        try:
            value = layout.to_keras(tensors[name])
        except ValueError:  # another number of axes
            value = tensors[name]
        if tuple(value.shape) != tuple(variable.shape):
            problems.append(
                f"wrong shape: {name} is {tensors[name].shape}, which becomes "
                f"{tuple(value.shape)}; the network has {tuple(variable.shape)}"
                + _hint(name, value, variable)
            )
        new.append((variable, value))
    if not names & set(tensors):
        begun = sorted({name.partition(".")[0] for name in tensors})
        problems.append(f"no name is known: they begin with {begun}, of which key= chooses one")
    if problems:
        raise ValueError(f"{file_name} does not fit this network. " + "; ".join(problems) + ".")
    return new


def _hint(name, value, variable):
    if name == "pos_embed":
        return " (presets.load and networks.transfer resize positions)"
    if name == "label_emb.weight" and abs(len(value) - variable.shape[0]) == 1:
        return " (published tables count the 'no label' row: check num_classes and null_label)"
    return ""
