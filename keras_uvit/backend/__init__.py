"""What differs between JAX, TensorFlow and PyTorch; everything else is `keras.ops`.

This is the only file that asks which backend runs. `jax.py`, `tensorflow.py` and `torch.py` answer
the same questions, each in its own way:

| function | what it does |
|---|---|
| `has_accelerator()` | whether the backend sees a GPU or TPU |
| `fuses_attention()` | whether Keras' fused attention is the fastest there is, now |
| `fused_attention(q, k, v)` | Keras' fused attention, made to take what networks here have |
| `image_by_image(attend, q, k, v)` | `attend(q, k, v)`, an image at a time where that is faster |
| `compiled(f)` | `f` of nested arrays, without gradients; one program where there is XLA |
| `holding(network, weights)` | a scope in which its variables have these values, given in order |
| `compile_blocks(network, wanted)` | compiles its blocks, where steps are not compiled |
| `images_at_once(size)` | how many to draw together, with tensors of `size` bytes for each |
| `constant(array)` | what a layer keeps of a NumPy array that its calls read |
| `project(x, kernel, bias)` | a dense layer: `(..., D)` by `(D, M)`, plus `(M,)` or None |
| `norm(tensors)` | Euclidean norm of all their numbers |
| `blend(averages, weights, decay)` | moves each average towards its weight, in place |
| `AdamW` | Keras' own, or one that updates all weights faster |
| `normal_per_image(seeds, step, shape)` | noise `(B, *shape)`, image k's by `seeds[k]` and `step` |
| `train_step(model, *args)`, `test_step(...)` | Keras' steps, around the model's own loss |
| `initialize(address, count, index)` | joins this process to the others of a job |
| `use_devices(devices)` | models made from now on are trained on all of them |
| `replicas()` | into how many parts a global batch is divided |
| `drawn(draw, shape)` | what this replica sees of `draw(shape of the global batch)` |
| `process()` | (index, count) of this process |
| `data_shard()` | (index, count): which part of a global batch this process reads |
| `synchronize(model)` | the same weights in all processes |
| `pieces(variable)`, `assign(variable, read)` | what this process saves of a variable, and back |
| `catches_sigterm()` | whether the runtime takes the signal itself |
| `barrier(name)`, `any_process(flag, step)`, `from_first(number)` | agreement between processes |
| `spread(array, axis, together)` | an argument of a program on all devices; rows divided, or not |
| `whole(tensor)` | the result of such a program, in each process |
| `alone(tensor)` | a weight as this process can use it without the others |
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_uvit.backend import heap
from keras_uvit.optional import optional
from keras_uvit.types import Tensor

NAME: str = keras.config.backend()
HAS_XLA = NAME in ("jax", "tensorflow")
# How Keras exports a network so that others can read the file. Its other formats fail for inputs
# that are a dict or, ONNX on TensorFlow, write a file that no runtime takes.
EXPORT_FORMATS: tuple[str, ...] = {
    "jax": ("tf_saved_model",),
    "tensorflow": ("tf_saved_model", "litert"),
    "torch": ("torch",),
}.get(NAME, ())
# Which backends write the sampling loop in each format; `export_jax.py` and others say how.
SAMPLER_FORMATS: dict[str, tuple[str, ...]] = {
    "onnx": ("tensorflow", "torch"),
    "tf_saved_model": ("jax", "tensorflow"),
    "litert": ("tensorflow",),
    "stablehlo": ("jax",),
}
TAKES_LOADERS_OF_DICTS = NAME == "torch"  # elsewhere Keras wants a DataLoader to yield tuples

if TYPE_CHECKING or NAME == "jax":  # a type checker takes JAX's signatures for all
    from keras_uvit.backend import jax as _running
elif NAME == "tensorflow":
    from keras_uvit.backend import tensorflow as _running
elif NAME == "torch":
    from keras_uvit.backend import torch as _running
else:
    raise ImportError(
        f"keras_uvit runs on JAX, TensorFlow or PyTorch. Received: the backend {NAME!r}. Choose "
        "one of them before Keras is imported: KERAS_BACKEND=jax, tensorflow or torch."
    )

# What each of them gives, in the order of the table above.
has_accelerator = _running.has_accelerator
fuses_attention = _running.fuses_attention
fused_attention = _running.fused_attention
image_by_image = _running.image_by_image
compiled = _running.compiled
holding = _running.holding
compile_blocks = _running.compile_blocks
images_at_once = _running.images_at_once
constant = _running.constant
project = _running.project
norm = _running.norm
blend = _running.blend
AdamW = _running.AdamW
normal_per_image = _running.normal_per_image
train_step = _running.train_step
test_step = _running.test_step
initialize = _running.initialize
use_devices = _running.use_devices
replicas = _running.replicas
drawn = _running.drawn
process = _running.process
data_shard = _running.data_shard
synchronize = _running.synchronize
pieces = _running.pieces
assign = _running.assign
catches_sigterm = _running.catches_sigterm
barrier = _running.barrier
any_process = _running.any_process
from_first = _running.from_first
spread = _running.spread
whole = _running.whole
alone = _running.alone


def check_exports(format: str) -> None:
    """Raises ImportError unless what writes the format is installed."""
    for module, extra in _exporting().NEEDS[format].items():
        optional(module, extra, f"format={format!r} needs {module}")


def export_sampler(program: Any, path: Path, format: str) -> None:
    """Writes a `sampling.export.Program` in a format that this backend has."""
    _exporting().WRITERS[format](program, path)


def _exporting() -> Any:
    if NAME == "jax":
        from keras_uvit.backend import export_jax as exporting
    elif NAME == "tensorflow":
        from keras_uvit.backend import export_tensorflow as exporting  # type: ignore[no-redef]
    else:
        from keras_uvit.backend import export_torch as exporting  # type: ignore[no-redef]
    return exporting


def keep_memory() -> None:
    """Lets this process keep the memory that XLA's programs for CPUs free at the end of each step.

    PyTorch frees less of it, and its steps take as long either way (benchmarks/heap.py).
    """
    if HAS_XLA and not has_accelerator():
        heap.keep()


def is_first() -> bool:
    """Whether this process is the one that talks, and writes what all of them have."""
    return process()[0] == 0


def keep_tensorflow_off_accelerators() -> None:
    """Where TensorFlow only prepares data: it would take the memory of every GPU it sees."""
    if NAME == "tensorflow":
        return
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    except (ImportError, RuntimeError):
        pass  # not installed, or already started by somebody who chose otherwise


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V for `(B, L, N, K)` each; returns the same shape.

    On an accelerator Keras' fused attention, which never stores the L x L weights. On a CPU two
    batched products, 1.4 to 2.6 times faster there than Keras' own on each backend (batch 8, 257
    tokens, 8 heads of 64, forward and backward, 2 cores), but for PyTorch without a backward pass.
    """
    if fuses_attention():
        return fused_attention(query, key, value)
    return image_by_image(_attention_by_products, query, key, value)


def _attention_by_products(query, key, value):
    query, key, value = (
        ops.transpose(a, (0, 2, 1, 3)) for a in (query, key, value)
    )  # (B, N, L, K)
    # float32 before the product, as fused attention sums it: bfloat16 would round large scores.
    query, key = (ops.cast(a, "float32") for a in (query, key))
    scores = ops.matmul(query * query.shape[-1] ** -0.5, ops.transpose(key, (0, 1, 3, 2)))
    return ops.transpose(_weighted_sum(scores, value), (0, 2, 1, 3))


def _weighted_sum(scores, values):
    """softmax(scores) values: `(..., L, L)` float32 by `(..., L, K)`."""
    # float16 cannot hold every sum that is not divided yet.
    if not HAS_XLA or values.dtype != scores.dtype:
        return ops.matmul(ops.cast(ops.softmax(scores), values.dtype), values)
    # Divided last, where there are L x K numbers instead of L x L: with the softmax in one piece a
    # step of U-ViT-S/2 takes an eighth longer in XLA's CPU code.
    weights = ops.exp(scores - ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True)))
    return ops.matmul(weights, values) / ops.sum(weights, axis=-1, keepdims=True)
