"""`statistics` of reference images, and `evaluate`: FID and other measures against them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from keras_uvit_cli.options import (
    COUNT,
    INCEPTION_OPTIONS,
    MODEL_OPTIONS,
    SAMPLING_OPTIONS,
    SOURCE_OPTIONS,
    Target,
    given_sampling,
)


@click.command()
@click.argument("source")
@click.argument("target", type=Target(".npz"))
@SOURCE_OPTIONS
@INCEPTION_OPTIONS
def statistics(source: str, target: str, reading: dict[str, Any], network: dict[str, Any]) -> None:
    """Write the reference statistics of SOURCE's images to TARGET.

    TARGET is an .npz file. SOURCE is what `encode` takes: use the training images, at the size that
    the model generates.

    \b
    Example:
      keras-uvit statistics tfds:cifar10 cifar10.npz \\
          --inception pt_inception-2015-12-05-6726825d.pth
    """
    import numpy as np

    from keras_uvit import evaluation
    from keras_uvit_cli.inputs import open_source

    images = open_source(source, **reading)
    rows = np.arange(len(images))
    batches = (
        np.stack([sample["image"] for _, sample in group]) for group in images.batches(rows, 64)
    )
    features = evaluation.InceptionFeatures(network["inception"], resize=network["resize"])
    reference = evaluation.reference_statistics(batches, features, total=len(images))
    reference.save(target)
    click.echo(f"{target}: {reference.count} images of {reference.image_size}, {reference.hash}")


@click.command()
@click.argument("model")
@click.option(
    "--reference",
    required=True,
    type=click.Path(exists=True),
    help="The .npz file that `statistics` made of the reference images.",
)
@INCEPTION_OPTIONS
@MODEL_OPTIONS
@click.option(
    "--num-images",
    type=COUNT,
    show_default="50,000; with --prompts 30,000, or as many as there are",
    help="Number of images to draw.",
)
@click.option(
    "--labels",
    type=click.Choice(["random", "balanced"]),
    default="random",
    help="How classes are chosen: each image's at random, or every class equally often.",
)
@click.option(
    "--prompts",
    help="Text file with one prompt per line, or a source with captions such as coco:FOLDER.",
)
@click.option("--split", default="val2014", help="Split of the source of --prompts to read.")
@click.option(
    "--clip",
    help="CLIP with its image and text encoder, to compute the CLIP score: a Hugging Face or "
    "keras-hub folder, or clip_vit_large_patch14, which is downloaded.",
)
@SAMPLING_OPTIONS
@click.option(
    "--folder",
    type=Target(),
    help="Keep the drawn images in this folder, from which an interrupted run resumes.",
)
@click.option("--out", type=Target(".json"), help="JSON file to write the results to.")
@click.option(
    "--allow-few",
    is_flag=True,
    help="Accept fewer than 2,049 images, to try the command; the numbers then mean nothing.",
)
def evaluate(
    model: str,
    reference: str,
    network: dict[str, Any],
    parts: dict[str, Any],
    num_images: int | None,
    labels: str,
    prompts: str | None,
    split: str,
    clip: str | None,
    sampling: dict[str, Any],
    folder: str | None,
    out: str | None,
    allow_few: bool,
) -> None:
    """Measure the FID and other scores of MODEL's images.

    The scores are FID, sFID, Inception Score, precision, recall and, with --clip, the CLIP score.
    MODEL is the name of a preset, a .keras file, a folder that `share` wrote, hf://user/name, or a
    folder of checkpoints; or images that are there already: an .npz file or a folder of pictures of
    one size, read as training reads them.

    \b
    Examples:
      keras-uvit evaluate runs/a/model.keras --reference cifar10.npz --num-images 10000 \\
          --inception pt_inception-2015-12-05-6726825d.pth --out fid.json
      keras-uvit evaluate runs/coco/model.keras --reference fid_stats_mscoco256_val.npz \\
          --prompts coco:data/coco --autoencoder autoencoder_kl.pth --text clip_vit_large_patch14 \\
          --clip clip_vit_large_patch14 --inception pt_inception-2015-12-05-6726825d.pth
    """
    from keras_uvit import evaluation, presets
    from keras_uvit_cli.inputs import holds_model, is_preset, open_model, open_prompts

    is_images = model.endswith(".npz") or (Path(model).is_dir() and not holds_model(model))
    if is_images and (prompts or clip or num_images):
        raise click.UsageError(
            "Images are measured as they are: omit --prompts, --clip and --num-images."
        )
    if not is_images and is_preset(model):
        presets.get(model)
    texts: Sequence[str] | None = prompts
    if prompts:
        texts = open_prompts(prompts, split, num_images, sampling["seed"])
        num_images = len(texts)
    known = evaluation.Reference.load(reference)
    features = evaluation.InceptionFeatures(network["inception"], resize=network["resize"])
    if is_images:
        record = _measured_images(model, known, features, allow_few, out)
    else:
        record = evaluation.evaluate(
            open_model(model, **parts),
            known,
            features,
            num_images,
            labels=labels,
            prompts=texts,
            clip=None if clip is None else evaluation.CLIPScore.from_preset(clip),
            folder=folder,
            path=out,
            allow_few=allow_few,
            **given_sampling(sampling),
        )
    click.echo(json.dumps(record, indent=2))


def _measured_images(path, reference, features, allow_few, out):
    """The record of images that are there already."""
    from keras_uvit import evaluation, io

    images = evaluation.read_images(path)
    record = evaluation.scores([images], len(images), reference, features, allow_few=allow_few)
    record |= {"num_images": len(images), "images": path, "reference": reference.hash}
    if out:
        io.write_json(out, record)
    return record


@click.command()
@click.argument("model")
@click.argument("dataset")
@click.argument("folder", type=Target())
@MODEL_OPTIONS
@SAMPLING_OPTIONS
@click.option("--num-images", type=COUNT, default=500, help="Number of images to draw.")
def report(
    model: str,
    dataset: str,
    folder: str,
    parts: dict[str, Any],
    sampling: dict[str, Any],
    num_images: int,
) -> None:
    """Measure MODEL on its pictures and draw the findings.

    MODEL is what `generate` takes, of pixels, with classes or without.
    DATASET is what it was trained on: a folder of images or digits. FOLDER gets report.png,
    with samples beside real pictures and the nearest ones to them, and report.json, with the
    numbers.

    \b
    Example:
      keras-uvit report runs/photos/model.keras my_photos runs/photos/report
    """
    from keras_uvit import evaluation
    from keras_uvit.evaluation.reports import check_model
    from keras_uvit_cli.inputs import open_dataset, open_model

    opened = open_model(model, **parts)
    check_model(opened)
    network = opened.network.get_config()
    given = given_sampling(sampling)
    samples = open_dataset(dataset, network, None, 1, given["seed"])
    evaluation.report(opened, samples, folder, num_images=num_images, **given)
