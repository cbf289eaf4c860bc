"""Whole batches in an order that is a pure function of (seed, epoch, position)."""

import functools

import keras
import numpy as np

from keras_uvit import backend
from keras_uvit.checks import as_int
from keras_uvit.data.contexts import Contexts
from keras_uvit.types import Array

# On a CPU a batch takes as long as its images: in a given time more steps of few images learn more
# (docs/own_data.md). Accelerators need many at once to be busy.
USUAL_BATCH = {"cpu": 16, "accelerator": 128}


class ShuffledDataset(keras.utils.PyDataset):
    """Batches of arrays at random access, a new permutation each epoch.

    Every batch is full: a remainder smaller than `batch_size` waits for the next epoch's order.

    Args:
        arrays: dict of array-likes of equal length, read as `array[rows]`.
        batch_size: int, of all processes together; `None` is what `usual_batch` says.
        seed: int.
        process: (index, count): this process gets the `index`-th of `count` equal parts of each
            batch; `None` is its place in the job (`distribution.initialize`).
        contexts: `Contexts` of the samples' captions, or None. Batches then have the "context" of
            one caption at random, `(B, length, width)`.

    Attributes:
        epoch: int, the epoch that is read; Keras moves it on, a resumed run may set it.
    """

    shuffles_itself = True  # `DiffusionModel.fit` keeps Keras from shuffling once more

    def __init__(
        self,
        arrays: dict[str, Array],
        batch_size: int | None,
        seed: int = 0,
        process: tuple[int, int] | None = None,
        contexts: Contexts | None = None,
    ) -> None:
        super().__init__()
        process = backend.data_shard() if process is None else process
        total = len(next(iter(arrays.values())))
        index, count = process
        if batch_size is None:
            batch_size = usual_batch(total, count)
        if not 1 <= batch_size <= total:
            raise ValueError(
                f"batch_size must be between 1 and the number of samples, {total}. "
                f"Received: {batch_size}."
            )
        if not 0 <= index < count:
            raise ValueError(f"process is (index, count), index < count. Received: {process}.")
        if batch_size % count:
            near = max(1, round(batch_size / count)) * count
            raise ValueError(
                f"batch_size is that of all processes together and must divide by their number, "
                f"{count}. Received: {batch_size}; the nearest is {near}."
            )
        self.arrays = arrays
        self.num_samples = total
        self.batch_size = batch_size
        self.seed = as_int(seed, "seed", 0)
        self.process = process
        self.contexts = contexts
        self.epoch = 0
        # Two: Keras may still read the old epoch's last batches while the new one begins.
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        if contexts is not None:
            self._captions = functools.lru_cache(maxsize=2)(
                functools.partial(contexts.chosen, seed)
            )

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._begun = False

    def _permutation(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def rows(self, epoch: int, index: int) -> np.ndarray:
        """Indices of this process's samples in batch `index` of `epoch`, ascending.

        Their order within a batch means nothing to training, and files are read front to back.
        """
        part, count = self.process
        batch = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        # Side by side the parts are the batch of one process: noise falls on the same samples.
        return np.split(np.sort(batch), count)[part]

    def __len__(self) -> int:
        return self.num_samples // self.batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = self.rows(self.epoch, index)
        batch = {key: array[rows] for key, array in self.arrays.items()}
        if self.contexts is not None:
            batch["context"] = self.contexts.array[self._captions(self.epoch)[rows]]
        return batch

    def on_epoch_begin(self) -> None:
        # Keras ends epochs more often than it begins them.
        self._epoch += self._begun
        self._begun = True


def usual_batch(total: int, processes: int = 1) -> int:
    """Samples per batch that suit this machine, if there are so many; each process has as many."""
    here = "accelerator" if backend.has_accelerator() else "cpu"
    return max(1, min(USUAL_BATCH[here], total) // processes) * processes
