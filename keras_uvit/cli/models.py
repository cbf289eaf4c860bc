"""Models trained, and images drawn from them."""

from pathlib import Path

import click
import numpy as np

from keras_uvit import distribution, evaluation, presets
from keras_uvit.specs import (
    MODEL_OPTIONS,
    PROMPT,
    RUN_OPTIONS,
    SAMPLING_OPTIONS,
    numbers,
    open_dataset,
    open_model,
    read_prompts,
    sampling,
)
from keras_uvit.training import train as train_in_folder


@click.command()
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


@click.command()
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
