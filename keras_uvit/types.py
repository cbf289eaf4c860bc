"""Types that signatures share; shapes, units and ranges are in the docstrings."""

import os
from typing import Any

Tensor = Any  # a tensor of the backend that runs, or a Keras variable
Array = Any  # what `np.asarray` takes: a NumPy array, a tensor, nested lists
PathLike = str | os.PathLike[str]
Config = dict[str, Any]  # what `get_config` returns
