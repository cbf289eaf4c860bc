"""Autoencoders of functions and of diffusers, as caches and models use them."""

import functools

import numpy as np
import pytest
import torch
from tiny import refused, uvit

from keras_uvit import DiffusionModel
from keras_uvit.data import LatentDataset, latent_statistics, write_latents
from keras_uvit.encoders import CustomAutoencoder

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), "uint8")


def halves(encode=lambda x: x[:, ::2, ::2], decode=None, **options):
    def doubled(z):
        return z.repeat(2, axis=1).repeat(2, axis=2)

    given = dict(factor=2, latent_channels=3, id="every second pixel") | options
    return CustomAutoencoder(encode, decode or doubled, **given)


@functools.cache
def of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 32),
            latent_channels=6,
            scaling_factor=0.7,
            shift_factor=0.2,
        ).eval()
    blocks = dict(encoder_block_types="ResBlock", decoder_block_types="ResBlock")
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
        **blocks,
    ).eval()


@pytest.mark.each_backend
def test_two_functions_train_and_sample_a_model_of_latents(tmp_path):
    autoencoder = halves(scale=(1.0, 2.0, 3.0), shift=0.1)
    content = write_latents(PICTURES, tmp_path, autoencoder, dtype="float32", verbose=0)
    latents = LatentDataset(tmp_path, 4, verbose=0)
    assert latents.statistics == latent_statistics(latents)
    assert {key: list(value) for key, value in latents.statistics.items()} == content["statistics"]
    network = uvit(image_shape=(4, 4, 3))
    model = DiffusionModel(network, latent_scale=(1.0, 2.0, 3.0), latent_shift=0.1, num_steps=2)
    model.set_encoders(autoencoder=autoencoder)
    model.compile()
    model.fit(latents, verbose=0)
    assert model.generate(num_images=2, verbose=0).shape == (2, 8, 8, 3)
    edit = functools.partial(model.generate, image=PICTURES[:2], strength=0, verbose=0)
    np.testing.assert_array_equal(edit(), autoencoder.decode(edit(decode=False)))
    np.testing.assert_array_equal(edit()[:, ::2, ::2], PICTURES[:2, ::2, ::2])
    other = halves(id="after more training", scale=(1.0, 2.0, 3.0), shift=0.1)
    refused(
        ValueError,
        lambda: model.set_encoders(autoencoder=other),
        other.id,
        "Use the same autoencoder",
    )


def test_moments_of_a_function_are_kept_and_latents_get_no_noise():
    moments = np.random.default_rng(1).normal(size=(12, 4, 4, 6)).astype("float32")
    images = np.linspace(-1, 1, 12, dtype="float32")[:, None, None, None] * np.ones((8, 8, 3), "f4")

    def encode(x):  # of the picture's number, to see that batches are kept in order
        return moments[np.round((x[:, 0, 0, 0] + 1) * 5.5).astype(int)]

    np.testing.assert_array_equal(halves(encode).encode(images, batch_size=5), moments)
    quiet = halves().encode(images)
    np.testing.assert_array_equal(quiet[..., :3], images[:, ::2, ::2])
    # The least log-variance leaves a deviation of exp(-15) = 3e-7, and 6 of them are never passed.
    np.testing.assert_allclose(halves().sample(quiet), images[:, ::2, ::2], atol=2e-6)
    assert halves().sample(moments, seed=1).std() > moments[..., :3].std()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_an_autoencoder_of_diffusers_gives_its_own_numbers(kind):
    theirs = of_diffusers(kind)
    ours = CustomAutoencoder.from_diffusers(theirs)
    images = np.random.default_rng(2).uniform(-1, 1, (3, 16, 8, 3)).astype("float32")
    with torch.no_grad():
        given = torch.from_numpy(images).permute(0, 3, 1, 2)
        out = theirs.encode(given)
        z = out.latent_dist.mode() if kind == "AutoencoderKL" else out.latent
        back = theirs.decode(z).sample.permute(0, 2, 3, 1).numpy()
        z = z.permute(0, 2, 3, 1).numpy()
    moments = ours.encode(images, batch_size=2)
    channels = z.shape[-1]
    assert moments.shape[1:] == ours.moments_shape(images.shape[1:])
    # float32 rounding, as batches of another size are summed in another order.
    atol = 1e-5 * np.abs(z).max()
    np.testing.assert_allclose(moments[..., :channels], z, atol=atol)
    scale, shift = theirs.config.scaling_factor, theirs.config.get("shift_factor") or 0.0
    assert (ours.scale, ours.shift) == (scale, shift)
    decoded = ours.decode((z - shift) * scale).astype(int)
    wanted = np.clip(np.round((back + 1) * 127.5), 0, 255).astype(int)
    assert np.abs(decoded - wanted).max() <= 1  # a level where rounding falls otherwise
    if kind == "AutoencoderKL":
        with torch.no_grad():
            expected = out.latent_dist.logvar.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(moments[..., channels:], expected, atol=1e-5)


def test_the_fingerprint_of_diffusers_is_of_the_encoders_weights():
    theirs = of_diffusers("AutoencoderKL")
    before = CustomAutoencoder.from_diffusers(theirs).fingerprint
    assert CustomAutoencoder.from_diffusers(theirs).fingerprint == before
    parameters = dict(theirs.named_parameters())
    for name, changes in [("decoder.conv_in.bias", False), ("encoder.conv_in.bias", True)]:
        parameters[name].data += 1
        after = CustomAutoencoder.from_diffusers(theirs).fingerprint
        parameters[name].data -= 1
        assert (after != before) == changes


def test_what_is_no_autoencoder_or_gives_other_shapes_is_refused():
    refused(TypeError, lambda: halves(encode="vae.pth"), "encode is a function", "vae.pth")
    refused(ValueError, lambda: halves(factor=0), "factor")
    refused(ValueError, lambda: halves(scale=(1.0, 2.0)), "3 channels")
    refused(TypeError, lambda: CustomAutoencoder.from_diffusers(object()), "AutoencoderDC")
    for images, words in [
        (PICTURES[..., :1], "3 channels"),
        (PICTURES[:, :7], "multiples of 2"),
        (PICTURES[0], "(n, height, width, channels)"),
        (PICTURES.astype("int32"), "uint8"),
    ]:
        refused((ValueError, TypeError), lambda images=images: halves().encode(images), words)
    refused(ValueError, lambda: halves(lambda x: x).encode(PICTURES), "(4, 4, 3)", "(8, 8, 3)")
    wrong = halves(decode=lambda z: z)
    refused(ValueError, lambda: wrong.decode(np.zeros((1, 4, 4, 3), "f4")), "(8, 8, 3)")
    refused(ValueError, lambda: wrong.decode(np.full((1, 4, 4, 3), np.nan)), "NaN")
