"""U-ViT: a vision transformer whose inputs are all tokens and whose layers are joined in a U."""

import dataclasses

import keras
from keras import layers, ops

from keras_uvit.networks import layers as parts
from keras_uvit.networks import lora, patches
from keras_uvit.networks.network import (
    Network,
    NetworkConfig,
    arguments_of,
    inputs_of,
    label_embedding,
)
from keras_uvit.types import Config

LORA_TARGETS = ("attention", "mlp")  # the kernels that can have low-rank pairs

CHOICES = {
    "skip": (*parts.SKIPS, None),
    "time": ("token", "adaln"),
    "position": ("learned", "sinusoidal", "rotary", None),
    "patch_embed": ("linear", "conv"),
    "output_conv": (True, "before", False),
    "norm": tuple(parts.NORMS),
    "mlp": parts.MLPS,
    "init": tuple(parts.INITS),
}

# Path of a weight: the dimension that the layout "fsdp" splits, the one that "tensor" splits; None
# is neither; see `distribution`. A row for every weight of two dimensions or more. Vectors without
# a row are whole everywhere.
#
# "tensor": a layer split by columns (1) and the next by rows (0) need one sum over devices between
# them. A long skip is split by rows: its inputs are whole everywhere, so each device takes its part
# without communication. What is small, or far from the blocks, stays whole.
#
# The label table is whole: split, its rows come out split by width, XLA then splits all tokens so
# and moves activations: 60 times the bytes of "fsdp" in U-ViT-H/2 (benchmarks/scale.py).
BLOCK = r"(in_block_\d+|mid_block|out_block_\d+)"
SPLITS: dict[str, tuple[int | None, int | None]] = {
    r"patch_embed/proj/kernel": (1, None),  # (P P C, D)
    r"patch_embed/conv_\d+/kernel": (3, None),  # (3, 3, in, out)
    r"context_embed/kernel": (1, None),  # (width, D)
    r"label_embed/embeddings": (None, None),  # (K + 1, D)
    r"position/embeddings": (1, None),  # (L, D)
    r"(time|span|guidance)_mlp_in/kernel": (1, 1),  # (D, 4 D)
    r"(time|span|guidance)_mlp_in/bias": (None, 0),
    r"(time|span|guidance)_mlp_out/kernel": (0, 0),  # (4 D, D)
    rf"{BLOCK}/modulation/kernel": (1, 1),  # (D, 4 D)
    rf"{BLOCK}/modulation/bias": (None, 0),
    rf"{BLOCK}/attention/qkv/kernel": (1, 1),  # (D, 3 D)
    rf"{BLOCK}/attention/qkv/bias": (None, 0),
    rf"{BLOCK}/attention/proj/kernel": (0, 0),  # (D, D)
    rf"{BLOCK}/mlp_in/kernel": (1, 1),  # (D, mlp_dim)
    rf"{BLOCK}/mlp_in/bias": (None, 0),
    rf"{BLOCK}/mlp_gate/kernel": (1, 1),  # (D, 2/3 mlp_dim), as mlp_in then is
    rf"{BLOCK}/mlp_gate/bias": (None, 0),
    rf"{BLOCK}/mlp_out/kernel": (0, 0),  # (mlp_dim, D)
    # Low-rank pairs, (in, rank) and (rank, out), as their kernels.
    rf"{BLOCK}/(attention/qkv|mlp_in|mlp_gate)/lora_a": (0, None),
    rf"{BLOCK}/(attention/qkv|mlp_in|mlp_gate)/lora_b": (1, 1),
    rf"{BLOCK}/(attention/proj|mlp_out)/lora_a": (0, 0),
    rf"{BLOCK}/(attention/proj|mlp_out)/lora_b": (1, None),
    r"skip_\d+/proj/kernel": (0, 0),  # (2 D or D, D)
    r"head/kernel": (0, None),  # (D, P P C)
    r"feature_conv/kernel": (3, None),  # (3, 3, D, D)
    r"output_conv/kernel": (None, None),  # (3, 3, C, C); of a U-Net (3, 3, D, C): small
}


@dataclasses.dataclass(frozen=True)
class UViTConfig(NetworkConfig):
    """The arguments of `UViT`, which explains them.

    Raises:
        ValueError: if an argument does not fit; the message names values that do.
    """

    image_shape: tuple[int, int, int]
    patch_size: int = 2
    hidden_dim: int = 512
    num_layers: int = 13
    num_heads: int = 8
    mlp_dim: int | None = None
    skip: str | None = "concat"
    time: str = "token"
    time_mlp: bool = False
    qkv_bias: bool = False
    output_conv: bool | str = True
    position: str | None = "learned"
    patch_embed: str = "linear"
    qk_norm: bool = False
    skip_norm: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    init: str = "published"
    remat: bool = False
    lora: Config | int | None = None
    name: str = dataclasses.field(default="uvit", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lora", lora.checked(self.lora, LORA_TARGETS))
        shape, patch, dim = self.image_shape, self.patch_size, self.hidden_dim
        if patch < 1 or shape[0] % patch or shape[1] % patch:
            near = [n for n in range(1, min(shape[:2]) + 1) if shape[0] % n == shape[1] % n == 0]
            sizes = tuple(max(patch, round(n / max(patch, 1)) * patch) for n in shape[:2])
            raise ValueError(
                f"patch_size={patch} does not divide image_shape={shape}. Patch sizes that do: "
                f"{near}; the nearest image size for patch_size={patch} is {sizes}."
            )
        if self.num_layers < 1 or self.num_layers % 2 == 0:
            raise ValueError(
                "num_layers counts every block, the middle one too, so it must be odd (the "
                f"published `depth` + 1). Received: {self.num_layers}; use "
                f"{max(self.num_layers - 1, 1)} or {self.num_layers + 1}."
            )
        if self.num_heads < 1 or dim % self.num_heads:
            near = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_dim={dim}. Head counts that "
                f"do: {near}."
            )
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key} must be one of {allowed}. Received: {getattr(self, key)!r}."
                )
        if self.skip_norm and self.skip is None:
            raise ValueError(
                "skip_norm=True norms what the long skips join, and skip=None has none. Received "
                f"both; leave skip_norm out, or choose skip from {parts.SKIPS}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches."""
        height, width, _ = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def extras(self) -> dict[str, int]:
        """The tokens in front of the patches: how many of each kind, in their order."""
        kinds = {
            "label": int(self.num_classes is not None),
            "time": int(self.time == "token"),
            "context": self.context_shape[0] if self.context_shape else 0,
        }
        return {kind: count for kind, count in kinds.items() if count}

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: patches, context, time and label."""
        return self.grid[0] * self.grid[1] + sum(self.extras.values())


@keras.saving.register_keras_serializable("keras_uvit")
class UViT(Network):
    """The backbone of "All are Worth Words" (Bao et al. 2023, arXiv 2209.12152, Figure 1).

    Every input becomes a token: [label, time, context, patches] (the published models have label
    or context, not both). `num_layers // 2` shallow blocks, one in the middle and as many deep
    ones; the k-th shallow block is joined to the k-th deep block from the end by a long skip.
    A last norm and a linear layer give each patch its pixels (row, column, channel), and a 3x3
    convolution may smooth the seams.

    What came after U-ViT, one by one: `mlp="swiglu"`, `norm="rms"` and `position="rotary"` took a
    DiT-XL/1 from FID 12.5 to 10.1, 9.3 and 7.1 (Yao et al. 2025, arXiv 2501.01423, LightningDiT).

    A functional Keras model: `summary()` shows every block and long skip, and
    `keras.Model(net.inputs, net.get_layer("mid_block").output)` taps any of them.

    Args:
        image_shape: `(H, W, C)`; need not be square.
        patch_size: int P, divides H and W.
        hidden_dim: int D, width of a token.
        num_layers: odd int, counts all blocks (13, 17, 21, 29 in the paper).
        num_heads: int, divides `hidden_dim`.
        mlp_dim: int; `None` means `4 * hidden_dim`.
        num_classes: int K for a label token, `None` for none.
        null_label: bool. Whether the table of labels has one more row, number K, that means "no
            label": needed by classifier-free guidance.
        context_shape: `(length, width)` of text features for context tokens, `None` for none.
        skip: "concat", "add", "add_project", "project_sum" or None; see `LongSkip`.
        time: "token", or "adaln" for modulated norms instead of a time token.
        time_mlp: bool. Two dense layers (4 D, SiLU, D) after the sinusoid of the timestep.
        qkv_bias: bool. Bias on query, key and value.
        output_conv: bool, or "before". A 3x3 convolution at the end, of the image; "before" the
            head, of the patches' features (the paper's ablation).
        position: "learned" (one vector a token), "sinusoidal" (2-D, patches only), "rotary" (2-D,
            patches only, in each attention; `hidden_dim / num_heads` divisible by 4) or None.
        patch_embed: "linear", or "conv" (3x3 convolutions; P a power of two).
        qk_norm: bool. Norms of query and key; see `layers.Attention`. For long runs in bfloat16.
        skip_norm: bool. A layer norm after each long skip; see `layers.LongSkip`. For float16.
        norm: "layer" or "rms", in the blocks and before the head; see `basics.RMSNorm`.
        mlp: "gelu", or "swiglu" with as many weights; see `layers.TransformerBlock`.
        init: "published", N(0, 0.02^2) for the kernels of the blocks and PyTorch's random kernel
            for the last convolution; or "balanced", N(0, 1 / D) for those kernels that read tokens
            (query, key, value, the MLP's first), and a last convolution that begins as the
            identity. In a narrow network the published queries and keys are so small that attention
            begins as a mean over all tokens. A random 3x3 kernel all but deletes some spatial
            frequencies of what the network draws, and of few channels training may never undo
            that: such runs end in noisy images, depending on the seed.
        remat: bool. Recompute blocks and long skips in the backward pass: much less memory, a
            third more work.
        takes_span: bool. The network reads the span t - r of a step, too; see `diffusion.FlowMap`.
        takes_guidance: bool. It reads the guidance scale, so that one evaluation is guided.
        lora: int, rank of a low-rank pair beside the kernels of all blocks, which alone is then
            trained; or dict of "rank", "alpha" (the pair is scaled by alpha / rank; the rank) and
            "targets" (some of `("attention", "mlp")`; both). See `training.adapt`.
        dtype: policy of every layer; `None` is the global policy.
        quantization: "int8" for kernels of 8-bit integers, as `quantize` makes them; for files.

    Call arguments, a dict:
        image: `(B, H, W, C)` float, the noisy image or latent.
        timestep: `(B,)`, `time_scale * t`: 0 to 999 for continuous schedules, 1 to 1000 for the
            discrete one.
        label: `(B,)` int32 in [0, K], only with `num_classes`.
        context: `(B, length, width)` float, only with `context_shape`.
        span: `(B,)` float in [0, 1], only with `takes_span`.
        guidance: `(B,)` float, the logarithm of the scale, only with `takes_guidance`.

    Returns:
        `(B, H, W, C)` float32: what the diffusion model's `prediction` says (noise, x0, ...).

    Raises:
        ValueError: if an argument does not fit; the message names values that do.

    Example:
        >>> net = UViT((8, 8, 1), patch_size=2, hidden_dim=32, num_layers=3, num_heads=2)
        >>> net.output_shape
        (None, 8, 8, 1)
    """

    @arguments_of(UViTConfig)
    def __init__(self, config: UViTConfig) -> None:
        super().__init__(config, *_build(config))


def _build(c):
    """Inputs and output of the functional graph for a checked config."""
    dtype, dim, adaln = c.dtype, c.hidden_dim, c.time == "adaln"
    grid, patch, channels = c.grid, c.patch_size, c.image_shape[-1]
    inputs = inputs_of(c)
    embed = patches.PatchEmbedding if c.patch_embed == "linear" else patches.ConvPatchEmbedding
    tokens = [embed(dim, patch, dtype=dtype, name="patch_embed")(inputs["image"])]
    if c.context_shape:
        tokens.insert(0, parts.dense(dim, dtype, "context_embed")(inputs["context"]))
    time = parts.TimeEmbedding(dim, dtype=dtype, name="time_embed")(inputs["timestep"])
    if c.time_mlp:
        hidden = parts.dense(4 * dim, dtype, "time_mlp_in")(time)
        time = parts.dense(dim, dtype, "time_mlp_out")(ops.silu(hidden))
    time = parts.with_flow_map_inputs(time, inputs, dim, dtype)
    if not adaln:
        tokens.insert(0, layers.Reshape((1, dim), dtype=dtype, name="time_token")(time))
    if c.num_classes is not None:
        label = label_embedding(c, c.num_classes, dim)(inputs["label"])
        tokens.insert(0, layers.Reshape((1, dim), dtype=dtype, name="label_token")(label))
    x = tokens[0]
    if len(tokens) > 1:
        x = layers.Concatenate(axis=1, dtype=dtype, name="tokens")(tokens)  # (B, L, D)
    if c.position == "learned":
        x = parts.PositionEmbedding(dtype=dtype, name="position")(x)
    elif c.position == "sinusoidal":
        x = parts.SinusoidalPositions(grid, dtype=dtype, name="position")(x)
    x = _trunk(x, time, c, grid if c.position == "rotary" else None)
    # The norm and the head work token by token, so the extra tokens are dropped before them.
    extras = x.shape[1] - grid[0] * grid[1]
    x = layers.Cropping1D((extras, 0), dtype=dtype, name="patches")(x)
    x = parts.NORMS[c.norm](dtype, "norm")(x)
    if c.output_conv == "before":
        x = layers.Reshape((*grid, dim), dtype=dtype, name="feature_map")(x)
        x = _smoothing(dim, dtype, "feature_conv", c.init)(x)
        x = layers.Reshape((-1, dim), dtype=dtype, name="features")(x)
    x = parts.dense(patch * patch * channels, dtype, "head")(x)
    x = patches.Unpatchify(patch, c.image_shape, dtype=dtype, name="unpatchify")(x)
    if c.output_conv is True:
        x = _smoothing(channels, "float32", "output_conv", c.init)(x)
    return inputs, layers.Activation("linear", dtype="float32", name="output")(x)


def _smoothing(channels, dtype, name, init):
    """A 3x3 convolution of as many channels, that begins like PyTorch's or as the identity."""
    if init == "published":  # one initialiser each: the same one would draw the same numbers
        kernel, bias = parts.fan_in_init(9 * channels), parts.fan_in_init(9 * channels)
    else:
        kernel, bias = parts.identity_init, "zeros"
    return layers.Conv2D(
        channels,
        3,
        padding="same",
        data_format="channels_last",
        kernel_initializer=kernel,
        bias_initializer=bias,
        dtype=dtype,
        name=name,
    )


def _trunk(x, time, c, grid):
    """The U of blocks: shallow ones, the middle one, deep ones joined by long skips."""
    adaln, half = c.time == "adaln", c.num_layers // 2

    def block(name, x):
        layer = parts.TransformerBlock(
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim or 4 * c.hidden_dim,
            qkv_bias=c.qkv_bias,
            adaln=adaln,
            qk_norm=c.qk_norm,
            remat=c.remat,
            norm=c.norm,
            mlp=c.mlp,
            init=c.init,
            grid=grid,
            lora=c.lora,
            dtype=c.dtype,
            name=name,
        )
        return layer(x, time) if adaln else layer(x)

    shallow = []
    for i in range(half):
        x = block(f"in_block_{i}", x)
        shallow.append(x)
    x = block("mid_block", x)
    for i in range(half):
        if c.skip is not None:
            skip = parts.LongSkip(c.skip, c.skip_norm, c.remat, dtype=c.dtype, name=f"skip_{i}")
            x = skip(x, shallow.pop())
        x = block(f"out_block_{i}", x)
    return x
