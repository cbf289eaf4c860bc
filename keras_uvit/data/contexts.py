"""Captions as a cache keeps them: the text encoder's contexts, several an image."""

import numpy as np

from keras_uvit.types import Array


class Contexts:
    """The contexts of all captions of a cache; each visit to an image draws one of its captions.

    Contexts are stored, not token ids: for COCO 49 GB in float16 beside 64 MB. In return no text
    encoder is loaded or run in training, where CLIP's would add 14 % to the work of U-ViT-S/2
    (6.6 GMACs a caption to 3 x 16.2), and what is trained on is fixed by checksums.

    Args:
        array: `(m, length, width)` float, contexts of all captions; may be mapped.
        rows: `(n, 2)` int: the first row in `array` of each image, and how many it has.
        null_context: `(length, width)`, the empty prompt's.
        about: dict with "id" and "fingerprint" of the text encoder.
    """

    def __init__(
        self, array: Array, rows: np.ndarray, null_context: np.ndarray, about: dict[str, str]
    ) -> None:
        self.array, self.rows, self.null_context = array, rows, null_context
        self.id, self.fingerprint = about["id"], about["fingerprint"]
        self.context_shape = tuple(array.shape[1:])

    def chosen(self, seed: int, epoch: int) -> np.ndarray:
        """The row of `array` for each image: one caption at random, a function of (seed, epoch)."""
        # Of all images, in a stream of its own: captions do not depend on the batch size.
        random = np.random.default_rng([seed, epoch, 2]).random(len(self.rows))
        first, count = self.rows.T
        return first + (random * count).astype("int64")
