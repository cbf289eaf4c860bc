"""The state of a model that training moves, and whether two are the same."""

import numpy as np
from keras import ops


def state(model):
    """All that training moves."""
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
