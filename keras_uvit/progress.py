"""What is said to the user while something takes long: by process 0 of a job alone."""

import keras

from keras_uvit import backend


def say(text):
    """Prints a line."""
    if backend.is_first():
        print(text, flush=True)  # noqa: T201


def bar(total, verbose, unit):
    """A `keras.utils.Progbar` over `total` units; silent where `verbose` is 0."""
    return keras.utils.Progbar(total, verbose=verbose if backend.is_first() else 0, unit_name=unit)
