"""A small, fast stand-in for `InceptionFeatures`, with its attributes and keys."""

import numpy as np

from keras_uvit.evaluation import Reference, reference_statistics

WIDTHS = {"pool": 16, "spatial": 12, "logits": 10, "logits_unbiased": 10}


class StubInception:
    """Fixed random projections of a 2 x 2 thumbnail.

    In integers up to the last division, so that an image's features do not depend on its batch.
    """

    def __init__(self, resize="half_pixel", fingerprint="0123456789abcdef"):
        self.resize, self.fingerprint = resize, fingerprint
        rng = np.random.default_rng(0)
        self.kernels = {key: rng.integers(-9, 10, (12, width)) for key, width in WIDTHS.items()}
        self.batches = []  # the length of each call's

    def __call__(self, images, batch_size=None, verbose=1):
        n, height, width, _ = images.shape
        self.batches.append(n)
        blocks = images.astype("int64").reshape(n, 2, height // 2, 2, width // 2, 3)
        sums = blocks.sum(axis=(2, 4)).reshape(n, -1)
        area = 255 * height * width / 4
        return {
            key: (sums @ kernel / area).astype("float32") for key, kernel in self.kernels.items()
        }


def random_images(n, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), "uint8")


def reference(inception=None, n=40, size=8, **options) -> Reference:
    images = random_images(n, size, seed=1)
    return reference_statistics(images, inception or StubInception(), verbose=0, **options)
