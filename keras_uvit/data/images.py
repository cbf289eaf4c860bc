"""Images in memory: your own from a folder, and TensorFlow Datasets'."""

import functools
from typing import Any

import numpy as np

from keras_uvit import progress
from keras_uvit.data import sources
from keras_uvit.data.contexts import Contexts
from keras_uvit.data.shuffled import ShuffledDataset
from keras_uvit.types import Array, PathLike

MAX_BYTES = 4 * 2**30


class ImageDataset(ShuffledDataset):
    """Batches of images, each mirrored left to right with probability 1/2, drawn again each epoch.

    Attributes:
        images: `(n, H, W, C)` uint8.
        labels: `(n,)` int32, or None.
        class_names: list of str, or None; label k is `class_names[k]`.
        num_classes: int, or None.
        skipped: list of (index, reason) left out with `corrupt="skip"`; the reason names the file.
    """

    def __init__(
        self,
        arrays: dict[str, Array],
        batch_size: int | None,
        *,
        flip: bool = True,
        contexts: Contexts | None = None,
        **about: Any,
    ) -> None:
        order = {key: about.pop(key) for key in ("seed", "process") if key in about}
        super().__init__(arrays, batch_size, contexts=contexts, **order)
        self.images, self.labels = arrays["image"], arrays.get("label")
        self.flip = flip
        self._mirrored = functools.lru_cache(maxsize=2)(self._mirror)
        self.num_classes = about.get("num_classes")
        self.class_names = about.get("class_names")
        self.skipped = about.get("skipped", [])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = super().__getitem__(index)
        if self.flip:
            rows = self.rows(self.epoch, index)
            mirrored = self._mirrored(self.epoch)[rows]
            batch["image"][mirrored] = batch["image"][mirrored, :, ::-1]
        return batch

    def split(self, share: float, seed: int = 0) -> tuple["ImageDataset", "ImageDataset"]:
        """Two sets: one without this share of the images, drawn at random, and one of it.

        The second is of whole batches too, in one order and without mirror images.

        Args:
            share: float in (0, 1).
            seed: int.

        Returns:
            (the rest, the share), both `ImageDataset`.
        """
        held = max(1, round(share * self.num_samples))
        order = np.random.default_rng([seed, 3]).permutation(self.num_samples)
        rows = np.sort(order[held:]), np.sort(order[:held])
        about = dict(num_classes=self.num_classes, class_names=self.class_names)
        sets = [
            ImageDataset(
                {key: array[chosen] for key, array in self.arrays.items()},
                min(self.batch_size, len(chosen)),
                flip=flip,
                seed=self.seed,
                **about,
            )
            for chosen, flip in zip(rows, (self.flip, False))
        ]
        sets[0].skipped = self.skipped
        return sets[0], sets[1]

    def _mirror(self, epoch):
        # Of all samples, in a stream of its own: flips do not depend on the batch size.
        return np.random.default_rng([self.seed, epoch, 1]).random(self.num_samples) < 0.5


def image_folder(
    path: PathLike,
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    labels: str | None = "auto",
    crop: tuple[int, int, int, int] | None = None,
    background: str = "white",
    batch_size: int | None = None,
    flip: bool = True,
    corrupt: str = "raise",
    seed: int = 0,
    verbose: int = 1,
) -> ImageDataset:
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
        crop: (top, left, height, width) to cut out of each file first, in pixels, or None.
        background: "white" or "black", what is seen through transparent pixels.
        batch_size: int, at most the number of images; `None` is 16 on a CPU and 128 on an
            accelerator, or all images where there are fewer.
        flip: bool. Mirror each image left to right with probability 1/2, drawn again each epoch.
        corrupt: "raise" names the first damaged file; "skip" leaves such files out and lists them
            in `.skipped`.
        seed: int.
        verbose: 0 or 1. Progress bar.

    Returns:
        `ImageDataset`, a `keras.utils.PyDataset` of dicts "image" `(B, H, W, C)` uint8 and, with
        classes, "label" `(B,)` int32.

    Raises:
        FileNotFoundError: if there is no such folder or no image in it.
        ValueError: for a damaged file, images both beside and inside sub-folders, fewer images than
            `batch_size`, or more than 4 GiB of decoded images.
    """
    source = sources.folder(
        path, image_size, channels=channels, labels=labels, crop=crop, background=background
    )
    return in_memory(source, batch_size, flip=flip, corrupt=corrupt, seed=seed, verbose=verbose)


def in_memory(
    source: sources.Source,
    batch_size: int | None = None,
    *,
    flip: bool = True,
    corrupt: str = "raise",
    seed: int = 0,
    verbose: int = 1,
) -> ImageDataset:
    """`ImageDataset` of all images of a `Source`, decoded now; see `image_folder`."""
    if corrupt not in ("raise", "skip"):
        raise ValueError(f'corrupt must be "raise" or "skip". Received: {corrupt!r}.')
    if batch_size is not None and not 1 <= batch_size <= len(source):
        raise ValueError(
            f"batch_size must be between 1 and the number of images, {len(source)}. "
            f"Received: {batch_size}."
        )
    if source.captions is not None:
        raise ValueError(
            "The source has captions, which need a text encoder: write them once with "
            "`data.write_images(source, folder, text_encoder=...)`, and read `data.image_shards`."
        )
    needed = len(source) * int(np.prod(source.shape))
    if needed > MAX_BYTES:
        raise ValueError(
            f"{len(source)} images of {'x'.join(map(str, source.shape))} need "
            f"{needed / 2**30:.1f} GiB of memory; at most {MAX_BYTES / 2**30:.0f} GiB are read. "
            "Choose a smaller image_size, or write them once with `data.write_images` (pixels) or "
            "`data.write_latents`."
        )
    arrays, skipped = _read_all(source, corrupt, verbose)
    good, least = len(arrays["image"]), batch_size or 1
    if good < least:
        raise ValueError(
            f"Only {good} of {len(source)} images could be read, fewer than batch_size={least}."
        )
    return ImageDataset(
        arrays,
        batch_size,
        flip=flip,
        seed=seed,
        num_classes=source.num_classes,
        class_names=source.class_names,
        skipped=skipped,
    )


def _read_all(source, corrupt, verbose):
    """The samples that could be read, as arrays, and [(index, reason)] of the others."""
    images, labels, skipped = np.empty((len(source), *source.shape), "uint8"), [], []
    good = 0
    bar = progress.bar(len(source), verbose, "image")
    for group in source.batches(np.arange(len(source)), 256, corrupt):
        for index, sample in group:
            if isinstance(sample, str):
                skipped.append((index, sample))
                continue
            images[good] = sample["image"]
            labels.append(sample.get("label"))
            good += 1
        bar.update(good + len(skipped))
    arrays = {"image": images[:good]}
    if source.num_classes is not None:
        arrays["label"] = np.array(labels, "int32")
    return arrays, skipped
