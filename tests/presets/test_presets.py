"""The table of recipes against the paper, and `load` with every kind of weight file."""

import dataclasses
import functools
import inspect
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.svm import SVC

from keras_uvit import DiffusionModel, UViT, evaluation, presets
from keras_uvit.data import digits
from keras_uvit.diffusion import samplers
from keras_uvit.diffusion.schedules import LinearPath, VPDiscrete, VPLinear
from keras_uvit.encoders import AutoencoderKL
from keras_uvit.presets.preset import OF_MODEL
from keras_uvit.training.optimizers import adamw

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"hidden_dim": 16, "num_layers": 3, "num_heads": 2}

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


@functools.cache
def _cost(name):
    """(parameters, multiply-accumulates) of a row's network, which never gets any memory."""
    with keras.StatelessScope(initialize_variables=False):
        network = presets.get(name).new_network()
    return evaluation.count_parameters(network), evaluation.count_macs(network)


def _inputs(network, labels=None):
    rng = np.random.default_rng(0)
    inputs = {"image": rng.standard_normal((2, *network.image_shape), "float32")}
    inputs["timestep"] = np.array([10.0, 500.0], "float32")
    if labels is not None:
        inputs["label"] = np.array(labels, "int32")
    return inputs


def _output(network, labels=None):
    return ops.convert_to_numpy(network(_inputs(network, labels), training=False))


# The table ----------------------------------------------------------------------------------------


def test_every_published_recipe_is_in_the_table():
    assert presets.names() == list(presets.PRESETS)
    shipped = {"uvit_tiny_digits", "uvit_tiny_shapes"}
    assert set(presets.names()) == {*PUBLISHED, *FLOW, *COMPARED, *shipped}


@pytest.mark.parametrize("name", presets.names())
def test_names_say_size_and_data(name):
    size, data = r"(tiny|small|mid|large|huge)(_deep)?", r"[a-z]+(10|64|256|512)?"
    assert re.fullmatch(rf"((uvit|unet)_{size}|vit_adaln)_{data}(_flow)?", name)


@pytest.mark.parametrize("name", presets.names())
def test_a_row_states_what_its_network_costs(name):
    row, (params, macs) = presets.get(name), _cost(name)
    assert params == row.params
    # 0.5 %: the table has three digits.
    assert macs / 1e9 == pytest.approx(row.gmacs, rel=5e-3)


@pytest.mark.parametrize("name", presets.names())
def test_a_rows_sampler_takes_its_steps_on_its_schedule(name):
    row = presets.get(name)
    steps = samplers.named(row.sampler, row.schedule, row.num_steps)
    assert isinstance(steps, samplers.Steps)
    # Heun looks twice at each step but the last.
    assert steps.nfe == (2 * row.num_steps - 1 if row.sampler == "heun" else row.num_steps)


@pytest.mark.parametrize("name", presets.names())
def test_a_rows_optimizer_is_adamw_with_its_learning_rate(name):
    recipe = presets.get(name).optimizer
    optimizer = adamw(**recipe)
    peak = optimizer.schedule(optimizer.schedule.warmup)
    # Float32 rounding of the schedule.
    assert float(ops.convert_to_numpy(peak)) == pytest.approx(recipe["learning_rate"], rel=1e-5)
    assert optimizer.weight_decay == recipe["weight_decay"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_has_the_published_facts(name):
    row, fact = presets.get(name), dict(zip(COLUMNS, PUBLISHED[name], strict=True))
    schedule, time_scale = PROCESSES[fact["process"]]
    assert row.optimizer == {
        "learning_rate": fact["learning_rate"],
        "beta_1": fact["beta_1"],
        "beta_2": fact["beta_2"],
        "weight_decay": 0.03,
        "warmup_steps": fact["warmup"],
    }
    assert (row.batch_size, row.iterations) == (fact["batch"], fact["iterations"])
    assert (row.schedule, row.schedule.time_scale) == (schedule, time_scale)
    assert (row.prediction, row.ema_decay) == ("epsilon", 0.9999)
    assert (row.sampler, row.num_steps) == (fact["sampler"], fact["steps"])
    assert (row.condition_dropout, row.guidance_scale) == (fact["dropout"], fact["guidance"])
    assert row.latent_scale == fact["latent_scale"]
    assert row.reported_fid == fact["fid"]
    assert row.weights is None


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_rows_network_is_the_published_one(name):
    row, fact = presets.get(name), dict(zip(COLUMNS, PUBLISHED[name], strict=True))
    network = {"output_conv": True, "num_classes": None, "context_shape": None, **row.network}
    keys = ("num_layers", "hidden_dim", "num_heads", "patch_size")
    assert tuple(network[key] for key in keys) == PUBLISHED[name][:4]
    # The paper rounds to a million.
    assert round(row.params / 1e6) == fact["millions"]
    assert network["output_conv"] == ("huge" not in name)
    assert network["num_classes"] == (1000 if "imagenet" in name else None)
    assert network["context_shape"] == ((77, 768) if "coco" in name else None)
    # Guidance needs the 1,001st row of the label table; the pixel models have none.
    assert network.get("null_label", True) == ("imagenet64" not in name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_latent_models_name_their_autoencoder_and_pixel_models_have_none(name):
    row = presets.get(name)
    assert (row.autoencoder is None) == (row.latent_scale is None)
    assert row.network["image_shape"][-1] == (3 if row.latent_scale is None else 4)
    if "imagenet" in name and row.autoencoder:
        expected = "autoencoder_kl_ema.pth" if "huge" in name else "autoencoder_kl.pth"
        assert row.autoencoder == expected


# load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("find", [presets.get, presets.load])
def test_an_unknown_name_is_answered_with_the_nearest(find):
    with pytest.raises(ValueError, match="Unknown preset 'uvit_smal_cifar'.*uvit_small_cifar10"):
        find("uvit_smal_cifar")


@pytest.mark.parametrize("name", ["uvit_tiny_digits", *FLOW, "uvit_small_coco"])
def test_a_loaded_model_follows_its_recipe(name):
    row, model = presets.get(name), presets.load(name, seed=7, **SMALL)
    for field in OF_MODEL:
        place = model.objective if hasattr(model.objective, field) else model
        assert getattr(place, field) == getattr(row, field)
    assert (model.name, model.seed) == (name, 7)
    model.compile()
    assert model.optimizer.beta_1 == row.optimizer["beta_1"]
    assert model.optimizer.beta_2 == row.optimizer["beta_2"]


def test_arguments_of_the_network_can_be_changed():
    model = presets.load("uvit_tiny_digits", num_classes=3, image_shape=(16, 16, 1))
    assert model.network.num_classes == 3
    assert model.network.image_shape == (16, 16, 1)
    recipe = presets.get("uvit_tiny_digits").network
    assert model.network.config["hidden_dim"] == recipe["hidden_dim"]  # the rest stays
    assert _output(model.network, labels=[0, 3]).shape == (2, 16, 16, 1)
    assert recipe["num_classes"] == 10  # and the table is as it was


def test_a_recipe_with_labels_can_be_loaded_without():
    model = presets.load("uvit_tiny_digits", num_classes=None)
    assert model.condition_dropout == 0
    assert _output(model.network).shape == (2, 8, 8, 1)


def _weight_files(path):
    """A model with an average unlike its network, and its two kinds of weight files."""
    model = presets.load("uvit_tiny_digits", **SMALL)
    for weight in model.ema_network.weights:
        weight.assign(weight + 0.1)
    model.ema_network.save_weights(path / "w.weights.h5")
    model.save(path / "w.keras")
    return model


@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_weight_files_give_the_moving_average_back(tmp_path, kind):
    saved = _weight_files(tmp_path)
    loaded = presets.load("uvit_tiny_digits", tmp_path / kind, **SMALL)
    expected = _output(saved.ema_network, labels=[1, 10])
    np.testing.assert_array_equal(_output(loaded.network, labels=[1, 10]), expected)
    np.testing.assert_array_equal(_output(loaded.ema_network, labels=[1, 10]), expected)
    assert not np.array_equal(_output(saved.network, labels=[1, 10]), expected)


@pytest.mark.each_backend
def test_a_published_checkpoint_is_loaded_by_its_path():
    data = np.load(GOLDEN / "uvit_uncond.npz")
    model = presets.load(
        "uvit_small_cifar10",
        str(GOLDEN / "uvit_uncond.pth"),
        image_shape=(8, 8, 3),
        hidden_dim=48,
        num_layers=5,
        num_heads=4,
    )
    inputs = {"image": data["x_nchw"].transpose(0, 2, 3, 1), "timestep": data["t"]}
    output = ops.convert_to_numpy(model.ema_network(inputs)).transpose(0, 3, 1, 2)
    # 1e-5 of the largest value: float32 sums in another order.
    scale = np.abs(data["out_nchw"]).max()
    np.testing.assert_allclose(output, data["out_nchw"], rtol=0, atol=1e-5 * scale)


# Autoencoders -------------------------------------------------------------------------------------

LATENT = {**SMALL, "image_shape": (4, 4, 4), "num_classes": 3}


@pytest.fixture(scope="module")
def autoencoder():
    """A tiny one with latents of 4 channels, at the scale of the ImageNet rows."""
    return AutoencoderKL(32, (1, 1), 1, scale=0.18215, id="tiny")


def test_an_autoencoder_is_taken_as_it_is_and_decodes(autoencoder):
    model = presets.load("uvit_huge_imagenet256", autoencoder=autoencoder, **LATENT)
    assert model.encoders.autoencoder is autoencoder
    assert model.latent_encoder == autoencoder.fingerprint
    options = dict(labels=[0, 2], num_steps=3, verbose=0)
    images = model.generate(**options)
    assert images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(
        images, autoencoder.decode(model.generate(**options, decode=False))
    )


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    ("name", "scale"), [("uvit_huge_imagenet256", 0.18215), ("uvit_small_coco", 0.23010)]
)
def test_a_path_of_an_autoencoder_is_read_at_the_rows_scale(
    tmp_path, monkeypatch, autoencoder, kind, name, scale
):
    autoencoder.save_weights(tmp_path / "mine.weights.h5")
    read = AutoencoderKL.from_file
    monkeypatch.setattr(  # the tiny architecture instead of Stable Diffusion's
        AutoencoderKL, "from_file", lambda path, scale: read(path, scale, **autoencoder.config)
    )
    model = presets.load(name, autoencoder=kind(tmp_path / "mine.weights.h5"), **SMALL)
    assert (model.encoders.autoencoder.id, model.encoders.autoencoder.scale) == ("mine", scale)
    assert model.latent_encoder == autoencoder.fingerprint
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4), "float32")
    at_its_scale = latents * autoencoder.scale / scale
    np.testing.assert_allclose(
        model.encoders.autoencoder.decode(latents).astype(int),
        autoencoder.decode(at_its_scale).astype(int),
        atol=1,  # a rounding of the scale may tip an integer
    )


def test_an_autoencoder_of_another_scale_is_refused(autoencoder):
    message = r"The autoencoder \(tiny\) has scale 0.18215, the model latent_scale=0.2301"
    with pytest.raises(ValueError, match=message):
        presets.load("uvit_small_coco", autoencoder=autoencoder, **SMALL)


def test_an_autoencoder_for_a_preset_of_pixels_is_refused(autoencoder):
    with pytest.raises(ValueError, match=r"works on pixels \(latent_scale=None\)"):
        presets.load("uvit_tiny_digits", autoencoder=autoencoder)


@pytest.fixture
def tiny_stable_diffusion(monkeypatch, autoencoder):
    """`AutoencoderKL()` without arguments is the tiny one: the true one is 83.7 M weights."""
    make = AutoencoderKL.__init__

    def init(self, *arguments, **options):
        make(self, *arguments, **{**autoencoder.config, **options})

    monkeypatch.setattr(AutoencoderKL, "__init__", init)


@pytest.mark.usefixtures("tiny_stable_diffusion")
def test_a_file_of_another_autoencoder_is_refused_and_its_keys_named():
    path = GOLDEN / "autoencoder_kl.pth"
    with pytest.raises(ValueError, match=r"autoencoder_kl\.pth.*(decoder|encoder)\."):
        presets.load("uvit_huge_imagenet256", autoencoder=path, **LATENT)


@pytest.mark.usefixtures("tiny_stable_diffusion")
def test_a_file_that_is_no_autoencoder_is_refused_and_its_keys_named():
    path = GOLDEN / "uvit_uncond.pth"
    with pytest.raises(ValueError, match=r"uvit_uncond\.pth.*encoder\."):
        presets.load("uvit_huge_imagenet256", autoencoder=path, **LATENT)


@pytest.mark.usefixtures("tiny_stable_diffusion")
def test_a_missing_autoencoder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kl\.pth"):
        presets.load("uvit_huge_imagenet256", autoencoder=tmp_path / "kl.pth", **LATENT)


# Weights that are refused -------------------------------------------------------------------------


@pytest.fixture
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(presets.Preset, "new_network", None)


@pytest.mark.usefixtures("nothing_is_built")
def test_rows_without_shipped_weights_say_so_before_building():
    with pytest.raises(
        ValueError, match=r"ships no weights; \['uvit_tiny_digits', 'uvit_tiny_shapes'\] do"
    ):
        presets.load("uvit_huge_imagenet256", "pretrained")


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("name", ["nothing.pth", "nothing.keras", "pretrain"])
def test_a_missing_file_is_named_before_building(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f'No weight file at .*{name}.*"pretrained"'):
        presets.load("uvit_huge_imagenet256", tmp_path / name)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("name", ["w.npz", "w.h5", "w"])
def test_an_unknown_extension_is_refused_before_building(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name}: unknown kind.*\.weights\.h5.*\.keras"):
        presets.load("uvit_huge_imagenet256", tmp_path / name)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_unet_has_no_published_checkpoints(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name}: unknown kind.* for a UNet. .*\.keras"):
        presets.load("unet_huge_imagenet256", tmp_path / name)


def test_a_unets_own_weights_are_loaded(tmp_path):
    small = dict(base_dim=8, multipliers=(1,), num_blocks=1, attention_levels=(), head_dim=4)
    saved = presets.load("unet_tiny_digits", **small)
    saved.network.get_layer("output_conv").bias.assign([2.0])
    saved.network.save_weights(tmp_path / "w.weights.h5")
    loaded = presets.load("unet_tiny_digits", tmp_path / "w.weights.h5", **small)
    for network in (loaded.network, loaded.ema_network):
        for a, b in zip(network.get_weights(), saved.network.get_weights()):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("nothing_is_built")
def test_a_missing_autoencoder_is_named_before_building(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kl\.pth"):
        presets.load("uvit_huge_imagenet256", autoencoder=tmp_path / "kl.pth")


DAMAGES = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"<!DOCTYPE html>",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "hole": lambda whole: whole[: len(whole) // 5] + bytes(9000) + whole[len(whole) // 5 + 9000 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_a_damaged_file_is_named(tmp_path, kind, damage):
    _weight_files(tmp_path)
    path = tmp_path / kind
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"{kind} is damaged or does not fit"):
        presets.load("uvit_tiny_digits", path, **SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_dim": 32},
        {"num_classes": 3},
        {"num_layers": 5},  # the file has fewer weights
        {"time_mlp": True},
        {"num_layers": 1},  # the file has more: none may be left out
        {"output_conv": False},
        {"skip": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["w.weights.h5", "w.keras"])
def test_weights_of_another_network_are_refused(tmp_path, kind, change):
    _weight_files(tmp_path)
    (changed,) = change
    with pytest.raises(ValueError, match=f"{kind} .* not fit.*uvit_tiny_digits.*{changed}="):
        presets.load("uvit_tiny_digits", tmp_path / kind, **{**SMALL, **change})


def test_a_saved_network_that_is_no_diffusion_model_is_refused(tmp_path):
    UViT((8, 8, 1), num_classes=10, **SMALL).save(tmp_path / "net.keras")
    with pytest.raises(ValueError, match=r"net\.keras is damaged or does not fit"):
        presets.load("uvit_tiny_digits", tmp_path / "net.keras", **SMALL)


# The weights that ship ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained():
    return presets.load("uvit_tiny_digits", "pretrained")


@pytest.mark.each_backend
def test_the_shipped_model_makes_digits_of_the_labels_asked(pretrained):
    images = pretrained.generate(labels=range(10), verbose=0)
    assert images.shape == (10, 8, 8, 1)
    assert images.dtype == np.uint8


def test_the_same_seed_gives_the_same_images(pretrained):
    first, second, other = (
        pretrained.generate(labels=range(10), seed=seed, verbose=0) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


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


@pytest.mark.usefixtures("pretrained")  # the file is there
def test_shipped_weights_refuse_another_network():
    with pytest.raises(ValueError, match=r"digits\.weights\.h5 is damaged or does not fit"):
        presets.load("uvit_tiny_digits", "pretrained", num_classes=3)


@pytest.mark.parametrize("name", presets.names())
def test_the_fast_way_is_one_of_generate(name):
    generation = inspect.signature(DiffusionModel.generate).parameters
    assert set(presets.get(name).fast) <= set(generation)


def test_the_fast_way_draws_digits_as_well_as_the_long_one():
    model = presets.load("uvit_tiny_digits", weights="pretrained")
    labels = np.arange(10)
    long = model.generate(labels=labels, sampler="dpm_solver_pp", num_steps=50, verbose=0)
    fast = model.generate(labels=labels, **presets.get("uvit_tiny_digits").fast, verbose=0)
    # Other steps of the same way through the same noise: 0.02 of [-1, 1] was measured.
    away = np.sqrt(np.mean((long / 127.5 - fast / 127.5) ** 2))
    assert 0.001 < away < 0.05


def test_a_class_that_is_missing_is_no_damage(tmp_path):
    class Own(UViT):
        """Which no other process knows."""

    DiffusionModel(Own((8, 8, 1), num_classes=10, **SMALL)).save(tmp_path / "own.keras")
    for load in (lambda path: presets.load("uvit_tiny_digits", path), AutoencoderKL.from_file):
        with pytest.raises(ImportError, match=r"own\.keras needs 'Own'.*import the module"):
            load(tmp_path / "own.keras")
