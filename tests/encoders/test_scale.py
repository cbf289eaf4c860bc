"""The scale of latents of one's own: found before encoding, changed afterwards, kept in files."""

import numpy as np
import pytest

from keras_uvit import DiffusionModel, UViT, data
from keras_uvit.encoders import AutoencoderKL, SpaceToDepth, fitting_scale

pytestmark = pytest.mark.once

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype("uint8")


@pytest.mark.parametrize("source", [IMAGES, data.sources.arrays(IMAGES)])
def test_scaled_latents_have_variance_one(source):
    scale = fitting_scale(SpaceToDepth(2), source, num_images=64, verbose=0)
    scaled = SpaceToDepth(2, scale=scale)
    latents = scaled.sample(scaled.encode(IMAGES))
    assert latents.std() == pytest.approx(1.0, rel=1e-3)  # the scale has four digits


def test_latents_that_do_not_vary_are_named():
    with pytest.raises(ValueError, match="all equal"):
        fitting_scale(SpaceToDepth(2), np.full_like(IMAGES, 7), verbose=0)


def test_the_advice_of_fit_can_be_followed(tmp_path):
    data.write_latents(IMAGES, tmp_path, SpaceToDepth(2, scale=0.1), verbose=0)
    network = UViT((4, 4, 4), 2, 16, num_layers=1, num_heads=2)
    model = DiffusionModel(network, latent_scale=0.1)
    model.compile()
    cache = data.LatentDataset(tmp_path, 16, verbose=0)
    with pytest.raises(ValueError, match="scale that fits is 1.7") as refused:
        model.fit(cache, verbose=0)
    scale = float(str(refused.value).split("latent_scale=")[-1].split(",")[0])
    model = DiffusionModel(network, latent_scale=scale)
    model.compile()
    model.fit(data.LatentDataset(tmp_path, 16, scale=scale, verbose=0), verbose=0)
    model.set_encoders(autoencoder=SpaceToDepth(2, scale=scale))


def test_a_saved_autoencoder_loads_by_its_path(tmp_path):
    tiny = AutoencoderKL(32, (1, 1), 1, scale=0.5, id="mine")
    tiny.save(tmp_path / "a.keras")
    loaded = AutoencoderKL.from_file(tmp_path / "a.keras")
    assert (loaded.scale, loaded.id, loaded.fingerprint) == (0.5, "mine", tiny.fingerprint)
    assert AutoencoderKL.from_file(tmp_path / "a.keras", scale=0.25).scale == 0.25


def test_what_is_no_saved_autoencoder_is_named(tmp_path):
    DiffusionModel(UViT((4, 4, 4), 2, 16, num_layers=1, num_heads=2)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="Expected an AutoencoderKL .* DiffusionModel"):
        AutoencoderKL.from_file(tmp_path / "m.keras")
    (tmp_path / "d.keras").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"d\.keras is damaged"):
        AutoencoderKL.from_file(tmp_path / "d.keras")
