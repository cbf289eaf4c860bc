"""COCO 256x256: text to image on Stable Diffusion latents and CLIP's contexts.

Reproduces   "All are Worth Words", Table 4: U-ViT-S/2 (Deep), and with --preset uvit_small_coco
             U-ViT-S/2; --preset uvit_mid_coco is a larger network at the same recipe.
Expect       FID of 30,000 validation prompts 5.48 (S/2: 5.95), the paper's; not yet reproduced with
             this package, which has loaded no published weights either. The paper has no CLIP
             score.
Hardware     the paper: 4 A100, 74 hours (S/2: 60 hours), 1,000,000 steps of 256. Without data:
             2 CPU cores, a few minutes.
Commands     keras-uvit encode coco:data/coco data/coco256 --split train2014 --scale 0.23010 \\
                 --autoencoder autoencoder_kl.pth --text clip_vit_large_patch14
             keras-uvit statistics coco:data/coco coco256-val.npz --split val2014 \\
                 --inception pt_inception-2015-12-05-6726825d.pth
             KERAS_BACKEND=jax python examples/coco.py --coco data/coco \\
                 --autoencoder autoencoder_kl.pth --clip clip_vit_large_patch14 \\
                 --reference coco256-val.npz --inception pt_inception-2015-12-05-6726825d.pth
             python examples/coco.py --quick          (half a minute, the same path)

data/coco holds train2014.zip, val2014.zip and annotations_trainval2014.zip, unpacked. The cache
takes 1.4 GB of moments and 49 GB of contexts (414,113 captions). One of a picture's captions is
drawn at each visit; one time in ten it is the empty prompt. FID is of one random caption each of
30,000 validation pictures, against the statistics of all 40,504; `--reference` takes the published
program's fid_stats_mscoco256_val.npz as well.

Without latents the same recipe runs at reduced size on the captioned shapes that the package draws:
cache, training, checkpoint, prompts, decoding, attributes read back. Its 1,014 steps (6 minutes)
show that the path works, not what it can draw: 0.14 of the pictures show two things. The run that
learns is examples/shapes.py.

Started again, a run resumes where it was. Writes into --out: model.keras, ema.weights.h5, log.csv,
loss.png, samples.png (with prompts), grids/, metrics.json.
"""

from pathlib import Path

import recipe
import shapes as shapes_example

from keras_uvit import data, evaluation, presets
from keras_uvit.data import captioned, shapes
from keras_uvit.encoders import SpaceToDepth

PRESETS = ["uvit_small_deep_coco", "uvit_small_coco", "uvit_mid_coco"]
PROMPTS = 30_000
LOOK_AT = [
    "a green train is coming down the tracks",
    "a group of skiers preparing to ski down a mountain",
    "a road with traffic lights, street lights and cars",
    "a bus driving in a city area with traffic signs",
    "a small kitchen with a low ceiling",
    "a dog under a red umbrella",
]


def main():
    options = recipe.parse(
        __doc__,
        PRESETS[0],
        PRESETS,
        latents=("data/coco256", "cache of `keras-uvit encode`"),
        coco=("data/coco", "folder of COCO's unpacked zips, for the prompts of FID"),
        autoencoder=(None, "weights of the autoencoder, to make pictures of latents"),
        clip=("clip_vit_large_patch14", "CLIP of both towers: a folder, or a preset"),
        out=("runs/coco", "folder to write into"),
    )
    row = presets.get(options.preset)
    if not options.quick and Path(options.latents).is_dir():
        published(options, row)
        return
    if not options.quick:
        recipe.say(
            f"No latents in {options.latents}; `keras-uvit encode coco:{options.coco} "
            f"{options.latents} --scale {row.latent_scale} --autoencoder autoencoder_kl.pth --text "
            f"{options.clip}` makes them. Running the recipe at reduced size on shapes instead."
        )
    stand_in(options, row)


def published(options, row):
    dataset = data.LatentDataset(
        options.latents, options.batch_size or row.batch_size, seed=options.seed
    )
    model = recipe.preset_model(options, autoencoder=options.autoencoder, text_encoder=options.clip)
    protocol = {}
    if options.reference:
        captions = captioned.coco(options.coco, "val2014").captions
        count = min(options.num_images, PROMPTS)
        protocol = {
            "num_images": count,
            "prompts": captioned.random_prompts(captions, count, options.seed),
            "clip": evaluation.CLIPScore.from_preset(options.clip),
        }
    iterations = options.iterations or row.iterations
    recipe.run(options, model, dataset, iterations, show=LOOK_AT, **protocol)


def stand_in(options, row):
    """The recipe at reduced size: 32x32 shapes as 16x16 latents of 12 channels, 64 patches."""
    out = Path(options.out)
    source = shapes.source(256 if options.quick else 5_000, seed=options.seed)
    text = shapes_example.text_encoder(source.captions, 12, 64)
    autoencoder = SpaceToDepth(2, scale=3.0)
    cache = out / "shapes-cache"
    data.write_latents(source, cache, autoencoder, text_encoder=text, batch_size=256)
    dataset = data.LatentDataset(cache, options.batch_size or 64, seed=options.seed)
    model = recipe.reduced(
        row,
        (16, 16, 12),
        2,
        None,
        options.quick,
        context_shape=(12, 64),
        prediction="x0",  # as uvit_tiny_shapes, for flat colours
        latent_scale=autoencoder.scale,
        seed=options.seed,
    )
    model.set_encoders(autoencoder=autoencoder, text_encoder=text)
    prompts = [str(scene) for scene in shapes.scenes(24 if options.quick else 200, "test")]
    iterations = options.iterations or (len(dataset) if options.quick else 1000)
    recipe.run(
        options,
        model,
        dataset,
        iterations,
        lambda model: shapes_example.measure(model, prompts),
        show=prompts[:24],
    )


if __name__ == "__main__":
    main()
