"""`train` a model, `generate` images with one."""

from pathlib import Path

import click

from keras_uvit_cli.options import (
    COUNT,
    DEVICES,
    LAYOUTS,
    MODEL_OPTIONS,
    PRECISIONS,
    SAMPLING_OPTIONS,
    SEED,
    Target,
    class_numbers,
    gathered,
    given_sampling,
)

GRID_IMAGES = 16
OTHER_IMAGES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".npy")  # which nothing here writes

RUN_OPTIONS = gathered(
    "run",
    precision=dict(
        type=click.Choice(PRECISIONS),
        default="float32",
        help="Number format of the computation; mixed_bfloat16 is faster on accelerators that "
        "support it.",
    ),
    devices=dict(
        type=click.Choice(DEVICES),
        default="one",
        help="Train on one device, on all devices of this machine, or on those of a job of several "
        "processes.",
    ),
    layout=dict(
        type=click.Choice(LAYOUTS),
        default="data",
        help="What several devices divide: only the data, or the weights too (fsdp and tensor, on "
        "JAX).",
    ),
    model_devices=dict(
        type=COUNT,
        help="Number of devices that share one copy of the weights, with --layout tensor.",
    ),
    save_every=dict(
        type=COUNT, default=1000, help="Number of optimizer steps between two checkpoints."
    ),
)


@click.command()
@click.argument("preset")
@click.argument("dataset")
@click.argument("folder", type=Target())
@MODEL_OPTIONS
@click.option(
    "--iterations",
    type=COUNT,
    show_default="the preset's",
    help="Number of batches to train on, rounded up to whole epochs.",
)
@click.option(
    "--batch-size",
    type=COUNT,
    show_default="the preset's",
    help="Number of images per batch, of all devices together.",
)
@click.option(
    "--seed", type=SEED, default=0, help="Seed of the noise and of the order of the data."
)
@click.option(
    "--grid-every",
    type=click.IntRange(min=0),
    default=10,
    help="Number of epochs between two pictures of samples; 0 draws none.",
)
@click.option(
    "--prompt",
    multiple=True,
    help="Prompt for one image of those pictures, for a text-to-image model; can be repeated.",
)
@RUN_OPTIONS
def train(preset, dataset, folder, parts, iterations, batch_size, seed, grid_every, prompt, run):
    """Train the model of PRESET on DATASET, in FOLDER.

    DATASET is a cache that `encode` made, a folder of images, tfds:NAME, or digits. A text-to-image
    model is trained on a cache, and draws samples of each --prompt. Run the same command again to
    resume an interrupted run.

    \b
    Example:
      keras-uvit train uvit_tiny_digits digits runs/tiny --iterations 440
    """
    from keras_uvit import distribution, presets, training
    from keras_uvit_cli.inputs import open_dataset

    row = presets.get(preset)
    if prompt and not (row.network.get("context_shape") and parts["text"]):
        raise click.UsageError("--prompt needs the preset of a text-to-image model, and --text.")
    distribution.choose(run["devices"], run["layout"], run["model_devices"])
    samples = open_dataset(dataset, row.network, batch_size or row.batch_size, seed)
    classes = row.network.get("num_classes")
    network = {"dtype": run["precision"]}
    if classes and samples.num_classes and samples.num_classes != classes:
        click.echo(
            f"{preset} has {classes} classes and the data has {samples.num_classes}: the model is "
            f"made with {samples.num_classes}."
        )
        network["num_classes"] = classes = samples.num_classes
    callbacks = []
    if grid_every and (row.latent_scale is None or parts["autoencoder"]):
        callbacks = _grids(folder, grid_every, row, classes, prompt)
    model = presets.load(
        preset,
        parts["weights"],
        autoencoder=parts["autoencoder"],
        text_encoder=parts["text"],
        seed=seed,
        **network,
    )
    iterations = iterations or row.iterations
    training.train(
        model, samples, folder, iterations, every_steps=run["save_every"], callbacks=callbacks
    )
    click.echo(f"Trained: {Path(folder) / 'model.keras'}")


def _grids(folder, every, row, classes, prompts):
    """The callback that draws samples, in a list; none for a text model without prompts."""
    from keras_uvit.evaluation import SampleGridCallback

    if row.network.get("context_shape"):
        what = {"prompts": list(prompts)}
    elif classes:
        what = {"labels": [k % classes for k in range(GRID_IMAGES)]}
    else:
        what = {"num_images": GRID_IMAGES}
    if what.get("prompts") == []:
        return []
    return [SampleGridCallback(Path(folder) / "grids", every=every, **what)]


def _image_target(context, argument, path):
    """A click callback: rejects a TARGET of `generate` that nothing would be written to."""
    if Path(path).suffix.lower() in OTHER_IMAGES:
        raise click.BadParameter(
            f"expected a name ending in .png (a grid) or .npz (arrays), or a folder. "
            f"Received: {path}."
        )
    if not path.endswith((".png", ".npz")) and Path(path).is_file():
        raise click.BadParameter(f"{path} is a file; expected a folder for PNG files.")
    return path


@click.command()
@click.argument("model")
@click.argument("target", type=Target(), callback=_image_target)
@MODEL_OPTIONS
@click.option(
    "--labels",
    callback=class_numbers,
    metavar="INTEGER,...",
    help="Class numbers, separated by commas: one image is drawn of each.",
)
@click.option(
    "--num-images", type=COUNT, help="Number of images, for a model without labels and prompts."
)
@click.option(
    "--prompt", multiple=True, help="Text that describes one image; can be repeated for more."
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    help="Text file with one prompt per line, in UTF-8.",
)
@click.option("--negative-prompt", help="Text that guidance leads all images away from.")
@SAMPLING_OPTIONS
@click.option("--zoom", type=COUNT, default=1, help="Enlarge the images of a grid this many times.")
def generate(
    model, target, parts, labels, num_images, prompt, prompts, negative_prompt, sampling, zoom
):
    """Generate images with MODEL and write them to TARGET.

    MODEL is the name of a preset, a .keras file, or a folder of checkpoints. A TARGET that ends in
    .png gets one picture with all images in a grid, one in .npz the arrays (`arr_0` images, `arr_1`
    labels); any other TARGET is a folder for PNG files.

    \b
    Examples:
      keras-uvit generate uvit_tiny_digits grid.png --weights pretrained \\
          --labels 0,1,2,3,4,5,6,7,8,9 --zoom 8
      keras-uvit generate uvit_tiny_shapes grid.png --weights pretrained --zoom 8 \\
          --prompt "a small red circle left of a large blue square"
    """
    from keras_uvit import evaluation
    from keras_uvit.evaluation.files import pillow
    from keras_uvit_cli.inputs import check_preset, is_preset, open_model, read_prompts

    prompts = [*prompt, *(read_prompts(prompts) if prompts else [])]
    if is_preset(model):
        check_preset(model, parts["autoencoder"], labels, prompts, num_images)
    if not target.endswith(".npz"):
        pillow()  # if it is missing, that is said before anything is drawn
    images = open_model(model, **parts).generate(
        num_images=num_images,
        labels=labels,
        prompts=prompts or None,
        negative_prompts=negative_prompt,
        **given_sampling(sampling),
    )
    if target.endswith(".png"):
        evaluation.write_png(target, evaluation.image_grid(images, zoom=zoom))
    elif target.endswith(".npz"):
        evaluation.write_npz(target, images, labels)
    else:
        evaluation.write_pngs(target, images)
    click.echo(f"{len(images)} images: {target}")
