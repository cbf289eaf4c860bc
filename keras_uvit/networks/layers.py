"""The layers of U-ViT: time, attention, transformer block, long skip.

Facts about the published network, each stated once, where it is used:
`LayerNormalization` epsilon 1e-5 and exact GELU (`TransformerBlock`), cosine before sine
(`TimeEmbedding`), patch order (row, column, channel) (`patches.patchify`), nothing starts at zero
but biases (`normal_init`, `fan_in_init`).

A block asks the layers inside it by `call`: what Keras does around each layer (casts, masks,
scopes) was done for the block, and takes PyTorch a tenth of a millisecond, for which a GPU waits.
"""

from typing import Any

import numpy as np
from keras import layers, ops

from keras_uvit import backend
from keras_uvit.networks.basics import INITS as INITS
from keras_uvit.networks.basics import (
    NORMS,
    DType,
    Shape,
    dense,
    layer_norm,
    rematerialized,
    rms_norm,
)
from keras_uvit.networks.basics import Dense as Dense
from keras_uvit.networks.basics import fan_in_init as fan_in_init
from keras_uvit.networks.basics import identity_init as identity_init
from keras_uvit.networks.basics import serializable as serializable
from keras_uvit.networks.lora import pair_of
from keras_uvit.networks.positions import PositionEmbedding as PositionEmbedding
from keras_uvit.networks.positions import SinusoidalPositions as SinusoidalPositions
from keras_uvit.networks.positions import rotary_turns, rotate
from keras_uvit.types import Config, Tensor

SKIPS = ("concat", "add", "add_project", "project_sum")
MLPS = ("gelu", "swiglu")


@serializable
class TimeEmbedding(layers.Layer):
    """Sinusoid of the timestep: cosines first, then sines; period 1e4.

    e = [cos(s f_0), ..., cos(s f_{D/2-1}), sin(s f_0), ...], f_i = 10000^(-2i / D)

    Always float32, whatever the policy: bfloat16 would round 999 to 1000. The result is cast to
    the compute dtype. An odd D gets one zero at the end.

    Args:
        hidden_dim: int. Width D.
        scale: float, by which the number is multiplied first.

    Call arguments:
        timestep: `(B,)`, what the network receives (`time_scale * t`, 0 to 999 or 1000).

    Returns:
        `(B, D)`.
    """

    def __init__(self, hidden_dim: int, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.hidden_dim = hidden_dim
        self.scale = scale

    def call(self, timestep: Tensor) -> Tensor:
        half = self.hidden_dim // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype("float32")
        angles = ops.cast(timestep, "float32")[:, None] * ops.convert_to_tensor(
            self.scale * frequencies
        )
        x = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
        return ops.cast(ops.pad(x, ((0, 0), (0, self.hidden_dim % 2))), self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape, self.hidden_dim)


# Inputs beside the timestep, and the scale of their sinusoids: the span is at most 1, and a loss
# that compares two near spans must not see them far apart, as the timestep's 999 would make them.
FLOW_MAP_INPUTS = {"span": 20.0, "guidance": 5.0}


def with_flow_map_inputs(time: Tensor, inputs: dict[str, Tensor], dim: int, dtype: DType) -> Tensor:
    """The time embedding `(B, M)` plus those of the span and the guidance scale, where they are.

    What is added starts at zero, so that weights of a network without these inputs give the same
    answers in one that has them. (As tokens of their own they would change the attention.)
    """
    for name in [name for name in FLOW_MAP_INPUTS if name in inputs]:
        x = TimeEmbedding(dim, FLOW_MAP_INPUTS[name], dtype=dtype, name=f"{name}_embed")(
            inputs[name]
        )
        x = ops.silu(dense(4 * dim, dtype, f"{name}_mlp_in")(x))
        out = Dense(time.shape[-1], kernel_initializer="zeros", dtype=dtype, name=f"{name}_mlp_out")
        time = layers.Add(dtype=dtype, name=f"time_and_{name}")([time, out(x)])
    return time


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
        grid: pair of ints `(H/P, W/P)`: queries and keys of the patches, the last tokens, are
            turned by their place; see `positions.rotary_turns`. `None`: they are not.
        lora: dict or None, of the pairs of both projections; see `networks.lora`.
        init: a name in `basics.INITS`, of the projection to query, key and value.

    Call arguments:
        tokens: `(B, L, D)`.

    Returns:
        `(B, L, D)`.
    """

    def __init__(
        self,
        num_heads: int,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        grid: tuple[int, int] | None = None,
        lora: Config | None = None,
        init: str = "published",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.grid = grid
        self.lora = lora
        self.init = init

    def build(self, input_shape: Shape) -> None:
        _, length, dim = input_shape
        head_dim = dim // self.num_heads
        reading = INITS[self.init](dim)
        self.qkv = dense(3 * dim, self.dtype_policy, "qkv", self.qkv_bias, self.lora, reading)
        self.proj = dense(dim, self.dtype_policy, "proj", lora=self.lora)
        self.qkv.build(input_shape)
        self.proj.build(input_shape)
        if self.qk_norm:
            self.query_norm = rms_norm(self.dtype_policy, "query_norm")
            self.key_norm = rms_norm(self.dtype_policy, "key_norm")
            for layer in (self.query_norm, self.key_norm):
                layer.build((None, None, self.num_heads, head_dim))
        if self.grid is not None:
            self.turns = rotary_turns(self.grid, length, head_dim)

    def call(self, tokens: Tensor) -> Tensor:
        length, dim = tokens.shape[1:]
        qkv = ops.reshape(
            self.qkv.call(tokens), (-1, length, 3, self.num_heads, dim // self.num_heads)
        )  # (B, L, 3, N, K)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, L, N, K)
        if self.qk_norm:
            query, key = self.query_norm.call(query), self.key_norm.call(key)
        if self.grid is not None:
            query, key = rotate(query, self.turns), rotate(key, self.turns)
        x = backend.attention(query, key, value)  # (B, L, N, K)
        return self.proj.call(ops.reshape(x, (-1, length, dim)))


@serializable
class TransformerBlock(layers.Layer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    | mlp | result | |
    |---|---|---|
    | "gelu" | Linear(GELU(Linear(x))), exact (erf) | the published model |
    | "swiglu" | Linear(SiLU(Linear(x)) Linear(x)) | Shazeer 2020, arXiv 2002.05202, Eq. 6 |

    Layer norm epsilon 1e-5, no dropout. With `adaln` each norm is modulated by
    the time embedding e: (1 + scale(e)) norm(x) + shift(e), both linear in e (the paper's AdaLN,
    y_s LayerNorm(h) + y_b, with the constant part of y_s written out).

    Args:
        num_heads: int N, divides D.
        mlp_dim: int. Hidden width of the MLP; "swiglu" has `gated_width(mlp_dim)`.
        qkv_bias: bool.
        adaln: bool. Whether `call` takes the time embedding.
        qk_norm: bool; see `Attention`.
        remat: bool. Recompute the block in the backward pass instead of storing it.
        norm: "layer" or "rms"; see `basics.RMSNorm`.
        mlp: one of the above.
        grid: pair of ints or None; see `Attention`.
        lora: dict or None, of the pairs of its attention and MLP; see `networks.lora`.
        init: a name in `basics.INITS`, of query, key, value and the MLP's first layer.

    Call arguments:
        tokens: `(B, L, D)`.
        time: `(B, D)`, only with `adaln`.

    Returns:
        `(B, L, D)`.
    """

    def __init__(
        self,
        num_heads: int,
        mlp_dim: int,
        qkv_bias: bool = False,
        adaln: bool = False,
        qk_norm: bool = False,
        remat: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        grid: tuple[int, int] | None = None,
        lora: Config | None = None,
        init: str = "published",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.qkv_bias = qkv_bias
        self.adaln = adaln
        self.qk_norm = qk_norm
        self.remat = remat
        self.norm = norm
        self.mlp = mlp
        self.grid = grid
        self.lora = lora
        self.init = init

    def build(self, tokens_shape: Shape, time_shape: Shape | None = None) -> None:
        policy, dim = self.dtype_policy, tokens_shape[-1]
        self.norm_1 = NORMS[self.norm](policy, "norm_1", affine=not self.adaln)
        self.attention = Attention(
            self.num_heads,
            self.qkv_bias,
            self.qk_norm,
            self.grid,
            pair_of(self.lora, "attention"),
            self.init,
            dtype=policy,
            name="attention",
        )
        self.norm_2 = NORMS[self.norm](policy, "norm_2", affine=not self.adaln)
        width = self.mlp_dim if self.mlp == "gelu" else gated_width(self.mlp_dim)
        pair = pair_of(self.lora, "mlp")
        self.mlp_in = dense(width, policy, "mlp_in", lora=pair, initializer=INITS[self.init](dim))
        self.mlp_out = dense(dim, policy, "mlp_out", lora=pair)
        for layer in (self.norm_1, self.attention, self.norm_2, self.mlp_in):
            layer.build(tokens_shape)
        self.mlp_out.build((*tokens_shape[:-1], width))
        if self.mlp == "swiglu":
            reading = INITS[self.init](dim)
            self.mlp_gate = dense(width, policy, "mlp_gate", lora=pair, initializer=reading)
            self.mlp_gate.build(tokens_shape)
        if self.adaln:
            self.modulation = dense(4 * dim, policy, "modulation")
            self.modulation.build((None, dim))

    compiles_once = True  # one program serves all blocks; see `backend.compile_blocks`

    def call(self, tokens: Tensor, time: Tensor | None = None, training: bool = False) -> Tensor:
        inputs = (tokens, time) if self.adaln else (tokens,)
        if self.remat and training:
            return rematerialized(self._body, *inputs)
        return self._body(*inputs)

    def _body(self, x, time=None):
        parts = [None] * 4
        if self.adaln:
            parts = ops.split(self.modulation.call(time)[:, None], 4, axis=-1)  # each (B, 1, D)
        x = x + self.attention.call(_modulate(self.norm_1.call(x), *parts[:2]))
        y = _modulate(self.norm_2.call(x), *parts[2:])
        if self.mlp == "swiglu":
            h = ops.silu(self.mlp_gate.call(y)) * self.mlp_in.call(y)
        else:
            h = ops.gelu(self.mlp_in.call(y), approximate=False)
        return x + self.mlp_out.call(h)

    def compute_output_shape(self, tokens_shape: Shape, time_shape: Shape | None = None) -> Shape:
        return tokens_shape


def gated_width(mlp_dim: int) -> int:
    """2/3, so that three kernels have the weights of two; a multiple of 8, for tensor cores.

    >>> gated_width(4608), gated_width(2048)
    (3072, 1368)
    """
    return max(8, 8 * round(mlp_dim / 12))


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

    def __init__(
        self, merge: str = "concat", norm: bool = False, remat: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.merge = merge
        self.norm = norm
        self.remat = remat

    def build(self, x_shape: Shape, skip_shape: Shape | None = None) -> None:
        if self.merge != "add":
            dim = x_shape[-1]
            self.proj = dense(dim, self.dtype_policy, "proj")
            self.proj.build((None, None, 2 * dim if self.merge == "concat" else dim))
        if self.norm:
            self.layer_norm = layer_norm(self.dtype_policy, "norm")
            self.layer_norm.build(x_shape)

    compiles_once = True

    def call(self, x: Tensor, skip: Tensor, training: bool = False) -> Tensor:
        if self.remat and training and (self.norm or self.merge == "concat"):
            return rematerialized(self._body, x, skip)
        return self._body(x, skip)

    def _body(self, x, skip):
        merged = self._merged(x, skip)
        return self.layer_norm.call(merged) if self.norm else merged

    def _merged(self, x, skip):
        if self.merge == "concat":
            return self.proj.call(ops.concatenate([x, skip], axis=-1))
        if self.merge == "add_project":
            return self.proj.call(x + skip)
        if self.merge == "project_sum":
            return x + self.proj.call(skip)
        return x + skip

    def compute_output_shape(self, x_shape: Shape, skip_shape: Shape | None = None) -> Shape:
        return x_shape
