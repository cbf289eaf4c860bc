"""Images measured against others."""

import json
from pathlib import Path

import click
import numpy as np

from keras_uvit import evaluation
from keras_uvit.evaluation import CLIPScore, InceptionFeatures, Reference
from keras_uvit.specs import (
    INCEPTION,
    MODEL_OPTIONS,
    RESIZE,
    SAMPLING_OPTIONS,
    SOURCE_OPTIONS,
    has_checkpoints,
    open_model,
    open_prompts,
    open_source,
    sampling,
)


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path())
@SOURCE_OPTIONS
@INCEPTION
@RESIZE
def statistics(source, target, inception, resize, **more):
    """Makes reference statistics of SOURCE's images, an .npz file.

    Take the training images at the size that the model makes; SOURCE is as for `encode`.

    \b
    Example:
      keras-uvit statistics tfds:cifar10 cifar10.npz \\
          --inception pt_inception-2015-12-05-6726825d.pth
    """
    keys = ("image_size", "split", "channels", "crop", "data_dir")
    images = open_source(source, *(more[key] for key in keys))
    rows = np.arange(len(images))
    batches = (
        np.stack([sample["image"] for _, sample in group]) for group in images.batches(rows, 64)
    )
    features = InceptionFeatures(inception, resize=resize)
    reference = evaluation.reference_statistics(batches, features, total=len(images))
    reference.save(target)
    click.echo(f"{target}: {reference.count} images of {reference.image_size}, {reference.hash}")


@click.command()
@click.argument("model")
@click.option("--reference", required=True, type=click.Path(), help=".npz of `statistics`.")
@INCEPTION
@RESIZE
@MODEL_OPTIONS
@click.option("--num-images", type=int, help="50,000; of prompts, 30,000 or as many as there are.")
@click.option("--labels", type=click.Choice(["random", "balanced"]), default="random")
@click.option("--prompts", help="File of prompts, or what has captions, such as coco:FOLDER.")
@click.option("--split", default="val2014", show_default=True, help="Of the captions.")
@click.option("--clip", help="CLIP with both towers, for the CLIP score: a folder, or a preset.")
@SAMPLING_OPTIONS
@click.option("--folder", type=click.Path(), help="Keeps the images; an interrupted run goes on.")
@click.option("--out", type=click.Path(), help="JSON file for the record.")
@click.option("--allow-few", is_flag=True, help="Fewer than 2,049 images, to try the path.")
def evaluate(model, reference, inception, resize, weights, autoencoder, text, **more):
    """FID, sFID, Inception Score, precision, recall and CLIP score of MODEL.

    MODEL is a preset, a .keras file or a folder of checkpoints; or images, drawn before: an .npz or
    a folder of PNG files.

    \b
    Example:
      keras-uvit evaluate runs/a/model.keras --reference cifar10.npz --num-images 10000 \\
          --inception pt_inception-2015-12-05-6726825d.pth --out fid.json
      keras-uvit evaluate runs/coco/model.keras --reference fid_stats_mscoco256_val.npz \\
          --prompts coco:data/coco --autoencoder autoencoder_kl.pth --text clip_vit_large_patch14 \\
          --clip clip_vit_large_patch14 --inception pt_inception-2015-12-05-6726825d.pth
    """
    prompts, count = None, more["num_images"]
    if more["prompts"]:
        prompts = open_prompts(more["prompts"], more["split"], count, more["seed"])
        count = len(prompts)
    features, known = InceptionFeatures(inception, resize=resize), Reference.load(reference)
    is_folder = Path(model).is_dir() and not has_checkpoints(model)
    is_images = model.endswith(".npz") or is_folder
    if is_images and (more["prompts"] or more["clip"] or count):
        raise click.UsageError(
            "Images are measured as they are: no --prompts, --clip, --num-images."
        )
    if not is_images:
        keys = ("sampler", "num_steps", "guidance_scale", "fast", "seed", "batch_size", "raw")
        record = evaluation.evaluate(
            open_model(model, weights, autoencoder, text),
            known,
            features,
            count,
            labels=more["labels"],
            prompts=prompts,
            clip=more["clip"] and CLIPScore.from_preset(more["clip"]),
            folder=more["folder"],
            path=more["out"],
            allow_few=more["allow_few"],
            **sampling(*(more[key] for key in keys)),
        )
    else:
        images = evaluation.read_images(model)
        record = evaluation.scores(
            [images], len(images), known, features, allow_few=more["allow_few"]
        )
        record |= {"num_images": len(images), "images": model, "reference": known.hash}
        if more["out"]:
            Path(more["out"]).write_text(json.dumps(record, indent=2) + "\n")
    click.echo(json.dumps(record, indent=2))
