"""The U-Net in PyTorch, channels first, with the names of Keras': an oracle of values and cost."""

import numpy as np
import torch
from keras import ops
from torch import nn

RESAMPLINGS = {
    None: nn.Identity,
    "down": lambda: nn.AvgPool2d(2),
    "up": lambda: nn.Upsample(None, 2),
}
NAMES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def group_norm(dim):
    return nn.GroupNorm(max(n for n in range(1, 33) if dim % n == 0 and dim // n >= 4), dim)


class Block(nn.Module):
    def __init__(self, width, dim, embedding, resample=None):
        super().__init__()
        self.norm_1, self.norm_2 = group_norm(width), group_norm(dim)
        self.conv_1 = nn.Conv2d(width, dim, 3, padding=1)
        self.conv_2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * dim)
        self.resampled = RESAMPLINGS[resample]()
        self.shortcut = nn.Identity() if width == dim else nn.Conv2d(width, dim, 1)

    def forward(self, x, time):
        h = self.conv_1(self.resampled(nn.functional.silu(self.norm_1(x))))
        scale, shift = self.modulation(time)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_2(nn.functional.silu(self.norm_2(h) * (1 + scale) + shift))
        return self.shortcut(self.resampled(x)) + h


class Attention(nn.Module):
    def __init__(self, dim, heads, context_width=None):
        super().__init__()
        self.heads, self.norm = heads, group_norm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(context_width or dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context=None):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        tokens = pixels if context is None else context
        query, key, value = (
            a.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, L, K)
            for a in (self.query(pixels), *self.key_value(tokens).chunk(2, dim=2))
        )
        weights = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3)
        h = self.proj((weights @ value).transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class UNet(nn.Module):
    """The whole, of a Keras U-Net's config."""

    def __init__(self, c):
        super().__init__()
        self.c, self.base, self.names = c, c["base_dim"], []
        self.widths = [self.base * n for n in c["multipliers"]]
        self.time_mlp_in = nn.Linear(self.base, 4 * self.base)
        self.time_mlp_out = nn.Linear(4 * self.base, 4 * self.base)
        if c["num_classes"]:
            self.label_embed = nn.Embedding(c["num_classes"] + c["null_label"], 4 * self.base)
        self.input_conv = nn.Conv2d(c["image_shape"][2], self.widths[0], 3, padding=1)
        joined = [self.widths[0]]
        width, last = self.widths[0], len(self.widths) - 1
        for level, dim in enumerate(self.widths):
            for i in range(c["num_blocks"]):
                self.add(f"down_{level}_{i}", width, dim, level in c["attention_levels"])
                joined.append(width := dim)
            if level < last:
                self.add(f"down_{level}_half", dim, dim, resample="down")
                joined.append(dim)
        self.add("mid_0", width, width, True)
        self.add("mid_1", width, width)
        for level in range(last, -1, -1):
            dim = self.widths[level]
            for i in range(c["num_blocks"] + 1):
                attends = level in c["attention_levels"]
                self.add(f"up_{level}_{i}", width + joined.pop(), dim, attends)
                width = dim
            if level:
                self.add(f"up_{level}_double", dim, dim, resample="up")
        self.norm = group_norm(width)
        self.output_conv = nn.Conv2d(width, c["image_shape"][2], 3, padding=1)

    def add(self, name, width, dim, attends=False, resample=None):
        self.names.append(name)
        self.add_module(name, Block(width, dim, 4 * self.base, resample))
        if attends:
            heads, text = dim // self.c["head_dim"], self.c["context_shape"]
            self.add_module(f"{name}_attention", Attention(dim, heads))
            if text:
                self.add_module(f"{name}_context", Attention(dim, heads, text[1]))

    def forward(self, inputs):
        half = self.base // 2
        frequencies = torch.tensor(10000.0 ** (-np.arange(half) / half), dtype=torch.float32)
        angles = inputs["timestep"][:, None] * frequencies
        time = self.time_mlp_in(torch.cat([angles.cos(), angles.sin()], dim=1))
        time = self.time_mlp_out(nn.functional.silu(time))
        if "label" in inputs:
            time = time + self.label_embed(inputs["label"])
        time = nn.functional.silu(time)
        x = self.input_conv(inputs["image"])
        outputs = [x]
        for name in self.names:
            if name.startswith("up") and not name.endswith("double"):
                x = torch.cat([x, outputs.pop()], dim=1)
            x = getattr(self, name)(x, time)
            if hasattr(self, f"{name}_attention"):
                x = getattr(self, f"{name}_attention")(x)
            if hasattr(self, f"{name}_context"):
                x = getattr(self, f"{name}_context")(x, inputs["context"])
            if name.startswith("down"):
                outputs.append(x)
        return self.output_conv(nn.functional.silu(self.norm(x)))


def take(module, keras_layer):
    """The Keras layer's weights into `module`, each once; returns it."""
    names = dict(module.named_parameters())
    for weight in keras_layer.weights:
        *path, kind = weight.path.removeprefix(f"{keras_layer.name}/").split("/")
        value = torch.tensor(ops.convert_to_numpy(weight))
        if kind == "kernel":  # (height, width, in, out) or (in, out)
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        parameter = names.pop(".".join([*path, NAMES.get(kind, kind)]))
        assert parameter.shape == value.shape
        parameter.data = value.contiguous()
    assert not names
    return module


def channels_first(values):
    """Keras' inputs as the module takes them."""
    values = torch.tensor(values)
    return values.permute(0, 3, 1, 2) if values.ndim == 4 else values


@torch.no_grad()
def answer(module, *inputs):
    """What the module makes of Keras' inputs, channels last."""
    inputs = [
        {k: channels_first(v) for k, v in x.items()} if isinstance(x, dict) else channels_first(x)
        for x in inputs
    ]
    out = module(*inputs)
    return out.permute(0, 2, 3, 1).numpy()
