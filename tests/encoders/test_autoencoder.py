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
from tiny import assert_equal, normal, numpy, refused, uvit, weights

from keras_uvit import DiffusionModel, convert
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
# Batches of another size are other programs, with float32 sums in another order.
ROUNDING = 5e-6


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
    return _tiny(id="tiny")


def _images(n=2, height=8, width=8):
    return np.random.default_rng(1).integers(0, 256, (n, height, width, 3), "uint8")


def _run(network, x):
    """The network as it is now, all at once: none of the batches and programs under test."""
    call, x = lambda x: network(x, training=False), np.asarray(x, "float32")
    if keras.config.backend() == "jax":  # slow one operation at a time
        import jax

        call = jax.jit(call)
    return numpy(call(x))


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
def golden(golden_cases):
    """The recorded answers, channels last, and the network that must give them."""
    case = golden_cases["autoencoder_kl"]
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
def test_decoded_latents_are_the_published_programs_and_fingerprints_those_of_caches(golden):
    # Another value here means that every cache of latents is made anew.
    assert golden.network.fingerprint == "775fdc92a0054574"
    ours = _decoded(golden.network, golden.z / golden.scale)
    assert _error(ours, golden.decoded) <= PARITY


@pytest.mark.each_backend
@pytest.mark.compiled
def test_decoded_images_are_the_published_programs(golden):
    assert golden.network.scale == 0.18215 == pytest.approx(golden.scale)  # float32 there
    _assert_same_images(golden.network.decode(golden.z), _levels(golden.decoded))


def test_a_call_encodes_to_the_mean_and_decodes(golden):
    ours = _run(golden.network, golden.image)
    assert _error(ours, _decoded(golden.network, golden.moments[..., :4])) <= PARITY


# diffusers ----------------------------------------------------------------------------------------


def _vae(widths, blocks, latent_channels=4, image_channels=3):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=blocks,
        latent_channels=latent_channels,
    ).eval()


def _random_vae(*arguments, **options):
    """Norms and biases too."""
    vae, generator = _vae(*arguments, **options), torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = float("norm" in name and name.endswith("weight")) + 0.2 * noise
    return vae


def test_the_default_is_stable_diffusions():
    with torch.device("meta"), keras.StatelessScope(initialize_variables=False):  # no memory
        theirs, network = _vae((128, 256, 512, 512), 2).state_dict(), AutoencoderKL()
    tensors = {name: np.broadcast_to(np.float32(0), a.shape) for name, a in theirs.items()}
    entries = list(names.entries(network))
    matched = convert._matched(entries, names.normalized(tensors, network), "strictly")
    assert len(matched) == len(tensors) == len(network.weights) == 248
    assert len({id(variable) for variable, _ in matched}) == 248
    assert (network.count_params(), network.factor) == (83_653_863, 8)


SIZES = {
    "one level, odd sides": ((32,), 1, (7, 9), {}),
    "two widths and blocks, grey, wide": (
        (32, 64), 2, (6, 20), {"latent_channels": 3, "image_channels": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_answers_are_random_vae(tmp_path, size):
    widths, blocks, sides, channels = SIZES[size]
    vae = _random_vae(widths, blocks, **channels)
    vae.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_file(
        tmp_path,
        base_dim=widths[0],
        multipliers=[w // widths[0] for w in widths],
        num_res_blocks=blocks,
        **channels,
    )
    x = np.random.default_rng(0).uniform(-1, 1, (2, *sides, ours.config["image_channels"]))
    with torch.no_grad():
        latents = vae.encode(torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)).latent_dist
        decoded = vae.decode(latents.mean).sample
    moments = latents.parameters.permute(0, 2, 3, 1).numpy()
    assert _error(ours.encode(x, verbose=0), moments) <= PARITY
    mean = moments[..., : moments.shape[-1] // 2]
    assert _error(_decoded(ours, mean), decoded.permute(0, 2, 3, 1).numpy()) <= PARITY


# Files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "sd-vae-ft-mse"
    _random_vae((32, 32), 1).save_pretrained(path)
    return path


def _weights_of(path):
    return AutoencoderKL.from_file(path, **TINY).get_weights()


@pytest.mark.parametrize("kind", ["folder", "names before 0.13", "bin", "float16"])
def test_every_file_of_diffusers_gives_the_same_weights(folder, tmp_path, kind):
    tensors, path = load_file(folder / SAFETENSORS), tmp_path / SAFETENSORS
    expected = _weights_of(folder / SAFETENSORS)
    if kind == "folder":
        path = str(folder)
    elif kind == "names before 0.13":
        new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for part, old in new.items():
            tensors = {name.replace(f"0.{part}.", f"0.{old}."): a for name, a in tensors.items()}
        assert sum("proj_attn" in name or ".query." in name for name in tensors) == 8
        save_file(tensors, path)
    elif kind == "bin":
        path = tmp_path / "diffusion_pytorch_model.bin"
        torch.save({name: torch.tensor(a) for name, a in tensors.items()}, path)
    else:
        save_file({name: a.astype("float16") for name, a in tensors.items()}, path)
        expected = [w.astype("float16").astype("float32") for w in expected]
    assert_equal(_weights_of(path), expected)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("autoencoder_kl.pth", "autoencoder_kl"),
        ("autoencoder_kl_ema.safetensors", "autoencoder_kl_ema"),
        ("my-decoder.weights.h5", "my-decoder"),
        (f"sd-vae-ft-ema/{SAFETENSORS}", "sd-vae-ft-ema"),
        ("sd-v1.5-vae", "sd-v1.5-vae"),  # a folder, its name with a dot
        ("saved.keras", "tiny"),  # which is in the file
    ],
)
def test_the_files_name_becomes_the_id(tiny, tmp_path, monkeypatch, name, id):
    path = tmp_path / name
    file = path / SAFETENSORS if name == id else path
    file.parent.mkdir(exist_ok=True)
    if name.endswith(".keras"):
        tiny.save(file)
    elif name.endswith(".h5"):
        tiny.save_weights(file)
    else:
        save_torch_weights(tiny, file)
    loaded = AutoencoderKL.from_file(path, scale=0.2301, **TINY)
    assert (loaded.id, loaded.scale) == (id, 0.2301)
    assert_equal(loaded.get_weights(), tiny.get_weights())
    if name == id:  # a folder, and where it is the current one
        monkeypatch.chdir(path)
        assert [AutoencoderKL.from_file(p, **TINY).id for p in (".", SAFETENSORS)] == [id, id]


def _larger():
    return AutoencoderKL(**{**TINY, "multipliers": (1, 1, 1)})


def _with_one_array_twice(path):
    save_torch_weights(AutoencoderKL(**TINY), path)
    twice = {"encoder.conv_norm_out.weight": np.zeros(32, "float32")}  # as diffusers names it
    save_file(load_file(path) | twice, path)


# Who writes what under this name, and the error of reading it.
UNFIT = {
    "nothing.pth": (lambda path: None, FileNotFoundError, "No weight file"),
    "empty": (lambda path: path.mkdir(), FileNotFoundError, SAFETENSORS),
    "text.keras": (lambda path: path.write_bytes(b"no zip"), ValueError, "is damaged"),
    "larger.weights.h5": (lambda path: _larger().save_weights(path), ValueError, "does not fit"),
    "model.keras": (
        lambda path: DiffusionModel(uvit()).save(path), ValueError, "Expected an AutoencoderKL",
    ),
    "norm_out.safetensors": (_with_one_array_twice, ValueError, "under two names"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_that_does_not_fit_is_named(tmp_path, name):
    write, error, words = UNFIT[name]
    write(tmp_path / name)
    refused(error, lambda: AutoencoderKL.from_file(tmp_path / name, **TINY), words, name[:8])


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.each_backend
def test_moments_do_not_depend_on_the_batch_size(tiny):
    images = _images(3)
    expected = _encoded(tiny, images)
    for batch_size in (1, 2, 100):
        moments = tiny.encode(images, batch_size=batch_size, verbose=0)
        assert moments.dtype == np.float32
        assert _error(moments, expected) <= ROUNDING, batch_size


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


@pytest.mark.each_backend
def test_images_are_floats_tensors_of_the_backend_and_mapped_files_too(tiny, tmp_path):
    images = _images(3)
    expected = tiny.encode(images, batch_size=2, verbose=0)
    floats = images.astype("float32") / 127.5 - 1
    np.save(tmp_path / "x.npy", images)
    for same in (floats, ops.convert_to_tensor(floats), np.load(tmp_path / "x.npy", mmap_mode="r")):
        np.testing.assert_array_equal(tiny.encode(same, batch_size=2, verbose=0), expected)
    # Another precision of x / 127.5 - 1: an ulp of the input.
    float64 = tiny.encode(images / 127.5 - 1, batch_size=2, verbose=0)
    assert _error(float64, expected) <= ROUNDING


def test_the_progress_bar_counts_images_or_is_silent(tiny, capsys):
    tiny.decode(np.zeros((3, 4, 4, 4)), batch_size=2, verbose=0)
    assert capsys.readouterr().out == ""
    tiny.encode(_images(3), batch_size=2)
    printed = capsys.readouterr().out
    assert "3/3" in printed
    assert "image" in printed


# From moments to latents and back -----------------------------------------------------------------


def _moments(mean, log_variance, shape=(4, 64, 64, 4)):
    return np.concatenate([np.full(shape, mean), np.full(shape, log_variance)], axis=-1)


@pytest.mark.parametrize("dtype", ["float64", "float16"])  # float16 is what caches keep
def test_a_sample_is_scale_times_mean_plus_deviation_times_noise(dtype):
    autoencoder = AutoencoderKL(**TINY, scale=1 / np.std([1.0, 4.0]))  # a NumPy number
    mean, log_variance = normal(2, 3, 5, 7, 4).astype(dtype)
    noise = autoencoder.sample(_moments(0, 0, mean.shape), seed=11) / autoencoder.scale
    latents = autoencoder.sample(np.concatenate([mean, log_variance], axis=-1), seed=11)
    mean, log_variance = mean.astype("float64"), log_variance.astype("float64")
    expected = autoencoder.scale * (mean + np.exp(log_variance / 2) * noise)
    # Float32 rounding of numbers below 8.
    np.testing.assert_allclose(latents, expected, atol=2e-6)
    assert latents.dtype == np.float32


@pytest.mark.parametrize(
    ("mean", "log_variance", "deviation"),
    [(0.7, -1.4, np.exp(-0.7)), (0, 100, np.exp(10)), (0, -100, np.exp(-15))],
)
def test_samples_have_the_mean_and_the_clipped_deviation_of_their_moments(
    tiny, mean, log_variance, deviation
):
    latents = tiny.sample(_moments(mean, log_variance)) / tiny.scale
    # Five standard errors of a mean and of a standard deviation of n numbers.
    assert latents.mean() == pytest.approx(mean, abs=5 * deviation / latents.size**0.5)
    assert latents.std() == pytest.approx(deviation, rel=5 / (2 * latents.size) ** 0.5)


def test_noise_is_the_seeds_and_each_images_own(tiny):
    moments = _moments(0, 0, (2, 4, 4, 4))
    np.testing.assert_array_equal(tiny.sample(moments, seed=3), tiny.sample(moments, seed=3))
    assert not np.array_equal(tiny.sample(moments, seed=3), tiny.sample(moments, seed=4))
    first, second = tiny.sample(moments)
    assert not np.array_equal(first, second)


def test_encoded_images_decode_to_images_of_the_same_shape(tiny):
    images = _images(2, 6, 14)
    moments = tiny.encode(images, verbose=0)
    assert tiny.moments_shape((6, 14, 3)) == moments.shape[1:]
    assert tiny.decode(tiny.sample(moments)).shape == images.shape


# Weights loaded later, saved, told apart ----------------------------------------------------------


def test_the_fingerprint_is_of_the_encoders_weights_alone_and_of_their_places():
    network = _tiny()
    before = network.fingerprint
    for weight in network.decoder.weights:
        weight.assign(weight + 1)
    assert _tiny(scale=0.5, id="x").fingerprint == network.fingerprint == before
    attention = network.encoder.get_layer("mid_attention")
    q, k = (numpy(conv.kernel).copy() for conv in (attention.q, attention.k))
    attention.q.kernel.assign(k)
    attention.k.kernel.assign(q)
    seen = {before, network.fingerprint}
    for weight in network.encoder.weights:  # the least change of any
        value = np.array(numpy(weight))
        value.flat[-1] = np.nextafter(value.flat[-1], np.float32(9))
        weight.assign(value)
        seen.add(network.fingerprint)
    assert len(seen) == 2 + len(network.encoder.weights)


@pytest.mark.compiled
def test_weights_loaded_after_a_first_run_are_the_ones_used(tmp_path):
    network, other = _tiny(), _tiny(seed=1)
    images, latents = _images(), normal(2, 4, 4, 4)
    moments, levels = _encoded(other, images), _levels(_decoded(other, latents / other.scale))
    for i, kind in enumerate(["w.pth", "w.weights.h5", "set_weights"]):
        _randomize(network, seed=i + 2)
        assert _error(network.encode(images, verbose=0), moments) > 0.1
        assert (network.decode(latents) != levels).mean() > 0.5
        if kind == "set_weights":
            network.set_weights(other.get_weights())
        elif kind == "w.weights.h5":
            other.save_weights(tmp_path / kind)
            network.load_weights(tmp_path / kind)
        else:
            save_torch_weights(other, tmp_path / kind)
            load_torch_weights(network, tmp_path / kind)
        assert network.fingerprint == other.fingerprint
        assert _error(network.encode(images, verbose=0), moments) <= ROUNDING, kind
        _assert_same_images(network.decode(latents), levels)


@pytest.mark.each_backend
def test_a_saved_autoencoder_comes_back_whole(tiny, tmp_path):
    _tiny(scale=3.0, id="sd-vae-ft-mse").save(tmp_path / "ae.keras")  # of tiny's weights
    for load in (keras.saving.load_model, AutoencoderKL.from_file):
        loaded = load(tmp_path / "ae.keras")
        assert isinstance(loaded, AutoencoderKL)
        assert (loaded.scale, loaded.id, loaded.factor) == (3.0, "sd-vae-ft-mse", 2)
        assert_equal(weights(loaded), weights(tiny))
        assert not loaded.trainable_weights
    np.testing.assert_array_equal(
        loaded.encode(_images(), verbose=0), tiny.encode(_images(), verbose=0)
    )


def test_every_argument_is_in_the_configuration():
    arguments = {
        "base_dim": 64, "multipliers": (1, 2, 1), "num_res_blocks": 1, "latent_channels": 3,
        "image_channels": 1, "scale": 0.5, "shift": [0.1, 0.2, 0.3],
        "id": "x", "name": "y", "dtype": "mixed_bfloat16",
    }  # fmt: skip
    with keras.StatelessScope(initialize_variables=False):
        network = AutoencoderKL(**arguments)
        again = AutoencoderKL.from_config(json.loads(json.dumps(network.get_config())))
    assert again.get_config() == network.get_config() == arguments
    assert [w.shape for w in again.weights] == [w.shape for w in network.weights]
    assert again.factor == 4


@pytest.mark.each_backend
def test_mixed_precision_changes_answers_only_where_it_is_asked_for(tiny):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = _tiny()
        with pytest.raises(ValueError, match="filters"):
            AutoencoderKL(base_dim=-32)
        assert keras.config.dtype_policy().name == "mixed_bfloat16"  # kept, after a failure too
        moments = network.encode(_images(), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert moments.dtype == np.float32
    np.testing.assert_array_equal(moments, tiny.encode(_images(), verbose=0))
    assert {layer.compute_dtype for layer in network.decoder._flatten_layers()} == {"float32"}
    moments = _tiny(dtype="mixed_bfloat16").encode(_images(), verbose=0)
    assert moments.dtype == np.float32
    assert 1e-4 < _error(moments, tiny.encode(_images(), verbose=0)) < 0.1  # bfloat16 has 8 bits


# What is refused ----------------------------------------------------------------------------------

GOOD = np.zeros((1, 8, 8, 3), "uint8")
LATENTS = np.zeros((1, 4, 4, 4), "float32")
LATE = np.zeros((5, 8, 8, 3), "float32")
LATE[4, 0, 0, 0] = np.nan  # in the third batch
NAN = float("nan")
BOTH = [
    (lambda a: a.encode(GOOD[0]), ValueError, ["images must have shape", "(8, 8, 3)"]),
    (lambda a: a.encode(GOOD[:0]), ValueError, ["images must have shape", "(0, 8, 8, 3)"]),
    (lambda a: a.encode(GOOD[:, :7]), ValueError, ["multiples of 2", "7 x 8"]),
    (lambda a: a.encode(GOOD.astype("int64")), TypeError, ["uint8, or float", "int64"]),
    (lambda a: a.encode(GOOD + 1.5), ValueError, ["[1.5, 1.5]", "x / 127.5 - 1"]),
    (lambda a: a.encode(LATE, batch_size=2), ValueError, ["in [-1, 1]", "nan"]),
    (lambda a: a.decode(LATENTS[0]), ValueError, ["latents must have shape", "(4, 4, 4)"]),
    (lambda a: a.decode(LATENTS[:0]), ValueError, ["latents must have shape", "(0, 4, 4, 4)"]),
    (lambda a: a.decode(LATENTS.astype("int32")), TypeError, ["latents are float", "int32"]),
    (lambda a: a.decode(LATENTS + np.inf), ValueError, ["latents", "NaN or infinity"]),
    (lambda a: a.sample(LATENTS[0]), ValueError, ["moments must have shape", "(4, 4, 4)"]),
]
OF_KL = [
    (lambda a: a.encode(GOOD[..., :1]), ValueError, ["images must have shape", "(1, 8, 8, 1)"]),
    (lambda a: a.encode(GOOD[:, :7]), ValueError, ["the nearest are", "8 x 8"]),
    (lambda a: a.encode(GOOD, batch_size=0), ValueError, ["batch_size must be an int >= 1", "0"]),
    (lambda a: a.decode(LATENTS, batch_size=-1), ValueError, ["batch_size must be", "-1"]),
    (lambda a: a.decode(np.zeros((1, 4, 4, 8))), ValueError, ["latents must have", "4, 8)"]),
    (lambda a: a.moments_shape((8, 8, 1)), ValueError, ["takes 3 channels", "of 1"]),
    (lambda a: AutoencoderKL(48), ValueError, ["base_dim must be a multiple of 32", "48"]),
    (lambda a: AutoencoderKL(**TINY, scale=0.0), ValueError, ["scale must be a positive", "0.0"]),
    (lambda a: AutoencoderKL(**TINY, scale=NAN), ValueError, ["scale must be a positive", "nan"]),
    (lambda a: AutoencoderKL(multipliers=()), ValueError, ["at least one level", "=()"]),
]
OF_SPACE_TO_DEPTH = [
    (lambda a: a.decode(np.zeros((1, 4, 4, 6))), ValueError, ["latents must have", "c=6"]),
    (lambda a: SpaceToDepth(0), ValueError, ["factor must be an int >= 1", "0"]),
    (lambda a: SpaceToDepth(scale=NAN), ValueError, ["scale must be a positive", "nan"]),
]


@pytest.mark.parametrize(("call", "error", "words"), BOTH + OF_KL)
def test_what_does_not_fit_is_refused(tiny, call, error, words):
    refused(error, lambda: call(tiny), *words)


@pytest.mark.parametrize(("call", "error", "words"), BOTH + OF_SPACE_TO_DEPTH)
def test_space_to_depth_refuses_what_an_autoencoder_refuses(call, error, words):
    refused(error, lambda: call(SpaceToDepth()), *words)


# Space to depth -----------------------------------------------------------------------------------


def _every_level(channels, size=16):
    """Images that hold each uint8 value in each channel."""
    levels = np.arange(256, dtype="uint8").reshape(1, size, size, 1)
    return np.concatenate([np.roll(levels, 37 * c, axis=1) for c in range(channels)], axis=-1)


@pytest.mark.parametrize(
    ("channels", "factor", "scale"), [(1, 1, 1.0), (3, 2, 0.18215), (1, 4, 7.0), (3, 8, 7.0)]
)
def test_space_to_depth_gives_every_value_back(channels, factor, scale):
    images, autoencoder = _every_level(channels), SpaceToDepth(factor, scale)
    moments = autoencoder.encode(images, batch_size=1, verbose=0)
    side = 16 // factor
    assert moments.shape == (1, side, side, 2 * channels * factor**2)
    assert autoencoder.moments_shape(images.shape[1:]) == moments.shape[1:]
    mean, log_variance = np.split(moments, 2, axis=-1)
    latents = autoencoder.sample(moments, seed=5)
    np.testing.assert_array_equal(latents, scale * mean)
    decoded = autoencoder.decode(latents, batch_size=1, verbose=0)
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


def test_space_to_depth_clips_what_a_model_overshoots():
    decoded = SpaceToDepth(2).decode(np.array([-9, -1, 1, 9.0]).reshape(1, 1, 1, 4))
    np.testing.assert_array_equal(decoded.ravel(), [0, 0, 255, 255])


def test_space_to_depth_has_every_method_of_the_autoencoder_and_a_name_of_its_factor():
    own = [name for name, value in vars(AutoencoderKL).items() if not name.startswith("_")]
    promised = set(own) - {"from_file", "call", "get_config"}
    assert {name for name in promised if not hasattr(SpaceToDepth(), name)} == set()
    assert SpaceToDepth(4).id == SpaceToDepth(4).fingerprint == "space-to-depth-4"
