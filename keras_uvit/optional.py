"""Packages that a part of this one needs, imported where they are used."""

import importlib
import types


def optional(module: str, extra: str, purpose: str) -> types.ModuleType:
    """Imports a module, or says which extra brings it.

    Args:
        module: such as "scipy.ndimage".
        extra: of this package, such as "data".
        purpose: a clause that says what needs it, such as "Reading shapes back needs SciPy".

    Raises:
        ImportError: if the module is not there, or cannot be imported itself.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose}: pip install "keras-uvit[{extra}]". ({error})') from error
