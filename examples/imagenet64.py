"""ImageNet 64x64: a class-conditional U-ViT on pixels.

Reproduces   "All are Worth Words", Table 2: U-ViT-M/4 (and with --preset uvit_large_imagenet64,
             U-ViT-L/4).
Expect       FID-50K 5.85 (L/4: 4.26), the paper's, without guidance; not yet reproduced with this
             package.
Hardware     the paper: 8 A100, 59 hours for M/4, 100 hours for L/4 (300,000 steps of 1,024).
Commands     keras-uvit encode tfds:imagenet_resized/64x64 data/imagenet64 --pixels
             keras-uvit statistics tfds:imagenet_resized/64x64 imagenet64.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             KERAS_BACKEND=jax python examples/imagenet64.py --reference imagenet64.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             python examples/imagenet64.py --quick          (a minute, the same path on digits)

The cache of pixels takes 15.7 GB. The published program shrinks the original images itself;
imagenet_resized is the official 64x64 release, shrunk by box filter, so a FID can differ. All
else is as in cifar10.py.
"""

import cifar10

from keras_uvit import data


def load(options, batch_size):
    return data.image_shards(options.pixels, batch_size, seed=options.seed)


if __name__ == "__main__":
    cifar10.main(
        __doc__,
        ["uvit_mid_imagenet64", "uvit_large_imagenet64"],
        "runs/imagenet64",
        load,
        pixels=("data/imagenet64", "cache of `keras-uvit encode --pixels`"),
    )
