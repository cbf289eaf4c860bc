"""What `train` trains: the data, and a model by a preset or by what suits the data."""

from pathlib import Path
from typing import Any

import click

from keras_uvit import presets
from keras_uvit.data import LatentDataset, sources
from keras_uvit.data.images import ImageDataset
from keras_uvit.data.manifest import MANIFEST
from keras_uvit.presets import own_data
from keras_uvit.presets.loading import set_encoders
from keras_uvit.training import DiffusionModel, adapt
from keras_uvit_cli.inputs import is_preset, open_dataset, open_model


def planned(
    dataset: str,
    folder: str,
    plan: dict[str, Any],
    begin: dict[str, Any],
    parts: dict[str, Any],
    batch_size: int | None,
    seed: int,
    precision: str,
) -> tuple[DiffusionModel, LatentDataset | ImageDataset, ImageDataset | None, int]:
    """The compiled model, its training and validation data and the number of steps.

    Args:
        dataset, folder: the command's arguments.
        plan: dict of the options that `train` gathers under this name.
        begin: dict of the options that `train` gathers under this name.
        parts: dict of autoencoder and text encoder.
        batch_size: int, or None for the usual.
        seed: int.
        precision: dtype policy.
    """
    row = presets.get(plan["preset"]) if plan["preset"] else None
    network = {"dtype": precision}
    if row and (plan["width"] or plan["layers"]) and "hidden_dim" not in row.network:
        raise click.UsageError("--width and --layers are for U-ViTs.")
    for option, argument in (("width", "hidden_dim"), ("layers", "num_layers")):
        if plan[option]:
            network[argument] = plan[option]
    base = _base(row, plan, begin, parts)
    known = base.network.get_config() if base else row and row.network
    samples = _open(dataset, row, known, plan, begin, batch_size, seed)
    if plan["mirror"] is not None:
        if not isinstance(samples, ImageDataset):
            raise click.UsageError("--mirror is for pictures: encode latents with --flip.")
        samples.flip = plan["mirror"]
    samples, validation = _split(samples, plan["validation_share"], seed)
    optimizer = {"learning_rate": plan["learning_rate"]} if plan["learning_rate"] else {}
    if begin["from"]:
        model, steps = _by_weights(
            base, known, samples, plan, begin, parts, seed, network, optimizer
        )
    elif row is not None:
        model, steps = _by_preset(row, samples, plan, parts, seed, network, optimizer)
    else:
        model, steps = _by_data(samples, folder, plan, parts, seed, network, optimizer)
    return model, samples, validation, steps


def _check_dataset(name):
    """Raises for what is not there, and for the name of a preset."""
    if name in presets.names():
        raise click.UsageError(
            f"{name} is a preset, not data: keras-uvit train DATASET FOLDER --preset {name}."
        )
    if name.endswith(".keras"):
        raise click.UsageError(
            f"{name} is a model, not data: expected keras-uvit train DATASET FOLDER. The same "
            "command as before resumes an interrupted run in FOLDER."
        )
    is_name = name == "digits" or name.startswith(("tfds:", "shapes:", "coco:"))
    if not is_name and not Path(name).is_dir():
        raise FileNotFoundError(
            f"No folder at {name}. Expected a folder of images, a cache, tfds:NAME, or digits."
        )


def _base(row, plan, begin, parts):
    """The model that --from names without a --preset; checks what goes with --from."""
    source = begin["from"]
    if not source:
        extra = [f"--{key.replace('_', '-')}" for key, value in begin.items() if value]
        if extra:
            raise click.UsageError(f"{extra[0]} goes with --from, the weights to begin at.")
        return None
    if not plan["steps"] and not plan["epochs"]:
        raise click.UsageError("--from needs --steps or --epochs: how long to fine-tune.")
    if plan["width"] or plan["layers"]:
        raise click.UsageError("--width and --layers cannot be changed with --from.")
    if row is not None:
        return None
    if begin["key"] or is_preset(source):
        raise click.UsageError(
            f"--from {source} goes with --preset, the network that these weights are of. Without "
            "it, --from takes a .keras file, a folder that `share` wrote, or one of checkpoints."
        )
    return open_model(source, None, **parts)


def _open(dataset, row, known, plan, begin, batch_size, seed):
    shape, size = known and known["image_shape"], plan["image_size"]
    if begin["from"]:
        side = (size, size) if size else shape[:2]
        known = {**known, "image_shape": (*side, shape[2])}
        known["num_classes"] = begin["num_classes"] or known.get("num_classes")
    elif row is not None and size and (row.latent_scale is not None or size != shape[0]):
        raise click.UsageError(
            f"--preset {plan['preset']} is for {'x'.join(map(str, shape))}. Received: "
            f"--image-size {size}. Leave --preset out for a network that suits your pictures."
        )
    _check_dataset(dataset)
    is_pictures = Path(dataset).is_dir() and not (Path(dataset) / MANIFEST).is_file()
    if size and not is_pictures and not dataset.startswith("tfds:"):
        raise click.UsageError(f"--image-size is for folders of images and tfds:, not {dataset}.")
    if is_pictures:
        survey = sources.survey(dataset)
        click.echo(survey.text())
        if known is None:
            size = size or survey.suitable_side(own_data.SIDES[own_data.machine()])
            click.echo(f"They are resized to {size}x{size}; --image-size chooses another size.")
        elif not begin["from"] and not size and not survey.all_of(shape):
            raise click.UsageError(
                f"--preset {plan['preset']} is for pictures of {'x'.join(map(str, shape))}. Pass "
                f"--image-size {shape[0]} to resize them, or leave --preset out for a network that "
                "suits your pictures."
            )
    usual = row.batch_size if row else None
    try:
        return open_dataset(dataset, known, size, batch_size or usual, seed)
    except ValueError as error:
        if "batch_size" not in str(error):
            raise
        raise click.UsageError(str(error).replace("batch_size", "--batch-size")) from error


def _split(samples, share, seed):
    """Training and validation data; the latter None for a share of 0."""
    if not share:
        return samples, None
    if not isinstance(samples, ImageDataset) or samples.contexts is not None:
        raise click.UsageError("--validation-share is for pictures, not for caches of latents.")
    return samples.split(share, seed)


def _steps(samples, plan):
    if plan["epochs"]:
        return plan["epochs"] * len(samples)
    return plan["steps"]


def _by_preset(row, samples, plan, parts, seed, network, optimizer):
    name, classes = plan["preset"], row.network.get("num_classes")
    if classes and samples.num_classes and samples.num_classes != classes:
        click.echo(
            f"{name} has {classes} classes and the data has {samples.num_classes}: the model is "
            f"made with {samples.num_classes}."
        )
        network["num_classes"] = samples.num_classes
    if plan["hours"]:
        raise click.UsageError("--hours goes without --preset, whose recipe is of --steps.")
    model = presets.load(
        name,
        autoencoder=parts["autoencoder"],
        text_encoder=parts["text"],
        seed=seed,
        **network,
    )
    model.optimizer_config.update(optimizer)
    return model, _steps(samples, plan) or row.iterations


def _by_weights(base, known, samples, plan, begin, parts, seed, network, optimizer):
    """A model that begins at weights, its ends made for the data."""
    facts = own_data.facts_of(samples)
    if begin["num_classes"] or known.get("num_classes"):
        classes = begin["num_classes"] or samples.num_classes
        network["num_classes"] = classes or known["num_classes"]
    if begin["lora"]:
        network["lora"] = begin["lora"]
    network["image_shape"] = facts.image_shape
    if base is not None:
        model = adapt(base, **network)
        model.seed = seed
    else:
        model = presets.load(
            plan["preset"],
            begin["from"],
            key=begin["key"],
            autoencoder=parts["autoencoder"],
            text_encoder=parts["text"],
            seed=seed,
            **network,
        )
    model.optimizer_config.update({"warmup_steps": 0.05, "decay_steps": "run", **optimizer})
    return model, _steps(samples, plan)


def _by_data(samples, folder, plan, parts, seed, network, optimizer):
    model = presets.for_data(
        samples,
        steps=_steps(samples, plan),
        minutes=plan["hours"] and 60 * plan["hours"],
        folder=folder,
        network=network,
        seed=seed,
        optimizer=optimizer,
    )
    set_encoders(model, parts["autoencoder"], parts["text"])
    return model, model.planned_steps
