"""Real data without a download: the 1,797 handwritten digits bundled with scikit-learn."""

import numpy as np

from keras_uvit.optional import optional

NUM_TEST = 360


def digits(split: str = "train") -> dict[str, np.ndarray]:
    """Handwritten digits, 8x8, a fixed split with equal shares of each class.

    Args:
        split: "train" (1,437 scans) or "test" (360).

    Returns:
        dict for `DiffusionModel.fit`: "image" `(n, 8, 8, 1)` uint8 in [0, 255], white on black,
        "label" `(n,)` int32 in [0, 10).

    Raises:
        ImportError: without scikit-learn; `pip install "keras-uvit[data]"`.
        ValueError: for another split.

    Example:
        >>> digits("test")["image"].shape
        (360, 8, 8, 1)
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test". Received: {split!r}.')
    datasets = optional("sklearn.datasets", "data", "The digits come with scikit-learn")
    from sklearn.model_selection import train_test_split

    scans = datasets.load_digits()
    order = np.arange(len(scans.target))
    train, test = train_test_split(order, test_size=NUM_TEST, stratify=scans.target, random_state=0)
    rows = np.sort(train if split == "train" else test)
    image = np.round(scans.images[rows, :, :, None] * (255.0 / 16.0)).astype("uint8")
    return {"image": image, "label": scans.target[rows].astype("int32")}
