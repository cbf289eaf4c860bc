"""`encode`: images to a cache of latents. `convert`: weights from one kind of file to another."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from keras_uvit_cli.options import COUNT, SOURCE_OPTIONS, WEIGHTS, Target, gathered, share

WRITING_OPTIONS = gathered(
    "writing",
    flip=dict(is_flag=True, help="Store the mirror image of every image too."),
    dtype=dict(
        type=click.Choice(["float16", "float32"]),
        default="float16",
        help="Number format of the stored latents and text contexts.",
    ),
    batch_size=dict(type=COUNT, default=16, help="Number of images that are encoded at a time."),
    shard_size=dict(
        type=COUNT,
        show_default="8192, or 1024 with captions",
        help="Number of images in each file of the cache.",
    ),
    process=dict(
        default="0/1",
        callback=share,
        help="Divide the work among N processes: K/N writes every N-th shard, beginning with "
        "shard K.",
    ),
    skip_corrupt=dict(
        is_flag=True, help="Leave out damaged images instead of stopping at the first one."
    ),
)


@click.command()
@click.argument("source")
@click.argument("cache", type=Target())
@click.option(
    "--autoencoder",
    help="Weights of the autoencoder, a file or a diffusers folder; or space-to-depth, which has "
    "no weights.",
)
@click.option(
    "--scale",
    type=float,
    default=0.18215,
    help="Factor that brings the latents to variance 1: 0.18215 for ImageNet, 0.23010 for COCO.",
)
@click.option(
    "--text",
    help="CLIP text encoder for the captions: a Hugging Face or keras-hub folder, or "
    "clip_vit_large_patch14, which is downloaded.",
)
@click.option("--no-captions", is_flag=True, help="Leave out the captions of SOURCE.")
@click.option("--pixels", is_flag=True, help="Store pixels instead of latents.")
@click.option(
    "--published-pickles",
    "pickles",
    is_flag=True,
    help="Read SOURCE as a folder of features that the published U-ViT program extracted.",
)
@SOURCE_OPTIONS
@WRITING_OPTIONS
def encode(
    source: str,
    cache: str,
    autoencoder: str | None,
    scale: float,
    text: str | None,
    no_captions: bool,
    pixels: bool,
    pickles: bool,
    reading: dict[str, Any],
    writing: dict[str, Any],
) -> None:
    """Encode the images of SOURCE into a CACHE of latents.

    A model is trained on the cache. SOURCE is a folder of images (with a sub-folder for each class,
    with a captions.jsonl, or with neither), coco:FOLDER (where COCO's zip files are unpacked),
    tfds:NAME (a TensorFlow data set), an .npz file with "image" and optionally "label", or bundled
    data: digits, or shapes:20000 (that many pictures with captions). Captions are stored as the
    contexts that --text makes of them. Run the same command again to resume an interrupted run;
    several processes can share the work with --process 0/4, 1/4, ...

    \b
    Examples:
      keras-uvit encode tfds:imagenet2012 imagenet256 --image-size 256 --flip \\
          --autoencoder autoencoder_kl.pth
      keras-uvit encode coco:data/coco coco-train --split train2014 --scale 0.23010 \\
          --autoencoder autoencoder_kl.pth --text clip_vit_large_patch14
      keras-uvit encode tfds:imagenet_resized/64x64 imagenet64 --pixels
      keras-uvit encode imagenet_features cache --published-pickles --autoencoder autoencoder_kl.pth
    """
    if pixels and (autoencoder or writing["flip"]):
        raise click.UsageError("--pixels stores images unchanged: omit --autoencoder and --flip.")
    if not (pixels or autoencoder or pickles):
        raise click.UsageError("Pass --autoencoder FILE to store latents, or --pixels.")

    from keras_uvit import data, encoders
    from keras_uvit_cli.inputs import open_source

    images = data.published_pickles(source) if pickles else open_source(source, **reading)
    if no_captions:
        images = dataclasses.replace(images, captions=None)
    if (images.captions is None) != (text is None):
        has = "no captions: omit --text." if text else "captions: pass --text, or --no-captions."
        raise click.UsageError(f"{source} has {has}")
    encoder = None if pixels else _autoencoder(autoencoder, scale)
    shared = {
        "process": writing["process"],
        "corrupt": "skip" if writing["skip_corrupt"] else "raise",
        "shard_size": writing["shard_size"],
    }
    if text is not None:  # last, because it takes longest
        shared["text_encoder"] = encoders.CLIPText.from_preset(text)
    if pixels:
        made = data.write_images(images, cache, **shared)
    else:
        shared |= {key: writing[key] for key in ("flip", "dtype", "batch_size")}
        made = data.write_latents(images, cache, encoder, **shared)
    missing = "the share of this process is complete; the shares of others are still missing"
    click.echo(f"{cache}: {made['count']} samples" if made else f"{cache}: {missing}")


def _autoencoder(name, scale):
    """The encoder that --autoencoder names; None without a name."""
    from keras_uvit.encoders import AutoencoderKL, SpaceToDepth

    if name == "space-to-depth":
        return SpaceToDepth()
    return name and AutoencoderKL.from_file(name, scale=scale)


@click.command("convert")
@click.argument("kind")
@click.argument("source", type=click.Path(exists=True))
@click.argument("target", type=Target(*WEIGHTS))
@click.option("--key", help="Part of a published file that holds several, such as ema.")
def convert_weights(kind: str, source: str, target: str, key: str | None) -> None:
    """Convert published weights to Keras' format, or back.

    KIND is the name of a preset, autoencoder, or inception. A file with the published names ends in
    .pth or .safetensors, a Keras file in .weights.h5, an autoencoder that Keras saved in .keras.

    \b
    Examples:
      keras-uvit convert uvit_huge_imagenet256 imagenet256_uvit_huge.pth huge.weights.h5
      keras-uvit convert inception pt_inception-2015-12-05-6726825d.pth inception.safetensors
    """
    from keras_uvit import convert, evaluation

    Path(target).parent.mkdir(parents=True, exist_ok=True)
    network = _loaded(kind, source, key)
    if target.endswith(".weights.h5"):
        network.save_weights(target, overwrite=True)
    else:
        convert.save_torch_weights(network, target)
    click.echo(f"{target}: {evaluation.count_parameters(network):,} weights")


def _loaded(kind, source, key):
    """The network that KIND names, with the weights of a file."""
    from keras_uvit import convert, encoders, evaluation, presets
    from keras_uvit.inference import load_keras_weights

    if kind == "autoencoder" and source.endswith(".keras"):
        return encoders.AutoencoderKL.from_file(source)
    makers = {"autoencoder": encoders.AutoencoderKL, "inception": evaluation.InceptionFeatures}
    network = makers[kind]() if kind in makers else presets.get(kind).new_network()
    if source.endswith(".weights.h5"):
        load_keras_weights(getattr(network, "network", network), source)
    else:
        convert.load_torch_weights(network, source, key)
    return network
