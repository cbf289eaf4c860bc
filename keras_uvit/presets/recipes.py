"""What several presets share: sizes of networks, and how they are trained and sampled.

Facts are from the paper (arXiv 2209.12152, Tables 2 and 7, Appendix) and the configurations of its
program, but for what says otherwise.
"""

from typing import Any

from keras_uvit.diffusion import FlowMap
from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear
from keras_uvit.types import Config


def adamw(
    learning_rate: float = 2e-4,
    beta_1: float = 0.99,
    beta_2: float = 0.99,
    warmup_steps: float = 5000,
    **more: Any,
) -> Config:
    """Arguments of `training.adamw`, those of the published latent models where not given."""
    names = dict(learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2)
    return {**names, "weight_decay": 0.03, "warmup_steps": warmup_steps, **more}


SMALL: Config = dict(patch_size=2, hidden_dim=512, num_layers=13, num_heads=8)
SMALL_DEEP: Config = dict(patch_size=2, hidden_dim=512, num_layers=17, num_heads=8)
MID: Config = dict(patch_size=2, hidden_dim=768, num_layers=17, num_heads=12)
LARGE: Config = dict(patch_size=2, hidden_dim=1024, num_layers=21, num_heads=16)
HUGE: Config = dict(patch_size=2, hidden_dim=1152, num_layers=29, num_heads=16, output_conv=False)

# All pixel models and latent L are continuous, latent H and COCO discrete; samplers differ too.
CONTINUOUS: Config = dict(schedule=VPLinear())
DISCRETE: Config = dict(schedule=VPDiscrete())
LATENT_LARGE: Config = dict(
    **CONTINUOUS,
    optimizer=adamw(),
    batch_size=1024,
    sampler="dpm_solver",
    num_steps=50,
    condition_dropout=0.15,
    latent_scale=0.18215,
    autoencoder="autoencoder_kl.pth",
)
LATENT_HUGE: Config = dict(
    **DISCRETE,
    optimizer=adamw(),
    batch_size=1024,
    sampler="dpm_solver_pp",
    num_steps=50,
    condition_dropout=0.1,
    latent_scale=0.18215,
    autoencoder="autoencoder_kl_ema.pth",
)
# USiT's, by which a U-ViT-H of DC-AE's latents (arXiv 2410.10733, 512x512) came from FID 9.83 to
# 3.80, guided from 2.53 to 1.89, at scale 1.2. Its program hands the network t itself, which hardly
# moves a sinusoid made for 1 to 1000: here 999 t, as in U-ViT's continuous recipes. It samples by
# dopri5, whose steps are not fixed: 25 of Heun are 49 evaluations, where other rows have 50.
LATENT_FLOW: Config = dict(
    schedule=LinearPath(),
    prediction="velocity",
    optimizer=adamw(1e-4, weight_decay=0.0),
    batch_size=1024,
    iterations=500_000,
    sampler="heun",
    num_steps=25,
    condition_dropout=0.1,
    guidance_scale=1.2,
    latent_scale=0.18215,
    autoencoder="autoencoder_kl_ema.pth",
)
# SoFlow's alphas and weight of an image's loss (arXiv 2512.15657, whose times of flow matching are
# logit-normal too, moved by -0.2), MeanFlow's optimizer and length (arXiv 2505.13447), 240 epochs.
# The guidance scale is an input, as in improved MeanFlow (arXiv 2512.02012). With DiT-XL/2 SoFlow
# reaches FID 2.96 and 2.66 at 1 and 2 evaluations.
LATENT_FAST: Config = dict(
    schedule=LinearPath(),
    prediction="velocity",
    time_scale=20.0,
    time_sampling="logit_normal",
    flow_map=FlowMap(1_200_000, alpha=(0.1, 0.002), power=1.0, guidance=(1.0, 8.0)),
    optimizer=adamw(1e-4, 0.9, 0.95, weight_decay=0.0, clipnorm=1.0),
    batch_size=256,
    iterations=1_200_000,
    sampler="flow_map",
    num_steps=2,
    condition_dropout=0.1,
    guidance_scale=3.0,
    latent_scale=0.18215,
    autoencoder="autoencoder_kl_ema.pth",
)
# What a network needs for a flow map: smooth embeddings of both times and of the guidance scale.
FAST_INPUTS: Config = dict(time_mlp=True, takes_span=True, takes_guidance=True)
COCO: Config = dict(
    **DISCRETE,
    optimizer=adamw(beta_1=0.9, beta_2=0.9),
    batch_size=256,
    iterations=1_000_000,
    sampler="dpm_solver_pp",
    num_steps=50,
    condition_dropout=0.1,
    guidance_scale=2.0,
    latent_scale=0.23010,
    autoencoder="autoencoder_kl.pth",
    text_encoder="clip_vit_large_patch14",
)
# For short runs: 2,000 steps on digits, width 96: learned positions end 2.5 floors away, these 1.9.
TINY: Config = dict(num_layers=5, num_heads=4, position="sinusoidal", init="balanced")
TINY_DIGITS: Config = dict(
    image_shape=(8, 8, 1), patch_size=2, hidden_dim=80, num_classes=10, **TINY
)
TINY_SHAPES: Config = dict(
    image_shape=(32, 32, 3), patch_size=4, hidden_dim=96, context_shape=(12, 64), **TINY
)
SHIPPED_RECIPE: Config = dict(
    schedule=VPCosine(),
    batch_size=64,
    sampler="dpm_solver_pp_2m",
    num_steps=25,
    condition_dropout=0.1,
    ema_decay=0.999,
)
DIGITS: Config = dict(
    **SHIPPED_RECIPE,
    # With "epsilon" and learned positions only 7 digits in 10 are of the class asked for.
    prediction="v",
    optimizer=adamw(2e-3, 0.9, 0.99, warmup_steps=1 / 30, decay_steps="run"),
    iterations=3000,
    guidance_scale=1.2,
)
SHAPES: Config = dict(
    **SHIPPED_RECIPE,
    # Flat colours: after 500 steps 3 pictures in 4 show two things, with "v" 2 in 100.
    prediction="x0",
    optimizer=adamw(2e-3, 0.9, 0.99, warmup_steps=1 / 50, decay_steps="run"),
    iterations=5000,
    guidance_scale=2.0,
    text_encoder="uvit_tiny_shapes_text",
)
SHIPPED_FAST: Config = dict(
    schedule=LinearPath(),
    prediction="velocity",
    time_scale=20.0,
    time_sampling="logit_normal",
    optimizer=adamw(3e-3, 0.9, 0.99, warmup_steps=1 / 30, decay_steps="run"),
    batch_size=32,
    condition_dropout=0.1,
    ema_decay=0.999,
    sampler="flow_map",
    num_steps=2,
)
DIGITS_FAST: Config = dict(
    **SHIPPED_FAST, flow_map=FlowMap(4000, guidance=(1.0, 4.0)), iterations=4000
)
SHAPES_FAST: Config = dict(
    **SHIPPED_FAST,
    flow_map=FlowMap(12_000, guidance=(1.0, 4.0)),
    iterations=12_000,
    guidance_scale=2.0,
    text_encoder="uvit_tiny_shapes_text",
)
CIFAR10: Config = dict(
    **CONTINUOUS,
    optimizer=adamw(beta_2=0.999, warmup_steps=2500),
    batch_size=128,
    iterations=500_000,
    sampler="euler_maruyama",
    num_steps=1000,
)
COCO_SHAPES: Config = dict(image_shape=(32, 32, 4), context_shape=(77, 768))
