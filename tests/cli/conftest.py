"""What the tests of the commands share: small presets, small encoders, data with captions."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from shell import SCENES

from keras_uvit import presets
from keras_uvit.encoders import AutoencoderKL, CLIPText

SMALL = dict(patch_size=4, hidden_dim=16, num_layers=1, num_heads=2)
FEW = dict(weights=None, sampler="ddim", num_steps=2)
DIGITS, SHAPES = presets.get("uvit_tiny_digits"), presets.get("uvit_tiny_shapes")
ROWS = {
    "uvit_nano_digits": (DIGITS, dict(image_shape=(8, 8, 1), num_classes=10, **SMALL)),
    "uvit_nano_colour": (DIGITS, dict(image_shape=(8, 8, 3), **SMALL)),
    "uvit_nano_latent": (DIGITS, dict(image_shape=(4, 4, 4), num_classes=10, **SMALL)),
    "uvit_nano_shapes": (SHAPES, {**SHAPES.network, "hidden_dim": 16, "num_layers": 1}),
}
OTHER = {
    "uvit_nano_colour": dict(condition_dropout=0.0, guidance_scale=1.0),
    "uvit_nano_latent": dict(latent_scale=1.0),
}


@pytest.fixture(scope="module", autouse=True)
def _rows():
    """Presets with networks that train in a second."""
    rows = {
        name: dataclasses.replace(row, network=network, **FEW, **OTHER.get(name, {}))
        for name, (row, network) in ROWS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, row in rows.items():
            patch.setitem(presets.PRESETS, name, row)
        yield


@pytest.fixture
def small_autoencoder(monkeypatch):
    """`AutoencoderKL()` of few weights; the true one has 83.7 million."""
    init = AutoencoderKL.__init__

    def small(self, *arguments, **options):
        tiny = dict(base_dim=32, multipliers=(1, 1), num_res_blocks=1)
        init(self, *arguments, **{**tiny, **options})

    monkeypatch.setattr(AutoencoderKL, "__init__", small)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """An untrained text encoder of the shape that `uvit_nano_shapes` reads."""
    folder = tmp_path_factory.mktemp("clip") / "words"
    CLIPText.random(SCENES, length=12, hidden_dim=64, vocabulary_size=600).save(folder)
    return folder


@pytest.fixture
def coco(tmp_path):
    """Six pictures with one to three captions, as COCO keeps them."""
    folder = tmp_path / "coco"
    (folder / "train2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for k in range(6):
        picture = Image.fromarray(np.full((20, 30, 3), 40 * k, "uint8"))
        picture.save(folder / "train2014" / f"{k}.jpg")
        images.append({"id": k, "file_name": f"{k}.jpg"})
        annotations += [{"image_id": k, "caption": SCENES[(k + j) % 40]} for j in range(1 + k % 3)]
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_train2014.json").write_text(json.dumps(content))
    return folder
