"""ImageNet 512x512: a class-conditional U-ViT on Stable Diffusion latents.

Reproduces   "All are Worth Words", Table 2: U-ViT-H/4 (and with --preset uvit_large_imagenet512,
             U-ViT-L/4).
Expect       FID-50K 4.05 (L/4: 4.67), the paper's; not yet reproduced with this package.
Hardware     the paper: 8 A100, 208 hours for H/4, 166 hours for L/4 (500,000 steps of 1,024).
             Without data: 2 CPU cores, a few minutes.
Commands     keras-uvit encode tfds:imagenet2012 data/imagenet512 --image-size 512 --flip \\
                 --autoencoder autoencoder_kl.pth
             keras-uvit statistics tfds:imagenet2012 imagenet512.npz --image-size 512 \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             KERAS_BACKEND=jax python examples/imagenet512.py \\
                 --autoencoder autoencoder_kl_ema.pth --reference imagenet512.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             python examples/imagenet512.py --quick          (half a minute, the same path)

The latents take 168 GB. All else is as in imagenet256.py.
"""

import imagenet256

if __name__ == "__main__":
    imagenet256.main(__doc__, ["uvit_huge_imagenet512", "uvit_large_imagenet512"], 512)
