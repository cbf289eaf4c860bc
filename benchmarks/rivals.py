"""What the package is measured against: U-ViT in plain PyTorch, and diffusers' DiT.

`PlainUViT` follows the paper (arXiv 2209.12152, Figure 1, and Section 3's choices: concatenated
long skips, a time token, a 3x3 convolution at the end) and does what good PyTorch code does today:
one query-key-value product, `scaled_dot_product_attention`, fused AdamW, a `foreach` average of
the weights. No Keras is imported here.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

PUBLISHED_AVERAGE = 0.9999


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, N, L, K)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.norm_2(x))


class PlainUViT(nn.Module):
    """Takes images `(B, C, H, W)`, timesteps `(B,)` and maybe labels `(B,)`."""

    def __init__(self, image_shape, patch_size, hidden_dim, num_layers, num_heads, num_classes):
        super().__init__()
        height, width, channels = image_shape
        half, dim = num_layers // 2, hidden_dim
        self.dim, self.patch, self.grid = (
            dim,
            patch_size,
            (height // patch_size, width // patch_size),
        )
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.label_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.extras = 2 if num_classes else 1
        tokens = self.extras + self.grid[0] * self.grid[1]
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.shallow = nn.ModuleList(Block(dim, num_heads) for _ in range(half))
        self.middle = Block(dim, num_heads)
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        self.deep = nn.ModuleList(Block(dim, num_heads) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_size**2 * channels)
        self.output_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, image, timestep, label=None):
        time = sinusoid(timestep, self.dim)[:, None]
        tokens = [time, self.patch_embed(image).flatten(2).transpose(1, 2)]
        if self.label_embed is not None:
            tokens.insert(0, self.label_embed(label)[:, None])
        x = torch.cat(tokens, dim=1) + self.position
        kept = []
        for block in self.shallow:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for skip, block in zip(self.skips, self.deep):
            x = block(skip(torch.cat([x, kept.pop()], dim=-1)))
        x = self.head(self.norm(x))[:, self.extras :]
        (rows, columns), patch = self.grid, self.patch
        x = x.view(len(x), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return self.output_conv(x.reshape(len(x), -1, rows * patch, columns * patch))


class DiT(nn.Module):
    """diffusers' DiT with the arguments of `PlainUViT`; noise alone, no variances."""

    def __init__(self, image_shape, patch_size, hidden_dim, num_layers, num_heads, num_classes):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.network = DiTTransformer2DModel(
            num_attention_heads=num_heads,
            attention_head_dim=hidden_dim // num_heads,
            in_channels=image_shape[2],
            num_layers=num_layers,
            sample_size=image_shape[0],
            patch_size=patch_size,
            num_embeds_ada_norm=num_classes or 1,
        )

    def forward(self, image, timestep, label=None):
        label = (
            torch.zeros(len(image), dtype=torch.long, device=image.device)
            if label is None
            else label
        )
        return self.network(image, timestep=timestep.long(), class_labels=label).sample


def sinusoid(timestep, dim):
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(dim // 2, device=timestep.device) / (dim // 2)
    )
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Trainer:
    """Noise prediction on the linear schedule, AdamW, moving average: one call is one step."""

    def __init__(self, network, compiled, dtype=torch.float32):
        self.network = network.train()
        self.average = [weight.detach().clone() for weight in network.parameters()]
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=2e-4, betas=(0.99, 0.999), weight_decay=0.03, fused=True
        )
        self.dtype = dtype
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, image, label):
        device = image.device
        t = torch.rand(len(image), device=device)
        log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
        alpha = log_alpha.exp()[:, None, None, None]
        noise = torch.randn_like(image)
        noisy = alpha * image + (1 - alpha**2).sqrt() * noise
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.network(noisy, 999 * t, label)
        return (predicted.float() - noise).square().mean()

    def step(self, image, label=None):
        loss = self.loss(image, label)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            weights = list(self.network.parameters())
            torch._foreach_lerp_(self.average, weights, 1 - PUBLISHED_AVERAGE)
        return loss.detach()


@torch.inference_mode()
def sample(network, noise, label, null, scale, times, dtype=torch.float32):
    """Guided DDIM, one doubled batch a step: as many network evaluations as any solver's."""
    x, doubled = noise, torch.cat([label, torch.full_like(label, null)])
    for s, t in zip(times[:-1], times[1:]):
        (a_s, v_s), (a_t, v_t) = alpha_sigma(s), alpha_sigma(t)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            timestep = torch.full((2 * len(x),), 999 * s, device=x.device)
            conditional, other = network(torch.cat([x, x]), timestep, doubled).float().chunk(2)
        noise = other + scale * (conditional - other)
        x = a_t * (x - v_s * noise) / a_s + v_t * noise
    return x


def alpha_sigma(t):
    alpha = math.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
    return alpha, math.sqrt(1 - alpha**2)
