"""The sampling loop as a file: it draws what `generate` draws, where this package is not there."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from tiny import diffusion_model, normal, randomize, refused

from keras_uvit import DiffusionModel, UViT, backend, encoders
from keras_uvit.diffusion import samplers
from keras_uvit.sampling import export

FORMATS = [name for name, able in backend.SAMPLER_FORMATS.items() if backend.NAME in able]
OTHERS = [name for name in backend.SAMPLER_FORMATS if name not in FORMATS]
# What runs a file of each format, in a process that cannot import the package.
READERS = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
images = session.run(None, given)[0]
""",
    "tf_saved_model": """
import tensorflow as tf
run = tf.saved_model.load(path).signatures["serving_default"]
images = run(**{name: tf.constant(value) for name, value in given.items()})["images"].numpy()
""",
    "litert": """
import tensorflow as tf
images = tf.lite.Interpreter(path).get_signature_runner()(**given)["images"]
""",
    "stablehlo": """
from jax import export
with open(path, "rb") as file:
    program = export.deserialize(bytearray(file.read()))
images = np.asarray(program.call(**given))
""",
}
RUN = """
import sys
import numpy as np
sys.modules["keras_uvit"] = None  # an import of it would raise
path, inputs, out = sys.argv[1:]
given = dict(np.load(inputs))
{reader}
np.save(out, images)
"""
# The same for a single evaluation of the network, as Keras exports it, with the file's ending.
NETWORK_READERS = {
    "tf_saved_model": (
        "",
        """
import tensorflow as tf
run = tf.saved_model.load(path).signatures["serving_default"]
images = run(**{name: tf.constant(value) for name, value in given.items()})["output_0"].numpy()
""",
    ),
    "litert": (
        ".tflite",
        """
import tensorflow as tf
images = tf.lite.Interpreter(path).get_signature_runner()(**given)["output_0"]
""",
    ),
    "torch": (
        ".pt2",
        """
import torch
given = {name: torch.from_numpy(value) for name, value in given.items()}
images = torch.export.load(path).module()(given).detach().numpy()
""",
    ),
}


def needed(format):
    modules = {"onnx": ["onnx", "onnxruntime"]}.get(format, [])
    modules += {"onnx": {"torch": ["onnxscript"], "tensorflow": ["tf2onnx"]}}.get(format, {}).get(
        backend.NAME, []
    )
    modules += ["tensorflow"] if format in ("tf_saved_model", "litert") else []
    for module in modules:
        pytest.importorskip(module, reason=f"{format} needs {module}")


def draw(path, reader, tmp_path, **given):
    """What the file gives for these inputs, in a process of its own."""
    np.savez(tmp_path / "inputs.npz", **given)
    code = RUN.format(reader=reader)
    arguments = [str(path), str(tmp_path / "inputs.npz"), str(tmp_path / "images.npy")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "images.npy")


def trained_like(model):
    """Weights that are not small, so that guidance and the sampler show."""
    for network in (model.network, model.ema_network):
        randomize(network, scale=0.1)
    return model


def near(images, expected):
    assert images.dtype == np.uint8
    # Another runtime sums in another order: a number near a half may be rounded the other way.
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert expected.std() > 10  # not all of one colour


@pytest.mark.parametrize("format", FORMATS)
def test_a_guided_sampler_draws_the_same_without_the_package(format, tmp_path):
    needed(format)
    model = trained_like(diffusion_model(compiled=False))
    # Rows with and without guidance, and a sampler with a memory.
    options = dict(num_steps=4, guidance_scale=2.0, guidance_interval=(0.0, 0.7))
    path = tmp_path / f"sampler{export.ENDINGS[format]}"
    model.export_sampler(path, format, batch_size=2, **options)
    noise, labels = normal(2, 4, 4, 1), np.array([2, 0], "int32")
    expected = model.generate(labels=labels, noise=noise, verbose=0, **options)
    near(draw(path, READERS[format], tmp_path, noise=noise, label=labels), expected)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("tmp-")] == []


@pytest.mark.parametrize("format", FORMATS)
def test_latents_are_decoded_and_contexts_are_inputs(format, tmp_path):
    needed(format)
    keras.utils.set_random_seed(0)
    net = UViT((2, 2, 4), hidden_dim=16, num_layers=1, num_heads=2, context_shape=(3, 8))
    model = trained_like(DiffusionModel(net, latent_scale=0.5))
    model.set_encoders(autoencoder=encoders.SpaceToDepth(scale=0.5))
    model.null_context.assign(normal(3, 8, seed=4))
    path = tmp_path / f"sampler{export.ENDINGS[format]}"
    model.export_sampler(path, format, num_steps=2, guidance_scale=1.5)
    noise, context = normal(1, 2, 2, 4), normal(1, 3, 8, seed=3)
    options = dict(num_steps=2, guidance_scale=1.5)
    expected = model.generate(prompts=context, noise=noise, verbose=0, **options)
    assert expected.shape == (1, 4, 4, 1)
    near(draw(path, READERS[format], tmp_path, noise=noise, context=context), expected)


@pytest.mark.once
@pytest.mark.each_backend
def test_the_decoder_of_an_autoencoder_is_part_of_the_program():
    autoencoder = encoders.AutoencoderKL(32, (1, 1), 1, scale=0.5, shift=0.1)
    randomize(autoencoder, scale=0.1)
    net = UViT((4, 4, 4), hidden_dim=16, num_layers=1, num_heads=2)
    model = trained_like(DiffusionModel(net, latent_scale=0.5, latent_shift=0.1))
    model.set_encoders(autoencoder=autoencoder)
    program = export.program_of(model, num_steps=2)
    assert program.networks[-1] is autoencoder.decoder
    weights = [[w.value for w in network.variables] for network in program.networks]
    noise = normal(1, 4, 4, 4)
    run = backend.compiled(lambda weights, noise: program(weights, noise=noise))
    images = keras.ops.convert_to_numpy(run(weights, keras.ops.convert_to_tensor(noise)))
    near(images, model.generate(1, noise=noise, num_steps=2, verbose=0))


@pytest.mark.parametrize("format", backend.EXPORT_FORMATS)
def test_the_average_is_exported_after_a_model_was_loaded(format, tmp_path):
    needed(format)
    trained_like(diffusion_model(compiled=False)).save(tmp_path / "model.keras")
    network = keras.saving.load_model(tmp_path / "model.keras").ema_network
    ending, reader = NETWORK_READERS[format]
    path = tmp_path / f"network{ending}"
    network.export(path, format=format, verbose=False)
    inputs = {  # one image: PyTorch's program is traced for so many
        "image": normal(1, 4, 4, 1),
        "timestep": np.array([300.0], "float32"),
        "label": np.array([2], "int32"),
    }
    expected = keras.ops.convert_to_numpy(network(inputs))
    found = draw(path, reader, tmp_path, **inputs)
    # Other runtimes sum in another order: float32's rounding of some hundred terms.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


# Refusals: before anything is traced or written --------------------------------------------------


def model_of(**options):
    return diffusion_model(compiled=False, **options)


FORMAT = FORMATS[0]
BAD = {
    "format": (ValueError, dict(format="onxx"), ["'onxx'", "Did you mean 'onnx'?"]),
    "batch_size": (ValueError, dict(batch_size=0), ["batch_size", "0"]),
    "num_steps": (ValueError, dict(num_steps=0), ["num_steps", "0"]),
    "ddpm": (ValueError, dict(sampler="ddpm"), ["'ddpm'", "draws noise", "dpm_solver_pp_2m"]),
    "scale": (ValueError, dict(guidance_scale=-1.0), ["guidance_scale", "-1.0"]),
    "guidance": (TypeError, dict(guidance=2.0), ["guidance_scale", "2.0"]),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_cannot_be_are_refused_before_any_work(name, tmp_path, monkeypatch):
    error, options, words = BAD[name]
    monkeypatch.setattr(backend, "export_sampler", lambda *_: pytest.fail("it began"))
    options = {"format": FORMAT, **options}
    path = tmp_path / f"sampler{export.ENDINGS[FORMAT]}"
    refused(error, lambda: model_of().export_sampler(path, **options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", OTHERS)
def test_a_format_of_another_backend_is_refused_with_the_pair_that_works(format, tmp_path):
    path = tmp_path / f"sampler{export.ENDINGS[format]}"
    able = backend.SAMPLER_FORMATS[format]
    words = [repr(format), *able, backend.NAME, f"KERAS_BACKEND={able[0]}", *map(repr, FORMATS)]
    refused(NotImplementedError, lambda: model_of().export_sampler(path, format), *words)


@pytest.mark.once
@pytest.mark.each_backend
def test_a_path_that_does_not_suit_the_format_is_refused(tmp_path):
    model = model_of()
    for format in FORMATS:
        path, ending = tmp_path / "sampler.txt", export.ENDINGS[format]
        if ending:
            refused(ValueError, lambda: model.export_sampler(path, format), ending)  # noqa: B023
        else:
            call = lambda: model.export_sampler(tmp_path, format)  # noqa: B023, E731
            refused(FileExistsError, call, "is there already")


@pytest.mark.once
def test_latents_without_an_autoencoder_are_not_decoded(tmp_path):
    net = UViT((2, 2, 4), hidden_dim=16, num_layers=1, num_heads=2)
    model = DiffusionModel(net, latent_scale=0.5)
    call = lambda: model.export_sampler(tmp_path / "a.onnx", "onnx")  # noqa: E731
    if "onnx" in FORMATS:
        refused(ValueError, call, "set_encoders(autoencoder=...)", "decode=False")

    class Own(encoders.SpaceToDepth):
        decode_tensor = property()  # as if it had none

    model.set_encoders(autoencoder=Own(scale=0.5))
    refused(TypeError, lambda: export.program_of(model), "decode_tensor", "decode=False")


@pytest.mark.once
def test_a_network_in_bfloat16_or_too_large_is_refused(tmp_path, monkeypatch):
    path = tmp_path / f"sampler{export.ENDINGS['onnx']}"
    monkeypatch.setitem(backend.SAMPLER_FORMATS, "onnx", (backend.NAME,))
    half = model_of(network={"dtype": "mixed_bfloat16"})
    refused(ValueError, lambda: half.export_sampler(path, "onnx"), "bfloat16", "float32")
    monkeypatch.setattr(export, "LARGEST", 100)
    refused(ValueError, lambda: model_of().export_sampler(path, "onnx"), "2 GB", "tf_saved_model")


@pytest.mark.once
def test_a_missing_package_is_named(tmp_path, monkeypatch):
    if "onnx" not in FORMATS:
        pytest.skip(f"{backend.NAME} writes no ONNX")
    monkeypatch.setitem(sys.modules, "onnx", None)
    call = lambda: model_of().export_sampler(tmp_path / "a.onnx", "onnx")  # noqa: E731
    refused(ImportError, call, "keras-uvit[export]", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fails(program, path, format):
        path.mkdir()
        (path / "half").write_text("half", encoding="utf-8")
        raise RuntimeError("no space")

    monkeypatch.setattr(backend, "export_sampler", fails)
    monkeypatch.setattr(backend, "check_exports", lambda _: None)
    path = tmp_path / f"sampler{export.ENDINGS[FORMAT]}"
    refused(RuntimeError, lambda: model_of().export_sampler(path, FORMAT), "no space")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_stochastic_samplers_are_refused_by_name_and_the_others_taken():
    model = model_of()
    stochastic = {"ddpm", "euler_maruyama"}
    for name in samplers.SAMPLERS.keys() - {"flow_map"}:  # which needs a flow map
        if name in stochastic:
            refused(ValueError, lambda: export.program_of(model, sampler=name), repr(name))  # noqa: B023
        else:
            assert len(export.program_of(model, sampler=name, num_steps=4).table)


@pytest.mark.once
def test_keras_export_names_what_works(tmp_path):
    words = "export_sampler", "ema_network.export", "model.save"
    refused(NotImplementedError, lambda: model_of().export("never"), *words)
    # TensorFlow would write a file of ONNX that no runtime takes, and say so in its log alone.
    export = model_of().network.export
    words = "'onnx'", repr(backend.EXPORT_FORMATS[0]), "export_sampler"
    refused(NotImplementedError, lambda: export(tmp_path / "network", format="onnx"), *words)
    assert not list(tmp_path.iterdir())
