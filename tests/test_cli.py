"""The commands, from what is typed to what is on disk, and what bad input gets as an answer."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import keras_uvit
from keras_uvit import UViT, cli, convert, data, evaluation, presets
from keras_uvit.convert.files import read_tensors
from keras_uvit.latent import AutoencoderKL, SpaceToDepth

GOLDEN = Path(__file__).parent / "golden"
BACKEND = keras.config.backend()
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 8, 8, 3)).astype("uint8")
COMMANDS = list(cli.main.commands)

# Rows with networks that train in a second.
SMALL = dict(patch_size=4, hidden_dim=16, num_layers=1, num_heads=2)
DIGITS = presets.get("uvit_tiny_digits")
ROWS = {
    "uvit_nano_digits": dict(network=dict(image_shape=(8, 8, 1), num_classes=10, **SMALL)),
    "uvit_nano_colour": dict(
        network=dict(image_shape=(8, 8, 3), **SMALL), condition_dropout=0.0, guidance_scale=1.0
    ),
    "uvit_nano_latent": dict(
        network=dict(image_shape=(4, 4, 4), num_classes=10, **SMALL), latent_scale=1.0
    ),
    "uvit_golden_class": dict(
        network=dict(
            image_shape=(16, 16, 4),
            patch_size=4,
            hidden_dim=48,
            num_layers=5,
            num_heads=3,
            num_classes=10,
            output_conv=False,
        )
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _rows():
    rows = {name: dataclasses.replace(DIGITS, weights=None, **row) for name, row in ROWS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", {**presets.PRESETS, **rows})
        yield


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """Every command makes its model anew: JAX need not compile the same program again."""
    if BACKEND != "jax":
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, 0.0), strict=True):
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def run(*words):
    """What a command that succeeds prints."""
    result = invoke(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*words, code=1):
    """The one line with which bad input is answered."""
    result = invoke(*words)
    assert isinstance(result.exception, SystemExit), repr(result.exception)  # no traceback
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("Error: "), result.stderr
    if code == 1:
        assert len(lines) == 1, result.stderr
    return lines[-1]


TINY_AUTOENCODER = dict(base_dim=32, multipliers=(1, 1), num_res_blocks=1)


@pytest.fixture
def small_default(monkeypatch):
    """A function that gives `AutoencoderKL()` another architecture: the true one is 83.7 M weights.

    Called again, it changes the architecture again.
    """
    init, config = AutoencoderKL.__init__, dict(TINY_AUTOENCODER)

    def small(self, *arguments, **options):
        init(self, *arguments, **{**config, **options})

    monkeypatch.setattr(AutoencoderKL, "__init__", small)
    return config.update


def save_pngs(folder, images=PICTURES, classes=()):
    for k, image in enumerate(images):
        place = folder / classes[k % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{k:02d}.png")
    return folder


def latents(folder, **options):
    return data.LatentDataset(folder, 4, verbose=0, **options)


# Help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command):
    text = run(command, "--help")
    assert re.search(rf"Examples?:\s+keras-uvit {command}\b", text)
    assert text == run(command, "-h")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_are_valid_commands(command):
    """Options exist and take what is written; nothing is run."""
    text = cli.main.commands[command].help.replace("\\\n", " ")
    lines = [shlex.split(line)[1:] for line in text.splitlines() if "keras-uvit " in line]
    examples = [words for words in lines if words and words[0] == command]
    assert examples
    for words in examples:
        cli.main.commands[command].make_context(command, words[1:])


def test_the_groups_help_names_all_commands_and_the_backends():
    text = run("--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  ", text, re.M)
    assert "KERAS_BACKEND=jax, tensorflow or torch" in text
    assert set(re.findall(r"^ +keras-uvit (\w+)", text, re.M)) <= set(COMMANDS)


def test_presets_are_listed_with_parameters_and_fid():
    lines = run("presets").splitlines()
    assert len(lines) == 1 + len(presets.PRESETS)
    for name, row in presets.PRESETS.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        fid = f"{row.reported_fid:.2f}" if row.reported_fid else "-"
        assert line.split()[1:4] == [f"{row.params / 1e6:.1f}M", f"{row.gmacs:.1f}", fid]
        assert line.endswith(row.paper_name)


def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "keras-uvit"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert keras_uvit.__version__ in result.stdout


# encode -------------------------------------------------------------------------------------------


def test_encode_digits_with_mirror_images_by_two_processes(tmp_path):
    words = ("encode", "digits", tmp_path, "--autoencoder", "space-to-depth", "--flip")
    words += ("--shard-size", 400, "--batch-size", 256)
    text = run(*words, "--process", "0/2")
    assert "this process's part; others are still missing" in text
    assert "0 of 2 shards are there" in text  # of its own
    text = run(*words, "--process", "1/2")
    assert f"{tmp_path}: {2 * 1437} samples" in text
    cache = latents(tmp_path)
    assert cache.num_samples == 2 * 1437
    assert (cache.num_classes, cache.fingerprint) == (10, "space-to-depth-2")
    assert cache.manifest["flip"] == "stored"
    image = data.digits()["image"][:1]
    expected = SpaceToDepth().encode(np.concatenate([image, image[:, :, ::-1]]))
    # float16: half a unit in the last of 11 bits, of values up to 1 (the log-variance is exact).
    np.testing.assert_allclose(cache.arrays["moments"][:2], expected, atol=2**-12)


def test_encode_goes_on_with_what_is_missing(tmp_path):
    words = ("encode", "digits", tmp_path, "--autoencoder", "space-to-depth")
    words += ("--shard-size", 500, "--batch-size", 256)
    assert "0 of 3 shards are there" in run(*words)
    (tmp_path / "00001.json").unlink()
    untouched = (tmp_path / "00002.json").stat().st_mtime_ns
    text = run(*words)
    assert "2 of 3 shards are there" in text
    assert "1437 samples" in text
    assert (tmp_path / "00002.json").stat().st_mtime_ns == untouched
    line = refused(*words, "--dtype", "float32")
    assert "a cache made in another way: dtype was float16, is float32" in line


def test_encode_a_folder_of_pictures_with_classes(tmp_path):
    photos = save_pngs(tmp_path / "photos", classes=("cats", "dogs"))
    cache = tmp_path / "cache"
    run("encode", photos, cache, "--autoencoder", "space-to-depth", "--image-size", 4)
    found = latents(cache)
    assert (found.num_samples, found.num_classes) == (12, 2)
    assert found.manifest["class_names"] == ["cats", "dogs"]
    assert found.sample_shape == (2, 2, 24)
    grey = tmp_path / "grey"
    run(
        "encode", photos, grey, "--pixels", "--image-size", 2, "--channels", 1, "--crop", 1, 2, 4, 5
    )
    assert data.image_shards(grey, 4, verbose=0).images.shape == (12, 2, 2, 1)


@pytest.mark.parametrize("labelled", [True, False])
def test_encode_an_npz(tmp_path, labelled):
    content = {"image": PICTURES, **({"label": np.arange(12) % 3} if labelled else {})}
    np.savez(tmp_path / "a.npz", **content)
    run("encode", tmp_path / "a.npz", tmp_path / "cache", "--autoencoder", "space-to-depth")
    found = latents(tmp_path / "cache")
    assert (found.num_samples, found.num_classes) == (12, 3 if labelled else None)
    assert found.manifest["source"] == "a.npz"


def test_encode_pixels(tmp_path):
    text = run("encode", "digits", tmp_path, "--pixels", "--shard-size", 1000)
    assert "1437 samples" in text
    found = data.image_shards(tmp_path, 4, flip=False, verbose=0)
    np.testing.assert_array_equal(found.images[:], data.digits()["image"])
    assert found.num_classes == 10


@pytest.mark.usefixtures("small_default")
def test_encode_with_a_file_of_weights(tmp_path):
    autoencoder = AutoencoderKL()
    autoencoder.save_weights(tmp_path / "mine.weights.h5")
    np.savez(tmp_path / "a.npz", image=PICTURES)
    words = ("encode", tmp_path / "a.npz", tmp_path / "cache", "--scale", 0.5)
    run(*words, "--autoencoder", tmp_path / "mine.weights.h5", "--dtype", "float32")
    found = latents(tmp_path / "cache")
    assert (found.scale, found.autoencoder_id) == (0.5, "mine")
    assert found.fingerprint == autoencoder.fingerprint
    expected = autoencoder.encode(PICTURES, verbose=0)
    # The same program in batches of another size: rounding.
    np.testing.assert_allclose(found.arrays["moments"][:], expected, atol=1e-5)


# convert ------------------------------------------------------------------------------------------


def assert_same_tensors(first, second):
    first, second = read_tensors(first), read_tensors(second)
    assert sorted(first) == sorted(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_convert_there_and_back_is_exact(tmp_path, kind):
    ours, back = tmp_path / "w.weights.h5", tmp_path / f"back{kind}"
    text = run("convert", "uvit_golden_class", GOLDEN / "uvit_class.pth", ours)
    assert re.search(rf"{re.escape(str(ours))}: \d\d\d,\d\d\d numbers", text)
    run("convert", "uvit_golden_class", ours, back)
    assert_same_tensors(GOLDEN / "uvit_class.pth", back)
    network = UViT(**presets.get("uvit_golden_class").network)
    network.load_weights(ours)
    other = UViT(**presets.get("uvit_golden_class").network)
    convert.load_torch_weights(other, GOLDEN / "uvit_class.pth")
    for a, b in zip(network.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_convert_an_autoencoder(tmp_path, small_default):
    small_default(multipliers=(1, 1, 2, 2))
    source = GOLDEN / "autoencoder_kl.pth"
    run("convert", "autoencoder", source, tmp_path / "a.weights.h5")
    run("convert", "autoencoder", tmp_path / "a.weights.h5", tmp_path / "b.safetensors")
    back, there = read_tensors(tmp_path / "b.safetensors"), read_tensors(source)
    assert back
    for name, value in back.items():
        np.testing.assert_array_equal(value, there[name])


@pytest.mark.eager
def test_converted_weights_are_generated_from(tmp_path):
    run("convert", "uvit_golden_class", GOLDEN / "uvit_class.pth", tmp_path / "w.weights.h5")
    images = []
    for weights in (GOLDEN / "uvit_class.pth", tmp_path / "w.weights.h5"):
        target = tmp_path / "x.npz"
        words = ("generate", "uvit_golden_class", target, "--weights", weights)
        run(*words, "--labels", "1,2", "--num-steps", 2)
        images.append(np.load(target)["arr_0"])
    np.testing.assert_array_equal(*images)


# train --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    words = ("train", "uvit_nano_digits", "digits", folder, "--iterations", 1)
    words += ("--batch-size", 512)
    return folder, words, run(*words)


def test_train_on_digits_leaves_a_run_and_pictures(trained):
    folder, words, text = trained
    assert f"Trained: {folder / 'model.keras'}" in text
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.keras", "ema.weights.h5", "log.csv", "grids", "checkpoints"}
    assert [path.name for path in (folder / "grids").iterdir()] == ["epoch-0001.png"]
    log = (folder / "log.csv").read_text()
    assert "Trained" in run(*words)  # typed again: there is nothing to do
    assert (folder / "log.csv").read_text() == log
    assert "another model: it differs in ['seed']" in refused(*words, "--seed", 5)


@pytest.fixture
def asked(monkeypatch):
    """What `train` would train; nothing is."""
    seen = {}

    def train(model, samples, folder, iterations, **more):
        seen.update(model=model, samples=samples, folder=folder, iterations=iterations, **more)
        return model

    monkeypatch.setattr(cli.models, "train_in_folder", train)
    return seen


def test_train_takes_the_presets_numbers_unless_others_are_given(tmp_path, asked):
    run("train", "uvit_nano_digits", "digits", tmp_path)
    row = presets.get("uvit_nano_digits")
    assert (asked["samples"].batch_size, asked["iterations"]) == (row.batch_size, row.iterations)
    assert len(asked["callbacks"]) == 1
    assert not asked["samples"].flip  # a mirrored digit is no digit
    words = ("--batch-size", 7, "--iterations", 9, "--seed", 3, "--grid-every", 0)
    run("train", "uvit_nano_digits", "digits", tmp_path, *words)
    assert (asked["samples"].batch_size, asked["iterations"]) == (7, 9)
    assert asked["model"].seed == 3
    assert asked["callbacks"] == []


@pytest.mark.parametrize("spec", ["digits", "folder"])
def test_the_seed_is_that_of_the_data_too(tmp_path, asked, spec):
    if spec == "folder":
        spec = save_pngs(tmp_path / "photos")
    preset = "uvit_nano_digits" if spec == "digits" else "uvit_nano_colour"
    run("train", preset, spec, tmp_path / "run", "--seed", 3, "--batch-size", 4)
    assert asked["samples"].seed == 3


def test_train_on_a_cache_of_pixels(tmp_path, asked):
    np.savez(tmp_path / "a.npz", image=PICTURES, label=np.arange(12) % 3)
    run("encode", tmp_path / "a.npz", tmp_path / "cache", "--pixels")
    words = ("train", "uvit_nano_colour", tmp_path / "cache", tmp_path / "run", "--batch-size", 4)
    run(*words)
    assert isinstance(asked["samples"], data.images.ImageDataset)
    assert "label" not in asked["samples"][0]  # the row has no labels
    assert asked["samples"][0]["image"].shape == (4, 8, 8, 3)


def test_train_takes_the_number_of_classes_of_the_data_and_says_so(tmp_path, asked):
    grey = PICTURES[..., :1]
    np.savez(tmp_path / "a.npz", image=grey, label=np.arange(12) % 3)
    run("encode", tmp_path / "a.npz", tmp_path / "cache", "--pixels")
    words = (tmp_path / "cache", tmp_path / "run", "--batch-size", 4)
    text = run("train", "uvit_nano_digits", *words)
    assert "3 classes in the data, 10 in uvit_nano_digits: taking those." in text
    assert asked["model"].network.num_classes == 3
    assert "taking those" not in run("train", "uvit_nano_digits", "digits", tmp_path / "run")


@pytest.mark.usefixtures("small_default")
def test_train_on_latents_draws_pictures_only_with_an_autoencoder(tmp_path, asked):
    AutoencoderKL().save_weights(tmp_path / "a.weights.h5")
    run("encode", "digits", tmp_path / "cache", "--autoencoder", "space-to-depth")
    words = ("train", "uvit_nano_latent", tmp_path / "cache", tmp_path / "run")
    run(*words)
    assert asked["callbacks"] == []
    assert asked["samples"].sample_shape == (4, 4, 8)
    run(*words, "--autoencoder", tmp_path / "a.weights.h5")
    assert len(asked["callbacks"]) == 1
    assert (asked["model"].autoencoder.id, asked["model"].autoencoder.scale) == ("a", 1.0)


def test_train_on_a_folder_of_pictures_fits_them_to_the_network(tmp_path, asked):
    large = PICTURES.repeat(2, 1).repeat(3, 2)
    photos = save_pngs(tmp_path / "photos", large)
    run("train", "uvit_nano_colour", photos, tmp_path / "run", "--batch-size", 4)
    assert asked["samples"].images.shape == (12, 8, 8, 3)


# generate -----------------------------------------------------------------------------------------

FEW = ("--num-steps", 2)


def test_generate_from_shipped_weights_into_a_grid(tmp_path):
    words = ("generate", "uvit_tiny_digits", tmp_path / "a.png", "--weights", "pretrained", *FEW)
    text = run(*words, "--labels", "0,1,2,3", "--zoom", 3)
    assert f"4 images: {tmp_path / 'a.png'}" in text
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (2 * 24 + 2, 2 * 24 + 2)


def test_generate_from_a_trained_model_into_arrays_and_files(tmp_path, trained):
    model = trained[0] / "model.keras"
    words = ("--labels", "3,1,4", *FEW)
    run("generate", model, tmp_path / "a.npz", *words)
    with np.load(tmp_path / "a.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert labels.tolist() == [3, 1, 4]
    run("generate", model, tmp_path / "pictures", *words, "--batch-size", 2)
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    drawn = np.stack([np.asarray(Image.open(file)) for file in files])
    # Batches of another size: a rounding may tip an integer.
    np.testing.assert_allclose(drawn.astype(int), images[..., 0].astype(int), atol=1)
    run("generate", model, tmp_path / "a.png", *words)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "a.png")), evaluation.image_grid(images)[..., 0]
    )
    expected = keras.saving.load_model(model).generate(labels=[3, 1, 4], num_steps=2, verbose=0)
    np.testing.assert_array_equal(images, expected)


@pytest.mark.eager
def test_the_same_seed_gives_the_same_images_and_the_options_arrive(tmp_path, trained):
    model = keras.saving.load_model(trained[0] / "model.keras")
    for weight in model.ema_network.weights:
        weight.assign(weight + 0.1)  # few steps leave it near the weights themselves
    model.save(tmp_path / "model.keras")

    def images(*more):
        run("generate", tmp_path / "model.keras", tmp_path / "a.npz", "--labels", "3,1", *more)
        return np.load(tmp_path / "a.npz")["arr_0"]

    first = images(*FEW)
    np.testing.assert_array_equal(first, images(*FEW, "--seed", 0))
    for other in (("--seed", 1), ("--guidance-scale", 9), ("--sampler", "ddpm"), ("--raw",)):
        assert (images(*FEW, *other) != first).any(), other
    assert (images("--num-steps", 3) != first).any()
    np.testing.assert_array_equal(
        images("--fast"), model.generate(labels=[3, 1], **presets.FAST, verbose=0)
    )
    np.testing.assert_array_equal(
        images("--fast", *FEW),
        model.generate(labels=[3, 1], **{**presets.FAST, "num_steps": 2}, verbose=0),
    )


@pytest.mark.eager
def test_the_average_of_a_run_is_its_model_for_generate(tmp_path, trained):
    images = []
    average = ("uvit_nano_digits", "--weights", trained[0] / "ema.weights.h5")
    for what in ((trained[0] / "model.keras",), average):
        target = tmp_path / "a.npz"
        run("generate", what[0], target, *what[1:], "--labels", "3,1", *FEW)
        images.append(np.load(target)["arr_0"])
    np.testing.assert_array_equal(*images)


def test_generate_without_labels(tmp_path):
    run("generate", "uvit_nano_colour", tmp_path / "a.npz", "--num-images", 2, *FEW)
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].shape == (2, 8, 8, 3)


# statistics and evaluate --------------------------------------------------------------------------


class StubInception:
    """Fixed random projections, with the attributes and keys of `InceptionFeatures`."""

    fingerprint = "stub"

    def __init__(self, weights=None, resize="half_pixel"):
        if not Path(weights).is_file():
            raise FileNotFoundError(f"No weight file at {weights}.")
        self.resize = resize

    def __call__(self, images, batch_size=None, verbose=0):
        flat = images.reshape(len(images), -1) / 255.0
        widths = {"pool": 16, "spatial": 12, "logits": 10, "logits_unbiased": 10}
        rng = np.random.default_rng(0)
        return {
            key: (flat @ rng.standard_normal((flat.shape[1], width))).astype("float32")
            for key, width in widths.items()
        }


@pytest.fixture
def inception(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.measures, "InceptionFeatures", StubInception)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    return ("--inception", tmp_path / "inception.pth")


@pytest.fixture
def reference(tmp_path, inception):
    photos = save_pngs(tmp_path / "photos", RNG.integers(0, 256, (40, 8, 8, 3)).astype("uint8"))
    text = run("statistics", photos, tmp_path / "ref.npz", "--image-size", 8, *inception)
    known = evaluation.Reference.load(tmp_path / "ref.npz")
    assert f"{tmp_path / 'ref.npz'}: 40 images of (8, 8), {known.hash}" in text
    return ("--reference", tmp_path / "ref.npz", *inception, "--allow-few")


@pytest.mark.usefixtures("inception")
def test_statistics_are_of_the_sources_images(tmp_path, inception):
    np.savez(tmp_path / "a.npz", image=PICTURES)
    run("statistics", tmp_path / "a.npz", tmp_path / "r.npz", *inception, "--resize", "tf1")
    known = evaluation.Reference.load(tmp_path / "r.npz")
    assert (known.count, known.image_size, known.resize) == (12, (8, 8), "tf1")
    pool = StubInception(tmp_path / "inception.pth")(PICTURES)["pool"]
    np.testing.assert_allclose(known.pool[0], pool.mean(axis=0), atol=1e-5)  # float32 rounding
    assert np.asarray(known.pool[1]).shape == (16, 16)


SCORES = {"fid", "sfid", "inception_score", "precision", "recall"}


def record_of(text):
    return json.loads(text[text.index("{") :])


@pytest.mark.filterwarnings("ignore")  # few images
def test_evaluate_a_model_keeps_images_and_record(tmp_path, reference):
    words = ("evaluate", "uvit_nano_colour", *reference, "--num-images", 30, *FEW)
    words += ("--folder", tmp_path / "drawn", "--out", tmp_path / "fid.json")
    record = record_of(run(*words))
    assert record == json.loads((tmp_path / "fid.json").read_text())
    assert record.keys() >= {*SCORES, "num_images", "seed", "num_steps", "weights", "reference"}
    assert (record["num_images"], record["num_steps"]) == (30, 2)
    assert record["fid"] > 0
    with np.load(tmp_path / "drawn" / "000000.npz") as file:
        assert file["arr_0"].shape == (30, 8, 8, 3)
    assert "samples of something else" in refused(*words, "--seed", 1)
    # The same images, ready, give the same numbers.
    ready = record_of(run("evaluate", tmp_path / "drawn" / "000000.npz", *reference))
    assert all(ready[key] == pytest.approx(record[key], abs=1e-4) for key in SCORES)  # rounded


@pytest.mark.filterwarnings("ignore")
def test_evaluate_ready_images_of_an_npz_or_a_folder(tmp_path, reference):
    evaluation.write_npz(tmp_path / "a.npz", PICTURES)
    folder = save_pngs(tmp_path / "pictures")
    records = []
    for images in (tmp_path / "a.npz", folder):
        text = run("evaluate", images, *reference, "--out", tmp_path / "out.json")
        records.append(record_of(text))
        assert records[-1] == json.loads((tmp_path / "out.json").read_text())
        assert records[-1]["num_images"] == 12
        assert records[-1]["images"] == str(images)
    assert {k: records[0][k] for k in SCORES} == {k: records[1][k] for k in SCORES}


def test_evaluate_refuses_what_cannot_be_compared(tmp_path, reference):
    words = ("evaluate", "uvit_nano_colour", *reference, "--num-images", 30)
    assert "tf1" in refused(*words, "--resize", "tf1")
    assert "fewer than 2049" in refused(*words[:-3], "--num-images", 30)
    assert "3 channels" in refused("evaluate", "uvit_nano_digits", *words[2:])
    evaluation.write_npz(tmp_path / "large.npz", PICTURES.repeat(2, 1).repeat(2, 2))
    assert "8 x 8 images, these are 16 x 16" in refused(
        "evaluate", tmp_path / "large.npz", *reference
    )


# Bad input ----------------------------------------------------------------------------------------


def test_an_unknown_preset_is_answered_with_the_nearest(tmp_path):
    for words in (
        ("generate", "uvit_nano_digit", tmp_path / "a.png"),
        ("train", "uvit_nano_digit", "digits", tmp_path / "run"),
        ("convert", "uvit_nano_digit", "a.pth", "b.weights.h5"),
    ):
        line = refused(*words)
        assert "Unknown preset 'uvit_nano_digit'. Nearest: ['uvit_nano_digits'" in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset_is_answered_with_the_nearest_by_evaluate_too(reference):
    assert "uvit_nano_colour" in refused("evaluate", "uvit_nano_color", *reference)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("generate gone.keras a.png --num-images 1", "gone.keras"),
        ("generate uvit_nano_colour a.png --num-images 1 --weights gone.pth", "gone.pth"),
        ("generate uvit_nano_colour a.png --num-images 1 --weights gone.keras", "gone.keras"),
        ("encode gone cache --image-size 8 --pixels", "gone"),
        ("encode gone cache --pixels", "gone"),
        ("encode gone.npz cache --pixels", "gone.npz"),
        ("train uvit_nano_colour gone run", "gone"),
        ("convert uvit_nano_colour gone.pth a.weights.h5", "gone.pth"),
        ("convert uvit_nano_colour gone.weights.h5 a.pth", "gone.weights.h5"),
        ("evaluate uvit_nano_colour --reference gone.npz --inception inception.pth", "gone.npz"),
        ("evaluate gone.png --reference ref.npz --inception gone.pth", "gone.pth"),
        ("statistics gone ref.npz --image-size 8 --inception inception.pth", "gone"),
    ],
)
def test_a_missing_file_is_named(tmp_path, monkeypatch, inception, words, missing):
    monkeypatch.chdir(tmp_path)
    assert re.search(rf"\b{re.escape(missing)}\b", refused(*words.split()))
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("encode digits c --autoencoder space-to-depth --process 3", 2, r"--process is K/N.*: 3"),
        ("encode digits c --autoencoder space-to-depth --process a/b", 2, r"--process is K/N"),
        ("encode digits c --autoencoder space-to-depth --process=-1/2", 2, r"--process is K/N"),
        ("encode digits c --autoencoder space-to-depth --process 2/2", 1, r"index < count"),
        ("encode digits c --autoencoder space-to-depth --shard-size 0", 1, r"shard_size"),
        ("encode digits c", 2, r"Latents need --autoencoder FILE; or --pixels"),
        ("encode photos c --pixels", 2, r"folder of images needs --image-size"),
        ("encode photos c --autoencoder space-to-depth --image-size 7", 1, r"multiples of 2"),
        ("encode digits c --autoencoder space-to-depth --dtype int8", 2, r"'int8' is not one of"),
        (
            "encode arrays.npz c --pixels",
            1,
            r'the keys "image" and maybe "label", "captions". Received: ',
        ),
        ("train uvit_nano_digits digits run --batch-size 9999", 1, r"batch_size .* 1437"),
        ("train uvit_nano_digits photos run --batch-size 4", 1, r"Received the keys \['image'\]"),
        ("generate uvit_nano_digits a.png", 1, r"generates from `labels`. Received: nothing"),
        ("generate uvit_nano_digits a.png --num-images 2", 1, r"Received: \['num_images'\]"),
        ("generate uvit_nano_digits a.png --labels 3,10", 1, r"in \[0, 10\). Received: 10"),
        ("generate uvit_nano_colour a.png --labels 3", 1, r"Received: \['labels'\]"),
        ("generate uvit_nano_colour a.png --num-images 2 --sampler x", 1, r"Unknown sampler"),
        ("generate uvit_nano_colour a.png --num-images 2 --seed -1", 1, r"seed must be"),
        ("generate uvit_nano_colour a.png --num-images 2 --weights pretrained", 1, r"ships no"),
        ("generate uvit_nano_latent a.png --labels 2", 1, r"no autoencoder to decode"),
        ("generate m.keras a.png --num-images 2 --weights w.pth", 2, r"--weights go with a preset"),
        ("convert uvit_nano_colour w.txt a.pth", 1, r"w\.txt: unknown kind"),
        ("nonsense", 2, r"No such command 'nonsense'"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    save_pngs(tmp_path / "photos")
    np.savez(tmp_path / "arrays.npz", arr_0=PICTURES)
    (tmp_path / "w.txt").write_text("x")
    assert re.search(message, refused(*words.split(), code=code))
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "c").exists() or not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize("labels", ["cat", "1,,2", "1;2", "0.5"])
def test_labels_that_are_no_numbers_are_told_what_is_expected(tmp_path, labels):
    words = ("generate", "uvit_nano_digits", tmp_path / "a.png", "--labels", labels)
    assert "--labels" in refused(*words, code=2)


@pytest.mark.parametrize(
    "more",
    ["--pixels --flip", "--pixels --autoencoder space-to-depth", "--pixels --image-size 4"],
)
def test_an_option_that_does_nothing_is_refused(tmp_path, more):
    refused("encode", "digits", tmp_path / "cache", *more.split(), code=2)


def damage(kind, path):
    """A truncated file of a kind."""
    if kind == ".npz":
        np.savez(path, image=PICTURES)
    elif kind == ".keras":
        presets.load("uvit_nano_colour").save(path)
    elif kind == ".weights.h5":
        presets.load("uvit_nano_colour").ema_network.save_weights(path)
    else:
        path.write_bytes((GOLDEN / "uvit_class.pth").read_bytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("generate bad.keras a.png --num-images 1", "bad.keras"),
        ("generate uvit_nano_colour a.png --num-images 1 --weights bad.keras", "bad.keras"),
        ("generate uvit_nano_colour a.png --num-images 1 --weights bad.weights.h5", "bad.weights."),
        ("generate uvit_nano_colour a.png --num-images 1 --weights bad.pth", "bad.pth"),
        ("convert uvit_nano_colour bad.weights.h5 a.pth", "bad.weights.h5"),
        ("encode bad.npz cache --pixels", "bad.npz"),
        ("evaluate bad.npz --reference ref.npz --inception inception.pth", "bad.npz"),
        ("evaluate x.npz --reference bad.npz --inception inception.pth", "bad.npz"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, request, words, name):
    if "evaluate" in words:
        request.getfixturevalue("reference")
    monkeypatch.chdir(tmp_path)
    file = next(word for word in words.split() if word.startswith("bad."))
    damage(file.removeprefix("bad"), tmp_path / file)
    assert name in refused(*words.split())


def test_weights_of_another_network_get_one_line(tmp_path):
    presets.load("uvit_nano_digits").ema_network.save_weights(tmp_path / "w.weights.h5")
    words = ("generate", "uvit_nano_colour", tmp_path / "a.png", "--num-images", 1)
    line = refused(*words, "--weights", tmp_path / "w.weights.h5")
    assert "w.weights.h5 is damaged or does not fit" in line


def test_a_saved_network_that_is_no_diffusion_model_is_refused(tmp_path):
    UViT(**presets.get("uvit_nano_colour").network).save(tmp_path / "net.keras")
    line = refused("generate", tmp_path / "net.keras", tmp_path / "a.png", "--num-images", 1)
    assert "net.keras" in line


@pytest.mark.usefixtures("small_default")
def test_an_autoencoder_of_another_architecture_names_the_file(tmp_path):
    words = ("encode", "digits", tmp_path / "cache", "--autoencoder")
    assert "autoencoder_kl.pth" in refused(*words, GOLDEN / "autoencoder_kl.pth")


def test_traceback_shows_where_an_error_was_raised(tmp_path):
    words = ("generate", "uvit_nano_digit", tmp_path / "a.png")
    result = invoke("--traceback", *words)
    assert isinstance(result.exception, ValueError)
    assert "Unknown preset" in str(result.exception)
    result = invoke("--traceback", "encode", "digits", tmp_path / "c")  # misuse stays misuse
    assert result.exit_code == 2


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a fault of the program")

    monkeypatch.setattr(presets, "load", broken)
    result = invoke("generate", "uvit_nano_digits", tmp_path / "a.png")
    assert isinstance(result.exception, AssertionError)


def test_usage_errors_show_the_usage():
    result = CliRunner().invoke(cli.main, ["generate"])
    assert result.exit_code == click.UsageError.exit_code
    assert "Usage: main generate" in result.stderr
    assert "Missing argument 'MODEL'" in result.stderr
