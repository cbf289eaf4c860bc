"""The encoders of a model in its folder: written there, or named there."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from keras_uvit.convert import save_torch_weights
from keras_uvit.encoders import AutoencoderKL, CLIPText, SpaceToDepth
from keras_uvit.training.adapting import PARTS
from keras_uvit.types import Config

WEIGHTS = "model.safetensors"


class Kind(NamedTuple):
    """How encoders of a class are written and read.

    Attributes:
        files: names of the files in the encoder's own folder.
        write: writes them for an encoder into a folder, and returns what the record keeps.
        read: makes the encoder of that folder and of what the record keeps.
        weights: the variables of an encoder, for its size.
    """

    files: tuple[str, ...]
    write: Callable[[Any, Path], Config]
    read: Callable[[Path, Config], Any]
    weights: Callable[[Any], list]


def _write_autoencoder(part, folder):
    folder.mkdir()
    save_torch_weights(part, folder / WEIGHTS)
    return part.get_config()


def _write_text_encoder(part, folder):
    part.save(folder)
    return {"id": part.id}


def _read_text_encoder(folder, config):
    part = CLIPText.from_preset(folder)
    part.id = config["id"]
    return part


KINDS: dict[str, Kind] = {
    "AutoencoderKL": Kind(
        (WEIGHTS,),
        _write_autoencoder,
        lambda folder, config: AutoencoderKL.from_file(folder / WEIGHTS, **config),
        lambda part: part.weights,
    ),
    "CLIPText": Kind(
        ("config.json", WEIGHTS, "vocab.json", "merges.txt"),
        _write_text_encoder,
        _read_text_encoder,
        lambda part: part.tower.weights,
    ),
    "SpaceToDepth": Kind(
        (),
        lambda part, folder: {key: getattr(part, key) for key in ("factor", "scale", "shift")},
        lambda folder, config: SpaceToDepth(**config),
        lambda part: [],
    ),
}
FILES = {f"{part}/{name}" for part in PARTS for kind in KINDS.values() for name in kind.files}


def check(parts: dict[str, Any]) -> None:
    """Raises for encoders that cannot be written into a folder.

    Args:
        parts: dict of "autoencoder" and "text_encoder" to the encoder, or None.
    """
    for name, part in parts.items():
        if part is not None and type(part).__name__ not in KINDS:
            raise ValueError(
                f"The {name.replace('_', ' ')} is a {type(part).__name__}, and only {list(KINDS)} "
                "can be written into a model's folder. Pass include_encoders=False: the folder "
                "then has its name and fingerprint."
            )


def write(parts: dict[str, Any], folder: Path, include: bool) -> dict[str, Config]:
    """What a model's record keeps of its encoders; writes their files if they are included."""
    return {
        name: {
            "class": type(part).__name__,
            "id": part.id,
            "fingerprint": part.fingerprint,
            "bytes": size(part),
            "config": KINDS[type(part).__name__].write(part, folder / name) if include else None,
        }
        for name, part in parts.items()
        if part is not None
    }


def size(part: Any) -> int | None:
    """Bytes of an encoder's weights in float32; None where they are not known."""
    kind = KINDS.get(type(part).__name__)
    return kind and sum(4 * math.prod(weight.shape) for weight in kind.weights(part))


def files(encoders: dict[str, Config]) -> set[str]:
    """Paths of the files of the encoders that a record says are included.

    Raises:
        ValueError: for an encoder of a class that is not known.
    """
    included = {name: a["class"] for name, a in encoders.items() if a["config"] is not None}
    for name, kind in included.items():
        if kind not in KINDS:
            raise ValueError(f"The {name} is a {kind}; expected one of {list(KINDS)}.")
    return {f"{name}/{file}" for name, kind in included.items() for file in KINDS[kind].files}


def read(folder: Path, about: Config) -> Any:
    """The encoder that the record says is in this folder."""
    return KINDS[about["class"]].read(folder, about["config"])
