"""What `fit` can show and measure while it runs."""

import json
from pathlib import Path
from typing import Any

import keras

from keras_uvit import backend, sampling
from keras_uvit.evaluation.files import captioned_grid, image_grid, write_png
from keras_uvit.evaluation.frechet import Reference
from keras_uvit.evaluation.inception import InceptionFeatures
from keras_uvit.evaluation.protocol import check, evaluate
from keras_uvit.optional import optional
from keras_uvit.types import PathLike

EVALUATE_ONLY = ("seed", "folder", "path", "verbose")  # arguments that cannot be wrong beforehand


class Periodic(keras.callbacks.Callback):
    """Calls `act` after every few epochs and after the last, also of a fit that stops early."""

    def __init__(self, every: int, log_dir: PathLike | None) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1 epoch. Received: {every}.")
        self.every, self.writer = every, _writer(log_dir)
        self.waiting: int | None = None  # the last epoch, where it was not acted upon

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.params["epochs"]:
            self.waiting = None
            self.act(epoch + 1, logs)
        else:
            self.waiting = epoch + 1

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self.waiting is not None:
            self.act(self.waiting, None)
            self.waiting = None
        if self.writer:
            self.writer.close()  # flushing alone does not wait for its thread


class SampleGridCallback(Periodic):
    """Draws the same images after every few epochs: the moving average's, same noise, same labels.

    Prompts that are strings stand below their images.

    Args:
        folder: where `epoch-0010.png`, ... go.
        every: int, epochs between pictures; the last epoch is always drawn.
        columns, zoom: see `evaluation.image_grid`.
        log_dir: folder for TensorBoard, or None.
        seed: int.
        **options: of `generate`: `labels`, `num_images` or `prompts`, sampler, num_steps,
            guidance_scale, ...
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        every: int = 1,
        columns: int | None = None,
        zoom: int = 1,
        log_dir: PathLike | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(every, log_dir)
        self.folder, self.columns, self.zoom = Path(folder), columns, zoom
        if isinstance(options.get("prompts"), str):
            options["prompts"] = [options["prompts"]]
        self.options = {**options, "seed": seed}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        sampling.prepare(self.model, **self.options)  # not after the first epoch

    def act(self, epoch: int, logs: dict[str, Any] | None) -> None:
        images = self.model.generate(**self.options, verbose=0)
        prompts = self.options.get("prompts")
        if not backend.is_first():
            return
        if prompts is not None and all(isinstance(prompt, str) for prompt in prompts):
            grid = captioned_grid(images, prompts, self.columns, self.zoom)
        else:
            grid = image_grid(images, self.columns, self.zoom)
        write_png(self.folder / f"epoch-{epoch:04d}.png", grid)
        if self.writer:
            self.writer.add_image("samples", grid, epoch, dataformats="HWC")
            self.writer.flush()


class FIDCallback(Periodic):
    """Measures the moving average after every few epochs, by the code of the final evaluation.

    The log gets "fid", so that `keras.callbacks.ModelCheckpoint(monitor="fid", mode="min")` behind
    this one keeps the best; the paper reports the checkpoint that is best on 10,000 images.

    Args:
        reference, inception: see `evaluation.evaluate`.
        path: file that gets one JSON record a line.
        every: int, epochs between measurements; the last epoch is always measured.
        num_images: int.
        log_dir: folder for TensorBoard, or None.
        **options: of `evaluate`: labels, prompts, clip, seed, guidance_scale (the paper watches
            training at 1.0), num_steps, ...
    """

    def __init__(
        self,
        reference: Reference,
        inception: InceptionFeatures,
        path: PathLike,
        *,
        every: int = 1,
        num_images: int = 10_000,
        log_dir: PathLike | None = None,
        **options: Any,
    ) -> None:
        super().__init__(every, log_dir)
        self.reference, self.inception, self.path = reference, inception, Path(path)
        self.num_images = len(options["prompts"]) if "prompts" in options else num_images
        self.options = {"usual": 0, "verbose": 0, **options}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Not after hours of training.
        names = ("labels", "prompts", "clip", "allow_few", "usual")
        check(
            self.model,
            self.reference,
            self.inception,
            self.num_images,
            **{k: v for k, v in self.options.items() if k in names},
            options={k: v for k, v in self.options.items() if k not in (*names, *EVALUATE_ONLY)},
        )

    def act(self, epoch: int, logs: dict[str, Any] | None) -> None:
        record = evaluate(
            self.model, self.reference, self.inception, self.num_images, **self.options
        )
        if logs is not None:
            logs["fid"] = record["fid"]
        if not backend.is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **record}) + "\n")
        if self.writer:
            self.writer.add_scalar("fid", record["fid"], epoch)
            self.writer.flush()


def _writer(log_dir):
    if log_dir is None:
        return None
    module = optional("tensorboardX", "eval", "Logs for TensorBoard need tensorboardX")
    return module.SummaryWriter(str(log_dir))
