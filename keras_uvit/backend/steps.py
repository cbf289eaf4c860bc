"""What the backends share: the contract of their training steps, and sums over all weights.

They differentiate and carry state; what is computed is the model's, in keras.ops:

    unpack(data)               -> the batch, a dict
    loss_of(batch)             -> float32 scalar; draws its own randomness
    test_loss_of(batch)        -> the same for evaluation
    gradient_norm(gradients)   -> float32 scalar
    after_step(ok, before)     -> counters and moving average; `before`: optimizer.iterations before
    report(loss, norm)         -> the logs
    test_report(batch, loss)   -> the logs of evaluation

A step whose loss or gradient norm is not finite changes no weight and no optimizer slot.
"""

import keras
from keras import ops

AdamW = keras.optimizers.AdamW


def is_ok(loss, norm):
    return ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))


def guards_itself(optimizer):
    """A loss-scale optimizer skips by itself, and must see such a step, to lower its scale."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def constant(array):
    return array  # a tensor would belong to the program that is being written


def fused_attention(query, key, value):
    return ops.dot_product_attention(query, key, value)


def image_by_image(attend, query, key, value):
    return attend(query, key, value)


def images_at_once(size):
    return 64


def holding(network, weights):
    """Within it the network's variables have these values."""
    return keras.StatelessScope(state_mapping=list(zip(network.variables, weights)))


def compile_blocks(network, wanted):
    """Nothing to do: XLA compiles whole steps."""


def norm(tensors):
    """Euclidean norm of all numbers in them, float32."""
    return ops.sqrt(sum(ops.sum(ops.square(ops.cast(t, "float32"))) for t in tensors))


def blend(averages, weights, decay):
    """average <- decay average + (1 - decay) weight, pair by pair of variables.

    Written as a step towards the weight, which rounds numbers of the weight's size once.
    """
    for average, weight in zip(averages, weights, strict=True):
        average.assign(average.value + (1.0 - decay) * (weight.value - average.value))
