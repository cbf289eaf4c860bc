"""Your own images from a folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
MAX_BYTES = 4 * 2**30


class ImageFolder(keras.utils.PyDataset):
    """Batches of a folder's images, all of them decoded into memory once; see `image_folder`.

    The order of epoch e is a pure function of (seed, e). Every batch is full: a remainder smaller
    than `batch_size` waits for the next epoch's order.

    Attributes:
        images: `(n, H, W, C)` uint8.
        labels: `(n,)` int32, or None.
        class_names: list of str, or None; label k is `class_names[k]`.
        num_classes: int, or None.
        skipped: list of (path, reason) left out with `corrupt="skip"`.
    """

    shuffles_itself = True  # `DiffusionModel.fit` keeps Keras from shuffling once more

    def __init__(self, images, labels, class_names, skipped, batch_size, flip, seed):
        super().__init__()
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else None
        self.skipped = skipped
        self.batch_size = batch_size
        self.flip = flip
        self.seed = seed
        self.epoch = 0
        self._begun = False

    def __len__(self):
        return len(self.images) // self.batch_size

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.images))
        flipped = rng.random(len(self.images)) < 0.5
        rows = order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self.images[rows]
        if self.flip:
            mirror = flipped[rows]
            images[mirror] = images[mirror, :, ::-1]
        batch = {"image": images}
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        return batch

    def on_epoch_begin(self):
        # Keras ends epochs more often than it begins them.
        self.epoch += self._begun
        self._begun = True


def image_folder(
    path,
    image_size,
    *,
    channels=3,
    labels="auto",
    batch_size=64,
    flip=True,
    corrupt="raise",
    seed=0,
    verbose=1,
):
    """Reads a folder of images for `DiffusionModel.fit`: class sub-folders, or just images.

    Each image is upright by its EXIF tag, shrunk by box-filtered halving and then bicubic until it
    just covers `image_size`, and cropped at the centre (the ADM crop, Dhariwal and Nichol 2021).
    All are decoded once, by several threads, before training begins, so a damaged file is found
    at once.

    Args:
        path: the folder. With sub-folders that hold images, each is a class, in sorted order.
        image_size: int or (height, width) in pixels.
        channels: 3 (RGB) or 1 (grey).
        labels: "auto" takes sub-folders as classes where there are any; None gives no labels.
        batch_size: int, at most the number of images.
        flip: bool. Mirror each image left to right with probability 1/2, anew each epoch.
        corrupt: "raise" names the first damaged file; "skip" leaves such files out and lists them
            in `.skipped`.
        seed: int.
        verbose: 0 or 1. Progress bar.

    Returns:
        `ImageFolder`, a `keras.utils.PyDataset` of dicts "image" `(B, H, W, C)` uint8 and, with
        classes, "label" `(B,)` int32.

    Raises:
        ImportError: without Pillow; `pip install "keras-uvit[data]"`.
        FileNotFoundError: if there is no such folder or no image in it.
        ValueError: for a damaged file, images both beside and inside sub-folders, fewer images than
            `batch_size`, or more than 4 GiB of decoded images.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if corrupt not in ("raise", "skip"):
        raise ValueError(f'corrupt must be "raise" or "skip". Received: {corrupt!r}.')
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"image_size must be an int or (height, width), at least 1. Received: {image_size}."
        )
    if labels not in ("auto", None):
        raise ValueError(f'labels must be "auto" or None. Received: {labels!r}.')
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3. Received: {channels}.")
    files, classes = _files(Path(path), labels)
    if batch_size < 1 or batch_size > len(files):
        raise ValueError(
            f"batch_size must be between 1 and the number of images, {len(files)}. "
            f"Received: {batch_size}."
        )
    needed = len(files) * size[0] * size[1] * channels
    if needed > MAX_BYTES:
        raise ValueError(
            f"{len(files)} images of {size[0]}x{size[1]}x{channels} need {needed / 2**30:.1f} GiB "
            f"of memory; image_folder reads at most {MAX_BYTES / 2**30:.0f} GiB. Choose a smaller "
            "image_size, or train on latents."
        )
    images, skipped = _read_all(files, size, channels, corrupt, verbose)
    good = [i for i in range(len(files)) if i not in skipped]
    if len(good) < batch_size:
        raise ValueError(
            f"Only {len(good)} of {len(files)} images could be read, fewer than "
            f"batch_size={batch_size}."
        )
    if skipped:
        images = images[good]
    names = classes and sorted(set(classes))
    ids = classes and np.array([names.index(classes[i]) for i in good], "int32")
    left_out = [(files[i], reason) for i, reason in sorted(skipped.items())]
    return ImageFolder(images, ids, names, left_out, batch_size, flip, seed)


def _files(path, labels):
    """Image files in sorted order, and the class of each or None."""
    if not path.is_dir():
        raise FileNotFoundError(f"No folder at {path}.")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise FileNotFoundError(f"No image in {path}. Looked for {', '.join(sorted(EXTENSIONS))}.")
    classes = [p.relative_to(path).parts[0] if p.parent != path else None for p in found]
    if labels is None or not any(classes):
        return found, None
    if not all(classes):
        stray = found[classes.index(None)].name
        raise ValueError(
            f"{path} has images both beside and inside sub-folders ({stray} has no class). "
            "Move them, or pass labels=None."
        )
    return found, classes


def _read_all(files, size, channels, corrupt, verbose):
    """`(n, H, W, C)` uint8, and {index: reason} of files that could not be read."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('Reading images needs Pillow: pip install "keras-uvit[data]".') from error

    def read(file):
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):  # Pillow would clip at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
                image = image.convert("RGB" if channels == 3 else "L")
                return np.asarray(_centre_crop(image, size)).reshape(*size, channels), None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return None, f"{type(error).__name__}: {error}"

    images, skipped = np.zeros((len(files), *size, channels), "uint8"), {}
    bar = keras.utils.Progbar(len(files), verbose=verbose, unit_name="image")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, (image, reason) in enumerate(pool.map(read, files)):
            if image is not None:
                images[i] = image
            elif corrupt == "skip":
                skipped[i] = reason
            else:
                pool.shutdown(cancel_futures=True)
                raise ValueError(
                    f"{files[i]} cannot be read ({reason}). Mend or remove it, or pass "
                    'corrupt="skip".'
                )
            if (i + 1) % 100 == 0 or i + 1 == len(files):
                bar.update(i + 1)
    return images, skipped


def _centre_crop(image, size):
    """Shrinks a PIL image until it just covers (height, width), then cuts the middle out."""
    from PIL import Image

    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covered = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covered, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
