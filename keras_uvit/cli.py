"""`keras-uvit`: the package from a shell."""

import dataclasses
import json
from pathlib import Path

import click
import numpy as np

import keras_uvit
from keras_uvit import convert, data, distribution, evaluation, presets
from keras_uvit.evaluation import CLIPScore, InceptionFeatures, Reference
from keras_uvit.inference import load_keras_weights
from keras_uvit.latent import AutoencoderKL, CLIPText, SpaceToDepth
from keras_uvit.networks import UViT
from keras_uvit.specs import (
    INCEPTION,
    MODEL_OPTIONS,
    PROMPT,
    RESIZE,
    RUN_OPTIONS,
    SAMPLING_OPTIONS,
    SOURCE_OPTIONS,
    has_checkpoints,
    numbers,
    open_dataset,
    open_model,
    open_prompts,
    open_source,
    read_prompts,
    sampling,
)
from keras_uvit.training import train as train_in_folder

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


class Group(click.Group):
    """Turns errors that a user can act on into one line; `--traceback` shows where they were."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except USER_ERRORS as error:
            if context.params.get("traceback"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(keras_uvit.__version__)
@click.option("--traceback", is_flag=True, help="Show where an error was raised.")
def main(traceback):
    """U-ViT diffusion transformers: encode data, train, sample, evaluate.

    KERAS_BACKEND=jax, tensorflow or torch chooses the backend.

    \b
    From images to FID:
      keras-uvit encode photos cache --autoencoder autoencoder_kl.pth --image-size 256
      keras-uvit train uvit_large_imagenet256 cache runs/a
      keras-uvit generate runs/a/model.keras grid.png --labels 207,360 --autoencoder ...
      keras-uvit statistics photos reference.npz --image-size 256 --inception ...
      keras-uvit evaluate runs/a/model.keras --reference reference.npz --inception ...
    """


@main.command("presets")
def show_presets():
    """Lists the published recipes.

    \b
    Example:
      keras-uvit presets
    """
    click.echo(f"{'name':26}{'parameters':>12}{'GMACs':>8}{'FID':>7}  paper")
    for name, row in presets.PRESETS.items():
        reported = f"{row.reported_fid:.2f}" if row.reported_fid else "-"
        size = f"{row.params / 1e6:.1f}M"
        click.echo(f"{name:26}{size:>12}{row.gmacs:8.1f}{reported:>7}  {row.paper_name}")


@main.command()
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


@main.command("convert")
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
    network = makers[kind]() if kind in makers else UViT(**presets.get(kind).network)
    if source.endswith(".weights.h5"):
        load_keras_weights(getattr(network, "network", network), source)
    else:
        convert.load_torch_weights(network, source)
    if target.endswith(".weights.h5"):
        network.save_weights(target, overwrite=True)
    else:
        convert.save_torch_weights(network, target)
    click.echo(f"{target}: {evaluation.count_parameters(network):,} numbers")


@main.command()
@click.argument("preset")
@click.argument("dataset")
@click.argument("folder", type=click.Path())
@MODEL_OPTIONS
@click.option("--iterations", type=int, help="Optimizer steps; the preset's.")
@click.option("--batch-size", type=int, help="The preset's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--grid-every", type=int, default=10, show_default=True, help="Epochs; 0 is never.")
@RUN_OPTIONS
@PROMPT
def train(preset, dataset, folder, iterations, batch_size, seed, grid_every, prompt, **parts):
    """Trains PRESET on DATASET into FOLDER; typed again, it goes on where it was.

    DATASET is a cache that `encode` made, a folder of images, tfds:NAME, or digits. Models of text
    are trained on a cache; they draw grids of each --prompt.

    \b
    Example:
      keras-uvit train uvit_tiny_digits digits runs/tiny --iterations 440
    """
    distribution.choose(parts["devices"], parts["layout"], parts["model_devices"])
    row = presets.get(preset)
    known = row.network.get("num_classes")
    reads_text = row.network.get("context_shape") and "auto"
    if prompt and not (reads_text and parts["text"]):
        raise click.UsageError("--prompt is for models of text, with --text.")
    size = batch_size or row.batch_size
    samples = open_dataset(
        dataset, row.network["image_shape"], known and "auto", reads_text, size, seed
    )
    own = {"dtype": parts["precision"]}
    if known and samples.num_classes and samples.num_classes != known:
        click.echo(f"{samples.num_classes} classes in the data, {known} in {preset}: taking those.")
        own["num_classes"] = samples.num_classes
    weights, autoencoder, text = (parts[key] for key in ("weights", "autoencoder", "text"))
    model = presets.load(
        preset, weights, autoencoder=autoencoder, text_encoder=text, seed=seed, **own
    )
    callbacks = []
    can_draw = row.latent_scale is None or autoencoder
    if grid_every and can_draw and (prompt or not reads_text):
        what = {"num_images": 16}
        if model.network.num_classes is not None:
            what = {"labels": np.arange(16) % model.network.num_classes}
        if prompt:
            what = {"prompts": list(prompt)}
        grids = Path(folder) / "grids"
        callbacks.append(evaluation.SampleGridCallback(grids, every=grid_every, **what))
    steps, every = iterations or row.iterations, parts["save_every"]
    train_in_folder(model, samples, folder, steps, every_steps=every, callbacks=callbacks)
    click.echo(f"Trained: {Path(folder) / 'model.keras'}")


@main.command()
@click.argument("model")
@click.argument("target", type=click.Path())
@MODEL_OPTIONS
@click.option("--labels", callback=numbers, help="Comma-separated class numbers, one an image.")
@click.option("--num-images", type=int, help="For models without labels.")
@PROMPT
@click.option("--prompts", type=click.Path(), help="Text file of them, one a line.")
@click.option("--negative-prompt", help="What guidance leads away from.")
@SAMPLING_OPTIONS
@click.option("--zoom", type=int, default=1, show_default=True, help="Of a grid.")
def generate(
    model,
    target,
    weights,
    autoencoder,
    text,
    labels,
    num_images,
    prompt,
    prompts,
    negative_prompt,
    zoom,
    **how,
):
    """Draws images from MODEL (a preset, a .keras file or a folder of checkpoints) into TARGET.

    TARGET ending in .png gets a grid, in .npz the arrays (`arr_0`, labels `arr_1`); otherwise it
    is a folder of PNG files.

    \b
    Examples:
      keras-uvit generate uvit_tiny_digits grid.png --weights pretrained \\
          --labels 0,1,2,3,4,5,6,7,8,9 --zoom 8
      keras-uvit generate uvit_tiny_shapes grid.png --weights pretrained --zoom 8 \\
          --prompt "a small red circle left of a large blue square"
    """
    prompts = [*prompt, *(read_prompts(prompts) if prompts else [])]
    network = open_model(model, weights, autoencoder, text)
    images = network.generate(
        num_images=num_images,
        labels=labels,
        prompts=prompts or None,
        negative_prompts=negative_prompt,
        **sampling(**how),
    )
    if target.endswith(".png"):
        evaluation.write_png(target, evaluation.image_grid(images, zoom=zoom))
    elif target.endswith(".npz"):
        evaluation.write_npz(target, images, labels)
    else:
        evaluation.write_pngs(target, images)
    click.echo(f"{len(images)} images: {target}")


@main.command()
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


@main.command()
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
