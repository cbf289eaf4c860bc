"""What TensorBoard shows of a training, on every backend: numbers, the loss by time, samples."""

from typing import Any

import numpy as np
from keras import ops

from keras_uvit import backend, sampling
from keras_uvit.checks import as_int
from keras_uvit.evaluation.callbacks import Periodic
from keras_uvit.evaluation.files import image_grid
from keras_uvit.types import PathLike


class TensorBoardCallback(Periodic):
    """Writes what TensorBoard shows, without TensorFlow; it needs the extra `eval`.

    Every few batches, over the training step: "train/loss" and "train/grad_norm", as `fit` shows
    them (the mean since the epoch began), and "train/learning_rate". After every few epochs: the
    validation's numbers, as "val/loss"; of a `batch` the loss by the moving average at times of
    each bucket, as "loss_by_time/0-0.1"; and "samples", a grid of what the average draws, the
    same noise every time.

    Args:
        log_dir: folder of the event files; `tensorboard --logdir` names it or one above.
        every: int, epochs between losses by time and samples; the last epoch always has them.
        every_steps: int, batches of an epoch between two points of the training's curves.
        batch: dict as `fit` takes it, of some pictures that the model does not train on; None
            writes no loss by time.
        buckets: int, parts of the time from 0 to 1.
        columns, zoom: see `evaluation.image_grid`.
        seed: int, of the noise.
        **options: of `generate`: `labels`, `prompts` or `num_images`, `num_steps`, ...; without
            any there are no samples.

    Raises:
        ImportError: without tensorboardX.
    """

    def __init__(
        self,
        log_dir: PathLike,
        *,
        every: int = 1,
        every_steps: int = 20,
        batch: dict[str, Any] | None = None,
        buckets: int = 10,
        columns: int | None = None,
        zoom: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(every, log_dir)
        self.every_steps = as_int(every_steps, "every_steps", 1)
        self.batch, self.buckets = batch, as_int(buckets, "buckets", 1)
        self.columns, self.zoom, self.seed, self.options = columns, zoom, seed, options

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self.options:
            sampling.prepare(self.model, seed=self.seed, **self.options)  # not after an epoch
        if self.batch is not None:
            loss_by_time(self.model, self.batch, self.buckets, self.seed)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch % self.every_steps:
            return
        rate = ops.convert_to_numpy(self.model.optimizer.learning_rate)
        found = {key: logs[key] for key in ("loss", "grad_norm") if logs and key in logs}
        self._write("train", {**found, "learning_rate": rate})

    def act(self, epoch: int, logs: dict[str, Any] | None) -> None:
        validation = {key: value for key, value in (logs or {}).items() if key.startswith("val_")}
        self._write("val", {key.removeprefix("val_"): v for key, v in validation.items()})
        if self.batch is not None:
            found = loss_by_time(self.model, self.batch, self.buckets, self.seed)
            self._write("loss_by_time", found)
        if self.options:
            images = self.model.generate(**self.options, seed=self.seed, verbose=0)
            if backend.is_first():
                grid = image_grid(images, self.columns, self.zoom)
                self.writer.add_image("samples", grid, self._step(), dataformats="HWC")
        self.writer.flush()

    def _write(self, group, values):
        step = self._step()
        for name, value in values.items() if backend.is_first() else ():
            self.writer.add_scalar(f"{group}/{name}", float(value), step)

    def _step(self):
        return int(ops.convert_to_numpy(self.model.step))


def loss_by_time(
    model: Any, batch: dict[str, Any], buckets: int = 10, seed: int = 0
) -> dict[str, float]:
    """The validation loss of the moving average at times of each part of [0, 1].

    Args:
        model: `DiffusionModel`.
        batch: dict of arrays, as `fit` takes it.
        buckets: int, how many parts.
        seed: int, of times and noise: image i has the same place in each bucket, and one noise.

    Returns:
        dict of "0-0.1" and so on to the mean loss, without the training's weights.
    """
    objective = model.objective.for_validation()
    x0 = ops.convert_to_numpy(model.clean(batch))
    conditions = {k: ops.convert_to_numpy(v) for k, v in model.condition(batch).items()}
    random = np.random.default_rng(seed)
    noise, place = random.standard_normal(x0.shape, "float32"), random.random(len(x0), "float32")
    losses = {}
    for k in range(buckets):
        t = objective.times(ops.convert_to_tensor((k + place) / buckets))
        inputs = model.inputs(objective.add_noise(x0, t, noise), t)
        inputs = {key: ops.convert_to_numpy(value) for key, value in inputs.items()}
        output = model.ema_network.predict({**inputs, **conditions}, batch_size=64, verbose=0)
        loss = objective.loss(ops.cast(output, "float32"), x0, t, noise)
        losses[f"{k / buckets:.3g}-{(k + 1) / buckets:.3g}"] = float(loss)
    return losses
