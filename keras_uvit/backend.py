"""The only file that asks which backend runs.

What differs between JAX, TensorFlow and PyTorch: taking gradients, compiling a function whose
arguments include a model's weights, drawing one image's noise from its own seed, and which form of
attention is fast. Everything else in the package is `keras.ops`.
"""

import contextlib

import keras
from keras import ops

NAME = keras.config.backend()
HAS_XLA = NAME in ("jax", "tensorflow")
TAKES_LOADERS_OF_DICTS = NAME == "torch"  # elsewhere Keras wants a DataLoader to yield tuples


def has_accelerator():
    """Whether the backend sees a GPU or TPU."""
    if NAME == "jax":
        import jax

        return jax.default_backend() != "cpu"
    if NAME == "torch":
        import torch

        return torch.cuda.is_available() or torch.backends.mps.is_available()
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def keep_tensorflow_off_accelerators():
    """Where TensorFlow only prepares data: it would take the memory of every GPU it sees."""
    if NAME == "tensorflow":
        return
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    except (ImportError, RuntimeError):
        pass  # not installed, or already started by somebody who chose otherwise


def attention(query, key, value):
    """softmax(Q K^T / sqrt(K)) V for `(B, L, N, K)` each; returns the same shape.

    On an accelerator Keras' fused attention, which never stores the L x L weights. On a CPU two
    batched products, 1.4 to 2.6 times faster there than Keras' own on each backend (batch 8, 257
    tokens, 8 heads of 64, forward and backward, 2 cores).
    """
    if has_accelerator():
        return ops.dot_product_attention(query, key, value)
    query, key, value = (
        ops.transpose(a, (0, 2, 1, 3)) for a in (query, key, value)
    )  # (B, N, L, K)
    scores = ops.matmul(query * query.shape[-1] ** -0.5, ops.transpose(key, (0, 1, 3, 2)))
    weights = ops.cast(ops.softmax(ops.cast(scores, "float32")), value.dtype)  # (B, N, L, L)
    return ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))


# Sampling -----------------------------------------------------------------------------------------


def compiled(function):
    """`function` of arrays and nested arrays, without gradients; one program where there is XLA."""
    if NAME == "jax":
        import jax

        return jax.jit(function)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    import torch

    return torch.inference_mode()(function)


def normal_per_image(seeds, step, shape):
    """Standard normal noise `(B, *shape)`; image k's depends on `seeds[k]` and `step` alone.

    Args:
        seeds: `(B,)` int32.
        step: int32 scalar tensor.
        shape: static shape of one image.
    """
    if NAME == "jax":
        import jax

        def draw(seed):
            return jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), shape)

        return jax.vmap(draw)(seeds)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.map_fn(
            lambda seed: tf.random.stateless_normal(
                shape, tf.stack([seed, tf.cast(step, "int32")])
            ),
            seeds,
            fn_output_signature=tf.TensorSpec(shape, "float32"),
        )
    import torch

    def draw(seed):
        # The odd constant keeps (seed, step) and (seed + 1, step - 1) apart.
        generator = torch.Generator(seeds.device).manual_seed(seed * 1_000_003 + int(step))
        return torch.randn(shape, generator=generator, device=seeds.device)

    return torch.stack([draw(seed) for seed in seeds.tolist()])


# Training -----------------------------------------------------------------------------------------
#
# The steps below differentiate and carry state; what is computed is the model's, in keras.ops:
#   unpack(data)               -> the batch, a dict
#   loss_of(batch)             -> float32 scalar; draws its own randomness
#   test_loss_of(batch)        -> the same for evaluation
#   gradient_norm(gradients)   -> float32 scalar
#   after_step(ok, before)     -> counters and moving average; `before`: optimizer.iterations before
#   report(loss, norm)         -> the logs
#   test_report(batch, loss)   -> the logs of evaluation


def train_step(model, *args):
    """Loss, gradients, guard, optimizer, moving average: Keras' `train_step` on each backend.

    A step whose loss or gradient norm is not finite changes no weight and no optimizer slot. A
    loss-scale optimizer guards itself (and must see such a step, to lower its scale).
    """
    if NAME == "jax":
        return _jax_train_step(model, *args)
    batch, optimizer, weights = model.unpack(*args), model.optimizer, model.trainable_variables
    differentiate = _tensorflow_gradients if NAME == "tensorflow" else _torch_gradients
    loss, gradients = differentiate(model, batch, weights)
    with _no_gradients():
        norm = model.gradient_norm(gradients)
        ok = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
        before = optimizer.iterations + 0  # a copy: torch changes the variable in place

        def update():
            optimizer.apply(gradients, weights)  # returns a variable, which no branch may

        if _guards_itself(optimizer):
            update()
        else:
            ops.cond(ok, update, lambda: None)
        model.after_step(ok, before)
        return model.report(loss, norm)


def test_step(model, *args):
    """Keras' `test_step` on each backend."""
    if NAME == "jax":
        return _jax_test_step(model, *args)
    batch = model.unpack(*args)
    with _no_gradients():
        return model.test_report(batch, model.test_loss_of(batch))


def _guards_itself(optimizer):
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _no_gradients():
    if NAME == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def _tensorflow_gradients(model, batch, weights):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = model.loss_of(batch)
        scaled = model.optimizer.scale_loss(loss)
    # A label table's gradient comes as sparse slices, for which Keras' Adam takes another path,
    # off by 4e-3 of the largest weight after eight steps; dense ones agree with other backends.
    gradients = tape.gradient(scaled, weights)
    return loss, [g if g is None else tf.convert_to_tensor(g) for g in gradients]


def _torch_gradients(model, batch, weights):
    model.zero_grad()
    loss = model.loss_of(batch)
    model.optimizer.scale_loss(loss).backward()
    return loss.detach(), [weight.value.grad for weight in weights]


def _jax_train_step(model, state, data):
    import jax

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
    ok = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
    new = optimizer.stateless_apply(slots, gradients, trainable)
    if not _guards_itself(optimizer):
        new = jax.tree.map(lambda new, old: ops.where(ok, new, old), new, (trainable, slots))
    trainable, slots = new

    def finish():
        model.after_step(ok, before)
        return model.report(loss, norm)

    logs, other, metrics = _stateless(model, finish, trainable, other, slots, metrics)
    return logs, (trainable, other, slots, metrics)


def _jax_test_step(model, state, data):
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
