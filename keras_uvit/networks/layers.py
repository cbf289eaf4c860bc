"""The layers of U-ViT: time, positions, attention, transformer block, long skip.

Facts about the published network, each stated once, where it is used:
`LayerNormalization` epsilon 1e-5 and exact GELU (`TransformerBlock`), cosine before sine
(`TimeEmbedding`), patch order (row, column, channel) (`patches.patchify`), nothing starts at zero
but biases (`normal_init`, `fan_in_init`).
"""

import inspect
import math

import keras
import numpy as np
from keras import initializers, layers, ops

from keras_uvit import backend

SKIPS = ("concat", "add", "add_project", "project_sum")


def serializable(cls):
    """Registers `cls` with Keras; its `get_config` returns the constructor's own arguments.

    The constructor must store each argument as an attribute of the same name, so that the list of
    arguments is written once and cannot drift from the config.
    """
    own = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else ()
    names = [name for name in own if name not in ("self", "kwargs")]

    def get_config(self):
        return {**super(cls, self).get_config(), **{name: getattr(self, name) for name in names}}

    cls.get_config = get_config
    return keras.saving.register_keras_serializable("keras_uvit")(cls)


def normal_init():
    """N(0, 0.02^2), the published `trunc_normal_(std=.02)`, which cuts at +-2, never reached."""
    return initializers.RandomNormal(stddev=0.02)


def fan_in_init(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for convolutions, kernel and bias."""
    bound = 1.0 / math.sqrt(fan_in)
    return initializers.RandomUniform(-bound, bound)


@serializable
class Dense(layers.Dense):
    """Keras' own, by the product that is fastest on each backend."""

    def call(self, inputs):
        kernel = ops.convert_to_tensor(self.kernel)
        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        x = backend.project(inputs, kernel, bias)
        return x if self.activation is None else self.activation(x)


def dense(units, dtype, name, use_bias=True):
    return Dense(units, use_bias=use_bias, kernel_initializer=normal_init(), dtype=dtype, name=name)


def layer_norm(dtype, name, affine=True):
    return layers.LayerNormalization(
        epsilon=1e-5, center=affine, scale=affine, dtype=dtype, name=name
    )


def rematerialized(function, *tensors):
    """`function(*tensors)`, whose inside the backward pass computes again instead of keeping it.

    A new closure at each call, tensors as positional arguments: the only form with right gradients
    on all three backends. Nothing random may be drawn inside.
    """
    return keras.remat(lambda *values: function(*values))(*tensors)


@serializable
class TimeEmbedding(layers.Layer):
    """Sinusoid of the timestep: cosines first, then sines; period 1e4.

    e = [cos(s f_0), ..., cos(s f_{D/2-1}), sin(s f_0), ...], f_i = 10000^(-2i / D)

    Always float32, whatever the policy: bfloat16 would round 999 to 1000. The result is cast to
    the compute dtype. An odd D gets one zero at the end.

    Args:
        hidden_dim: int. Width D.

    Call arguments:
        timestep: `(B,)`, what the network receives (`time_scale * t`, 0 to 999 or 1000).

    Returns:
        `(B, D)`.
    """

    def __init__(self, hidden_dim, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.hidden_dim = hidden_dim

    def call(self, timestep):
        half = self.hidden_dim // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype("float32")
        angles = ops.cast(timestep, "float32")[:, None] * frequencies[None]  # (B, D/2)
        x = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
        return ops.cast(ops.pad(x, ((0, 0), (0, self.hidden_dim % 2))), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.hidden_dim)


@serializable
class PositionEmbedding(layers.Layer):
    """Adds a learned vector to every token: N(0, 0.02^2), 1-D over all tokens, extras first.

    Call arguments:
        tokens: `(B, L, D)`.

    Returns:
        `(B, L, D)`.
    """

    def build(self, input_shape):
        self.embeddings = self.add_weight(
            shape=input_shape[1:], initializer=normal_init(), name="embeddings"
        )

    def call(self, tokens):
        return tokens + ops.cast(self.embeddings, tokens.dtype)


@serializable
class SinusoidalPositions(layers.Layer):
    """Adds fixed 2-D sinusoids to the patch tokens: half the width for rows, half for columns.

    The extra tokens in front (time, label, context) get none: each kind has its own embedding.

    Args:
        grid: pair of ints `(H/P, W/P)`.

    Call arguments:
        tokens: `(B, L, D)`, the last `H/P * W/P` of them patches; D divisible by 4.

    Returns:
        `(B, L, D)`.
    """

    def __init__(self, grid, **kwargs):
        super().__init__(**kwargs)
        self.grid = tuple(grid)

    def build(self, input_shape):
        _, length, dim = input_shape
        if dim % 4:
            raise ValueError(
                'position="sinusoidal" splits the width in four (rows and columns, cosine and '
                f"sine). Received: hidden_dim={dim}; choose a multiple of 4."
            )
        frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
        rows, columns = np.meshgrid(*(np.arange(n) for n in self.grid), indexing="ij")
        angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
        table = np.concatenate([f(a) for a in angles for f in (np.cos, np.sin)], axis=-1)
        self.table = np.zeros((length, dim), "float32")
        self.table[length - len(table) :] = table

    def call(self, tokens):
        return tokens + ops.cast(self.table, tokens.dtype)


@serializable
class Attention(layers.Layer):
    """Multi-head self-attention: softmax(Q K^T / sqrt(K)) V, softmax in float32.

    One projection makes query, key and value, in this order, each (head, head dim).

    Args:
        num_heads: int N, divides the width.
        qkv_bias: bool. Bias on that projection; the published models have none.
        qk_norm: bool. Divides each head's query and key by its root mean square, with a learned
            scale `(K,)` shared by the heads, so that products cannot grow until the softmax is
            one-hot and training diverges (ViT-22B, arXiv 2302.05442, Section 2: LayerNorm
            without bias and centring; the RMSNorm of Stable Diffusion 3, arXiv 2403.03206).

    Call arguments:
        tokens: `(B, L, D)`.

    Returns:
        `(B, L, D)`.
    """

    def __init__(self, num_heads, qkv_bias=False, qk_norm=False, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm

    def build(self, input_shape):
        dim = input_shape[-1]
        self.qkv = dense(3 * dim, self.dtype_policy, "qkv", use_bias=self.qkv_bias)
        self.proj = dense(dim, self.dtype_policy, "proj")
        self.qkv.build(input_shape)
        self.proj.build(input_shape)
        if self.qk_norm:
            norm = dict(epsilon=1e-6, dtype=self.dtype_policy)
            self.query_norm = layers.RMSNormalization(name="query_norm", **norm)
            self.key_norm = layers.RMSNormalization(name="key_norm", **norm)
            for layer in (self.query_norm, self.key_norm):
                layer.build((None, None, self.num_heads, dim // self.num_heads))

    def call(self, tokens):
        length, dim = tokens.shape[1:]
        qkv = ops.reshape(
            self.qkv(tokens), (-1, length, 3, self.num_heads, dim // self.num_heads)
        )  # (B, L, 3, N, K)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, L, N, K)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        x = backend.attention(query, key, value)  # (B, L, N, K)
        return self.proj(ops.reshape(x, (-1, length, dim)))


@serializable
class TransformerBlock(layers.Layer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Layer norm epsilon 1e-5, exact (erf) GELU, no dropout. With `adaln` each norm is modulated by
    the time embedding e: (1 + scale(e)) norm(x) + shift(e), both linear in e (the paper's AdaLN,
    y_s LayerNorm(h) + y_b, with the constant part of y_s written out).

    Args:
        num_heads: int N, divides D.
        mlp_dim: int. Hidden width of the MLP.
        qkv_bias: bool.
        adaln: bool. Whether `call` takes the time embedding.
        qk_norm: bool; see `Attention`.
        remat: bool. Recompute the block in the backward pass instead of storing it.

    Call arguments:
        tokens: `(B, L, D)`.
        time: `(B, D)`, only with `adaln`.

    Returns:
        `(B, L, D)`.
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        qkv_bias=False,
        adaln=False,
        qk_norm=False,
        remat=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.qkv_bias = qkv_bias
        self.adaln = adaln
        self.qk_norm = qk_norm
        self.remat = remat

    def build(self, tokens_shape, time_shape=None):
        policy, dim = self.dtype_policy, tokens_shape[-1]
        self.norm_1 = layer_norm(policy, "norm_1", affine=not self.adaln)
        self.attention = Attention(
            self.num_heads, self.qkv_bias, self.qk_norm, dtype=policy, name="attention"
        )
        self.norm_2 = layer_norm(policy, "norm_2", affine=not self.adaln)
        self.mlp_in = dense(self.mlp_dim, policy, "mlp_in")
        self.mlp_out = dense(dim, policy, "mlp_out")
        for layer in (self.norm_1, self.attention, self.norm_2, self.mlp_in):
            layer.build(tokens_shape)
        self.mlp_out.build((*tokens_shape[:-1], self.mlp_dim))
        if self.adaln:
            self.modulation = dense(4 * dim, policy, "modulation")
            self.modulation.build((None, dim))

    def call(self, tokens, time=None, training=False):
        inputs = (tokens, time) if self.adaln else (tokens,)
        if self.remat and training:
            return rematerialized(self._body, *inputs)
        return self._body(*inputs)

    def _body(self, x, time=None):
        parts = [None] * 4
        if self.adaln:
            parts = ops.split(self.modulation(time)[:, None], 4, axis=-1)  # each (B, 1, D)
        x = x + self.attention(_modulate(self.norm_1(x), *parts[:2]))
        h = ops.gelu(self.mlp_in(_modulate(self.norm_2(x), *parts[2:])), approximate=False)
        return x + self.mlp_out(h)

    def compute_output_shape(self, tokens_shape, time_shape=None):
        return tokens_shape


def _modulate(x, scale, shift):
    return x if scale is None else (1 + scale) * x + shift


@serializable
class LongSkip(layers.Layer):
    """Joins a deep layer's tokens x with a shallow layer's tokens s (the paper's long skip).

    | merge | result | paper |
    |---|---|---|
    | "concat" | Linear([x, s]), in this order | the published model |
    | "add_project" | Linear(x + s) | ablation |
    | "project_sum" | x + Linear(s) | ablation |
    | "add" | x + s | ablation |

    Args:
        merge: one of the above.
        norm: bool. A layer norm (epsilon 1e-5) on the result: half of UniDiffuser's cure against
            overflow in mixed precision (arXiv 2303.06555, Section 4.2; the other half, norms after
            attention and MLP instead of before, would be another network).
        remat: bool. Recompute it in the backward pass, where that keeps less: x instead of
            [x, s] for "concat" (s is kept anyway, by the block after it), x instead of what the
            norm keeps. The other merges keep one `(B, L, D)` at most, and so would recomputing.

    Call arguments:
        x: `(B, L, D)`.
        skip: `(B, L, D)`.

    Returns:
        `(B, L, D)`.
    """

    def __init__(self, merge="concat", norm=False, remat=False, **kwargs):
        super().__init__(**kwargs)
        self.merge = merge
        self.norm = norm
        self.remat = remat

    def build(self, x_shape, skip_shape=None):
        if self.merge != "add":
            dim = x_shape[-1]
            self.proj = dense(dim, self.dtype_policy, "proj")
            self.proj.build((None, None, 2 * dim if self.merge == "concat" else dim))
        if self.norm:
            self.layer_norm = layer_norm(self.dtype_policy, "norm")
            self.layer_norm.build(x_shape)

    def call(self, x, skip, training=False):
        if self.remat and training and (self.norm or self.merge == "concat"):
            return rematerialized(self._body, x, skip)
        return self._body(x, skip)

    def _body(self, x, skip):
        merged = self._merged(x, skip)
        return self.layer_norm(merged) if self.norm else merged

    def _merged(self, x, skip):
        if self.merge == "concat":
            return self.proj(ops.concatenate([x, skip], axis=-1))
        if self.merge == "add_project":
            return self.proj(x + skip)
        if self.merge == "project_sum":
            return x + self.proj(skip)
        return x + skip

    def compute_output_shape(self, x_shape, skip_shape=None):
        return x_shape
