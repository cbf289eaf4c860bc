"""`encode` and `convert`: what the options do to the files; the formats have tests of their own."""

import json
import re

import numpy as np
import pytest
from shell import PICTURES, SCENES, refused, run, save_pngs

from keras_uvit import data, presets
from keras_uvit.data import captioned
from keras_uvit.encoders import AutoencoderKL, SpaceToDepth
from keras_uvit.inference import fingerprint

pytestmark = pytest.mark.once

STAND_IN = ("--autoencoder", "space-to-depth")


def latents(folder, batch_size=4):
    return data.LatentDataset(folder, batch_size, verbose=0)


# encode -------------------------------------------------------------------------------------------


def test_encode_digits_with_mirror_images_by_two_processes_and_no_other_options(tmp_path):
    words = ("encode", "digits", tmp_path, *STAND_IN, "--flip")
    words += ("--shard-size", 400, "--batch-size", 256)
    assert "the shares of others are still missing" in run(*words, "--process", "0/2")
    assert f"{tmp_path}: {2 * 1437} samples" in run(*words, "--process", "1/2")
    cache = latents(tmp_path)
    assert cache.num_samples == 2 * 1437
    assert (cache.num_classes, cache.fingerprint) == (10, "space-to-depth-2")
    assert cache.manifest["flip"] == "stored"
    image = data.digits()["image"][:1]
    expected = SpaceToDepth().encode(np.concatenate([image, image[:, :, ::-1]]))
    # float16: half a unit in the last of 11 bits, of values up to 1 (the log-variance is exact).
    np.testing.assert_allclose(cache.arrays["moments"][:2], expected, atol=2**-12)
    assert "dtype was float16, is float32" in refused(*words, "--dtype", "float32")


def test_encode_a_folder_of_pictures_with_classes(tmp_path):
    photos = save_pngs(tmp_path / "photos", classes=("cats", "dogs"))
    run("encode", photos, tmp_path / "cache", *STAND_IN, "--image-size", 4)
    found = latents(tmp_path / "cache")
    assert found.manifest["class_names"] == ["cats", "dogs"]
    assert found.sample_shape == (2, 2, 24)
    grey = ("--image-size", 2, "--channels", 1, "--crop", 1, 2, 4, 5)
    run("encode", photos, tmp_path / "grey", "--pixels", *grey)
    assert data.image_shards(tmp_path / "grey", 4, verbose=0).images.shape == (12, 2, 2, 1)


@pytest.mark.usefixtures("small_autoencoder")
def test_encode_with_a_file_of_weights(tmp_path):
    autoencoder = AutoencoderKL()
    autoencoder.save_weights(tmp_path / "mine.weights.h5")
    np.savez(tmp_path / "a.npz", image=PICTURES)
    words = ("encode", tmp_path / "a.npz", tmp_path / "cache", "--scale", 0.5)
    run(*words, "--autoencoder", tmp_path / "mine.weights.h5", "--dtype", "float32")
    found = latents(tmp_path / "cache")
    assert (found.scale, found.autoencoder_id) == (0.5, "mine")
    assert found.fingerprint == autoencoder.fingerprint


def test_encode_coco(coco, clip, tmp_path):
    words = ("encode", f"coco:{coco}", tmp_path / "cache", "--split", "train", "--image-size", 16)
    text = run(*words, *STAND_IN, "--text", clip)
    assert "float16 contexts of 12 captions" in text
    assert "6 samples" in text
    cache = latents(tmp_path / "cache", 6)
    assert list(cache.contexts.rows[:, 1]) == [1, 2, 3, 1, 2, 3]
    assert (cache.contexts.context_shape, cache.contexts.id) == ((12, 64), "words")
    words = ("encode", f"coco:{coco}", tmp_path / "other", "--image-size", 16, "--pixels")
    assert "6 samples" in run(*words, "--no-captions")


def test_encode_a_folder_with_captions(clip, tmp_path):
    folder = save_pngs(tmp_path / "photos", PICTURES[:3])
    lines = [json.dumps({"file_name": f"{k:02d}.png", "captions": [SCENES[k]]}) for k in range(3)]
    (folder / captioned.CAPTIONS).write_text("\n".join(lines))
    run("encode", folder, tmp_path / "cache", "--image-size", 8, "--pixels", "--text", clip)
    cache = data.image_shards(tmp_path / "cache", 3, verbose=0)
    assert set(cache[0]) == {"image", "context"}
    assert not cache.flip


# convert ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_autoencoder")
def test_convert_there_and_back_is_exact(tmp_path):
    names = ("a.keras", "new/a.safetensors", "b.weights.h5")
    first, published, back = (tmp_path / name for name in names)
    autoencoder = AutoencoderKL()
    autoencoder.save(first)
    text = run("convert", "autoencoder", first, published)
    assert re.fullmatch(rf"{re.escape(str(published))}: [\d,]+ weights\n", text)
    run("convert", "autoencoder", published, back)
    other = AutoencoderKL.from_file(back)
    assert fingerprint(other.encoder) == fingerprint(autoencoder.encoder)
    assert fingerprint(other.decoder) == fingerprint(autoencoder.decoder)


def test_convert_the_weights_of_a_preset(tmp_path):
    network = presets.get("uvit_nano_digits").new_network()
    network.save_weights(tmp_path / "a.weights.h5")
    run("convert", "uvit_nano_digits", tmp_path / "a.weights.h5", tmp_path / "a.safetensors")
    model = presets.load("uvit_nano_digits", tmp_path / "a.safetensors")
    assert fingerprint(model.network) == fingerprint(network)
    line = refused("convert", "uvit_nano_colour", tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert "a.safetensors" in line
