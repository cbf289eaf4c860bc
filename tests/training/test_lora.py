"""Low-rank pairs: they begin as nothing, are trained alone, have a file of their own, and merge."""

import keras
import numpy as np
import pytest
from states import EIGHT, kept_in_files
from tiny import DATA, assert_equal, diffusion_model, fit, numpy, refused, uvit, weights

from keras_uvit import DiffusionModel, UNet, convert, evaluation, training
from keras_uvit.networks.basics import dense
from keras_uvit.training import adapt, checkpoints, load_lora, merge_lora, save_lora
from keras_uvit.training.checkpoints import Place
from keras_uvit.training.optimizers import settings

UNET = dict(image_shape=(4, 4, 1), base_dim=8, multipliers=(1,), num_blocks=1, head_dim=4)
UNET |= dict(attention_levels=(0,), num_classes=3)
X = {
    "image": np.random.default_rng(0).standard_normal((3, 4, 4, 1)).astype("float32"),
    "timestep": np.array([1.0, 300.0, 999.0], "float32"),
    "label": np.array([0, 1, 2], "int32"),
}


def answer(model):
    return numpy(model.ema_network(X))


def paths(network, trained):
    return [weight.path for weight in network.weights if weight.trainable == trained]


def learned(base, rank=2, **changes):
    """A model with pairs after three steps, which have moved them."""
    model = adapt(base, lora=dict(rank=rank, alpha=4), **changes, verbose=0)
    model.compile()
    fit(model, {**DATA, "label": DATA["label"] % model.network.num_classes})
    return model


@pytest.fixture
def base():
    return diffusion_model(compiled=False, ema_decay=0.5)


@pytest.mark.eager
def test_a_pair_is_added_to_its_kernel():
    layer = dense(5, "float32", "layer", lora=dict(rank=2, alpha=3.0))
    layer.build((None, 4))
    layer.lora_b.assign(np.random.default_rng(0).standard_normal((2, 5)))
    kernel, bias, a, b = weights(layer)
    x = np.random.default_rng(1).standard_normal((7, 4)).astype("float32")
    # 1e-5: float32 sums of four numbers near 1 in another order.
    np.testing.assert_allclose(numpy(layer(x)), x @ (kernel + 1.5 * a @ b) + bias, atol=1e-5)
    refused(NotImplementedError, lambda: layer.enable_lora(2), "lora=16")


@pytest.mark.once
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_new_pairs_change_nothing_of_a_uvit(mlp, capsys):
    base = DiffusionModel(uvit(num_classes=3, mlp=mlp))
    model = adapt(base, lora=2)
    np.testing.assert_array_equal(answer(model), answer(base))
    count = 8 if mlp == "gelu" else 10
    assert f"Made anew: {count} low-rank kernels." in capsys.readouterr().out
    assert len(paths(model.network, True)) == count


@pytest.mark.once
def test_new_pairs_change_nothing_of_a_unet_and_are_merged():
    base = DiffusionModel(UNet(**UNET))
    for network in (base.network, base.ema_network):  # whose outputs start at zero
        for k, weight in enumerate(network.weights):
            weight.assign(0.1 * np.random.default_rng(k).standard_normal(weight.shape))
    model = adapt(base, lora=2, verbose=0)
    np.testing.assert_array_equal(answer(model), answer(base))
    layers = {path.split("/")[0] for path in paths(model.network, True)}
    assert all(name.endswith("_attention") for name in layers)
    model.compile()
    fit(model)
    # 1e-5 of the largest value: float32 sums in another order.
    close = dict(rtol=0, atol=1e-5 * np.abs(answer(model)).max())
    np.testing.assert_allclose(answer(merge_lora(model)), answer(model), **close)


@pytest.mark.eager
def test_pairs_and_what_is_new_are_trained_alone(base):
    before = dict(zip((w.path for w in base.ema_network.weights), weights(base.ema_network)))
    model = learned(base, num_classes=2)
    trained = paths(model.network, True)
    assert {path for path in trained if "/lora_" not in path} == {"label_embed/embeddings"}
    assert len(trained) == 9
    moments = [v for v in model.optimizer.variables if len(v.shape) > 0]
    assert len(moments) == 2 * len(trained)  # AdamW's two, of no other weight
    for network in (model.network, model.ema_network):
        for weight, value in zip(network.weights, weights(network), strict=True):
            if weight.path not in trained:
                np.testing.assert_array_equal(value, before[weight.path])
            elif weight.name == "lora_b":
                assert np.abs(value).max() > 0
    pair = [w.path for w in model.network.weights].index(trained[-1])
    assert (weights(model.network)[pair] != weights(model.ema_network)[pair]).any()  # is averaged


@pytest.mark.eager
def test_merged_pairs_compute_the_same(base):
    model = learned(base)
    merged = merge_lora(model)
    # 1e-5 of values near 1: float32 sums in another order.
    np.testing.assert_allclose(answer(merged), answer(model), atol=1e-5)
    np.testing.assert_allclose(answer(merge_lora(model, strength=0)), answer(base), atol=1e-6)
    assert np.abs(answer(model) - answer(base)).max() > 1e-3
    assert merged.network.config.lora is None
    assert not paths(merged.network, False)


@pytest.mark.eager
def test_a_file_of_pairs_gives_the_model_back_onto_its_base(base, tmp_path):
    model, path = learned(base, num_classes=2), tmp_path / "pairs.safetensors"
    save_lora(model, path)
    loaded = load_lora(base, path)
    np.testing.assert_array_equal(answer(loaded), answer(model))
    assert paths(loaded.network, True) == paths(model.network, True)
    nothing = load_lora(base, path, strength=0)
    table = adapt(base, num_classes=2, verbose=0)
    for network in (table.network, table.ema_network):
        network.get_layer("label_embed").set_weights(
            model.ema_network.get_layer("label_embed").get_weights()
        )
    np.testing.assert_array_equal(answer(nothing), answer(table))


@pytest.mark.once
def test_a_file_of_pairs_is_small_and_of_one_base(base, tmp_path):
    path = tmp_path / "pairs.safetensors"
    big = DiffusionModel(uvit(num_classes=3, hidden_dim=128, num_layers=3))
    save_lora(adapt(big, lora=1, verbose=0), path)
    numbers = evaluation.count_parameters(big.network)
    assert path.stat().st_size < 4 * numbers / 10
    refused(ValueError, lambda: load_lora(base, path), "differs in", "hidden_dim")
    save_lora(learned(base), path)
    other = diffusion_model(compiled=False, seed=1)
    refused(ValueError, lambda: load_lora(other, path), "other weights", "began at")
    path.write_bytes(path.read_bytes()[:100])
    refused(ValueError, lambda: load_lora(base, path), "damaged")
    convert.files.write_tensors({"a": np.ones(2, "float32")}, path)
    refused(ValueError, lambda: load_lora(base, path), "no file of `training.save_lora`")
    refused(FileNotFoundError, lambda: load_lora(base, tmp_path / "no.safetensors"), "no.safe")
    refused(ValueError, lambda: save_lora(base, path), "no low-rank pairs", "lora=16")
    refused(ValueError, lambda: merge_lora(base), "no low-rank pairs")
    refused(ValueError, lambda: save_lora(learned(base), tmp_path / "pairs.pth"), ".safetensors")


@pytest.mark.eager
def test_pairs_are_kept_in_models_and_checkpoints(base, tmp_path):
    model = learned(base, num_classes=2)
    checkpoints.write(model, tmp_path / "run", 0, Place(0, 0, 1, 8), optimizer=settings(model))
    model.save(tmp_path / "model.keras")
    model.ema_network.save_weights(tmp_path / "average.weights.h5")
    for loaded in (
        keras.saving.load_model(tmp_path / "model.keras"),
        training.load_checkpoint(tmp_path / "run"),
    ):
        assert loaded.network.config == model.network.config
        assert paths(loaded.network, True) == paths(model.network, True)
        assert_equal(kept_in_files(loaded), kept_in_files(model))
        assert np.isfinite(fit(loaded, {**EIGHT, "label": EIGHT["label"] % 2})["loss"])
    network = uvit(num_classes=2, lora=dict(rank=2, alpha=4))
    network.load_weights(tmp_path / "average.weights.h5")
    assert_equal(weights(network), weights(model.ema_network))


@pytest.mark.once
def test_a_model_with_pairs_goes_on_to_other_classes(base):
    model = learned(base, num_classes=2)
    again = adapt(model, num_classes=5, verbose=0)
    assert paths(again.network, True) == paths(model.network, True)
    for layer in ("mid_block", "head"):
        layers = (m.get_layer(layer) for m in (again.network, model.ema_network))
        assert_equal(*map(weights, layers))


@pytest.mark.once
@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (0, ("rank of lora", "int >= 1")),
        (dict(alpha=2), ("rank is", "needed")),
        (dict(rank=2, scale=1), ("rank is", "needed", "scale")),
        (dict(rank=2, targets=["head"]), ("some of ('attention', 'mlp')", "('head',)")),
    ],
    ids=str,
)
def test_pairs_that_cannot_be_are_refused(lora, words):
    refused(ValueError, lambda: uvit(lora=lora), *words)


@pytest.mark.once
def test_pairs_of_some_kernels_cost_what_they_multiply():
    plain, network = uvit(), uvit(lora=dict(rank=2, targets=["attention"]))
    pairs = [w for w in network.weights if "lora_" in w.name]
    assert {w.path.split("/")[-2] for w in pairs} == {"qkv", "proj"}
    tokens = network.config.num_tokens
    more = evaluation.count_macs(network) - evaluation.count_macs(plain)
    assert more == tokens * 2 * (16 + 48 + 16 + 16)
    refused(ValueError, lambda: convert.save_torch_weights(network, "w.pth"), "lora")
