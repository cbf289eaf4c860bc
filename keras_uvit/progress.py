"""What is said to the user while something takes long: by process 0 of a job alone."""

import sys
from typing import cast

import keras

from keras_uvit import backend


def say(text: str) -> None:
    """Prints a line."""
    if backend.is_first():
        print(text, flush=True)  # noqa: T201


def bar(total: int | None, verbose: int | str, unit: str) -> keras.utils.Progbar:
    """A `keras.utils.Progbar` over `total` units; silent where `verbose` is 0."""
    verbose = verbosity("auto" if verbose == 1 else verbose)
    return keras.utils.Progbar(total, verbose=verbose, unit_name=unit)


def verbosity(verbose: int | str) -> int:
    """The `verbose` of Keras that is meant: "auto" draws bars where somebody can see them move.

    Elsewhere, in a file or a pipe, each change of a bar would be a line: there a bar is one line
    when it is full. Processes other than the first are silent.
    """
    if not backend.is_first():
        return 0
    if verbose != "auto":
        return cast(int, verbose)
    return 1 if is_watched() else 2


def is_watched() -> bool:
    """Whether the output is a terminal or a notebook, where a line can move."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
