"""Files from files: caches of images and captions, converted weights."""

import dataclasses

import click

from keras_uvit import convert, data, evaluation, presets
from keras_uvit.evaluation import InceptionFeatures
from keras_uvit.inference import load_keras_weights
from keras_uvit.latent import AutoencoderKL, CLIPText, SpaceToDepth
from keras_uvit.specs import SOURCE_OPTIONS, open_source


@click.command()
@click.argument("source")
@click.argument("cache", type=click.Path())
@click.option("--autoencoder", type=click.Path(), help="Its weights, or space-to-depth.")
@click.option("--scale", type=float, default=0.18215, show_default=True, help="COCO: 0.23010.")
@click.option("--text", help="CLIP, for captions: a folder, or clip_vit_large_patch14.")
@click.option("--no-captions", is_flag=True, help="Leave captions out.")
@click.option("--pixels", is_flag=True, help="Keep pixels, not latents.")
@click.option("--published-pickles", is_flag=True, help="SOURCE is the published program's.")
@SOURCE_OPTIONS
@click.option("--flip", is_flag=True, help="Store each image's mirror image too.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16")
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--shard-size", type=int, help="Images a shard; 8192, with captions 1024.")
@click.option("--process", default="0/1", show_default=True, help="K/N: every N-th shard from K.")
@click.option("--skip-corrupt", is_flag=True, help="Leave damaged images out.")
def encode(source, cache, autoencoder, scale, text, no_captions, pixels, published_pickles, **more):
    """Makes a cache of SOURCE's latents, to train on.

    SOURCE is a folder of images (class sub-folders, or a captions.jsonl, or neither), coco:FOLDER
    (with COCO's zips unpacked in it), tfds:NAME (a TensorFlow data set), an .npz file with "image"
    and maybe "label", or what is bundled: digits, shapes:20000 (captioned). Of captions the
    contexts are kept, which --text makes. An interrupted run goes on when the same is typed again;
    several processes divide the shards (--process 0/4, 1/4, ...).

    \b
    Examples:
      keras-uvit encode tfds:imagenet2012 imagenet256 --image-size 256 --flip \\
          --autoencoder autoencoder_kl.pth
      keras-uvit encode coco:data/coco coco-train --split train2014 --scale 0.23010 \\
          --autoencoder autoencoder_kl.pth --text clip_vit_large_patch14
      keras-uvit encode tfds:imagenet_resized/64x64 imagenet64 --pixels
      keras-uvit encode imagenet_features cache --published-pickles --autoencoder autoencoder_kl.pth
    """
    index, _, count = more["process"].partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise click.UsageError(f"--process is K/N, such as 0/4. Received: {more['process']}.")
    if pixels and (autoencoder or more["flip"]):
        raise click.UsageError("--pixels are kept as they are: no --autoencoder, no --flip.")
    shared = {
        "process": (int(index), int(count)),
        "corrupt": "skip" if more["skip_corrupt"] else "raise",
        "shard_size": more["shard_size"],
    }
    if published_pickles:
        images = data.published_pickles(source)
    else:
        keys = ("image_size", "split", "channels", "crop", "data_dir")
        images = open_source(source, *(more[key] for key in keys))
    if no_captions:
        images = dataclasses.replace(images, captions=None)
    if (images.captions is None) != (text is None):
        raise click.UsageError(
            f"{source} has no captions for --text."
            if images.captions is None
            else f"{source} has captions: pass --text, or --no-captions to leave them out."
        )
    if not pixels:
        autoencoder = _autoencoder(autoencoder, scale, published_pickles)
    if text is not None:  # last, as it takes longest
        shared["text_encoder"] = CLIPText.from_preset(text)
    if pixels:
        made = data.write_images(images, cache, **shared)
    else:
        made = data.write_latents(
            images,
            cache,
            autoencoder,
            flip=more["flip"],
            dtype=more["dtype"],
            batch_size=more["batch_size"],
            **shared,
        )
    rest = f"{made['count']} samples" if made else "this process's part; others are still missing"
    click.echo(f"{cache}: {rest}")


def _autoencoder(name, scale, optional):
    if name == "space-to-depth":
        return SpaceToDepth()
    if name is None and not optional:
        raise click.UsageError("Latents need --autoencoder FILE; or --pixels.")
    return name and AutoencoderKL.from_file(name, scale=scale)


@click.command("convert")
@click.argument("kind")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
def convert_weights(kind, source, target):
    """Converts a file of weights: published ones to Keras', and back.

    KIND is a preset's name, autoencoder, or inception. Files end in .pth or .safetensors (the
    published names) or .weights.h5 (Keras').

    \b
    Examples:
      keras-uvit convert uvit_huge_imagenet256 imagenet256_uvit_huge.pth huge.weights.h5
      keras-uvit convert inception pt_inception-2015-12-05-6726825d.pth inception.safetensors
    """
    makers = {"autoencoder": AutoencoderKL, "inception": InceptionFeatures}
    network = makers[kind]() if kind in makers else presets.get(kind).new_network()
    if source.endswith(".weights.h5"):
        load_keras_weights(getattr(network, "network", network), source)
    else:
        convert.load_torch_weights(network, source)
    if target.endswith(".weights.h5"):
        network.save_weights(target, overwrite=True)
    else:
        convert.save_torch_weights(network, target)
    click.echo(f"{target}: {evaluation.count_parameters(network):,} numbers")
