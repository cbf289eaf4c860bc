"""The table of recipes against the paper, and `load` with every kind of weight file."""

import dataclasses
import functools
import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from published import answer_of
from sklearn.svm import SVC
from tiny import assert_equal, numpy, randomize, refused, uvit, weights
from words import Words

from keras_uvit import DiffusionModel, UViT, evaluation, presets
from keras_uvit.data import digits, shapes
from keras_uvit.diffusion import samplers
from keras_uvit.diffusion.schedules import LinearPath, VPDiscrete, VPLinear
from keras_uvit.encoders import AutoencoderKL, CLIPText, clip
from keras_uvit.networks.transferring import resized
from keras_uvit.presets import loading
from keras_uvit.presets.preset import OF_MODEL
from keras_uvit.training import checkpoints
from keras_uvit.training.optimizers import adamw, settings

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}

# The paper (arXiv 2209.12152, Tables 1, 2, 7 and Appendix) and the configurations of its program.
# The published guidance s is 0.4, 0.7 and 1.0; here it is 1 + s. "continuous": beta from 0.1 to 20,
# network time 999 t; "discrete": Stable Diffusion's betas, network time 1000 t.
COLUMNS = (
    "layers", "width", "heads", "patch", "millions",
    "learning_rate", "beta_1", "beta_2", "warmup", "batch", "iterations",
    "dropout", "guidance", "process", "sampler", "steps", "latent_scale", "fid",
)  # fmt: skip
PUBLISHED = {
    "uvit_small_cifar10": (
        13, 512, 8, 2, 44, 2e-4, 0.99, 0.999, 2500, 128, 500_000,
        0.0, 1.0, "continuous", "euler_maruyama", 1000, None, 3.11,
    ),
    "uvit_small_celeba64": (
        13, 512, 8, 4, 44, 2e-4, 0.99, 0.99, 5000, 128, 500_000,
        0.0, 1.0, "continuous", "euler_maruyama", 1000, None, 2.87,
    ),
    "uvit_mid_imagenet64": (
        17, 768, 12, 4, 131, 3e-4, 0.99, 0.99, 5000, 1024, 300_000,
        0.0, 1.0, "continuous", "dpm_solver", 50, None, 5.85,
    ),
    "uvit_large_imagenet64": (
        21, 1024, 16, 4, 287, 3e-4, 0.99, 0.99, 5000, 1024, 300_000,
        0.0, 1.0, "continuous", "dpm_solver", 50, None, 4.26,
    ),
    "uvit_large_imagenet256": (
        21, 1024, 16, 2, 287, 2e-4, 0.99, 0.99, 5000, 1024, 300_000,
        0.15, 1.4, "continuous", "dpm_solver", 50, 0.18215, 3.40,
    ),
    "uvit_huge_imagenet256": (
        29, 1152, 16, 2, 501, 2e-4, 0.99, 0.99, 5000, 1024, 500_000,
        0.1, 1.4, "discrete", "dpm_solver_pp", 50, 0.18215, 2.29,
    ),
    "uvit_large_imagenet512": (
        21, 1024, 16, 4, 287, 2e-4, 0.99, 0.99, 5000, 1024, 500_000,
        0.15, 1.7, "continuous", "dpm_solver", 50, 0.18215, 4.67,
    ),
    "uvit_huge_imagenet512": (
        29, 1152, 16, 4, 501, 2e-4, 0.99, 0.99, 5000, 1024, 500_000,
        0.1, 1.7, "discrete", "dpm_solver_pp", 50, 0.18215, 4.05,
    ),
    "uvit_small_coco": (
        13, 512, 8, 2, 45, 2e-4, 0.9, 0.9, 5000, 256, 1_000_000,
        0.1, 2.0, "discrete", "dpm_solver_pp", 50, 0.23010, 5.95,
    ),
    "uvit_small_deep_coco": (
        17, 512, 8, 2, 58, 2e-4, 0.9, 0.9, 5000, 256, 1_000_000,
        0.1, 2.0, "discrete", "dpm_solver_pp", 50, 0.23010, 5.48,
    ),
    # Size M at the COCO recipe: not in the paper, so it reports no FID.
    "uvit_mid_coco": (
        17, 768, 12, 2, 131, 2e-4, 0.9, 0.9, 5000, 256, 1_000_000,
        0.1, 2.0, "discrete", "dpm_solver_pp", 50, 0.23010, None,
    ),
}  # fmt: skip
# The same networks, by USiT's recipe (DC-AE's program).
FLOW = {f"{name}_flow": name for name in ("uvit_huge_imagenet256", "uvit_huge_imagenet512")}
# The same networks with the inputs of a flow map.
FAST = {f"{name}_fast": name for name in ("uvit_large_imagenet256", "uvit_huge_imagenet256")}
# What U-ViT is compared with: the row whose recipe it has, millions of parameters and GMACs to be
# near to (the paper's; of digits and shapes, U-ViT's own), FID (Table 1, Appendix E, Table 4).
COMPARED = {
    "unet_tiny_digits": ("uvit_tiny_digits", 0.4155, 0.00764, None),
    "unet_tiny_shapes": ("uvit_tiny_shapes", 0.6107, 0.0519, None),
    "unet_huge_imagenet256": ("uvit_huge_imagenet256", 646, 135, 2.66),
    "unet_small_coco": ("uvit_small_coco", 53, None, 7.32),
    "vit_adaln_cifar10": ("uvit_small_cifar10", 11, None, 20.20),
}
PROCESSES = {"continuous": (VPLinear(0.1, 20.0), 999.0), "discrete": (VPDiscrete(), 1000.0)}


# The table ----------------------------------------------------------------------------------------


def test_every_published_recipe_is_in_the_table():
    assert presets.names() == list(presets.PRESETS)
    shipped = {name for name in presets.names() if presets.get(name).weights}
    assert set(presets.names()) == {*PUBLISHED, *FLOW, *FAST, *COMPARED, *shipped}


@pytest.mark.parametrize("name", presets.names())
def test_a_row_states_what_its_network_costs_and_can_be_trained_and_sampled(name):
    row = presets.get(name)
    with keras.StatelessScope(initialize_variables=False):  # which never gets any memory
        network = row.new_network()
    assert evaluation.count_parameters(network) == row.params
    # 0.5 %: the table has three digits.
    assert evaluation.count_macs(network) / 1e9 == pytest.approx(row.gmacs, rel=5e-3)
    steps = samplers.named(row.sampler, row.schedule, row.num_steps)
    # Heun looks twice at each step but the last.
    assert steps.nfe == (2 * row.num_steps - 1 if row.sampler == "heun" else row.num_steps)
    optimizer = adamw(**row.optimizer)
    peak = optimizer.schedule(optimizer.schedule.warmup)
    # Float32 rounding of the schedule.
    assert float(numpy(peak)) == pytest.approx(row.optimizer["learning_rate"], rel=1e-5)
    assert set(presets.FAST) <= set(inspect.signature(DiffusionModel.generate).parameters)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_has_the_published_facts(name):
    row, fact = presets.get(name), dict(zip(COLUMNS, PUBLISHED[name], strict=True))
    assert row.optimizer == {
        "learning_rate": fact["learning_rate"],
        "beta_1": fact["beta_1"],
        "beta_2": fact["beta_2"],
        "weight_decay": 0.03,
        "warmup_steps": fact["warmup"],
    }
    assert (row.batch_size, row.iterations) == (fact["batch"], fact["iterations"])
    assert (row.schedule, row.schedule.time_scale) == PROCESSES[fact["process"]]
    assert (row.prediction, row.ema_decay) == ("epsilon", 0.9999)
    assert (row.sampler, row.num_steps) == (fact["sampler"], fact["steps"])
    assert (row.condition_dropout, row.guidance_scale) == (fact["dropout"], fact["guidance"])
    assert (row.latent_scale, row.reported_fid) == (fact["latent_scale"], fact["fid"])
    assert row.weights is None

    network = {"output_conv": True, "num_classes": None, "context_shape": None, **row.network}
    keys = ("num_layers", "hidden_dim", "num_heads", "patch_size")
    assert tuple(network[key] for key in keys) == PUBLISHED[name][:4]
    # The paper rounds to a million.
    assert round(row.params / 1e6) == fact["millions"]
    assert network["output_conv"] == ("huge" not in name)
    assert network["num_classes"] == (1000 if "imagenet" in name else None)
    # Guidance needs the 1,001st row of the label table; the pixel models have none.
    assert network.get("null_label", True) == ("imagenet64" not in name)
    assert network["context_shape"] == ((77, 768) if "coco" in name else None)
    assert row.text_encoder == ("clip_vit_large_patch14" if "coco" in name else None)
    sides = dict(cifar10=32, celeba64=64, imagenet64=64, imagenet256=32, imagenet512=64, coco=32)
    side, channels = sides[name.rpartition("_")[2]], 3 if row.latent_scale is None else 4
    assert network["image_shape"] == (side, side, channels)
    assert (row.autoencoder is None) == (row.latent_scale is None)
    if "imagenet" in name and row.autoencoder:
        suffix = "_ema" if "huge" in name else ""
        assert row.autoencoder == f"autoencoder_kl{suffix}.pth"


@pytest.mark.parametrize("name", FLOW)
def test_a_row_of_flow_matching_is_its_network_by_the_recipe_of_usit(name):
    row, other = presets.get(name), presets.get(FLOW[name])
    same = "network params gmacs batch_size iterations condition_dropout ema_decay latent_scale"
    for field in (*same.split(), "autoencoder", "architecture"):
        assert getattr(row, field) == getattr(other, field), field
    published = dict(learning_rate=1e-4, beta_1=0.99, beta_2=0.99, weight_decay=0.0)
    assert row.optimizer == {**published, "warmup_steps": 5000}
    assert (row.schedule, row.prediction) == (LinearPath(), "velocity")
    assert (row.time_sampling, row.loss_weighting) == ("uniform", "uniform")
    assert row.guidance_scale == 1.2
    assert row.reported_fid is None  # it is of other latents


@pytest.mark.parametrize("name", FAST)
def test_a_row_of_few_steps_is_its_network_by_the_recipe_of_soflow(name):
    row, other = presets.get(name), presets.get(FAST[name])
    assert row.network == {
        **other.network, "time_mlp": True, "takes_span": True, "takes_guidance": True
    }  # fmt: skip
    assert (row.schedule, row.prediction, row.sampler) == (LinearPath(), "velocity", "flow_map")
    assert (row.latent_scale, row.time_sampling) == (other.latent_scale, "logit_normal")
    # a = 0.1 0.02^(k / K) and the whole power, arXiv 2512.15657; 240 epochs of ImageNet.
    assert (row.flow_map.alpha, row.flow_map.power) == ((0.1, 0.1 * 0.02), 1.0)
    assert row.flow_map.steps == row.iterations
    assert row.iterations * row.batch_size == pytest.approx(240 * 1_281_167, rel=0.01)


@pytest.mark.parametrize("name", COMPARED)
def test_a_row_that_is_compared_has_the_recipe_and_nearly_the_cost(name):
    row, (other, millions, gmacs, fid) = presets.get(name), COMPARED[name]
    fields = {field.name for field in dataclasses.fields(row)}
    own = {"paper_name", "architecture", "network", "params", "gmacs", "weights", "context_encoder"}
    for field in fields - own - {"reported_fid", "reported_cost"}:
        assert getattr(row, field) == getattr(presets.get(other), field), field
    # Widths of whole heads and whole blocks come no nearer.
    near = 0.035 if name == "unet_tiny_shapes" else 0.02
    assert row.params / 1e6 == pytest.approx(millions, rel=near)
    assert gmacs is None or row.gmacs == pytest.approx(gmacs, rel=near)
    assert (row.reported_fid, row.weights) == (fid, None)


# load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uvit_tiny_digits", *FLOW, "uvit_small_coco"])
def test_a_loaded_model_follows_its_recipe(name):
    row, model = presets.get(name), presets.load(name, seed=7, **SMALL)
    for field in OF_MODEL:
        place = model.objective if hasattr(model.objective, field) else model
        expected = getattr(row, field)
        if field == "time_scale" and expected is None:
            expected = row.schedule.time_scale
        assert getattr(place, field) == expected
    assert (model.name, model.seed) == (name, 7)
    model.compile()
    assert model.optimizer.beta_1 == row.optimizer["beta_1"]
    assert model.optimizer.beta_2 == row.optimizer["beta_2"]


def test_arguments_of_the_network_can_be_changed():
    recipe = presets.get("uvit_tiny_digits").network
    changes = dict(num_classes=3, image_shape=(16, 16, 1))
    config = presets.load("uvit_tiny_digits", **changes).network.get_config()
    assert config == {**config, **recipe, **changes}  # the rest stays
    assert recipe["num_classes"] == 10  # and the table is as it was
    model = presets.load("uvit_tiny_digits", num_classes=None)
    assert (model.network.num_classes, model.condition_dropout) == (None, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with an average unlike its network, and a folder with its two kinds of files."""
    folder = tmp_path_factory.mktemp("saved")
    model = presets.load("uvit_tiny_digits", **SMALL)
    randomize(model.ema_network)
    model.ema_network.save_weights(folder / "w.weights.h5")
    model.save(folder / "w.keras")
    return model, folder


@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_weight_files_give_the_moving_average_back(saved, kind):
    model, folder = saved
    loaded = presets.load("uvit_tiny_digits", folder / kind, **SMALL)
    assert_equal(weights(loaded.network), weights(model.ema_network))
    assert_equal(weights(loaded.ema_network), weights(model.ema_network))


def test_a_unets_own_weights_are_loaded(tmp_path):
    small = dict(base_dim=8, multipliers=(1,), num_blocks=1, attention_levels=(), head_dim=4)
    network = randomize(presets.load("unet_tiny_digits", **small).network)
    network.save_weights(tmp_path / "w.weights.h5")
    loaded = presets.load("unet_tiny_digits", tmp_path / "w.weights.h5", **small)
    for other in (loaded.network, loaded.ema_network):
        assert_equal(weights(other), weights(network))


@pytest.mark.each_backend
def test_a_published_checkpoint_is_loaded_by_its_path():
    path, sizes = str(GOLDEN / "uvit_uncond.pth"), dict(hidden_dim=48, num_layers=5, num_heads=4)
    model = presets.load("uvit_small_cifar10", path, image_shape=(8, 8, 3), **sizes)
    ours, theirs = answer_of("uvit_uncond", model.ema_network)
    # 1e-5 of the largest value: float32 sums in another order.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# Weights to begin at ------------------------------------------------------------------------------

PUBLISHED_SIZE = dict(hidden_dim=48, num_layers=5, num_heads=4)


@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_files_of_the_preset_begin_a_model_of_other_classes_and_another_size(saved, capsys, kind):
    model, folder = saved
    changes = dict(num_classes=2, image_shape=(12, 8, 1))  # positions are sinusoids
    load = functools.partial(presets.load, "uvit_tiny_digits", folder / kind, **SMALL)
    loaded = load(**changes, classes={1: 7})
    assert "Resized: label_embed/embeddings." in capsys.readouterr().out
    tables = [
        net.get_layer("label_embed").embeddings for net in (loaded.network, model.ema_network)
    ]
    assert_equal(numpy(tables[0])[1:], numpy(tables[1])[[7, 10]])
    for layer in ("mid_block", "head", "output_conv"):
        expected = weights(model.ema_network.get_layer(layer))
        for network in (loaded.network, loaded.ema_network):
            assert_equal(weights(network.get_layer(layer)), expected)
    refused(ValueError, lambda: load(**changes, strict=True), f"{kind} does not fit", "strict=True")
    # A file of the very network that is asked for fits as it is, and nothing is said.
    loaded.ema_network.save_weights(folder / "other.weights.h5")
    capsys.readouterr()
    again = presets.load(
        "uvit_tiny_digits", folder / "other.weights.h5", **SMALL, **changes, strict=True
    )
    assert_equal(weights(again.network), weights(loaded.ema_network))
    assert capsys.readouterr().out == ""


def test_a_folder_of_checkpoints_begins_a_model_of_other_classes(tmp_path):
    model = presets.load("uvit_tiny_digits", **SMALL)
    model.compile()
    randomize(model.ema_network)
    optimizer = settings(model)
    checkpoints.write(model, tmp_path, 1, checkpoints.Place(0, 1, 1, 8), optimizer=optimizer)
    loaded = presets.load("uvit_tiny_digits", tmp_path, **SMALL, num_classes=2)
    for layer in ("mid_block", "head", "position"):
        found, expected = (
            weights(net.get_layer(layer)) for net in (loaded.network, model.ema_network)
        )
        assert_equal(found, expected)


def test_a_published_checkpoint_begins_a_model_of_another_size_and_of_classes(monkeypatch):
    path, own = GOLDEN / "uvit_uncond.pth", dict(image_shape=(8, 8, 3))
    load = functools.partial(presets.load, "uvit_small_cifar10", path, **PUBLISHED_SIZE, verbose=0)
    source = load(**own).network
    # The preset is of 32x32 pixels, and the file of 8x8.
    words = "pos_embed", "preset's own network", "training.adapt"
    refused(ValueError, lambda: load(image_shape=(16, 16, 3)), *words)
    row = presets.get("uvit_small_cifar10")
    row = dataclasses.replace(row, network={**row.network, **own})
    monkeypatch.setitem(presets.PRESETS, "uvit_small_cifar10", row)
    model = load(image_shape=(16, 16, 3), num_classes=5)
    for layer in ("mid_block", "head"):
        assert_equal(weights(model.network.get_layer(layer)), weights(source.get_layer(layer)))
    new, old = (numpy(net.get_layer("position").embeddings) for net in (model.network, source))
    np.testing.assert_array_equal(new[1], old[0])  # the time token's
    np.testing.assert_array_equal(new[2:], resized(old[1:], (4, 4), (8, 8)))


def test_a_part_of_a_published_checkpoint_is_chosen_by_name(tmp_path):
    tensors = torch.load(GOLDEN / "uvit_uncond.pth", weights_only=True)
    other = {name: 2 * a for name, a in tensors.items()}
    torch.save({"model": other, "ema": tensors, "step": 5}, tmp_path / "w.pth")
    arguments = dict(image_shape=(8, 8, 3), **PUBLISHED_SIZE)
    load = functools.partial(presets.load, "uvit_small_cifar10", **arguments)
    refused(ValueError, lambda: load(tmp_path / "w.pth"), "['ema', 'model']", "key=")
    expected = weights(load(GOLDEN / "uvit_uncond.pth").network)
    assert_equal(weights(load(tmp_path / "w.pth", key="ema").network), expected)
    refused(ValueError, lambda: load("pretrained", key="ema"), "ships no weights")
    call = functools.partial(presets.load, "uvit_tiny_digits", "pretrained", key="ema")
    refused(ValueError, call, "key='ema' chooses a part")


# Autoencoders -------------------------------------------------------------------------------------

HUGE = "uvit_huge_imagenet256"
LATENT = {**SMALL, "image_shape": (4, 4, 4), "num_classes": 3}


@pytest.fixture(scope="module")
def autoencoder():
    """A tiny one with latents of 4 channels, at the scale of the ImageNet rows."""
    return AutoencoderKL(32, (1, 1), 1, scale=0.18215, id="tiny")


@pytest.fixture
def tiny_stable_diffusion(monkeypatch, autoencoder):
    """`AutoencoderKL()` without arguments is the tiny one: the true one is 83.7 M weights."""
    make = AutoencoderKL.__init__

    def init(self, *arguments, **options):
        make(self, *arguments, **{**autoencoder.config, **options})

    monkeypatch.setattr(AutoencoderKL, "__init__", init)


def test_an_autoencoder_is_taken_as_it_is_and_decodes(autoencoder):
    model = presets.load(HUGE, autoencoder=autoencoder, **LATENT)
    assert model.encoders.autoencoder is autoencoder
    assert model.latent_encoder == autoencoder.fingerprint
    options = dict(labels=[0, 2], num_steps=3, verbose=0)
    images = model.generate(**options)
    assert images.shape == (2, 8, 8, 3)
    latents = model.generate(**options, decode=False)
    np.testing.assert_array_equal(images, autoencoder.decode(latents))


@pytest.mark.usefixtures("tiny_stable_diffusion")
@pytest.mark.parametrize(
    ("kind", "name", "scale"),
    [(str, HUGE, 0.18215), (Path, "uvit_small_coco", 0.23010)],
)
def test_a_path_of_an_autoencoder_is_read_at_the_rows_scale(
    tmp_path, autoencoder, kind, name, scale
):
    autoencoder.save_weights(tmp_path / "mine.weights.h5")
    model = presets.load(name, autoencoder=kind(tmp_path / "mine.weights.h5"), **SMALL)
    assert (model.encoders.autoencoder.id, model.encoders.autoencoder.scale) == ("mine", scale)
    assert model.latent_encoder == autoencoder.fingerprint


@pytest.mark.usefixtures("tiny_stable_diffusion")
@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [
        ("uvit_small_coco", None, ValueError, ("(tiny) has scale 0.18215", "latent_scale=0.2301")),
        ("uvit_tiny_digits", None, ValueError, ("works on pixels", "latent_scale=None")),
        # Of another autoencoder, and of none.
        (HUGE, "autoencoder_kl.pth", ValueError, ("does not fit", "encoder.")),
        (HUGE, "uvit_uncond.pth", ValueError, ("does not fit", "encoder.")),
    ],
)
def test_another_autoencoder_is_refused(autoencoder, name, given, error, words):
    given = GOLDEN / given if given else autoencoder
    refused(error, lambda: presets.load(name, autoencoder=given, **SMALL), *words)


# Text encoders ------------------------------------------------------------------------------------

TEXT = {**SMALL, "context_shape": (2, 3), "image_shape": (4, 4, 4)}


def test_a_text_encoder_is_taken_and_a_saved_model_brings_its_empty_prompt(tmp_path):
    words = Words()
    model = presets.load("uvit_small_coco", text_encoder=words, **TEXT)
    assert model.encoders.text_encoder is words
    model.save(tmp_path / "m.keras")
    again = presets.load("uvit_small_coco", tmp_path / "m.keras", **TEXT)
    assert again.encoders.text_encoder is None
    for loaded in (model, again):
        assert loaded.context_encoder == "words-1"
        np.testing.assert_array_equal(numpy(loaded.null_context), words.null_context)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_of_clip_is_read(tmp_path, kind):
    text = CLIPText.random(["a dog"], length=2, hidden_dim=4, vocabulary_size=520)
    text.save(tmp_path / "mine")
    small = {**TEXT, "context_shape": (2, 4)}
    model = presets.load("uvit_mid_coco", text_encoder=kind(tmp_path / "mine"), **small)
    assert (model.encoders.text_encoder.id, model.context_encoder) == ("mine", text.fingerprint)


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("uvit_small_coco", None, "network has context_shape=(77, 768)"),
        ("uvit_small_cifar10", None, "reads no text"),
        ("uvit_tiny_shapes", "pretrained", "is of text encoder words-1"),
    ],
)
def test_another_text_encoder_is_refused(name, weights, words):
    encoder = Words(12, 64) if weights else Words()
    sizes = {} if weights else SMALL
    refused(ValueError, lambda: presets.load(name, weights, text_encoder=encoder, **sizes), words)


# Weights that are refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "error", "words"),
    [
        ("uvit_smal_cifar", None, ValueError, ("Unknown preset", "uvit_small_cifar10")),
        (HUGE, "pretrained", ValueError, ("ships no weights", "'uvit_tiny_digits'")),
        (HUGE, "nothing.pth", FileNotFoundError, ("No weight file", '"pretrained"')),
        (HUGE, "w.npz", ValueError, ("w.npz: unknown kind", ".weights.h5")),
        (HUGE, "w.h5", ValueError, ("w.h5: unknown kind", ".keras")),
        ("unet_huge_imagenet256", "w.pth", ValueError, ("w.pth: unknown kind", "for a UNet")),
    ],
)  # fmt: skip
def test_weights_are_refused_before_anything_is_built(
    tmp_path, monkeypatch, name, file, error, words
):
    monkeypatch.setattr(presets.Preset, "new_network", None)
    path = tmp_path / file if file and file != "pretrained" else file
    if file and file.startswith("w."):
        path.write_bytes(b"x")
    refused(error, lambda: presets.load(name, path), *words)


def test_a_missing_autoencoder_is_named_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(presets.Preset, "new_network", None)
    path = tmp_path / "kl.pth"
    call = functools.partial(presets.load, HUGE, autoencoder=path)
    refused(FileNotFoundError, call, "kl.pth")


DAMAGES = {
    "text": lambda whole: b"<!DOCTYPE html>",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "hole": lambda whole: whole[: len(whole) // 5] + bytes(9000) + whole[len(whole) // 5 + 9000 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_a_damaged_file_is_named(saved, tmp_path, kind, damage):
    path = tmp_path / kind
    path.write_bytes(DAMAGES[damage]((saved[1] / kind).read_bytes()))
    load = functools.partial(presets.load, "uvit_tiny_digits", path, **SMALL)
    refused(ValueError, load, f"{kind} is damaged or does not fit")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_dim": 32},
        {"num_layers": 3},  # the file has fewer weights
        {"output_conv": False},  # the file has more: none may be left out
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_weights_of_another_network_are_refused(saved, kind, change):
    (changed,) = change
    load = functools.partial(presets.load, "uvit_tiny_digits", saved[1] / kind)
    words = f"{kind} ", "does not fit", "uvit_tiny_digits", f"{changed}="
    refused(ValueError, lambda: load(**{**SMALL, **change}), *words)


def test_files_of_other_classes_are_refused(tmp_path):
    uvit().save(tmp_path / "net.keras")  # no diffusion model
    load = functools.partial(presets.load, "uvit_tiny_digits")
    words = "net.keras is damaged or does not fit"
    refused(ValueError, lambda: load(tmp_path / "net.keras"), words)

    class Own(UViT):
        """Which no other process knows."""

    DiffusionModel(Own((8, 8, 1), **SMALL)).save(tmp_path / "own.keras")
    for reader in (load, AutoencoderKL.from_file):  # that is no damage
        call = functools.partial(reader, tmp_path / "own.keras")
        refused(ImportError, call, "own.keras needs 'Own'", "import the module")


# The weights that ship ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained():
    return presets.load("uvit_tiny_digits", "pretrained")


@pytest.mark.each_backend
def test_the_shipped_model_makes_digits_of_the_labels_asked(pretrained):
    images = pretrained.generate(labels=range(10), verbose=0)
    assert (images.shape, images.dtype) == ((10, 8, 8, 1), np.uint8)


def test_a_classifier_of_real_digits_reads_the_generated_ones(pretrained):
    train, test = digits("train"), digits("test")
    flat = [data["image"].reshape(-1, 64) / 255.0 for data in (train, test)]
    reader = SVC().fit(flat[0], train["label"])
    assert reader.score(flat[1], test["label"]) > 0.97  # it can read
    labels = np.repeat(np.arange(10), 10)
    images = pretrained.generate(labels=labels, verbose=0)
    right = reader.predict(images.reshape(-1, 64) / 255.0) == labels
    # 95 of 100: real test digits are read at 98 to 99 of 100.
    assert right.sum() >= 95
    assert len({image.tobytes() for image in images}) == 100  # no two are the same


def test_the_fast_way_draws_digits_as_well_as_the_long_one(pretrained):
    fast, labels = presets.FAST, np.arange(10)
    options = dict(sampler="dpm_solver_pp", num_steps=50)
    long = pretrained.generate(labels=labels, **options, verbose=0)
    short = pretrained.generate(labels=labels, **fast, verbose=0)
    # Other steps of the same way through the same noise: 0.02 of [-1, 1] was measured.
    away = np.sqrt(np.mean((long / 127.5 - short / 127.5) ** 2))
    assert 0.001 < away < 0.05


@pytest.fixture(scope="module")
def shipped():
    return presets.load("uvit_tiny_shapes", weights="pretrained")


def test_its_text_encoder_ships_too_in_less_than_4_megabytes(shipped):
    row, encoder = presets.get("uvit_tiny_shapes"), shipped.encoders.text_encoder
    files = [loading.SHIPPED / row.weights, *(loading.SHIPPED / row.text_encoder).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6
    assert isinstance(encoder, CLIPText)
    assert encoder.context_shape == (12, 64)
    # 1e-5 of values up to 4: the null context is that of any backend.
    np.testing.assert_allclose(numpy(shipped.null_context), encoder("")[0], atol=4e-5)
    ids = encoder.tokenize([str(scene) for scene in shapes.scenes(300)])  # a cut one would warn
    assert (ids[:, -1] == encoder.tokenizer.vocabulary[clip.END]).all()


@pytest.mark.eager
def test_it_draws_what_it_is_told(shipped):
    """On pairs of things that no training picture had; 500 prompts score 0.998, chance 0.43."""
    prompts = [str(scene) for scene in shapes.scenes(40, "test", seed=1)]
    images = shipped.generate(prompts=prompts, seed=1, verbose=0)
    # The standard deviation of a mean of 40 pictures is below 0.03.
    assert shapes.score(images, prompts)["attributes"] > 0.9
    assert shapes.score(images, prompts[1:] + prompts[:1])["attributes"] < 0.55
