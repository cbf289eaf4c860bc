"""What tests of training share: models compiled once, their state, sources of data, a kill."""

import keras
import numpy as np
import pytest
import tiny

PICTURES = {key: np.concatenate([value, value[:3]]) for key, value in tiny.DATA.items()}
STEPS, BATCH = 3, 8  # an epoch of them: 24 of 27 pictures, the rest waits
EIGHT = {key: value[:8] for key, value in tiny.DATA.items()}
BATCHES = [{key: value[i : i + 8] for key, value in tiny.DATA.items()} for i in (0, 8, 16)]
HALF = dict(network=dict(dtype="mixed_float16"))
_made = {}


def fresh(elsewhere=False, **options):
    """`tiny.diffusion_model(**options)` as it was when it was made; compiled once for all tests.

    Tracing and compiling take seconds where steps take milliseconds. A test has one model of a kind
    at a time. With `elsewhere` its weights are others, as in another process they may be.
    """
    key = repr(sorted(options.items()))
    if key not in _made:
        model = tiny.diffusion_model(**options)
        _made[key] = model, state(model)
    model, beginning = _made[key]
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()  # else Keras 3.10 would do it later, after a run that was killed
    for variable, value in zip(_variables(model), beginning, strict=True):
        variable.assign(np.array(value))  # a copy, because JAX donates it
    if elsewhere:
        for weight in [*model.network.weights, *model.ema_network.weights]:
            weight.assign(weight + 1.0)
    return model


def _variables(model):
    return [*model.variables, *model.optimizer.variables]


def state(model):
    """All that training moves."""
    return [np.array(tiny.numpy(variable)) for variable in _variables(model)]


def kept_in_files(model):
    """All but how far the random numbers are, which each step sets anew."""
    return [np.array(tiny.numpy(v)) for v in [*model.weights, *model.optimizer.variables]]


class Killed(BaseException):
    """As a signal: nothing may catch it."""


def kill():
    raise Killed


class Kill(keras.callbacks.Callback):
    """Ends the run, or acts, before a batch of an epoch; where that is None, at the epoch's end."""

    def __init__(self, epoch, batch=None, act=kill):
        super().__init__()
        self.at, self.act = (epoch, batch), act

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.at == (self.epoch, batch):
            self.act()

    def on_epoch_end(self, epoch, logs=None):
        if self.at == (epoch, None):
            self.act()


class Batches(keras.utils.PyDataset):
    """A data set of a user's, in one order."""

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return BATCHES[index]


def tf_data():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(tiny.DATA).batch(8, drop_remainder=True)


def rows():
    return [{key: value[k] for key, value in tiny.DATA.items()} for k in range(24)]


def grain_data():
    return pytest.importorskip("grain").MapDataset.source(rows()).batch(8)


def torch_data():
    loader = pytest.importorskip("torch.utils.data").DataLoader
    return loader([(row,) for row in rows()], batch_size=8)
