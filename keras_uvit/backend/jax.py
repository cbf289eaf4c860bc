"""JAX: pure functions of all state, compiled whole; many devices by sharded arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from keras import ops

from keras_uvit.backend.steps import AdamW as AdamW
from keras_uvit.backend.steps import blend as blend
from keras_uvit.backend.steps import compile_blocks as compile_blocks
from keras_uvit.backend.steps import constant as constant
from keras_uvit.backend.steps import guards_itself, is_ok
from keras_uvit.backend.steps import holding as holding
from keras_uvit.backend.steps import images_at_once as images_at_once
from keras_uvit.backend.steps import norm as norm
from keras_uvit.types import Array, Tensor


def has_accelerator() -> bool:
    return jax.default_backend() != "cpu"


fuses_attention = has_accelerator


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """On a GPU an odd number of tokens gets one more, which no other attends to.

    JAX differentiates cuDNN's kernel as if there were a bias, and then wants an even number: for an
    odd one Keras would log an error at each call and take the plain form, with its L x L weights.

    On a TPU it is JAX' own, in plain operations, which XLA divides among devices. Keras would ask
    for the splash kernel, which takes multiples of 128 tokens alone, and log an error at each call
    of a network of 257, 258 or 334. With tokens added up to 384 it needs 0.8 to 2.4 times the
    memory (benchmarks/tpu.py --attention). The backward pass computes the L x L weights again:
    with all blocks' weights kept a step of U-ViT-L/2 needs 10.5 GB a chip instead of 6.3, for 0.6 %
    fewer operations.
    """
    length, platform = query.shape[1], jax.default_backend()
    if platform == "tpu":
        return jax.checkpoint(jax.nn.dot_product_attention)(query, key, value)
    if length % 2 == 0 or query.dtype == "float32" or platform != "gpu":
        return ops.dot_product_attention(query, key, value)
    query, key, value = (ops.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (query, key, value))
    seen = np.arange(length + 1) < length
    mask = np.broadcast_to(seen, (1, 1, length + 1, length + 1))
    return ops.dot_product_attention(query, key, value, mask=mask)[:, :length]


LARGE = 2**20  # bytes of an image's weights; below it a batch takes as long, its gradient less


def image_by_image(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """What one image needs in between stays in the CPU's cache; a batch's is memory that the
    kernel maps again at each call. With 258 tokens it takes less than half the time. The gradient
    computes it again, which takes no longer than to keep it.
    """
    size = 4 * query.shape[1] * key.shape[1] * query.shape[2]
    # A loop over what is divided among devices would gather it.
    if size < LARGE or _distribution() is not None:
        return attend(query, key, value)

    @jax.checkpoint
    def one(image):
        return attend(*(a[None] for a in image))[0]

    return jax.lax.map(one, (query, key, value))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function)


def normal_per_image(seeds: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    def draw(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), shape)

    return jax.vmap(draw)(seeds)


def project(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    if jax.default_backend() == "tpu":
        # Its memory is in tiles of eight rows, so that below the reshape of 258 tokens would be a
        # copy, which the backward pass would keep.
        y = ops.matmul(x, kernel)
    else:
        # Rows in one axis: the weight's gradient sums over them, and for two of them XLA's CPU code
        # transposes x, element by element inside what computes it.
        y = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), kernel)
        y = ops.reshape(y, (*x.shape[:-1], kernel.shape[-1]))
    return y if bias is None else y + bias


# Training -----------------------------------------------------------------------------------------


def train_step(
    model: Any, state: tuple[Any, ...], data: Any
) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    trainable, other, slots, metrics = state
    batch, optimizer = model.unpack(data), model.optimizer

    def objective(trainable):
        def scaled():
            loss = model.loss_of(batch)
            return optimizer.scale_loss(loss), loss

        (scaled_loss, loss), *_ = _stateless(model, scaled, trainable, other, slots, metrics)
        return scaled_loss, loss

    (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(trainable)
    (norm, before), *_ = _stateless(
        model,
        lambda: (model.gradient_norm(gradients), ops.convert_to_tensor(optimizer.iterations)),
        *state,
    )
    ok = is_ok(loss, norm)
    new = optimizer.stateless_apply(slots, gradients, trainable)
    if not guards_itself(optimizer):
        new = jax.tree.map(lambda new, old: ops.where(ok, new, old), new, (trainable, slots))
    trainable, slots = new

    def finish():
        model.after_step(ok, before)
        return model.report(loss, norm)

    logs, other, metrics = _stateless(model, finish, trainable, other, slots, metrics)
    return logs, (trainable, other, slots, metrics)


def test_step(
    model: Any, state: tuple[Any, ...], data: Any
) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    trainable, other, metrics = state
    batch = model.unpack(data)

    def evaluate():
        return model.test_report(batch, model.test_loss_of(batch))

    logs, other, metrics = _stateless(model, evaluate, trainable, other, None, metrics)
    return logs, (trainable, other, metrics)


def _stateless(model, function, trainable, other, slots, metrics):
    """`function()` on the given values; also the non-trainable and metric values it leaves."""
    mapping = [
        *zip(model.trainable_variables, trainable),
        *zip(model.non_trainable_variables, other),
        *zip(model.metrics_variables, metrics),
    ]
    if slots is not None:
        mapping += zip(model.optimizer.variables, slots)
    with keras.StatelessScope(state_mapping=mapping) as scope:
        out = function()
    return (
        out,
        [scope.get_current_value(v) for v in model.non_trainable_variables],
        [scope.get_current_value(v) for v in model.metrics_variables],
    )


# Many devices -------------------------------------------------------------------------------------


def initialize(
    address: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    if not hasattr(keras.distribution.DataParallel, "auto_shard_dataset"):
        # Keras 3.10, whose `fit` takes nothing but tf.data where there are several processes.
        raise RuntimeError(
            "A job of several JAX processes needs Keras 3.11 or later. "
            f"Received: Keras {keras.__version__}. Upgrade with `pip install -U keras`."
        )
    keras.distribution.initialize(address, count, index)


def use_devices(devices: Sequence[str] | None = None) -> Any:
    distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    return distribution


def _distribution():
    return keras.distribution.distribution()


def replicas() -> int:
    distribution = _distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    return draw(shape)  # a program is written for the global batch


def process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def data_shard() -> tuple[int, int]:
    """Processes that hold parts of one model copy read the same data."""
    if _distribution() is None:
        return 0, 1
    index, processes = process()
    count = min(replicas(), processes)
    return index * count // processes, count


def synchronize(model: keras.Model) -> None:
    """Nothing to do: a variable is one array for all processes."""


def pieces(variable: keras.Variable) -> list[tuple[list[int], np.ndarray]]:
    """[(first index of each axis, NumPy array), ...]: each part of a variable is in one process."""
    value = variable.value
    return [
        ([part.start or 0 for part in shard.index], np.array(shard.data))
        for shard in value.addressable_shards
        if shard.replica_id == 0
    ]


def assign(variable: keras.Variable, read: Callable[..., Array]) -> None:
    """Calls `read(slices)` for the parts that this process' devices hold."""
    sharding = variable.value.sharding
    # A copy: JAX keeps NumPy's memory on a CPU, and it must not be a buffer that is donated twice.
    value = jax.make_array_from_callback(
        variable.shape, sharding, lambda index: np.array(read(index), variable.dtype)
    )
    variable.assign(value)


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool, step: int) -> bool:
    """JAX' runtime takes SIGTERM itself, and tells all processes the same step to stop at."""
    if jax.process_count() == 1:
        return flag
    return multihost_utils.reached_preemption_sync_point(step)


def catches_sigterm() -> bool:
    """Whether JAX' own runtime takes the signal, as it does where processes stop together."""
    return jax.process_count() > 1


def from_first(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def spread(array: Array, axis: int | None = 0, together: bool = True) -> Tensor:
    if _distribution() is None or (not together and jax.process_count() > 1):
        return jax.numpy.asarray(array)  # Keras makes floats of integers where floatx is bfloat16
    array = np.asarray(array)
    axes = [None] * array.ndim
    if axis == 0 and len(array) % replicas() == 0:
        axes[0] = _distribution().batch_dim_name
    mesh = _distribution().device_mesh.backend_mesh
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def whole(tensor: Tensor) -> np.ndarray:
    if tensor.is_fully_addressable:
        return ops.convert_to_numpy(tensor)
    return multihost_utils.process_allgather(tensor, tiled=True)


def alone(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_fully_addressable else tensor.addressable_data(0)
