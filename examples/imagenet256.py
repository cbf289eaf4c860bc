"""ImageNet 256x256: a class-conditional U-ViT on Stable Diffusion latents.

Reproduces   "All are Worth Words", Table 2: U-ViT-H/2 (and with --preset uvit_large_imagenet256,
             U-ViT-L/2).
Expect       FID-50K 2.29 (L/2: 3.40), the paper's; not yet reproduced with this package, which
             has loaded no published weights either.
Hardware     the paper: 8 A100, 208 hours for H/2 (500,000 steps of 1,024), 100 hours for L/2
             (300,000). Without data: 2 CPU cores, a few minutes.
Commands     keras-uvit encode tfds:imagenet2012 data/imagenet256 --image-size 256 --flip \\
                 --autoencoder autoencoder_kl.pth
             keras-uvit statistics tfds:imagenet2012 imagenet256.npz --image-size 256 \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             KERAS_BACKEND=jax python examples/imagenet256.py \\
                 --autoencoder autoencoder_kl_ema.pth --reference imagenet256.npz \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             python examples/imagenet256.py --quick          (half a minute, the same path)

imagenet2012 must be downloaded by hand: put ILSVRC2012_img_train.tar into
~/tensorflow_datasets/downloads/manual. The latents take 42 GB. The paper's FID is against the ADM
suite's statistics of the training images; `--reference` takes that file as well.

Without latents the same recipe runs at reduced size on the bundled digits: cache, training,
checkpoint, samples of the moving average, decoding, metrics. Started again, a run resumes where it
was. Writes into --out: model.keras, ema.weights.h5, log.csv, loss.png, samples.png, grids/,
metrics.json.
"""

from pathlib import Path

import recipe

from keras_uvit import data, presets

PRESETS = ["uvit_huge_imagenet256", "uvit_large_imagenet256"]


def main(doc=__doc__, names=PRESETS, size=256):
    options = recipe.parse(
        doc,
        names[0],
        names,
        latents=(f"data/imagenet{size}", "cache of `keras-uvit encode`"),
        autoencoder=(None, "weights of the autoencoder, to make pictures of latents"),
        out=(f"runs/imagenet{size}", "folder to write into"),
    )
    row = presets.get(options.preset)
    if not options.quick and Path(options.latents).is_dir():
        dataset = data.LatentDataset(
            options.latents, options.batch_size or row.batch_size, seed=options.seed
        )
        model = recipe.preset_model(options, autoencoder=options.autoencoder)
        recipe.run(options, model, dataset, options.iterations or row.iterations)
        return
    if not options.quick:
        recipe.say(
            f"No latents in {options.latents}; `keras-uvit encode tfds:imagenet2012 "
            f"{options.latents} --image-size {size} --flip --autoencoder autoencoder_kl.pth` makes "
            "them. Running the recipe at reduced size on digits instead."
        )
    stand_in(options, row)


def stand_in(options, row):
    """The recipe at reduced size: 8x8 digits as 4x4 latents of 4 channels, 16 tokens."""
    cache = Path(options.out) / "digits-cache"
    autoencoder = recipe.digits_cache(cache)
    dataset = data.LatentDataset(cache, options.batch_size or 64, seed=options.seed)
    model = recipe.reduced(
        row, (4, 4, 4), 1, 10, options.quick, latent_scale=autoencoder.scale, seed=options.seed
    )
    model.set_encoders(autoencoder=autoencoder)
    iterations = options.iterations or (len(dataset) if options.quick else 3000)
    recipe.run(options, model, dataset, iterations, recipe.digit_scores(options.quick))


if __name__ == "__main__":
    main()
