"""How a process keeps memory that it has freed: the settings of glibc's allocator."""

import ctypes
import os

SWITCH = "KERAS_UVIT_KEEP_MEMORY"
# mallopt's numbers of M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, and bytes. Below the first
# memory comes from the heap and not from a mapping of its own, which is new and empty each time;
# the heap is given back beyond the second, and grows by the third.
LIMITS = {-3: 2**30, -1: 2**31 - 1, -2: 2**28}


def keep() -> bool:
    """Lets the process use the memory again that it frees, and says whether it does.

    By default large buffers go back to the kernel as soon as they are freed, and it maps and clears
    others, page by page, for those that are asked for next.

    It does nothing without glibc, where the user has set the allocator (`MALLOC_...` or
    `GLIBC_TUNABLES` in the environment), or with `KERAS_UVIT_KEEP_MEMORY=0`.

    Raises:
        ValueError: if that variable is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"The environment's {SWITCH} must be 0 or 1. Received: {switch!r}.")
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    tuned |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or switch == "0" or not is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return [mallopt(option, size) for option, size in LIMITS.items()] == [1] * len(LIMITS)


def is_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError):  # not a Unix; another C library
        return False
