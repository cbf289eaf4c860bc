"""Files that a killed process cannot leave half written."""

import os
from pathlib import Path


def atomically(write, filepath, overwrite, **kwargs):
    """Calls Keras' `write` on a file beside `filepath`, then renames it.

    Only single files can be renamed at once: folders, shards and remote paths are Keras' business.

    Raises:
        FileExistsError: if `filepath` exists and `overwrite` is false.
    """
    path = Path(filepath)
    if kwargs or not path.name.endswith((".keras", ".weights.h5")):
        write(filepath, overwrite=overwrite, **kwargs)
        return
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
    beside = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        write(beside, overwrite=True)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
