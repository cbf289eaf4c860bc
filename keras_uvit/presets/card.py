"""The model card: the README.md of a model's folder, which a hub shows."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_uvit import io
from keras_uvit.checks import as_int
from keras_uvit.evaluation import captioned_grid, count_parameters, image_grid
from keras_uvit.inference import fingerprint
from keras_uvit.types import Array, Config, PathLike

GRID = "samples.png"
SIDE = 64  # pixels: smaller images are enlarged to about this size
CAPTIONED_SIDE = 128  # a caption needs more width
UNKNOWN = "not recorded"
# Arguments of the network that a card names, where the network has them.
OF_NETWORK = ("patch_size", "hidden_dim", "base_dim", "num_layers", "num_heads", "skip", "lora")
# What a FID depends on, of the record of `evaluation.evaluate`.
OF_FID = (
    "fid", "sfid", "inception_score", "precision", "recall", "clip_score", "num_images",
    "sampler", "num_steps", "guidance_scale", "seed", "reference", "reference_images", "resize",
    "inception", "backend",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Card:
    """What the README of a model's folder says that the model does not know itself.

    Args:
        data: what the model was trained on, in words.
        license: identifier of the licence of the weights, such as "apache-2.0".
        fid: record that `evaluation.evaluate` returned, or the JSON file that it wrote.
        samples: how many images are drawn for the picture, 0 for none; of a text model the
            prompts; or images `(n, H, W, C)` uint8 that were drawn before.
    """

    data: str | None = None
    license: str | None = None
    fid: dict[str, Any] | PathLike | None = None
    samples: int | Sequence[str] | Array = 16

    def check(self, model: Any) -> None:
        """Raises unless the FID is of these weights."""
        record = self.fid_record()
        if record is None:
            return
        if "fid" not in record or "weights" not in record:
            raise ValueError(
                "fid must be a record of `evaluation.evaluate`, or its JSON file. Received: "
                f"{sorted(record)[:5]}."
            )
        if record["weights"] != (there := fingerprint(model.ema_network)):
            raise ValueError(
                f"The FID was measured on the weights {record['weights']}, and the moving average "
                f"of this model is {there}. Measure this model, or leave fid= out."
            )

    def fid_record(self) -> dict[str, Any] | None:
        """The record, read from its file."""
        if isinstance(self.fid, dict | None):
            return self.fid
        return io.read_json(self.fid)

    def grid(self, model: Any, verbose: int) -> tuple[np.ndarray | None, str]:
        """The picture `(H, W, C)` uint8 of what the model draws, and a sentence about it."""
        samples, what = self.samples, dict[str, Any]()
        if isinstance(samples, np.ndarray):
            return _grid(samples), "Images that the author has chosen."
        if not isinstance(samples, int | np.integer):
            what = {"prompts": list(samples)}
        elif not as_int(samples, "samples", 0):
            return None, "No picture was drawn."
        elif model.network.context_shape is not None:
            return None, "No picture was drawn: the author gave no prompts."
        elif model.network.num_classes is not None:
            what = {"labels": np.arange(samples) % model.network.num_classes}
        else:
            what = {"num_images": samples}
        if model.latent_scale is not None and model.encoders.autoencoder is None:
            return None, "No picture was drawn: the model had no autoencoder."
        if model.latent_scale is None and model.network.image_shape[-1] not in (1, 3):
            return None, "No picture was drawn: the images are neither grey nor of three colours."
        images = model.generate(**what, seed=0, verbose=verbose)
        how = f"{len(images)} images, drawn with the defaults and seed 0."
        return _grid(images, what.get("prompts")), how

    def text(self, model: Any, record: Config, source: str, caption: str) -> str:
        """The README.

        Args:
            model: `DiffusionModel`.
            record: what config.json of the folder says.
            source: what `presets.load` is told to load.
            caption: sentence about the picture.
        """
        picture = f"![What the model draws]({GRID})\n\n" if GRID in record["files"] else ""
        fid = self.fid_record()
        scores = {key: fid[key] for key in OF_FID if fid.get(key) is not None} if fid else {}
        measured = _table(scores) if fid else "No FID was recorded for these weights.\n"
        licence = (
            f"{self.license}\n"
            if self.license
            else "No licence is stated: ask the author before you use the weights.\n"
        )
        return (
            f"{_metadata(model, self.license)}\n# {model.name}\n\n"
            f"A {type(model.network).__name__} diffusion model of "
            "[keras_uvit](https://github.com/keras-uvit/keras-uvit), for Keras 3 on JAX, "
            f"TensorFlow and PyTorch.\n\n{picture}{caption}\n\n"
            f"## Use\n\n```python\nfrom keras_uvit import presets\n\n"
            f'model = presets.load("{source}")\nimages = model.generate({_call(model)})\n```\n\n'
            f"## Model\n\n{_table(_of_model(model))}\n"
            f"## Training\n\n{_table(_of_training(model, record, self.data))}\n"
            f"## Measured\n\n{measured}\n"
            f"## Files\n\nThe folder has: {', '.join(sizes(record))}. Nothing in it is run when it "
            f"is read.\n\n## Licence\n\n{licence}"
        )


def sizes(record: Config) -> list[str]:
    """What a folder holds and how large it is, in words."""
    count: dict[str, int] = {}
    for name, about in record["files"].items():
        part = name.partition("/")[0].replace("_", " ") if "/" in name else "weights"
        if name != GRID:
            count[part] = count.get(part, 0) + about["bytes"]
    said = [f"{part} {megabytes(size)}" for part, size in count.items()]
    for part, about in record["encoders"].items():
        if about["config"] is None:
            size = "of unknown size" if about["bytes"] is None else megabytes(about["bytes"])
            said.append(f"{part.replace('_', ' ')} {about['id']!r} not included ({size})")
    return said


def megabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _grid(images, captions=None):
    side = SIDE if captions is None else CAPTIONED_SIDE
    zoom = max(1, -(-side // images.shape[2]))
    if captions is None:
        return image_grid(images, zoom=zoom)
    return captioned_grid(images, captions, zoom=zoom)


def _metadata(model, licence):
    """The lines that a hub reads, YAML; JSON strings are YAML."""
    is_text = model.network.context_shape is not None
    task = "text-to-image" if is_text else "unconditional-image-generation"
    lines = [f"license: {json.dumps(licence)}"] if licence else []
    lines += ["library_name: keras_uvit", f"pipeline_tag: {task}"]
    lines += ["tags:", *(f"- {tag}" for tag in ("keras", "diffusion", "u-vit"))]
    return "\n".join(["---", *lines, "---", ""])


def _call(model):
    if model.network.context_shape is not None:
        return 'prompts=["..."]'
    if model.network.num_classes is not None:
        return "labels=[0]"
    return "num_images=4"


def _of_model(model):
    network, objective = model.network, model.objective
    config = network.get_config()
    given = {key: config[key] for key in OF_NETWORK if config.get(key) is not None}
    reads = [f"{network.num_classes} classes"] if network.num_classes is not None else []
    if network.context_shape is not None:
        reads.append("text, as contexts of {} x {}".format(*network.context_shape))
    rows = {
        "network": type(network).__name__,
        "weights": f"{count_parameters(network):,}",
        **given,
        "image_shape": network.image_shape,
        "reads": " and ".join(reads) or "no labels and no text",
        "prediction": objective.prediction,
        "schedule": objective.schedule,
        "flow_map": model.flow_map,
        "latent_scale": model.latent_scale,
        "latent_encoder": model.latent_encoder,
        "context_encoder": model.context_encoder,
        "sampler": f"{model.sampler}, {model.num_steps} steps",
        "guidance_scale": model.guidance_scale,
    }
    return {key: value for key, value in rows.items() if value is not None}


def _of_training(model, record, data):
    counters = record["counters"]
    return {
        "data": data or UNKNOWN,
        "steps": f"{counters['ema_step']:,}" if counters["ema_step"] else UNKNOWN,
        "batch": counters["global_batch"] or UNKNOWN,
        "precision": model.network.dtype_policy.name,
        "average": f"decay {model.ema_decay}",
        "optimizer": json.dumps(model.optimizer_config),
        "time_sampling": model.objective.time_sampling,
        "loss_weighting": model.objective.loss_weighting,
        "condition_dropout": model.condition_dropout,
    }


def _table(rows):
    """Two columns; a bar in a value would begin a third."""
    text = {key: str(value).replace("|", "\\|") for key, value in rows.items()}
    return "| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in text.items())
