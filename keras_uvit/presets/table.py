"""The presets, one literal table.

A preset holds everything that its number needs: network, noise schedule, prediction, time scale,
optimizer, batch size and iterations, sampler, steps, guidance, latent scale. Facts are from the
paper (arXiv 2209.12152, Tables 2 and 7, Appendix) and the configurations of its program; the
published guidance `scale` s is `guidance_scale` - 1 here. FIDs are of 50,000 samples (COCO:
30,000), of the checkpoint that was best by FID on 10,000.

The last rows are of what U-ViT is compared with. Layouts of the U-Nets were not recovered: these
are the nearest to the published parameters and cost.
"""

from keras_uvit.diffusion.schedules import LinearPath, VPCosine, VPDiscrete, VPLinear
from keras_uvit.networks import UNet
from keras_uvit.presets.preset import Preset
from keras_uvit.types import Config


def _adamw(learning_rate=2e-4, beta_1=0.99, beta_2=0.99, warmup_steps=5000, **more):
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
    optimizer=_adamw(),
    batch_size=1024,
    sampler="dpm_solver",
    num_steps=50,
    condition_dropout=0.15,
    latent_scale=0.18215,
    autoencoder="autoencoder_kl.pth",
)
LATENT_HUGE: Config = dict(
    **DISCRETE,
    optimizer=_adamw(),
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
    optimizer=_adamw(1e-4, weight_decay=0.0),
    batch_size=1024,
    iterations=500_000,
    sampler="heun",
    num_steps=25,
    condition_dropout=0.1,
    guidance_scale=1.2,
    latent_scale=0.18215,
    autoencoder="autoencoder_kl_ema.pth",
)
COCO: Config = dict(
    **DISCRETE,
    optimizer=_adamw(beta_1=0.9, beta_2=0.9),
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
TINY: Config = dict(num_layers=5, num_heads=4, position="sinusoidal")
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
    optimizer=_adamw(2e-3, 0.9, 0.99, warmup_steps=1 / 30, decay_steps="run"),
    iterations=3000,
    guidance_scale=1.2,
)
SHAPES: Config = dict(
    **SHIPPED_RECIPE,
    # Flat colours: after 500 steps 3 pictures in 4 show two things, with "v" 2 in 100.
    prediction="x0",
    optimizer=_adamw(2e-3, 0.9, 0.99, warmup_steps=1 / 50, decay_steps="run"),
    iterations=5000,
    guidance_scale=2.0,
    text_encoder="uvit_tiny_shapes_text",
)
CIFAR10: Config = dict(
    **CONTINUOUS,
    optimizer=_adamw(beta_2=0.999, warmup_steps=2500),
    batch_size=128,
    iterations=500_000,
    sampler="euler_maruyama",
    num_steps=1000,
)
COCO_SHAPES: Config = dict(image_shape=(32, 32, 4), context_shape=(77, 768))

PRESETS: dict[str, Preset] = {
    "uvit_tiny_digits": Preset(
        paper_name="none: 8x8 digits, ships with its weights",
        network=dict(image_shape=(8, 8, 1), patch_size=2, hidden_dim=80, num_classes=10, **TINY),
        **DIGITS,
        params=415_534,
        gmacs=0.00764,
        weights="uvit_tiny_digits.weights.h5",
    ),
    "uvit_tiny_shapes": Preset(
        paper_name="none: 32x32 captioned shapes, ships with its weights",
        network=dict(
            image_shape=(32, 32, 3), patch_size=4, hidden_dim=96, context_shape=(12, 64), **TINY
        ),
        **SHAPES,
        params=610_692,
        gmacs=0.0519,
        weights="uvit_tiny_shapes.weights.h5",
        context_encoder="0b172bfaf6eacfa5",
    ),
    "uvit_small_cifar10": Preset(
        paper_name="U-ViT-S/2, CIFAR10",
        network=dict(image_shape=(32, 32, 3), **SMALL),
        **CIFAR10,
        params=44_255_328,
        gmacs=12.2,
        reported_cost=(44, None),
        reported_fid=3.11,
    ),
    "uvit_small_celeba64": Preset(
        paper_name="U-ViT-S/4, CelebA 64x64",
        network=dict(image_shape=(64, 64, 3), **{**SMALL, "patch_size": 4}),
        **CONTINUOUS,
        optimizer=_adamw(),
        batch_size=128,
        iterations=500_000,
        sampler="euler_maruyama",
        num_steps=1000,
        params=44_292_228,
        gmacs=12.2,
        reported_cost=(44, None),
        reported_fid=2.87,
    ),
    "uvit_mid_imagenet64": Preset(
        paper_name="U-ViT-M/4, ImageNet 64x64",
        network=dict(
            image_shape=(64, 64, 3), num_classes=1000, null_label=False, **{**MID, "patch_size": 4}
        ),
        **CONTINUOUS,
        optimizer=_adamw(3e-4),
        batch_size=1024,
        iterations=300_000,
        sampler="dpm_solver",
        num_steps=50,
        params=130_940_292,
        gmacs=35.2,
        reported_cost=(131, None),
        reported_fid=5.85,
    ),
    "uvit_large_imagenet64": Preset(
        paper_name="U-ViT-L/4, ImageNet 64x64",
        network=dict(
            image_shape=(64, 64, 3),
            num_classes=1000,
            null_label=False,
            **{**LARGE, "patch_size": 4},
        ),
        **CONTINUOUS,
        optimizer=_adamw(3e-4),
        batch_size=1024,
        iterations=300_000,
        sampler="dpm_solver",
        num_steps=50,
        params=286_827_652,
        gmacs=76.5,
        reported_cost=(287, None),
        reported_fid=4.26,
    ),
    "uvit_large_imagenet256": Preset(
        paper_name="U-ViT-L/2, ImageNet 256x256",
        network=dict(image_shape=(32, 32, 4), num_classes=1000, **LARGE),
        **LATENT_LARGE,
        iterations=300_000,
        guidance_scale=1.4,
        params=286_763_172,
        gmacs=76.5,
        reported_cost=(287, 77),
        reported_fid=3.40,
    ),
    "uvit_huge_imagenet256": Preset(
        paper_name="U-ViT-H/2, ImageNet 256x256",
        network=dict(image_shape=(32, 32, 4), num_classes=1000, **HUGE),
        **LATENT_HUGE,
        iterations=500_000,
        guidance_scale=1.4,
        params=500_832_016,
        gmacs=133.2,
        reported_cost=(501, 133),
        reported_fid=2.29,
    ),
    "uvit_huge_imagenet256_flow": Preset(
        paper_name="U-ViT-H/2 by flow matching, ImageNet 256x256; not published: USiT-H, FID 1.89 "
        "at 512x512, is of DC-AE f32 latents",
        network=dict(image_shape=(32, 32, 4), num_classes=1000, **HUGE),
        **LATENT_FLOW,
        params=500_832_016,
        gmacs=133.2,
    ),
    "uvit_large_imagenet512": Preset(
        paper_name="U-ViT-L/4, ImageNet 512x512",
        network=dict(image_shape=(64, 64, 4), num_classes=1000, **{**LARGE, "patch_size": 4}),
        **LATENT_LARGE,
        iterations=500_000,
        guidance_scale=1.7,
        params=286_861_524,
        gmacs=76.5,
        reported_cost=(287, None),
        reported_fid=4.67,
    ),
    "uvit_huge_imagenet512": Preset(
        paper_name="U-ViT-H/4, ImageNet 512x512",
        network=dict(image_shape=(64, 64, 4), num_classes=1000, **{**HUGE, "patch_size": 4}),
        **LATENT_HUGE,
        iterations=500_000,
        guidance_scale=1.7,
        params=500_942_656,
        gmacs=133.2,
        reported_cost=(501, None),
        reported_fid=4.05,
    ),
    "uvit_huge_imagenet512_flow": Preset(
        paper_name="U-ViT-H/4 by flow matching, ImageNet 512x512; not published: USiT-H, FID 1.89 "
        "at 512x512, is of DC-AE f32 latents",
        network=dict(image_shape=(64, 64, 4), num_classes=1000, **{**HUGE, "patch_size": 4}),
        **LATENT_FLOW,
        params=500_942_656,
        gmacs=133.2,
    ),
    "uvit_small_coco": Preset(
        paper_name="U-ViT-S/2, MS-COCO 256x256",
        network=dict(**COCO_SHAPES, **SMALL),
        **COCO,
        params=44_692_644,
        gmacs=16.2,
        reported_cost=(45, None),
        reported_fid=5.95,
    ),
    "uvit_small_deep_coco": Preset(
        paper_name="U-ViT-S/2 (Deep), MS-COCO 256x256",
        network=dict(**COCO_SHAPES, **SMALL_DEEP),
        **COCO,
        params=58_345_636,
        gmacs=21.2,
        reported_cost=(58, None),
        reported_fid=5.48,
    ),
    "uvit_mid_coco": Preset(
        paper_name="U-ViT-M/2 at the MS-COCO recipe; not in the paper",
        network=dict(**COCO_SHAPES, **MID),
        **COCO,
        params=130_772_132,
        gmacs=46.3,
    ),
    "unet_tiny_digits": Preset(
        paper_name="none: 8x8 digits, at the cost of U-ViT's",
        architecture=UNet,
        network=dict(
            image_shape=(8, 8, 1),
            base_dim=24,
            multipliers=(1, 1, 1),
            head_dim=12,
            num_classes=10,
        ),
        **DIGITS,
        params=416_401,
        gmacs=0.00751,
    ),
    "unet_tiny_shapes": Preset(
        paper_name="none: 32x32 captioned shapes, at the cost of U-ViT's",
        architecture=UNet,
        network=dict(
            image_shape=(32, 32, 3),
            base_dim=16,
            multipliers=(1, 1, 2, 3),
            num_blocks=1,
            attention_levels=(2,),
            head_dim=16,
            context_shape=(12, 64),
        ),
        **SHAPES,
        params=592_131,
        gmacs=0.0516,
    ),
    "unet_huge_imagenet256": Preset(
        paper_name="U-Net at the cost of U-ViT-H/2 (Appendix E), ImageNet 256x256",
        architecture=UNet,
        network=dict(
            image_shape=(32, 32, 4),
            base_dim=320,
            multipliers=(1, 4, 4),
            attention_levels=(0, 1),
            num_classes=1000,
        ),
        **LATENT_HUGE,
        iterations=500_000,
        guidance_scale=1.4,
        params=644_117_764,
        gmacs=133.7,
        reported_cost=(646, 135),
        reported_fid=2.66,
    ),
    "unet_small_coco": Preset(
        paper_name="U-Net with cross-attention, MS-COCO 256x256",
        architecture=UNet,
        # The paper has no GMACs of it; here they are between those of U-ViT-S and -S Deep.
        network=dict(
            **COCO_SHAPES,
            base_dim=192,
            multipliers=(1, 1, 1),
            num_blocks=4,
            attention_levels=(0, 1, 2),
        ),
        **COCO,
        params=53_039_620,
        gmacs=19.5,
        reported_cost=(53, None),
        reported_fid=7.32,
    ),
    "vit_adaln_cifar10": Preset(
        paper_name="ViT of GenViT's size (arXiv 2208.07791) with AdaLN, CIFAR10",
        # GenViT's depth, patches, heads of 32 and MLP; 320 wide instead of 384, because AdaLN has
        # kernels in each block here. Its FID is of a recipe of its own, this one is U-ViT's.
        network=dict(
            image_shape=(32, 32, 3),
            patch_size=4,
            hidden_dim=320,
            num_layers=9,
            num_heads=10,
            mlp_dim=640,
            skip=None,
            time="adaln",
        ),
        **CIFAR10,
        params=11_134_532,
        gmacs=0.501,
        reported_cost=(11, None),
        reported_fid=20.20,
    ),
}
