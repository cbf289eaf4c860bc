"""`train` a model, `generate` images with one."""

from pathlib import Path
from typing import Any

import click

from keras_uvit_cli.options import (
    COUNT,
    DEVICES,
    ENCODER_OPTIONS,
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


PLAN_OPTIONS = gathered(
    "plan",
    preset=dict(
        show_default="what suits the data",
        help="Train the network of this preset, by its recipe; see `keras-uvit presets`.",
    ),
    steps=dict(
        type=COUNT, help="Number of batches to train on; with --preset rounded up to whole epochs."
    ),
    epochs=dict(type=COUNT, help="Number of times to go through the data, instead of --steps."),
    hours=dict(
        type=click.FloatRange(min=0, min_open=True),
        help="Time to train for, instead of --steps: a few steps are timed first.",
    ),
    image_size=dict(
        type=COUNT,
        show_default="what suits the pictures",
        help="Height and width in pixels that the pictures of a folder are resized to.",
    ),
    mirror=dict(
        type=bool,
        show_default="true, but not for digits and captions",
        help="Whether pictures are mirrored left to right at random; false where sides matter, as "
        "in text.",
    ),
    learning_rate=dict(
        type=click.FloatRange(min=0, min_open=True),
        show_default="what suits the width",
        help="Learning rate after the warm-up.",
    ),
    width=dict(type=COUNT, help="Width of the network (hidden_dim), a multiple of its heads."),
    layers=dict(type=COUNT, help="Number of transformer blocks, odd."),
    validation_share=dict(
        type=click.FloatRange(0, 0.5),
        default=0.0,
        help="Share of the pictures that is kept out of training; its loss is shown as val_loss.",
    ),
)


BEGIN: dict[str, dict[str, Any]] = {
    "from": dict(
        metavar="WEIGHTS",
        show_default="random weights",
        help="Fine-tune these weights: a .keras file, a folder that `share` wrote, hf://user/name, "
        'or a folder of checkpoints; with --preset also "pretrained" or a file of weights '
        "(.weights.h5, .pth or .safetensors).",
    ),
    "key": dict(help="Part of a published checkpoint that holds several, such as ema."),
    "num_classes": dict(
        type=COUNT,
        show_default="as many as the data has",
        help="Number of classes of the fine-tuned model.",
    ),
    "lora": dict(
        type=COUNT,
        metavar="RANK",
        show_default="all weights are trained",
        help="Fine-tune low-rank pairs of this rank, and what is made anew, alone.",
    ),
}
BEGIN_OPTIONS = gathered("begin", **BEGIN)


@click.command()
@click.argument("dataset")
@click.argument("folder", type=Target())
@PLAN_OPTIONS
@BEGIN_OPTIONS
@ENCODER_OPTIONS
@click.option(
    "--batch-size",
    type=COUNT,
    show_default="the preset's, or what suits the machine",
    help="Number of images per batch, of all devices together.",
)
@click.option(
    "--seed", type=SEED, default=0, help="Seed of the noise and of the order of the data."
)
@click.option(
    "--grid-every",
    type=click.IntRange(min=0),
    show_default="ten times in all",
    help="Number of epochs between two pictures of samples; 0 draws none.",
)
@click.option(
    "--prompt",
    multiple=True,
    help="Prompt for one image of those pictures, for a text-to-image model; can be repeated.",
)
@RUN_OPTIONS
def train(
    dataset: str,
    folder: str,
    plan: dict[str, Any],
    begin: dict[str, Any],
    parts: dict[str, Any],
    batch_size: int | None,
    seed: int,
    grid_every: int | None,
    prompt: tuple[str, ...],
    run: dict[str, Any],
) -> None:
    """Train a model on DATASET, in FOLDER.

    DATASET is a folder of images (with a sub-folder for each class, or without), a cache that
    `encode` made, tfds:NAME, or digits. Network, recipe and length of the run suit the data, unless
    a --preset is named. With --from a trained model is fine-tuned: what is kept of its weights, and
    what does not fit, is printed. A text-to-image model is trained on a cache, and draws samples of
    each --prompt. Run the same command again to resume an interrupted run.

    \b
    Examples:
      keras-uvit train my_photos runs/photos
      keras-uvit train my_photos runs/photos --image-size 64 --hours 2
      keras-uvit train digits runs/tiny --preset uvit_tiny_digits --steps 440
      keras-uvit train my_photos runs/tuned --from runs/photos/model.keras --lora 16 --steps 1000
    """
    from keras_uvit import distribution, training
    from keras_uvit.training.run_length import epoch_of
    from keras_uvit_cli.training import planned

    lengths = [f"--{key}" for key in ("steps", "epochs", "hours") if plan[key]]
    if len(lengths) > 1:
        raise click.UsageError(f"Choose one of {' and '.join(lengths)}.")
    distribution.choose(run["devices"], run["layout"], run["model_devices"])
    model, samples, validation, steps = planned(
        dataset,
        folder,
        plan,
        begin,
        parts,
        batch_size,
        seed,
        run["precision"],
    )
    if prompt and not (model.network.context_shape and model.encoders.text_encoder):
        raise click.UsageError("--prompt needs a text-to-image model, and --text.")
    callbacks = []
    steps_per_epoch = None if plan["preset"] else epoch_of(steps, len(samples))
    if grid_every is None:
        grid_every = max(1, steps // (steps_per_epoch or len(samples)) // 10)
    if grid_every and (model.latent_scale is None or model.encoders.autoencoder is not None):
        callbacks = _grids(folder, grid_every, model.network, prompt)
    training.train(
        model,
        samples,
        folder,
        steps,
        steps_per_epoch=steps_per_epoch,
        every_steps=run["save_every"],
        callbacks=callbacks,
        validation_data=validation,
    )
    if begin["lora"]:
        training.save_lora(model, Path(folder) / "lora.safetensors")
    click.echo(f"Trained: {Path(folder) / 'model.keras'}")


def _grids(folder, every, network, prompts):
    """The callback that draws samples, in a list; none for a text model without prompts."""
    from keras_uvit.evaluation import SampleGridCallback

    if network.context_shape:
        what = {"prompts": list(prompts)}
    elif network.num_classes:
        what = {"labels": [k % network.num_classes for k in range(GRID_IMAGES)]}
    else:
        what = {"num_images": GRID_IMAGES}
    if what.get("prompts") == []:
        return []
    return [SampleGridCallback(Path(folder) / "grids", every=every, **what)]


EDIT_OPTIONS = gathered(
    "edit",
    image=dict(
        type=click.Path(exists=True, dir_okay=False),
        multiple=True,
        help="Picture to start from, of the size that the model makes. Give one for all images, or "
        "repeat it, one for each image.",
    ),
    mask=dict(
        type=click.Path(exists=True, dir_okay=False),
        help="Picture of the same size, white where --image is drawn again; the rest is kept.",
    ),
    strength=dict(
        type=click.FloatRange(0, 1),
        help="How much of --image is drawn again: 0 returns it, 1 does not look at it.",
    ),
    resamples=dict(
        type=COUNT,
        show_default="1",
        help="How often each step is made with --mask; more fit the drawn part better to the kept.",
    ),
)


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
@EDIT_OPTIONS
@SAMPLING_OPTIONS
@click.option("--zoom", type=COUNT, default=1, help="Enlarge the images of a grid this many times.")
def generate(
    model: str,
    target: str,
    parts: dict[str, Any],
    labels: list[int] | None,
    num_images: int | None,
    prompt: tuple[str, ...],
    prompts: str | None,
    negative_prompt: str | None,
    edit: dict[str, Any],
    sampling: dict[str, Any],
    zoom: int,
) -> None:
    """Generate images with MODEL and write them to TARGET.

    MODEL is the name of a preset, a .keras file, a folder that `share` wrote, hf://user/name, or a
    folder of checkpoints. A TARGET that ends in .png gets one picture with all images in a grid,
    one in .npz the arrays (`arr_0` images, `arr_1` labels); any other TARGET is a folder for PNG
    files. With --image the grid shows it, the mask and what was drawn, a row for each image.

    \b
    Examples:
      keras-uvit generate uvit_tiny_digits grid.png --weights pretrained \\
          --labels 0,1,2,3,4,5,6,7,8,9 --zoom 8
      keras-uvit generate uvit_tiny_shapes grid.png --weights pretrained --zoom 8 \\
          --prompt "a small red circle left of a large blue square"
      keras-uvit generate uvit_tiny_digits edit.png --weights pretrained --labels 3,3,8 \\
          --image three.png --mask half.png --zoom 8
    """
    from keras_uvit import evaluation
    from keras_uvit_cli.inputs import (
        before_and_after,
        check_preset,
        is_preset,
        open_model,
        read_edit,
        read_prompts,
    )

    texts = [*prompt, *(read_prompts(prompts) if prompts else [])]
    if is_preset(model):
        check_preset(model, parts["autoencoder"], labels, texts, num_images)
    opened = open_model(model, **parts)
    edit = read_edit(opened, edit)
    images = opened.generate(
        num_images=num_images,
        labels=labels,
        prompts=texts or None,
        negative_prompts=negative_prompt,
        **edit,
        **given_sampling(sampling),
    )
    if target.endswith(".png"):
        shown, columns = before_and_after(images, edit)
        evaluation.write_png(target, evaluation.image_grid(shown, columns, zoom))
    elif target.endswith(".npz"):
        evaluation.write_npz(target, images, labels)
    else:
        evaluation.write_pngs(target, images)
    click.echo(f"{len(images)} images: {target}")
