"""What people type in a shell, and the objects that are meant: data, models, options."""

from pathlib import Path

import click
import keras

from keras_uvit import data, distribution, presets
from keras_uvit.data import captioned, sources
from keras_uvit.data.manifest import MANIFEST, read_manifest
from keras_uvit.evaluation.files import read_npz
from keras_uvit.evaluation.protocol import USUAL_PROMPTS
from keras_uvit.latent import AutoencoderKL, CLIPText
from keras_uvit.training import DiffusionModel, load_checkpoint
from keras_uvit.training.checkpoints import steps_in


def options(*shared):
    """Applies several options to a command."""

    def apply(command):
        for option in reversed(shared):
            command = option(command)
        return command

    return apply


SOURCE_OPTIONS = options(
    click.option("--image-size", type=int, help="Pixels; images are fitted and cut at the centre."),
    click.option("--split", default="train", show_default=True, help="Of tfds: and coco:."),
    click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True),
    click.option("--crop", type=int, nargs=4, help="TOP LEFT HEIGHT WIDTH to cut out first."),
    click.option("--data-dir", type=click.Path(), help="Where TensorFlow data sets are kept."),
)
MODEL_OPTIONS = options(
    click.option("--weights", help='File of weights, or "pretrained" for a preset that has them.'),
    click.option("--autoencoder", type=click.Path(), help="Weights, for models of latents."),
    click.option("--text", help="CLIP for models of text: a folder, or a preset of keras-hub."),
)
PROMPT = click.option("--prompt", multiple=True, help="What to draw; once for each image.")
SAMPLING_OPTIONS = options(
    click.option("--sampler", help="Name; the model's."),
    click.option("--num-steps", type=int, help="The model's."),
    click.option("--guidance-scale", type=float, help="1.0 is off; the model's."),
    click.option("--fast", is_flag=True, help="Few steps, guided where it matters: presets.FAST."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--batch-size", type=int, help="Images at a time; what is fast here."),
    click.option("--raw", is_flag=True, help="The weights themselves, not their moving average."),
)
RESIZE = click.option(
    "--resize",
    type=click.Choice(["half_pixel", "tf1"]),
    default="half_pixel",
    show_default=True,
    help="half_pixel as pytorch-fid and the paper, tf1 as torch-fidelity and the ADM suite.",
)
INCEPTION = click.option(
    "--inception",
    required=True,
    type=click.Path(),
    help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or .safetensors of it.",
)

PRECISIONS = ["float32", "mixed_bfloat16", "mixed_float16"]
RUN_OPTIONS = options(
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="float32",
        show_default=True,
        help="mixed_bfloat16 on accelerators that have it.",
    ),
    click.option(
        "--devices",
        type=click.Choice(distribution.DEVICES),
        default="one",
        show_default=True,
        help="All of this machine, or of a job of several processes.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["data", *distribution.LAYOUTS]),
        default="data",
        show_default=True,
        help="What several devices divide: only data, or weights too.",
    ),
    click.option("--model-devices", type=int, help="That share a copy, with --layout tensor."),
    click.option(
        "--save-every", type=int, default=1000, show_default=True, help="Steps between checkpoints."
    ),
)


def open_source(spec, image_size, split, channels, crop, data_dir):
    """A `Source` from what was typed."""
    channels = int(channels)
    if spec == "digits" or spec.endswith(".npz"):
        if image_size or crop:
            raise click.UsageError(f"{spec} is taken as it is: no --image-size, no --crop.")
        content = data.digits() if spec == "digits" else read_npz(spec, "images")
        return sources.arrays(content, Path(spec).name)
    if spec.startswith("tfds:"):
        return data.tfds_source(
            spec[5:], split, image_size, channels=channels, crop=crop, data_dir=data_dir
        )
    if spec.startswith("shapes:"):
        if image_size or crop or channels != 3:
            raise click.UsageError("shapes: are 32x32 in colour: no --image-size, --crop, ...")
        return data.shapes.source(_count(spec), split)
    if spec.startswith("coco:"):
        if crop or channels != 3:
            raise click.UsageError("COCO is cut at the centre, in colour: no --crop, --channels.")
        split = {"train": "train2014", "val": "val2014"}.get(split, split)
        return captioned.coco(spec[5:], split, image_size or 256)
    if image_size is None and Path(spec).is_dir():
        raise click.UsageError("A folder of images needs --image-size.")
    if (Path(spec) / captioned.CAPTIONS).is_file():
        return captioned.captioned_folder(spec, image_size, channels=channels, crop=crop)
    return sources.folder(spec, image_size or 1, channels=channels, crop=crop)


def _count(spec):
    count = spec.partition(":")[2]
    if not count.isdigit() or not int(count):
        raise click.UsageError(f"Expected a number of pictures, shapes:20000. Received: {spec}.")
    return int(count)


def read_prompts(path):
    """The prompts of a text file, one a line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file of prompts at {path}.")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: expected one a line.")
    return prompts


def open_prompts(spec, split, count, seed):
    """Prompts of a text file, or one random caption each of a source's pictures."""
    is_source = spec.startswith(("coco:", "tfds:", "shapes:")) or Path(spec).is_dir()
    if not is_source:
        prompts = read_prompts(spec)
        if count and count > len(prompts):
            raise ValueError(f"{spec} holds {len(prompts)} prompts, fewer than {count}.")
        return prompts[:count]
    size = None if spec.startswith("shapes:") else 256
    captions = open_source(spec, size, split, 3, None, None).captions
    if captions is None:
        raise ValueError(f"{spec} has no captions.")
    return captioned.random_prompts(captions, count or min(USUAL_PROMPTS, len(captions)), seed)


def has_checkpoints(name):
    """Whether it is a folder of a run's checkpoints."""
    return bool(steps_in(name))


def open_model(name, weights, autoencoder, text):
    """A `DiffusionModel` of a preset's name, a saved `.keras` file or a folder of checkpoints."""
    is_run = has_checkpoints(name)
    if not is_run and not name.endswith(".keras"):
        return presets.load(name, weights, autoencoder=autoencoder, text_encoder=text)
    if weights is not None:
        raise click.UsageError("--weights go with a preset; a saved model has its own.")
    model = load_checkpoint(name) if is_run else keras.saving.load_model(name, compile=False)
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"{name} holds a {type(model).__name__}, not a DiffusionModel.")
    if autoencoder is not None:
        model.autoencoder = AutoencoderKL.from_file(autoencoder, scale=model.latent_scale or 1.0)
    if text is not None:
        model.text_encoder = CLIPText.from_preset(text)
    return model


def open_dataset(spec, image_shape, labels, captions, batch_size, seed):
    """What `train` reads: a cache, or what `open_source` takes, in memory."""
    height, width, channels = image_shape
    shared = {"batch_size": batch_size, "seed": seed, "labels": labels}
    if (Path(spec) / MANIFEST).is_file():
        is_latent = read_manifest(spec)["field"] == "moments"
        reader = data.LatentDataset if is_latent else data.image_shards
        return reader(spec, captions=captions, **shared)
    if captions:
        raise ValueError(
            f"Models of text are trained on a cache: `keras-uvit encode {spec} CACHE --text ...` "
            "makes one."
        )
    if spec.startswith("tfds:"):
        return data.tfds_images(spec[5:], (height, width), channels=channels, **shared)
    if spec == "digits":
        digits = sources.arrays(data.digits(), "digits")
        return data.images.in_memory(digits, batch_size, flip=False, seed=seed)
    return data.image_folder(spec, (height, width), channels=channels, **shared)


def numbers(context, option, text):
    """A list of the ints in "1,2,3"."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise click.BadParameter(f"expected class numbers such as 207,360. Received: {text}.")
    return [int(part) for part in parts]


def sampling(sampler, num_steps, guidance_scale, fast, seed, batch_size, raw):
    """The arguments of `generate` that were given; they win over those of --fast."""
    given = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}
    given = {key: value for key, value in given.items() if value is not None}
    return {
        **(presets.FAST if fast else {}),
        **given,
        "seed": seed,
        "batch_size": batch_size,
        "use_ema": not raw,
    }
