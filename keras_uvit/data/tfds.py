"""Images of TensorFlow Datasets: CIFAR-10, CelebA, ImageNet and whatever else has images."""

import numpy as np
from PIL import Image

from keras_uvit import backend
from keras_uvit.data import pictures, sources
from keras_uvit.data.images import ImageDataset, in_memory
from keras_uvit.optional import optional
from keras_uvit.types import PathLike


def tfds_source(
    name: str,
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    *,
    channels: int = 3,
    labels: str | None = "auto",
    captions: str | None = "auto",
    crop: tuple[int, int, int, int] | None = None,
    data_dir: PathLike | None = None,
) -> sources.Source:
    """A source of one split of a TensorFlow data set, prepared at the first use.

    Preparing needs TensorFlow, on any Keras backend; it downloads, or, for "imagenet2012", reads
    the tar files in `<data_dir>/downloads/manual`. What was prepared is then read at random access
    without TensorFlow (array_record files).

    Args:
        name: such as "cifar10", "celeb_a", "imagenet2012", "imagenet_resized/64x64",
            "coco_captions" (whose "restval+val+test" is COCO's val2014).
        split: such as "train", "train[:1000]", "validation".
        image_size: int or (height, width) in pixels, fitted as `pictures.fitted` says; `None` for
            sets whose images are all of one size.
        channels: 3 (RGB) or 1 (grey).
        labels: "auto" takes the set's classes where it has a "label"; None gives no labels.
        captions: "auto" takes the set's "captions" where it has them, and then fits images as
            `captioned.coco` does; None leaves them.
        crop: (top, left, height, width) to cut out of each image first, in pixels, or None. The
            paper's CelebA is `crop=(57, 25, 128, 128)`, `image_size=64`.
        data_dir: where data sets are kept; `None` is ~/tensorflow_datasets.

    Returns:
        `Source`; labels where the set has a "label" of known classes.

    Raises:
        ImportError: without tensorflow-datasets; `pip install "keras-uvit[tfds]"`.
        ValueError: for an unknown set or split, a set without images, sizes that differ, or files
            that must be downloaded by hand first.
    """
    sources.check_options(labels, channels)
    builder = _builder(name, data_dir)
    split_names = sorted(builder.info.splits)
    try:
        data = builder.as_data_source(split)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} has the splits {split_names}. Received: {split!r}.") from error
    texts = _captions(builder, split) if captions else None
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"{name} has no images; its features are {list(features)}.")
    shape = features["image"].shape
    size = sources.checked_size(image_size) if image_size is not None else None
    if size is None and (crop is not None or None in shape):
        raise ValueError(f"The images of {name} differ in size: say which image_size you want.")
    has_labels = labels is not None and "label" in features
    classes = getattr(features["label"], "num_classes", None) if has_labels else None
    method = "adm" if texts is None else "lanczos"

    def read(i):
        record = data[i]
        pixels = np.asarray(record["image"])
        try:
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            image = pictures.fitted(pictures.opaque(image), size, channels, crop, method)
        except (ValueError, TypeError) as error:
            raise ValueError(f"Image {i} of {name} {split} cannot be read: {error}.") from error
        sample = {"image": image}
        return {**sample, "label": int(record["label"])} if classes else sample

    return sources.Source(
        f"tfds:{name}/{split}",
        len(data),
        (*(size or shape[:2]), channels),
        read,
        num_classes=classes,
        class_names=list(features["label"].names) if classes else None,
        captions=texts,
    )


def _captions(builder, split):
    """The captions of all records, read without decoding a picture; None where there are none."""
    if "captions" not in builder.info.features:
        return None
    import tensorflow_datasets as tfds

    data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [_texts(data[k]["captions"]) for k in range(len(data))]


def _texts(captions):
    """Captions as a list of str, from a sequence of texts, or of dicts with "text"."""
    texts = captions["text"] if isinstance(captions, dict) else captions
    texts = [texts] if isinstance(texts, str | bytes) else texts
    texts = [text["text"] if isinstance(text, dict) else text for text in texts]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def _builder(name, data_dir):
    tfds = optional("tensorflow_datasets", "tfds", "TensorFlow Datasets are an extra")
    backend.keep_tensorflow_off_accelerators()
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(
            f"tensorflow-datasets has no {name!r}. All: tensorflow_datasets.list_builders()."
        ) from error
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # how it says which files to download by hand, and where to
        raise ValueError(f"{name} is not prepared: {error}") from error
    return builder


def tfds_images(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    split: str = "train",
    *,
    channels: int = 3,
    labels: str | None = "auto",
    crop: tuple[int, int, int, int] | None = None,
    data_dir: PathLike | None = None,
    batch_size: int | None = 64,
    flip: bool = True,
    seed: int = 0,
    verbose: int = 1,
) -> ImageDataset:
    """A TensorFlow data set of images in memory, for `DiffusionModel.fit`.

    Args:
        name, image_size, split, channels, labels, crop, data_dir: see `tfds_source`.
        batch_size: int, at most the number of images.
        flip: bool. Mirror each image left to right with probability 1/2, drawn again each epoch.
        seed: int.
        verbose: 0 or 1. Progress bar.

    Returns:
        `ImageDataset`, a `keras.utils.PyDataset` of dicts "image" `(B, H, W, C)` uint8 and, with
        classes, "label" `(B,)` int32.

    Raises:
        ImportError, ValueError: see `tfds_source`; also for more than 4 GiB of images, which
            `write_images` is for.
    """
    source = tfds_source(
        name,
        split,
        image_size,
        channels=channels,
        labels=labels,
        captions=None,
        crop=crop,
        data_dir=data_dir,
    )
    return in_memory(source, batch_size, flip=flip, seed=seed, verbose=verbose)
