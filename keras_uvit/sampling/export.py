"""The whole sampling loop as one file that runs without this package.

The loop is `diffusion.loop.advance`, as in `generate`; here its arguments become inputs or
constants of a program, and `backend.export_sampler` writes it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend, io
from keras_uvit.checks import as_int, nearest
from keras_uvit.diffusion import loop, samplers
from keras_uvit.sampling.conditions import unconditional_of
from keras_uvit.sampling.generate import check_decodes, warn_if_untrained
from keras_uvit.sampling.guidance import (
    Guidance,
    Party,
    Runs,
    check_guidance,
    denoisers,
    networks_of,
    runs_of,
)
from keras_uvit.sampling.options import Scale, resolve
from keras_uvit.types import PathLike, Tensor

# How the name of a file of each format ends; a SavedModel is a folder.
ENDINGS = {"onnx": ".onnx", "tf_saved_model": "", "litert": ".tflite", "stablehlo": ".stablehlo"}
LARGEST = 2**31 - 2**26  # bytes of weights: what one file can hold, less what it says beside them
FLOAT32_ONLY = ("onnx", "litert")  # their runtimes have no bfloat16 on a CPU


@dataclasses.dataclass(frozen=True)
class Program:
    """A sampler as a function of arrays: `program(weights, noise=..., label=...)`.

    Attributes:
        parties: `(model, network)` of each network that estimates x0.
        autoencoder: what decodes latents; None for pixels, and where nothing is decoded.
        decode: bool. Whether images are uint8; else float32 as the network sees them.
        table: `(n, WIDTH)` float32, the sampler's rows.
        runs: which of them are guided.
        guidance: how two estimates become one.
        unconditional: dict of the network's conditions for D_u, constants.
        inputs: dict of an example of each input, in their order: "noise" first.
    """

    parties: list[tuple[Any, keras.Model]]
    autoencoder: Any
    decode: bool
    table: np.ndarray
    runs: Runs
    guidance: Guidance
    unconditional: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]

    @property
    def networks(self) -> list[keras.Model]:
        """Whose variables' values `weights` are, a list for each: a decoder is the last."""
        decoder = getattr(self.autoencoder, "decoder", None)
        own = [network for _, network in self.parties]
        return own + ([decoder] if isinstance(decoder, keras.Model) else [])

    def advance(
        self,
        weights: Sequence[Sequence[Tensor]],
        carry: loop.Carry,
        table: Tensor,
        runs: Runs,
        condition: dict[str, Tensor],
    ) -> loop.Carry:
        """Some rows of the sampler, as `diffusion.loop.advance` runs them."""
        parties = [Party(*pair, values) for pair, values in zip(self.parties, weights)]
        without = {key: ops.convert_to_tensor(value) for key, value in self.unconditional.items()}
        parts = denoisers(runs, parties, condition, without, self.guidance)
        return loop.advance(parts, carry, table)

    def finish(self, weights: Sequence[Sequence[Tensor]], x: Tensor) -> Tensor:
        """Images `(B, H, W, C)` of what the loop ends at."""
        if not self.decode:
            return x
        if self.autoencoder is not None:
            networks = self.networks
            if len(networks) > len(self.parties):
                with backend.holding(networks[-1], weights[-1]):
                    x = self.autoencoder.decode_tensor(x)
            else:
                x = self.autoencoder.decode_tensor(x)
        # As `pixels.from_unit_range`.
        return ops.cast(ops.clip(ops.round((x + 1.0) * 127.5), 0.0, 255.0), "uint8")

    def __call__(
        self, weights: Sequence[Sequence[Tensor]], noise: Tensor, **condition: Tensor
    ) -> Tensor:
        carry = loop.begin(noise)
        x, *_ = self.advance(weights, carry, self.table, self.runs, condition)
        return self.finish(weights, x)


def program_of(
    model: Any,
    batch_size: int = 1,
    *,
    num_steps: int | None = None,
    sampler: str | samplers.Steps | None = None,
    guidance_scale: Scale | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance: Guidance | None = None,
    use_ema: bool = True,
    decode: bool = True,
) -> Program:
    """Checks the arguments of `DiffusionModel.export_sampler`, which describes them."""
    model.check_weights()
    count = as_int(batch_size, "batch_size", 1)
    check_decodes(model, decode)
    autoencoder = model.encoders.autoencoder if decode and model.latent_scale is not None else None
    if autoencoder is not None and not hasattr(autoencoder, "decode_tensor"):
        raise TypeError(
            f"{type(autoencoder).__name__} decodes arrays alone. Give it a method `decode_tensor`, "
            "latents to images in [-1, 1] by keras.ops, as encoders.AutoencoderKL has it, or pass "
            "decode=False to export a sampler of latents."
        )
    guidance = Guidance() if guidance is None else guidance
    check_guidance(model, guidance)
    rest = (1.0, 1, guidance)  # no picture to start from
    options = resolve(model, sampler, num_steps, guidance_scale, guidance_interval, *rest)
    if options.steps.noise.any():
        raise ValueError(
            f"The sampler {options.sampler!r} draws noise at each step, and each backend and "
            "runtime draws other noise, so an exported sampler must be deterministic. Choose "
            'sampler="dpm_solver_pp_2m", "ddim", "euler" or "heun".'
        )
    without = bool(options.guided.any()) and guidance.weak_model is None
    unconditional = unconditional_of(model, None, count, without)
    return Program(
        networks_of(model, guidance, use_ema),
        autoencoder,
        decode,
        options.steps.packed(),
        runs_of(options.guided),
        guidance,
        {key: np.asarray(value[np.arange(count)]) for key, value in unconditional.items()},
        _examples(model.network, count),
    )


def _examples(network, count):
    examples = {"noise": np.zeros((count, *network.image_shape), "float32")}
    if network.num_classes is not None:
        examples["label"] = np.zeros(count, "int32")
    if network.context_shape is not None:
        examples["context"] = np.zeros((count, *network.context_shape), "float32")
    return examples


def export_sampler(model: Any, path: PathLike, format: str, **options: Any) -> None:
    """Writes `program_of(model, **options)`; see `DiffusionModel.export_sampler`."""
    path = Path(path)
    check_format(path, format)
    program = program_of(model, **options)
    _check_fits(program, format)
    backend.check_exports(format)
    warn_if_untrained(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.replacing(path) as beside:
        backend.export_sampler(program, beside, format)


def check_format(path: Path, format: str) -> None:
    """Raises unless there is such a format, this backend writes it, and the path suits it.

    Raises:
        ValueError: for an unknown format, or another ending.
        NotImplementedError: where this backend does not write it; the message says what does.
        FileExistsError: for a folder that is there already.
    """
    if format not in ENDINGS:
        known = ", ".join(map(repr, ENDINGS))
        raise ValueError(f"Unknown format {format!r}.{nearest(format, ENDINGS)} Known: {known}.")
    able = backend.SAMPLER_FORMATS[format]
    if backend.NAME not in able:
        here = [
            repr(key) for key, names in backend.SAMPLER_FORMATS.items() if backend.NAME in names
        ]
        raise NotImplementedError(
            f"format={format!r} is written on {' and '.join(able)}. Received: the backend "
            f"{backend.NAME}, which writes {' and '.join(here)}. A saved model is read on each of "
            f"them: `model.save(...)` here, and export it with KERAS_BACKEND={able[0]}."
        )
    if ENDINGS[format] and path.suffix != ENDINGS[format]:
        raise ValueError(
            f"The name of a file of format={format!r} ends in {ENDINGS[format]}. Received: {path}."
        )
    if not ENDINGS[format] and path.exists():
        raise FileExistsError(f"{path} is there already. Remove it, or choose another path.")


def _check_fits(program, format):
    """A file of these formats has its limits; both are known before anything is traced."""
    networks = program.networks
    others = [n.compute_dtype for n in networks if n.compute_dtype != "float32"]
    if format in FLOAT32_ONLY and others:
        raise ValueError(
            f"format={format!r} holds networks that compute in float32. Received: {others[0]}. "
            'Load the weights into a network made with dtype="float32".'
        )
    size = sum(
        int(np.prod(w.shape)) * np.dtype("float32").itemsize
        for network in networks
        for w in network.weights
    )
    if ENDINGS[format] and size > LARGEST:
        raise ValueError(
            f"One file of format={format!r} holds at most 2 GB. Received: {size / 1e9:.1f} GB of "
            'weights. Use format="tf_saved_model".'
        )
