"""The U-Net that U-ViT is compared with: convolutions, halved and doubled sizes, attention."""

import dataclasses

from keras import layers, saving

from keras_uvit.networks import lora
from keras_uvit.networks import unet_layers as parts
from keras_uvit.networks.layers import TimeEmbedding, with_flow_map_inputs
from keras_uvit.networks.network import (
    Network,
    NetworkConfig,
    arguments_of,
    inputs_of,
    label_embedding,
)
from keras_uvit.types import Config

# Which dimension of a weight each layout splits, as in `uvit.SPLITS`, which has the rows of
# label_embed, time_mlp_in, time_mlp_out (here (4 D, 4 D)) and output_conv.
BLOCK = r"(down|mid|up)(_\d+)+(_half|_double)?"  # with another ending it is the block's attention
SPLITS: dict[str, tuple[int | None, int | None]] = {
    r"input_conv/kernel": (3, None),  # (3, 3, C, D)
    rf"{BLOCK}/conv_1/kernel": (3, 3),  # (3, 3, in, out)
    rf"{BLOCK}/conv_1/bias": (None, 0),
    rf"{BLOCK}/conv_2/kernel": (2, 2),  # (3, 3, out, out)
    rf"{BLOCK}/shortcut/kernel": (2, 2),  # (1, 1, in, out)
    rf"{BLOCK}/modulation/kernel": (1, 1),  # (4 D, 2 out)
    rf"{BLOCK}/modulation/bias": (None, 0),
    rf"{BLOCK}_(attention|context)/(query|key_value)/kernel": (1, 1),  # (in, out or 2 out)
    rf"{BLOCK}_(attention|context)/(query|key_value)/bias": (None, 0),
    rf"{BLOCK}_(attention|context)/proj/kernel": (0, 0),  # (out, out)
    rf"{BLOCK}_(attention|context)/(query|key_value)/lora_a": (0, None),  # (in, rank)
    rf"{BLOCK}_(attention|context)/(query|key_value)/lora_b": (1, 1),  # (rank, out or 2 out)
    rf"{BLOCK}_(attention|context)/proj/lora_a": (0, 0),
    rf"{BLOCK}_(attention|context)/proj/lora_b": (1, None),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The arguments of `UNet`, which explains them.

    Raises:
        ValueError: if an argument does not fit; the message names values that do.
    """

    image_shape: tuple[int, int, int]
    base_dim: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (1, 2)
    head_dim: int = 64
    remat: bool = False
    lora: Config | int | None = None
    name: str = dataclasses.field(default="unet", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lora", lora.checked(self.lora, ("attention",)))
        shape, widths = self.image_shape, self.multipliers
        for key in ("multipliers", "attention_levels"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(isinstance(n, int) for n in value):
                raise ValueError(f"{key} must be a tuple of ints. Received: {value!r}.")
        if not widths or min(widths) < 1:
            raise ValueError(
                f"There is at least one multiplier, all at least 1. Received: {widths}."
            )
        for key in ("base_dim", "num_blocks", "head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1. Received: {getattr(self, key)}.")
        factor = 2 ** (len(widths) - 1)
        if shape[0] % factor or shape[1] % factor:
            levels = [n + 1 for n in range(len(widths)) if shape[0] % 2**n == shape[1] % 2**n == 0]
            sizes = tuple(max(factor, round(n / factor) * factor) for n in shape[:2])
            raise ValueError(
                f"{len(widths)} multipliers halve the image {len(widths) - 1} times, and "
                f"image_shape={shape} cannot be. Take at most {levels[-1]} multipliers; the "
                f"nearest image size for {len(widths)} is {sizes}."
            )
        outside = [n for n in self.attention_levels if not 0 <= n < len(widths)]
        if outside:
            raise ValueError(
                f"attention_levels are of the {len(widths)} levels that multipliers={widths} "
                f"makes, 0 to {len(widths) - 1}. Received: {outside[0]}."
            )
        for level in (*self.attention_levels, len(widths) - 1):
            dim, heads = self.base_dim * widths[level], self.head_dim
            if dim % heads:
                near = [n for n in range(1, dim + 1) if dim % n == 0]
                raise ValueError(
                    f"head_dim={heads} does not divide the width of level {level}, {dim}. Head "
                    f"widths that do: {near}."
                )


@saving.register_keras_serializable("keras_uvit")
class UNet(Network):
    """The CNN of "Diffusion Models Beat GANs" (Dhariwal and Nichol 2021, arXiv 2105.05233).

    Each level of the encoder has `num_blocks` residual blocks and one more that halves the size;
    in the middle are two, with attention between them. The decoder mirrors that, with one block
    more a level, and before each of these the encoder's outputs are joined, the last first. Where
    there is attention, text comes in by cross-attention after it (Rombach et al. 2022, arXiv
    2112.10752). The label's embedding is added to that of the timestep, which modulates all blocks.

    A functional Keras model as `UViT`: `summary()` shows every block.

    Differs from the published network in the biases, which start at zero.

    Args:
        image_shape: `(H, W, C)`; need not be square. Each multiplier but the first halves H and W.
        base_dim: int. Width of the sinusoid of the timestep, a fourth of that of its embedding.
        multipliers: tuple of ints, one a level: its width over `base_dim`.
        num_blocks: int. Residual blocks a level of the encoder.
        attention_levels: tuple of ints, the levels with attention, 0 the outermost. The middle has
            attention always.
        head_dim: int. Width of a head; divides the widths of all levels with attention.
        num_classes: int K for labels, `None` for none.
        null_label: bool. Whether the table of labels has one more row, number K, that means "no
            label": needed by classifier-free guidance.
        context_shape: `(length, width)` of text features for cross-attention, `None` for none.
        remat: bool. Recompute blocks and attention in the backward pass: much less memory, a third
            more work.
        takes_span: bool. The network reads the span t - r of a step, too; see `diffusion.FlowMap`.
        takes_guidance: bool. It reads the guidance scale, so that one evaluation is guided.
        lora: int, rank of a low-rank pair beside the kernels of attention, which alone is then
            trained; or dict of "rank" and "alpha" (the pair is scaled by alpha / rank; the rank).
            See `training.adapt`.
        quantization: "int8" for kernels of 8-bit integers, as `quantize` makes them; for files.
        dtype: policy of every layer; `None` is the global policy.

    Call arguments, a dict:
        image: `(B, H, W, C)` float, the noisy image or latent.
        timestep: `(B,)`, `time_scale * t`.
        label: `(B,)` int32 in [0, K], only with `num_classes`.
        context: `(B, length, width)` float, only with `context_shape`.
        span: `(B,)` float in [0, 1], only with `takes_span`.
        guidance: `(B,)` float, the logarithm of the scale, only with `takes_guidance`.

    Returns:
        `(B, H, W, C)` float32: what the diffusion model's `prediction` says (noise, x0, ...).

    Raises:
        ValueError: if an argument does not fit; the message names values that do.

    Example:
        >>> net = UNet((8, 12, 1), 16, multipliers=(1, 2), attention_levels=(1,), head_dim=8)
        >>> net.output_shape
        (None, 8, 12, 1)
    """

    @arguments_of(UNetConfig)
    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config, *_build(config))


def _build(c):
    """Inputs and output of the functional graph for a checked config."""
    inputs, dtype, channels = inputs_of(c), c.dtype, c.image_shape[-1]
    time = TimeEmbedding(c.base_dim, dtype=dtype, name="time_embed")(inputs["timestep"])
    time = parts.linear(4 * c.base_dim, dtype, "time_mlp_in")(time)
    time = layers.Activation("silu", dtype=dtype, name="time_mlp_silu")(time)
    time = parts.linear(4 * c.base_dim, dtype, "time_mlp_out")(time)
    time = with_flow_map_inputs(time, inputs, c.base_dim, dtype)
    if c.num_classes is not None:
        label = label_embedding(c, c.num_classes, 4 * c.base_dim)(inputs["label"])
        time = layers.Add(dtype=dtype, name="time_and_label")([time, label])
    time = layers.Activation("silu", dtype=dtype, name="modulator")(time)  # the same in all blocks
    x = parts.conv(c.base_dim * c.multipliers[0], 3, dtype, "input_conv")(inputs["image"])
    x = _trunk(x, time, inputs.get("context"), c)
    x = parts.group_norm(x.shape[-1], dtype, "norm")(x)
    x = layers.Activation("silu", dtype=dtype, name="norm_silu")(x)
    return inputs, parts.conv(channels, 3, "float32", "output_conv", zero=True)(x)


def _trunk(x, time, context, c):
    """The U of blocks: the encoder, the middle, the decoder joined with the encoder's outputs."""
    shared = dict(remat=c.remat, dtype=c.dtype)
    widths, levels = [c.base_dim * n for n in c.multipliers], c.attention_levels

    def block(name, x, dim, attends=False, resample=None):
        x = parts.UNetBlock(dim, resample, **shared, name=name)(x, time)
        if not attends:
            return x
        heads = dim // c.head_dim
        x = parts.UNetAttention(heads, **shared, lora=c.lora, name=f"{name}_attention")(x)
        if context is None:
            return x
        cross = parts.UNetAttention(heads, **shared, lora=c.lora, name=f"{name}_context")
        return cross(x, context)

    outputs = [x]
    for level, dim in enumerate(widths):
        for i in range(c.num_blocks):
            x = block(f"down_{level}_{i}", x, dim, level in levels)
            outputs.append(x)
        if level < len(widths) - 1:
            x = block(f"down_{level}_half", x, dim, resample="down")
            outputs.append(x)
    x = block("mid_0", x, dim, attends=True)
    x = block("mid_1", x, dim)
    for level, dim in reversed(list(enumerate(widths))):
        for i in range(c.num_blocks + 1):
            join = layers.Concatenate(dtype=c.dtype, name=f"join_{level}_{i}")
            x = block(f"up_{level}_{i}", join([x, outputs.pop()]), dim, level in levels)
        if level:
            x = block(f"up_{level}_double", x, dim, resample="up")
    return x
