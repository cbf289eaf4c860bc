"""The autoencoder against the published program and diffusers, and what a cache relies on."""

import json
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras import ops
from safetensors.numpy import load_file, save_file

from keras_uvit.convert import autoencoder as names
from keras_uvit.convert import load_torch_weights, save_torch_weights
from keras_uvit.encoders import AutoencoderKL, SpaceToDepth

pytestmark = [pytest.mark.eager, pytest.mark.once]

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"base_dim": 32, "multipliers": (1, 1), "num_res_blocks": 1}
SAFETENSORS = "diffusion_pytorch_model.safetensors"

# Largest error over largest value. Measured 3e-6 on every backend: float32 sums of up to 600 terms
# in another order, a dozen convolutions deep. The group norm's epsilon 1e-5 in place of 1e-6 moves
# answers by more.
PARITY = 1e-5


def _randomize(network, seed=0):
    """Every weight, norms and biases too: one left at its start would hide a forgotten one."""
    rng = np.random.default_rng(seed)
    values = []
    for weight in network.weights:
        noise = rng.standard_normal(weight.shape, "float32")
        if len(weight.shape) == 4:
            values.append(noise / np.sqrt(np.prod(weight.shape[:3]), dtype="float32"))
        else:
            values.append(np.float32(weight.name == "gamma") + np.float32(0.2) * noise)
    network.set_weights(values)
    return network


def _tiny(seed=0, **arguments):
    return _randomize(AutoencoderKL(**{**TINY, **arguments}), seed)


@pytest.fixture(scope="module")
def tiny():
    """Shared by the tests that change no weight, so that it is compiled once."""
    return _tiny()


def _images(n=2, height=8, width=8, channels=3, seed=1):
    shape = (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, "uint8")


def _run(network, x):
    """The network as it is now, all at once: none of the batches and programs under test."""
    call, x = lambda x: network(x, training=False), np.asarray(x, "float32")
    if keras.config.backend() == "jax":  # slow one operation at a time
        import jax

        call = jax.jit(call)
    return ops.convert_to_numpy(call(x))


def _encoded(autoencoder, images):
    """Moments of uint8 images."""
    return _run(autoencoder.encoder, images.astype("float32") / np.float32(127.5) - 1)


def _decoded(autoencoder, latents):
    """What the decoder says of unscaled latents, before it becomes uint8."""
    return _run(autoencoder.decoder, latents)


def _levels(images):
    """Floats in [-1, 1] as the uint8 they stand for."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype("uint8")


def _error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def _assert_same_images(ours, theirs):
    """Equal but where rounding to 256 levels falls on the other side, once in some hundreds."""
    assert ours.dtype == theirs.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# The published program ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """The recorded answers, channels last, and the network that must give them."""
    case = json.loads((GOLDEN / "cases.json").read_text())["autoencoder_kl"]
    network = AutoencoderKL.from_file(
        GOLDEN / "autoencoder_kl.pth",
        base_dim=case["ch"],
        multipliers=case["ch_mult"],
        num_res_blocks=case["num_res_blocks"],
    )
    with np.load(GOLDEN / "autoencoder_kl.npz") as file:
        data = {k.replace("_nchw", ""): a.transpose(0, 2, 3, 1) for k, a in file.items() if a.ndim}
        return types.SimpleNamespace(network=network, scale=float(file["scale_factor"]), **data)


@pytest.mark.each_backend
@pytest.mark.compiled
def test_moments_are_the_published_programs(golden):
    assert _error(golden.network.encode(golden.image, verbose=0), golden.moments) <= PARITY


@pytest.mark.each_backend
def test_decoded_latents_are_the_published_programs(golden):
    ours = _decoded(golden.network, golden.z / golden.scale)
    assert _error(ours, golden.decoded) <= PARITY


@pytest.mark.each_backend
@pytest.mark.compiled
def test_decoded_images_are_the_published_programs(golden):
    assert golden.network.scale == 0.18215 == pytest.approx(golden.scale)  # float32 there
    _assert_same_images(golden.network.decode(golden.z), _levels(golden.decoded))


def test_a_call_encodes_to_the_mean_and_decodes(golden):
    ours = _run(golden.network, golden.image)
    mean = golden.moments[..., :4]
    assert _error(ours, _decoded(golden.network, mean)) <= PARITY


def _published_shapes(ch, ch_mult, num_res_blocks, z=4, image=3):
    """{name: shape} as the published program's constructors make them."""
    shapes = {}

    def conv(name, out, into, size):
        shapes.update({f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def mid(side, width):
        block(f"{side}.mid.block_1", width, width)
        norm(f"{side}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", width, width, 1)
        block(f"{side}.mid.block_2", width, width)

    conv("encoder.conv_in", ch, image, 3)
    width = ch
    for i, multiplier in enumerate(ch_mult):
        for j in range(num_res_blocks):
            block(f"encoder.down.{i}.block.{j}", width, ch * multiplier)
            width = ch * multiplier
        if i < len(ch_mult) - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    mid("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", 2 * z, width, 3)

    conv("decoder.conv_in", width, z, 3)
    mid("decoder", width)
    for i in reversed(range(len(ch_mult))):
        for j in range(num_res_blocks + 1):
            block(f"decoder.up.{i}.block.{j}", width, ch * ch_mult[i])
            width = ch * ch_mult[i]
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", image, width, 3)
    conv("quant_conv", 2 * z, 2 * z, 1)
    conv("post_quant_conv", z, z, 1)
    return shapes


def test_the_list_of_published_names_is_the_golden_files():
    stored = torch.load(GOLDEN / "autoencoder_kl.pth", weights_only=True)
    assert _published_shapes(32, (1, 1, 2, 2), 1) == {k: tuple(a.shape) for k, a in stored.items()}


def test_the_default_is_stable_diffusions():
    with keras.StatelessScope(initialize_variables=False):  # needs no memory
        network = AutoencoderKL()
    entries = list(names.entries(network))
    shapes = {
        name: layout.to_torch(np.broadcast_to(np.float32(0), variable.shape)).shape
        for name, variable, layout in entries
    }
    assert shapes == _published_shapes(128, (1, 2, 4, 4), 2)
    assert len(entries) == len(shapes) == len(network.weights) == 248
    assert len({id(variable) for _, variable, _ in entries}) == 248
    assert network.count_params() == 83_653_863
    assert network.factor == 8


# diffusers ----------------------------------------------------------------------------------------


def _diffusers(widths, blocks, latent_channels=4, image_channels=3, seed=0):
    """A `diffusers.AutoencoderKL` with random weights, norms and biases too."""
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=blocks,
        latent_channels=latent_channels,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = float("norm" in name and name.endswith("weight")) + 0.2 * noise
    return vae


SIZES = {
    "one level, odd sides": ((32,), 1, (7, 9), {}),
    "two widths, two blocks, wide": ((32, 64), 2, (6, 20), {}),
    "grey, three latent channels, high": (
        (32, 32), 1, (12, 6), {"latent_channels": 3, "image_channels": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_answers_are_diffusers(tmp_path, size):
    widths, blocks, (height, width), channels = SIZES[size]
    vae = _diffusers(widths, blocks, **channels)
    vae.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_file(
        tmp_path,
        base_dim=widths[0],
        multipliers=[w // widths[0] for w in widths],
        num_res_blocks=blocks,
        **channels,
    )
    x = np.random.default_rng(0).uniform(-1, 1, (2, height, width, ours.config["image_channels"]))
    with torch.no_grad():
        x_nchw = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
        latents = vae.encode(x_nchw).latent_dist
        decoded = vae.decode(latents.mean).sample
    moments = latents.parameters.permute(0, 2, 3, 1).numpy()
    assert _error(ours.encode(x, verbose=0), moments) <= PARITY
    mean = moments[..., : moments.shape[-1] // 2]
    assert _error(_decoded(ours, mean), decoded.permute(0, 2, 3, 1).numpy()) <= PARITY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "sd-vae-ft-mse"
    _diffusers((32, 32), 1).save_pretrained(path)
    return path


def _weights_of(path):
    return AutoencoderKL.from_file(path, **TINY).get_weights()


def _assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folder_and_its_file_are_the_same(folder):
    _assert_equal(_weights_of(folder), _weights_of(folder / SAFETENSORS))
    _assert_equal(_weights_of(folder), _weights_of(str(folder)))


@pytest.mark.parametrize("kind", ["names before 0.13", "bin", "float16"])
def test_every_file_of_diffusers_gives_the_same_weights(folder, tmp_path, kind):
    tensors, path = load_file(folder / SAFETENSORS), tmp_path / SAFETENSORS
    if kind == "names before 0.13":
        new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for part, old in new.items():
            tensors = {name.replace(f"0.{part}.", f"0.{old}."): a for name, a in tensors.items()}
        assert sum("proj_attn" in name or ".query." in name for name in tensors) == 8
        save_file(tensors, path)
        expected = _weights_of(folder)
    elif kind == "bin":
        path = tmp_path / "diffusion_pytorch_model.bin"
        torch.save({name: torch.tensor(a) for name, a in tensors.items()}, path)
        expected = _weights_of(folder)
    else:
        save_file({name: a.astype("float16") for name, a in tensors.items()}, path)
        expected = [w.astype("float16").astype("float32") for w in _weights_of(folder)]
    _assert_equal(_weights_of(path), expected)


def test_files_written_here_are_read_by_the_published_names_alone(folder, tmp_path):
    network = AutoencoderKL.from_file(folder, **TINY)
    save_torch_weights(network, tmp_path / "w.safetensors")
    written = {name: a.shape for name, a in load_file(tmp_path / "w.safetensors").items()}
    assert written == _published_shapes(32, (1, 1), 1)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("autoencoder_kl.pth", "autoencoder_kl"),
        ("autoencoder_kl_ema.safetensors", "autoencoder_kl_ema"),
        ("my-decoder.weights.h5", "my-decoder"),
        (f"sd-vae-ft-ema/{SAFETENSORS}", "sd-vae-ft-ema"),
        ("sd-vae-ft-ema", "sd-vae-ft-ema"),
    ],
)
def test_the_files_name_becomes_the_id(tiny, tmp_path, name, id):
    path = tmp_path / name
    file = path if path.suffix else path / SAFETENSORS
    file.parent.mkdir(exist_ok=True)
    if name.endswith(".h5"):
        tiny.save_weights(file)
    else:
        save_torch_weights(tiny, file)
    loaded = AutoencoderKL.from_file(path, scale=0.2301, **TINY)
    assert (loaded.id, loaded.scale) == (id, 0.2301)
    assert loaded.fingerprint == tiny.fingerprint
    _assert_equal(loaded.get_weights(), tiny.get_weights())


# Files that do not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.safetensors", "nothing", "no.weights.h5"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        AutoencoderKL.from_file(tmp_path / name, **TINY)


def test_a_folder_without_weights_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No weight file at .*{SAFETENSORS}"):
        AutoencoderKL.from_file(tmp_path, **TINY)


def test_every_problem_of_a_diffusers_file_is_named_and_nothing_changes(folder, tmp_path):
    tensors, path = load_file(folder / SAFETENSORS), tmp_path / "w.safetensors"
    del tensors["decoder.up_blocks.0.resnets.1.conv1.bias"]
    tensors["encoder.mid_block.attentions.0.to_q.weight"] = np.ones((32, 31), "float32")
    tensors["loss.logvar"] = np.ones(1, "float32")
    save_file(tensors, path)
    network = _tiny()
    before = [np.array(w) for w in network.get_weights()]
    with pytest.raises(ValueError, match=r"w\.safetensors does not fit this network") as error:
        load_torch_weights(network, path)
    message = str(error.value)
    assert "missing: ['decoder.up.1.block.1.conv1.bias']" in message  # levels run backwards
    assert "extra: ['loss.logvar']" in message
    assert "wrong shape: encoder.mid.attn_1.q.weight is (32, 31, 1, 1)" in message
    assert message.count("wrong shape") == 1
    _assert_equal(network.get_weights(), before)


@pytest.mark.parametrize(
    "change",
    [{"multipliers": (1,)}, {"multipliers": (1, 1, 1)}, {"multipliers": (1, 2)},
     {"num_res_blocks": 2}, {"latent_channels": 8}, {"image_channels": 1}, {"base_dim": 64}],
    ids=str,
)  # fmt: skip
def test_files_of_another_architecture_are_refused(folder, change):
    with keras.StatelessScope(initialize_variables=False):  # refused before a weight is needed
        network = AutoencoderKL(**{**TINY, **change})
    with pytest.raises(ValueError, match=f"{SAFETENSORS} does not fit this network"):
        load_torch_weights(network, folder / SAFETENSORS)


# Batches ------------------------------------------------------------------------------------------

# Batches of another size are other programs, with float32 sums in another order.
ROUNDING = 5e-6


@pytest.mark.each_backend
def test_moments_do_not_depend_on_the_batch_size(tiny):
    images = _images(3)
    expected = _encoded(tiny, images)
    for batch_size in (1, 2, 3, 100):
        moments = tiny.encode(images, batch_size=batch_size, verbose=0)
        assert moments.dtype == np.float32
        assert _error(moments, expected) <= ROUNDING, batch_size


def test_decoded_images_do_not_depend_on_the_batch_size(tiny):
    latents = np.random.default_rng(0).standard_normal((3, 4, 4, 4), "float32")
    expected = _levels(_decoded(tiny, latents))
    for batch_size in (1, 2, 3, 100):
        _assert_same_images(tiny.decode(tiny.scale * latents, batch_size=batch_size), expected)


@pytest.mark.each_backend
@pytest.mark.compiled
def test_a_ragged_last_batch_is_filled_up_not_compiled_anew(tiny, monkeypatch):
    shapes = []
    for frozen in (tiny._encode, tiny._decode):
        program = frozen._program

        def record(weights, x, program=program):
            shapes.append(tuple(x.shape))
            return program(weights, x)

        monkeypatch.setattr(frozen, "_program", record)
    tiny.encode(_images(5), batch_size=2, verbose=0)
    tiny.decode(np.zeros((5, 4, 4, 4)), batch_size=2)
    assert shapes == [(2, 8, 8, 3)] * 3 + [(2, 4, 4, 4)] * 3


def test_uint8_and_its_floats_have_the_same_moments(tiny):
    images = _images()
    from_uint8 = tiny.encode(images, verbose=0)
    floats = images.astype("float32") / 127.5 - 1
    np.testing.assert_array_equal(tiny.encode(floats, verbose=0), from_uint8)
    # Another precision of x / 127.5 - 1: an ulp of the input.
    assert _error(tiny.encode(images / 127.5 - 1, verbose=0), from_uint8) <= ROUNDING


def test_memory_mapped_images_are_images_too(tiny, tmp_path):
    images, expected = _images(3), tiny.encode(_images(3), batch_size=2, verbose=0)
    np.save(tmp_path / "x.npy", images)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(tiny.encode(mapped, batch_size=2, verbose=0), expected)


@pytest.mark.parametrize("size", [(8, 8), (6, 14)])
def test_the_shape_of_moments_is_known_beforehand(tiny, size):
    moments = tiny.encode(_images(2, *size), verbose=0)
    assert tiny.moments_shape((*size, 3)) == moments.shape[1:]


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_progress_bar_counts_images_or_is_silent(tiny, capsys, method, verbose):
    inputs = _images(3) if method == "encode" else np.zeros((3, 4, 4, 4))
    getattr(tiny, method)(inputs, batch_size=2, verbose=verbose)
    printed = capsys.readouterr().out
    assert ("3/3" in printed and "image" in printed) if verbose else printed == ""


# From moments to latents and back -----------------------------------------------------------------


def _moments(mean, log_variance, shape=(4, 64, 64, 4)):
    return np.concatenate([np.full(shape, mean), np.full(shape, log_variance)], axis=-1)


def test_a_sample_is_scale_times_mean_plus_deviation_times_noise(tiny):
    rng = np.random.default_rng(0)
    mean, log_variance = rng.standard_normal((2, 3, 5, 7, 4))
    noise = tiny.sample(_moments(0, 0, mean.shape), seed=11) / tiny.scale
    latents = tiny.sample(np.concatenate([mean, log_variance], axis=-1), seed=11)
    expected = tiny.scale * (mean + np.exp(log_variance / 2) * noise)
    # Float32 rounding of numbers below 4.
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    assert latents.dtype == np.float32


@pytest.mark.each_backend
@pytest.mark.parametrize(("mean", "log_variance"), [(0, 0), (0.7, -1.4), (-2, 3)])
def test_samples_have_the_mean_and_deviation_of_their_moments(tiny, mean, log_variance):
    latents = tiny.sample(_moments(mean, log_variance)) / tiny.scale
    deviation, n = np.exp(log_variance / 2), latents.size
    # Five standard errors of a mean and of a standard deviation of n numbers.
    assert latents.mean() == pytest.approx(mean, abs=5 * deviation / n**0.5)
    assert latents.std() == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5)


@pytest.mark.parametrize(("log_variance", "deviation"), [(100, np.exp(10)), (-100, np.exp(-15))])
def test_the_log_variance_is_clipped_as_published(tiny, log_variance, deviation):
    latents = tiny.sample(_moments(0, log_variance)) / tiny.scale
    # Five standard errors of a standard deviation.
    assert latents.std() == pytest.approx(deviation, rel=5 / (2 * latents.size) ** 0.5)


@pytest.mark.each_backend
def test_noise_is_the_seeds_and_each_images_own(tiny):
    moments = _moments(0, 0, (2, 4, 4, 4))
    np.testing.assert_array_equal(tiny.sample(moments, seed=3), tiny.sample(moments, seed=3))
    assert not np.array_equal(tiny.sample(moments, seed=3), tiny.sample(moments, seed=4))
    first, second = tiny.sample(moments)
    assert not np.array_equal(first, second)


def test_stored_half_precision_moments_give_float32_latents(tiny):
    latents = tiny.sample(_moments(0.5, -30, (1, 4, 4, 4)).astype("float16"))
    assert latents.dtype == np.float32
    # exp(-15) of noise.
    np.testing.assert_allclose(latents, 0.5 * tiny.scale, atol=1e-6)


@pytest.mark.parametrize("scale", [0.18215, 3.0])
def test_the_scale_is_applied_exactly_once_each_way(tiny, scale):
    network = _tiny(scale=scale)  # of the same weights
    mean = tiny.encode(_images(), verbose=0)[..., :4]
    exact = np.concatenate([mean, np.full_like(mean, -30)], axis=-1)
    latents = network.sample(exact)
    # exp(-15) of noise.
    np.testing.assert_allclose(latents, scale * mean, atol=scale * 5e-6)
    expected = _levels(_decoded(network, mean))
    _assert_same_images(network.decode(latents), expected)
    for wrong in (mean, scale * latents):  # not at all, or twice: the decoder would tell
        assert (network.decode(wrong) != expected).mean() > 0.2


def test_decoded_images_fill_and_never_leave_0_to_255(tiny):
    latents = 50 * np.random.default_rng(0).standard_normal((2, 4, 4, 4))
    images, floats = tiny.decode(latents), _decoded(tiny, latents / tiny.scale)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.uint8)
    assert (images[floats > 1] == 255).all()  # clipped, not wrapped round
    assert (images[floats < -1] == 0).all()
    assert (floats > 1).any()
    assert (floats < -1).any()


def test_encoded_images_decode_to_images_of_the_same_shape(tiny):
    images = _images(2, 6, 14)
    decoded = tiny.decode(tiny.sample(tiny.encode(images, verbose=0)))
    assert (decoded.shape, decoded.dtype) == (images.shape, np.uint8)


# Weights loaded later, saved, told apart ----------------------------------------------------------


def test_equal_encoders_have_equal_fingerprints():
    assert _tiny(seed=1).fingerprint == _tiny(seed=1, scale=0.5, id="x").fingerprint
    assert _tiny(seed=1).fingerprint != _tiny(seed=2).fingerprint


@pytest.mark.each_backend
def test_the_fingerprint_is_the_same_on_every_backend(golden):
    # Of the golden checkpoint. Another value here means that every cache of latents is made anew.
    assert golden.network.fingerprint == "775fdc92a0054574"


def test_the_least_change_of_any_encoder_weight_changes_the_fingerprint():
    network = _tiny()
    seen = {network.fingerprint}
    for weight in network.encoder.weights:
        value = np.array(ops.convert_to_numpy(weight))
        value.flat[-1] = np.nextafter(value.flat[-1], np.float32(9))
        weight.assign(value)
        seen.add(network.fingerprint)
    assert len(seen) == 1 + len(network.encoder.weights)


def test_weights_that_change_places_change_the_fingerprint():
    network = _tiny()
    before, attention = network.fingerprint, network.encoder.get_layer("mid_attention")
    q, k = (ops.convert_to_numpy(conv.kernel).copy() for conv in (attention.q, attention.k))
    attention.q.kernel.assign(k)
    attention.k.kernel.assign(q)
    assert network.fingerprint != before


def test_another_decoder_leaves_the_fingerprint():
    network = _tiny()
    before = network.fingerprint
    for weight in network.decoder.weights:
        weight.assign(weight + 1)
    assert network.fingerprint == before


@pytest.mark.compiled
def test_weights_loaded_after_a_first_run_are_the_ones_used(tmp_path):
    network, other = _tiny(), _tiny(seed=1)
    images, latents = _images(), np.random.default_rng(0).standard_normal((2, 4, 4, 4), "float32")
    moments, levels = _encoded(other, images), _levels(_decoded(other, latents / other.scale))

    def is_other():
        same = network.fingerprint == other.fingerprint
        close = _error(network.encode(images, verbose=0), moments) <= ROUNDING
        differ = (network.decode(latents) != levels).mean()
        assert same == close == (differ < 0.01)
        assert same or differ > 0.5
        return same

    for i, kind in enumerate(["w.pth", "w.safetensors", "w.weights.h5", "set_weights"]):
        _randomize(network, seed=i + 2)
        assert not is_other()
        if kind == "set_weights":
            network.set_weights(other.get_weights())
        elif kind == "w.weights.h5":
            other.save_weights(tmp_path / kind)
            network.load_weights(tmp_path / kind)
        else:
            save_torch_weights(other, tmp_path / kind)
            load_torch_weights(network, tmp_path / kind)
        assert is_other(), kind


@pytest.mark.each_backend
def test_a_saved_autoencoder_comes_back_whole(tiny, tmp_path):
    _tiny(scale=3.0, id="sd-vae-ft-mse").save(tmp_path / "ae.keras")  # of tiny's weights
    loaded = keras.saving.load_model(tmp_path / "ae.keras")
    assert isinstance(loaded, AutoencoderKL)
    assert (loaded.scale, loaded.id, loaded.factor) == (3.0, "sd-vae-ft-mse", 2)
    assert loaded.fingerprint == tiny.fingerprint
    assert not loaded.trainable_weights
    images, latents = _images(), np.random.default_rng(0).standard_normal((2, 4, 4, 4))
    moments = loaded.encode(images, verbose=0)
    np.testing.assert_array_equal(moments, tiny.encode(images, verbose=0))
    # Float32 rounding of another scale.
    expected = tiny.sample(moments) * (3 / tiny.scale)
    np.testing.assert_allclose(loaded.sample(moments), expected, rtol=1e-6)
    _assert_same_images(loaded.decode(3 * latents), tiny.decode(tiny.scale * latents))


def test_every_argument_is_in_the_configuration():
    arguments = {
        "base_dim": 64, "multipliers": (1, 2, 1), "num_res_blocks": 1, "latent_channels": 3,
        "image_channels": 1, "scale": 0.5, "id": "x", "name": "y", "dtype": "mixed_bfloat16",
    }  # fmt: skip
    with keras.StatelessScope(initialize_variables=False):
        network = AutoencoderKL(**arguments)
        again = AutoencoderKL.from_config(json.loads(json.dumps(network.get_config())))
    assert again.get_config() == network.get_config() == arguments
    assert [w.shape for w in again.weights] == [w.shape for w in network.weights]
    assert again.factor == 4


@pytest.mark.each_backend
@pytest.mark.parametrize("when", ["when built", "when first run"])
def test_a_global_mixed_precision_policy_does_not_change_the_answers(tiny, when):
    try:
        keras.config.set_dtype_policy("mixed_bfloat16" if when == "when built" else "float32")
        network = _tiny()
        assert (keras.config.dtype_policy().name == "float32") == (when != "when built")  # kept
        keras.config.set_dtype_policy("mixed_bfloat16")
        moments = network.encode(_images(), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert moments.dtype == np.float32
    np.testing.assert_array_equal(moments, tiny.encode(_images(), verbose=0))
    assert {layer.compute_dtype for layer in network.decoder._flatten_layers()} == {"float32"}


def test_a_failed_construction_leaves_the_global_policy():
    with pytest.raises(ValueError, match="filters"):
        AutoencoderKL(base_dim=-32)
    assert keras.config.dtype_policy().name == "float32"


def test_the_autoencoder_is_frozen(tiny):
    assert not tiny.trainable_weights
    assert not tiny.trainable


# Inputs that are refused --------------------------------------------------------------------------

GOOD = np.zeros((1, 8, 8, 3), "uint8")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (GOOD[0], ValueError, r"images must have shape \(n, height, width, 3\).*\(8, 8, 3\)"),
        (GOOD[None], ValueError, r"images must have shape .*Received: \(1, 1, 8, 8, 3\)"),
        (GOOD[..., :1], ValueError, r"images must have shape .*Received: \(1, 8, 8, 1\)"),
        (GOOD[:0], ValueError, r"n at least 1\. Received: \(0, 8, 8, 3\)"),
        (GOOD[:, :7], ValueError, r"multiples of 2\. Received: 7 x 8; the nearest are 8 x 8"),
        (GOOD[:, :, :1], ValueError, r"multiples of 2\. Received: 8 x 1; the nearest are 8 x 2"),
        (GOOD.astype("int64"), TypeError, r"uint8, or float in \[-1, 1\].*int64"),
        (GOOD.astype(bool), TypeError, r"uint8, or float in \[-1, 1\].*bool"),
        (GOOD + 1.5, ValueError, r"in \[-1, 1\].*\[1\.5, 1\.5\]; pass uint8, or x / 127\.5 - 1"),
        (GOOD - 2.0, ValueError, r"in \[-1, 1\].*\[-2, -2\]"),
        (GOOD + np.nan, ValueError, r"in \[-1, 1\].*nan"),
        (GOOD + np.inf, ValueError, r"in \[-1, 1\].*inf"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_words(tiny, images, error, message):
    with pytest.raises(error, match=message):
        tiny.encode(images, verbose=0)


def test_a_bad_image_in_a_later_batch_is_refused_too(tiny):
    images = np.zeros((5, 8, 8, 3), "float32")
    images[4, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"in \[-1, 1\].*nan"):
        tiny.encode(images, batch_size=2, verbose=0)


LATENTS = np.zeros((1, 4, 4, 4), "float32")


@pytest.mark.parametrize(
    ("latents", "received"),
    [
        (LATENTS[0], r"\(4, 4, 4\)"),
        (np.zeros((1, 4, 4, 8)), r"\(1, 4, 4, 8\)"),  # moments
        (LATENTS[:0], r"\(0, 4, 4, 4\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused_in_words(tiny, latents, received):
    with pytest.raises(ValueError, match=rf"latents must have shape .*Received: {received}"):
        tiny.decode(latents)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_refused(tiny, value):
    with pytest.raises(ValueError, match="latents"):
        tiny.decode(LATENTS + value)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(tiny, batch_size):
    message = f"batch_size must be an int >= 1. Received: {batch_size}"
    with pytest.raises(ValueError, match=message):
        tiny.encode(GOOD, batch_size=batch_size, verbose=0)
    with pytest.raises(ValueError, match=message):
        tiny.decode(LATENTS, batch_size=batch_size)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((7, 8, 3), r"multiples of 2\. Received: 7 x 8"), ((8, 8, 1), "takes 3 channels.*of 1")],
)
def test_the_shape_of_moments_refuses_what_cannot_be_encoded(tiny, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny.moments_shape(shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_dim": 48}, "base_dim must be a multiple of 32. Received: 48"),
        ({"scale": 0.0}, "scale must be positive. Received: 0.0"),
        ({"scale": -1.0}, "scale must be positive. Received: -1.0"),
        ({"scale": float("nan")}, "scale must be positive. Received: nan"),
        ({"scale": float("inf")}, "scale must be positive. Received: inf"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**{**TINY, **arguments})


# Not yet as promised ------------------------------------------------------------------------------


@pytest.mark.each_backend
def test_tensors_of_the_backend_are_arrays_too(tiny):
    images = _images(3)
    floats = ops.convert_to_tensor(images.astype("float32") / 127.5 - 1)
    expected = tiny.encode(images, batch_size=2, verbose=0)
    np.testing.assert_array_equal(tiny.encode(floats, batch_size=2, verbose=0), expected)


def test_a_scale_computed_with_numpy_gives_float32_latents_too():
    network = AutoencoderKL(**TINY, scale=1 / np.std([1.0, 2.0]))
    assert network.sample(_moments(0, 0, (1, 4, 4, 4))).dtype == np.float32


@pytest.mark.each_backend
def test_a_half_precision_autoencoder_gives_float32_moments():
    moments = AutoencoderKL(**TINY, dtype="mixed_bfloat16").encode(GOOD, verbose=0)
    assert moments.dtype == np.float32


def test_keras_weights_of_a_larger_autoencoder_are_refused(tiny, tmp_path):
    tiny.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match="w.weights.h5"):
        AutoencoderKL.from_file(tmp_path / "w.weights.h5", **{**TINY, "multipliers": (1,)})


def test_damaged_keras_weights_are_refused_by_name(tmp_path):
    (tmp_path / "w.weights.h5").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="w.weights.h5"):
        AutoencoderKL.from_file(tmp_path / "w.weights.h5", **TINY)


def test_an_array_that_is_there_under_two_names_is_refused(folder, tmp_path):
    tensors = load_file(folder / SAFETENSORS)
    tensors["encoder.norm_out.weight"] = np.zeros(32, "float32")
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="norm_out.weight"):
        AutoencoderKL.from_file(tmp_path / "w.safetensors", **TINY)


@pytest.mark.parametrize("path", [".", SAFETENSORS])
def test_a_path_without_a_folder_takes_the_current_folders_name(folder, monkeypatch, path):
    monkeypatch.chdir(folder)
    assert AutoencoderKL.from_file(path, **TINY).id == "sd-vae-ft-mse"


def test_a_folders_name_may_have_dots(tiny, tmp_path):
    (tmp_path / "sd-v1.5-vae").mkdir()
    save_torch_weights(tiny, tmp_path / "sd-v1.5-vae" / SAFETENSORS)
    assert AutoencoderKL.from_file(tmp_path / "sd-v1.5-vae", **TINY).id == "sd-v1.5-vae"


# Space to depth -----------------------------------------------------------------------------------


def _every_level(channels, size=16):
    """Images that hold each uint8 value in each channel."""
    levels = np.arange(256, dtype="uint8").reshape(1, size, size, 1)
    return np.concatenate([np.roll(levels, 37 * c, axis=1) for c in range(channels)], axis=-1)


@pytest.mark.parametrize("scale", [1.0, 0.18215, 7.0])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_space_to_depth_gives_every_value_back(channels, factor, scale):
    images, autoencoder = _every_level(channels), SpaceToDepth(factor, scale)
    mean, log_variance = np.split(autoencoder.encode(images), 2, axis=-1)
    assert mean.shape == (1, 16 // factor, 16 // factor, channels * factor**2)
    decoded = autoencoder.decode(scale * mean)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, images)
    # Without noise: a deviation of exp(-15), a ten-thousandth of a level.
    assert (log_variance == -30).all()


def test_a_latent_of_space_to_depth_is_one_block_of_pixels():
    images = _images(2, 8, 12)
    moments = SpaceToDepth(4).encode(images)
    assert (moments.shape, moments.dtype) == ((2, 2, 3, 96), np.float32)
    block = images[1, 4:8, 8:12].astype("float32") / 127.5 - 1
    np.testing.assert_array_equal(moments[1, 1, 2, :48].reshape(4, 4, 3), block)


def test_latents_of_space_to_depth_are_sampled_and_decoded_like_an_autoencoders():
    images, autoencoder = _every_level(3), SpaceToDepth(2, scale=0.5)
    latents = autoencoder.sample(autoencoder.encode(images), seed=5)
    np.testing.assert_array_equal(autoencoder.decode(latents), images)


def test_space_to_depth_clips_what_a_model_overshoots():
    decoded = SpaceToDepth(2).decode(np.array([-9, -1, 1, 9.0]).reshape(1, 1, 1, 4))
    np.testing.assert_array_equal(decoded.ravel(), [0, 0, 255, 255])


def test_space_to_depth_says_its_shapes_and_name():
    autoencoder = SpaceToDepth(4)
    assert autoencoder.moments_shape((8, 12, 3)) == autoencoder.encode(_images(1, 8, 12)).shape[1:]
    assert autoencoder.id == autoencoder.fingerprint == "space-to-depth-4"
    assert autoencoder.fingerprint != SpaceToDepth(2).fingerprint


def test_space_to_depth_takes_the_autoencoders_arguments():
    autoencoder = SpaceToDepth()
    moments = autoencoder.encode(_images(), batch_size=1, verbose=0)
    images = autoencoder.decode(moments[..., :12], batch_size=1, verbose=0)
    np.testing.assert_array_equal(images, _images())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (GOOD[:, :7], ValueError, "multiples of 2. Received: 7 x 8"),
        (GOOD[:, :, :5], ValueError, "multiples of 2. Received: 8 x 5"),
        (GOOD.astype("int64"), TypeError, "int64"),
        (GOOD + 2.0, ValueError, r"in \[-1, 1\]"),
        (GOOD + np.nan, ValueError, r"in \[-1, 1\]"),
    ],
)
def test_space_to_depth_refuses_what_an_autoencoder_refuses(images, error, message):
    with pytest.raises(error, match=message):
        SpaceToDepth().encode(images)


@pytest.mark.parametrize("images", [GOOD[0], GOOD[:0], GOOD[:0] / 255.0])
def test_space_to_depth_names_the_shape_it_takes(images):
    with pytest.raises(ValueError, match=r"images must have shape \(n, height, width"):
        SpaceToDepth().encode(images)


@pytest.mark.parametrize("latents", [LATENTS[0], LATENTS[:0], np.zeros((1, 4, 4, 6))])
def test_space_to_depth_names_the_latents_it_takes(latents):
    with pytest.raises(ValueError, match="latents must have shape"):
        SpaceToDepth().decode(latents)


def test_space_to_depth_has_every_method_of_the_autoencoder():
    own = [name for name, value in vars(AutoencoderKL).items() if not name.startswith("_")]
    promised = set(own) - {"from_file", "call", "get_config"}
    assert {name for name in promised if not hasattr(SpaceToDepth(), name)} == set()
