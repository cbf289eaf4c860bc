"""What the package is measured against on JAX: U-ViT's training step in plain JAX.

It follows the paper (arXiv 2209.12152) as rivals.py does in PyTorch, and does what good JAX code
does today: weights in float32 and work in bfloat16, `jax.nn.dot_product_attention`, one fused
update of weights and their average. No Keras is imported here.
"""

import math

import jax
import jax.numpy as jnp

AVERAGE, RATE, BETA_1, BETA_2, DECAY, EPSILON = 0.9999, 2e-4, 0.99, 0.999, 0.03, 1e-8


def weights(image_shape, patch_size, hidden_dim, num_layers, num_classes):
    """Shapes of all weights, by name."""
    height, width, channels = image_shape
    numbers, tokens = channels * patch_size**2, height * width // patch_size**2
    dim = hidden_dim
    extras = 2 if num_classes else 1
    found = {
        "patch": dict(kernel=(numbers, dim), bias=(dim,)),
        "position": dict(kernel=(tokens + extras, dim)),
        "norm": dict(scale=(dim,), bias=(dim,)),
        "head": dict(kernel=(dim, numbers), bias=(numbers,)),
        "conv": dict(kernel=(3, 3, channels, channels), bias=(channels,)),
    }
    if num_classes:
        found["label"] = dict(kernel=(num_classes + 1, dim))
    for k in range(num_layers):
        found[f"block_{k}"] = dict(
            norm_1=(dim,), shift_1=(dim,), norm_2=(dim,), shift_2=(dim,),
            qkv=(dim, 3 * dim), proj=(dim, dim), proj_bias=(dim,),
            up=(dim, 4 * dim), up_bias=(4 * dim,), down=(4 * dim, dim), down_bias=(dim,),
        )  # fmt: skip
    for k in range(num_layers // 2):
        found[f"skip_{k}"] = dict(kernel=(2 * dim, dim), bias=(dim,))
    return found


def norm(x, scale, bias):
    wide = x.astype("float32")
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


def block(w, x, heads):
    batch, length, dim = x.shape
    qkv = norm(x, w["norm_1"], w["shift_1"]) @ w["qkv"].astype(x.dtype)
    query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, dim // heads), 2, 0)
    attended = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    x = x + attended @ w["proj"].astype(x.dtype) + w["proj_bias"].astype(x.dtype)
    hidden = norm(x, w["norm_2"], w["shift_2"]) @ w["up"].astype(x.dtype)
    hidden = jax.nn.gelu(hidden + w["up_bias"].astype(x.dtype), approximate=False)
    return x + hidden @ w["down"].astype(x.dtype) + w["down_bias"].astype(x.dtype)


def network(w, image, timestep, label, heads, patch, dtype, remat):
    batch, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    x = image.astype(dtype).reshape(batch, rows, patch, columns, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    x = x @ w["patch"]["kernel"].astype(dtype) + w["patch"]["bias"].astype(dtype)
    dim = x.shape[-1]
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(dim // 2) / (dim // 2))
    angles = timestep[:, None] * frequencies
    extras = [jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)[:, None].astype(dtype)]
    if label is not None:
        extras.append(w["label"]["kernel"][label][:, None].astype(dtype))
    x = jnp.concatenate([*extras, x], 1) + w["position"]["kernel"].astype(dtype)
    run = jax.checkpoint(block, static_argnums=2) if remat else block
    count, kept = sum(name.startswith("block_") for name in w), []
    for k in range(count):
        if k > count // 2:
            skip = w[f"skip_{k - count // 2 - 1}"]
            x = jnp.concatenate([x, kept.pop()], -1) @ skip["kernel"].astype(dtype)
            x = x + skip["bias"].astype(dtype)
        x = run(w[f"block_{k}"], x, heads)
        if k < count // 2:
            kept.append(x)
    x = norm(x, w["norm"]["scale"], w["norm"]["bias"])[:, len(extras) :]
    x = x @ w["head"]["kernel"].astype(dtype) + w["head"]["bias"].astype(dtype)
    x = x.reshape(batch, rows, columns, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(image.shape)
    kernel = w["conv"]["kernel"].astype(dtype)
    form = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form)
    return x + w["conv"]["bias"].astype(dtype)


def step(state, batch, heads, patch, dtype=jnp.bfloat16, remat=False, scale=0.18215):
    """Noise prediction on the linear schedule, AdamW, moving average: one step of training."""
    w, average, first, second, count, key = state
    key, one, two, three = jax.random.split(key, 4)
    mean, log_deviation = jnp.split(batch["moments"], 2, -1)
    image = scale * (mean + jnp.exp(log_deviation) * jax.random.normal(one, mean.shape))
    t = jax.random.uniform(two, (len(image),))
    alpha = jnp.exp(-0.25 * t**2 * 19.9 - 0.05 * t)[:, None, None, None]
    noise = jax.random.normal(three, image.shape)
    noisy = alpha * image + jnp.sqrt(1 - alpha**2) * noise

    def loss_of(w):
        found = network(w, noisy, 999 * t, batch.get("label"), heads, patch, dtype, remat)
        return jnp.square(found.astype("float32") - noise).mean()

    loss, gradients = jax.value_and_grad(loss_of)(w)
    count = count + 1
    rate = RATE * jnp.sqrt(1 - BETA_2**count) / (1 - BETA_1**count)

    def update(w, average, first, second, gradient):
        first = BETA_1 * first + (1 - BETA_1) * gradient
        second = BETA_2 * second + (1 - BETA_2) * gradient**2
        w = w - RATE * DECAY * w - rate * first / (jnp.sqrt(second) + EPSILON)
        return w, AVERAGE * average + (1 - AVERAGE) * w, first, second

    new = jax.tree.map(update, w, average, first, second, gradients)
    four = jax.tree.transpose(jax.tree.structure(w), jax.tree.structure((0, 0, 0, 0)), new)
    return loss, (*four, count, key)
