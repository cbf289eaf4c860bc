"""A training run in a folder: saved after each epoch, gone on with when it is started again."""

import math
from pathlib import Path

import keras

from keras_uvit.training.checkpoints import atomically

MODEL, AVERAGE = "model.keras", "ema.weights.h5"


def train(model, dataset, folder, iterations, *, callbacks=(), verbose="auto"):
    """Trains for at least `iterations` batches, in whole epochs.

    `folder` gets `model.keras` (everything, to go on), `ema.weights.h5` (to sample) and `log.csv`
    after each epoch. Where `model.keras` is there, the run goes on from it: the data's order and
    the noise are functions of epoch and step, so it ends as an uninterrupted run would.

    Args:
        model: `DiffusionModel`, compiled or not.
        dataset: `data.LatentDataset` or `data.ImageDataset`.
        folder: path, made if need be.
        iterations: int.
        callbacks: Keras callbacks.
        verbose: of `fit`.

    Returns:
        The trained model: `model`, or the saved one that was gone on with.

    Raises:
        ValueError: if the folder holds another model, or the data do not fit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MODEL).is_file():
        model = _saved(folder / MODEL, model)
    elif not model.compiled:
        model.compile()
    done = int(keras.ops.convert_to_numpy(model.step))
    first, epochs = done // len(dataset), math.ceil(iterations / len(dataset))
    if first >= epochs:
        if not (folder / AVERAGE).is_file():
            _keep_average(model, folder)
        return model
    dataset.epoch = first
    # Kept before it is logged: what a kill in between repeats is not logged twice.
    keeping = [_Keep(folder), keras.callbacks.CSVLogger(folder / "log.csv", append=True)]
    model.fit(
        dataset,
        initial_epoch=first,
        epochs=epochs,
        callbacks=[*keeping, *callbacks],
        verbose=verbose,
    )
    return model


def _saved(path, model):
    saved = keras.saving.load_model(path)
    there, here = saved.get_config(), model.get_config()
    free = ("latent_encoder", "context_encoder", "name")
    other = [key for key in here if key not in free and there[key] != here[key]]
    if other:
        raise ValueError(
            f"{path} is another model: it differs in {other}. Choose another folder, or delete it."
        )
    if not saved.compiled:
        saved.compile()
    saved.autoencoder, saved.text_encoder = model.autoencoder, model.text_encoder
    return saved


class _Keep(keras.callbacks.Callback):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        _keep_average(self.model, self.folder)
        self.model.save(self.folder / MODEL)  # last: with it the epoch counts as done


def _keep_average(model, folder):
    atomically(model.ema_network.save_weights, folder / AVERAGE, overwrite=True)
