"""CelebA 64x64: an unconditional U-ViT on pixels.

Reproduces   "All are Worth Words", Table 2: U-ViT-S/4.
Expect       FID-50K 2.87, the paper's; not yet reproduced with this package.
Hardware     the paper: 4 RTX 2080 Ti, 24 hours (500,000 steps of 128); sampling takes 1,000 steps.
Commands     keras-uvit statistics tfds:celeb_a celeba64.npz --image-size 64 \\
                 --crop 57 25 128 128 --inception pt_inception-2015-12-05-6726825d.pth
             KERAS_BACKEND=jax python examples/celeba64.py --reference celeba64.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             python examples/celeba64.py --quick          (a minute, the same path on digits)

Faces are cut out of 218x178 at the paper's place (128x128 around row 121, column 89) and halved;
the published program halves by antialiased bilinear resize, this one by the mean of 2x2 pixels.
TensorFlow Datasets downloads CelebA (1.4 GB) at the first run; the 162,770 training images take
2.0 GB of memory. All else is as in cifar10.py.
"""

import cifar10

from keras_uvit import data


def load(options, batch_size):
    return data.tfds_images(
        "celeb_a", 64, crop=(57, 25, 128, 128), batch_size=batch_size, seed=options.seed
    )


if __name__ == "__main__":
    cifar10.main(__doc__, ["uvit_small_celeba64"], "runs/celeba64", load)
