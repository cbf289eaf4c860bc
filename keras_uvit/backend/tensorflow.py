"""TensorFlow: variables that change in place; many devices of one machine by MirroredStrategy."""

import tensorflow as tf
from keras import ops

from keras_uvit.backend.steps import *  # noqa: F403
from keras_uvit.backend.steps import guards_itself, is_ok


def has_accelerator():
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


fuses_attention = has_accelerator


def compiled(function):
    return tf.function(function, jit_compile=True)


def normal_per_image(seeds, step, shape):
    return tf.map_fn(
        lambda seed: tf.random.stateless_normal(shape, tf.stack([seed, tf.cast(step, "int32")])),
        seeds,
        fn_output_signature=tf.TensorSpec(shape, "float32"),
    )


def project(x, kernel, bias=None):
    y = ops.matmul(x, kernel)
    return y if bias is None else y + bias


# Training -----------------------------------------------------------------------------------------


def train_step(model, data):
    batch, optimizer, weights = model.unpack(data), model.optimizer, model.trainable_variables
    with tf.GradientTape() as tape:
        loss = model.loss_of(batch)
        scaled = optimizer.scale_loss(loss)
    # A label table's gradient comes as sparse slices, for which Keras' Adam takes another path,
    # off by 4e-3 of the largest weight after eight steps; dense ones agree with other backends.
    gradients = [
        g if g is None else tf.convert_to_tensor(g) for g in tape.gradient(scaled, weights)
    ]
    loss, gradients = _mean_over_replicas((loss, gradients))
    norm = model.gradient_norm(gradients)
    ok = is_ok(loss, norm)
    before = optimizer.iterations + 0
    if guards_itself(optimizer):
        optimizer.apply(_first_replica_only(gradients), weights)
    elif not tf.distribute.has_strategy():
        # The branch returns nothing: `apply` returns a variable, which no branch may.
        ops.cond(ok, lambda: (optimizer.apply(gradients, weights), None)[1], lambda: None)
    else:
        _apply_and_undo(optimizer, gradients, weights, ok)
    model.after_step(ok, before)
    return model.report(loss, norm)


def test_step(model, data):
    batch = model.unpack(data)
    return model.test_report(batch, _mean_over_replicas(model.test_loss_of(batch)))


def _apply_and_undo(optimizer, gradients, weights, ok):
    """Under a strategy, even of one device, no update may stand in a branch: it is taken back."""
    variables = [*weights, *optimizer.variables]
    before = [tf.identity(v.value) for v in variables]
    optimizer.apply(_first_replica_only(gradients), weights)
    for variable, old in zip(variables, before):
        variable.assign(tf.where(ok, variable.value, old))


def _mean_over_replicas(tensors):
    if replicas() == 1:
        return tensors
    return tf.distribute.get_replica_context().all_reduce("MEAN", tensors)


def _first_replica_only(gradients):
    """Keras sums the replicas' gradients once more, after clipping; a product keeps NaN in all."""
    if replicas() == 1:
        return gradients
    index = tf.distribute.get_replica_context().replica_id_in_sync_group
    return [g if g is None else g * tf.cast(index == 0, g.dtype) for g in gradients]


# Many devices -------------------------------------------------------------------------------------


def initialize(address=None, count=None, index=None):
    raise NotImplementedError(
        "Several processes need JAX or PyTorch; TensorFlow trains on the devices of one machine: "
        "distribution.data_parallel()."
    )


def use_devices(devices=None):
    strategy = tf.distribute.MirroredStrategy(devices)
    tf.distribute.experimental_set_strategy(strategy)
    return strategy


def replicas():
    return tf.distribute.get_strategy().num_replicas_in_sync


def drawn(draw, shape):
    if replicas() == 1:
        return draw(shape)
    count, *rest = shape
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * count
    return draw((count * replicas(), *rest))[first : first + count]


def process():
    return 0, 1


def data_shard():
    return 0, 1


def synchronize(model):
    """Nothing to do: a mirrored variable is made equal on all devices."""


def pieces(variable):
    value = ops.convert_to_numpy(variable)
    return [([0] * value.ndim, value if _parts(variable) == 1 else value / _parts(variable))]


def assign(variable, read):
    value = read((slice(None),) * len(variable.shape))
    variable.assign(value if _parts(variable) == 1 else value * _parts(variable))


def _parts(variable):
    """How many replicas a variable is the sum of: those of metrics; what is saved is the mean."""
    return replicas() if variable.aggregation == "sum" else 1


def barrier(name):
    """Nothing to do in one process."""


def any_process(flag, step):
    return flag


def catches_sigterm():
    return False


def from_first(number):
    return number


def spread(array, axis=0, together=True):
    return ops.convert_to_tensor(array)


def whole(tensor):
    return ops.convert_to_numpy(tensor)


def alone(tensor):
    return tensor
