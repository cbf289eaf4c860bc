"""CIFAR-10: an unconditional U-ViT on pixels.

Reproduces   "All are Worth Words", Table 2: U-ViT-S/2.
Expect       FID-50K 3.11, the paper's; not yet reproduced with this package.
Hardware     the paper: 4 RTX 2080 Ti, 24 hours (500,000 steps of 128); sampling takes 1,000 steps.
Commands     keras-uvit statistics tfds:cifar10 cifar10.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             KERAS_BACKEND=jax python examples/cifar10.py --reference cifar10.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             python examples/cifar10.py --quick          (a minute, the same path on digits)

TensorFlow Datasets downloads CIFAR-10 (162 MB) at the first run. Started again, a run resumes where
it was. Writes into --out: model.keras, ema.weights.h5, log.csv, loss.png, samples.png, grids/,
metrics.json.
"""

import recipe

from keras_uvit import data, presets


def load(options, batch_size):
    return data.tfds_images("cifar10", labels=None, batch_size=batch_size, seed=options.seed)


def main(doc, names, out, load, **defaults):
    """Also what celeba64.py and imagenet64.py run; `load` gives the images, in batches."""
    options = recipe.parse(doc, names[0], names, out=(out, "folder to write into"), **defaults)
    row = presets.get(options.preset)
    if not options.quick:
        dataset = load(options, options.batch_size or row.batch_size)
        model = recipe.preset_model(options)
        recipe.run(options, model, dataset, options.iterations or row.iterations)
        return
    shape, classes = row.network["image_shape"], row.network.get("num_classes")
    dataset = recipe.digit_pictures(shape, 32, classes, options.seed)
    model = recipe.reduced(row, shape, shape[0] // 4, classes and 10, True, seed=options.seed)
    recipe.run(options, model, dataset, options.iterations or len(dataset))


if __name__ == "__main__":
    main(__doc__, ["uvit_small_cifar10"], "runs/cifar10", load)
