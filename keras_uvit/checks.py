"""What arguments and methods are checked with: whole numbers, nearest names, refusals."""

import difflib
import operator
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import numpy as np

Class = TypeVar("Class", bound=type)


def as_int(value: Any, name: str, least: int) -> int:
    """`value` as Python's int, which Keras, JSON and every backend take.

    >>> import numpy as np
    >>> as_int(np.int64(3), "num_steps", 1)
    3

    Raises:
        ValueError: if it is not a whole number, or less than `least`.
    """
    try:
        number: int | None = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be an int >= {least}. Received: {value!r}.")
    return number


def plain(value: Any) -> Any:
    """A number of NumPy's, alone or inside tuples and lists, as Python's own."""
    if isinstance(value, tuple | list):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def nearest(name: Any, known: Iterable[str]) -> str:
    """A sentence that suggests the known name that is meant; empty where none is near.

    >>> nearest("prompt", ["labels", "prompts"])
    " Did you mean 'prompts'?"
    """
    word = str(name).lower().replace("++", "_pp").replace("-", "_").replace(" ", "_")
    near = [k for k in known if k.startswith(word)] or difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def refuses(reasons: dict[str, str]) -> Callable[[Class], Class]:
    """A decorator of classes: methods that they inherit raise, before anything is changed.

    Args:
        reasons: dict of the method's name to a sentence that says why, and what to do instead.
    """

    def decorate(cls):
        for name, reason in reasons.items():
            setattr(cls, name, _refused(name, reason))
        return cls

    return decorate


def _refused(name, reason):
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}.{name} is not supported. {reason}")

    method.__name__ = name
    method.__doc__ = f"Not supported. {reason}"
    return method
