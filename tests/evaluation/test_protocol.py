"""`evaluate`: what it draws, what it records, what it goes on with, what it refuses and when."""

import importlib.metadata
import json

import keras
import numpy as np
import pytest
from stubs import StubInception, random_images, reference

from keras_uvit import DiffusionModel, UViT
from keras_uvit.diffusion import samplers
from keras_uvit.diffusion.schedules import VPLinear
from keras_uvit.encoders import SpaceToDepth
from keras_uvit.evaluation import Reference, evaluate, fid, protocol, scores
from keras_uvit.inference import fingerprint

pytestmark = pytest.mark.once

TINY = dict(image_shape=(8, 8, 3), patch_size=4, hidden_dim=16, num_layers=1, num_heads=2)
LATENT = {**TINY, "image_shape": (4, 4, 12), "patch_size": 2}
SCORES = ("fid", "sfid", "inception_score", "precision", "recall")
N = 20  # images: two chunks of 8 and one of 4, each in batches of 4
OPTIONS = dict(allow_few=True, usual=0, verbose=0, batch_size=4)
CLASSES = 3


def make(network, **options):
    keras.utils.set_random_seed(0)
    model = DiffusionModel(network, num_steps=2, **options)
    rng = np.random.default_rng(0)
    for weight in model.network.weights:
        # Fresh weights are so small that labels hardly matter.
        weight.assign(3.0 * weight)
    for weight in model.ema_network.weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.2))
    return model


@pytest.fixture(scope="module")
def of_labels():
    return make(UViT(**TINY, num_classes=CLASSES))


@pytest.fixture(scope="module")
def of_nothing():
    return make(UViT(**TINY))


@pytest.fixture(scope="module")
def of_latents():
    return make(UViT(**LATENT), latent_scale=0.5)


@pytest.fixture
def inception():
    return StubInception()


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(protocol, "CHUNK", 8)


@pytest.fixture
def drawn(monkeypatch):
    """The (first, number) of each call of `generate`; raises at the one that `stop` names."""

    class Drawn(list):
        stop = None

    calls, generate = Drawn(), DiffusionModel.generate

    def counted(model, *arguments, **options):
        if len(calls) == calls.stop:
            raise KeyboardInterrupt
        images = generate(model, *arguments, **options)
        calls.append((options["first"], len(images)))
        return images

    monkeypatch.setattr(DiffusionModel, "generate", counted)
    return calls


@pytest.fixture
def undrawn(monkeypatch):
    """Random pixels in place of `generate`, for what does not depend on images: no compiling."""

    def fake(model, num_images=None, labels=None, *, seed, first, **options):
        n = num_images if labels is None else len(labels)
        height, width, channels = model.network.image_shape
        calls.append((first, n))
        return np.random.default_rng([seed, first]).integers(
            0, 256, (n, height, width, channels), "uint8"
        )

    calls = []
    monkeypatch.setattr(DiffusionModel, "generate", fake)
    return calls


def random_labels(n=N, seed=0):
    return np.random.default_rng([seed, 1]).integers(0, CLASSES, n)


def by_hand(model, inception, seed=0, **options):
    images = model.generate(seed=seed, batch_size=4, verbose=0, **options)
    found = scores([images], len(images), reference(inception), inception, **FEW)
    return images, {key: round(value, 4) for key, value in found.items()}


FEW = dict(allow_few=True, usual=0, verbose=0)


def only_scores(record):
    return {key: record[key] for key in SCORES}


def saved(folder):
    return np.concatenate([np.load(path)["arr_0"] for path in sorted(folder.glob("*.npz"))])


# What is recorded ---------------------------------------------------------------------------------


def test_record_holds_what_the_numbers_depend_on(of_labels, inception, undrawn):
    real = reference(inception)
    record = evaluate(of_labels, real, inception, N, seed=3, guidance_scale=1.5, **OPTIONS)
    assert record.pop("keras_uvit") == importlib.metadata.version("keras-uvit")
    assert all(isinstance(record.pop(key), float) for key in SCORES)
    assert record == {
        "model": of_labels.name,
        "weights": fingerprint(of_labels.ema_network),
        "ema": True,
        "step": 0,
        "global_batch": None,
        "num_images": N,
        "label_protocol": "random",
        "prompts": None,
        "text_encoder": None,
        "context_encoder": None,
        "sampler": "dpm_solver_pp_2m",
        "num_steps": 2,
        "nfe": 2,
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 1.0],
        "seed": 3,
        "image_size": [8, 8],
        "autoencoder": None,
        "latent_scale": None,
        "backend": keras.config.backend(),
        "reference": real.hash,
        "reference_images": 40,
        "resize": "half_pixel",
        "inception": "0123456789abcdef",
    }


def test_record_is_json_and_the_file_holds_it(of_nothing, inception, tmp_path):
    path = tmp_path / "deep" / "fid.json"
    record = evaluate(of_nothing, reference(inception), inception, 8, path=path, **OPTIONS)
    assert json.loads(path.read_text()) == record
    assert record["label_protocol"] is None


def test_numbers_of_numpy_can_be_options(of_labels, inception, tmp_path, undrawn):
    options = dict(seed=np.int64(1), num_steps=np.int32(2), guidance_scale=np.float32(1.5))
    path = tmp_path / "fid.json"
    real = reference(inception)
    record = evaluate(of_labels, real, inception, 8, path=path, **options, **OPTIONS)
    assert json.loads(path.read_text())["seed"] == record["seed"] == 1


def test_a_sampler_made_by_hand_can_be_measured(of_nothing, inception, tmp_path, undrawn):
    steps = samplers.named("ddim", VPLinear(), 3)
    path = tmp_path / "fid.json"
    options = dict(sampler=steps, path=path, **OPTIONS)
    record = evaluate(of_nothing, reference(inception), inception, 8, **options)
    assert json.loads(path.read_text())["nfe"] == record["nfe"] == 3


def test_options_change_the_record(of_labels, inception, undrawn):
    options = dict(sampler="heun", num_steps=3, guidance_interval=(0.25, 0.75), guidance_scale=2.0)
    record = evaluate(of_labels, reference(inception), inception, 4, **options, **OPTIONS)
    assert (record["sampler"], record["num_steps"]) == ("heun", 3)
    assert record["nfe"] == 5  # two evaluations a step, the last has one
    assert record["guidance_interval"] == [0.25, 0.75]


def test_a_reference_of_mean_and_covariance_gives_fid_alone(of_nothing, inception):
    plain = Reference(reference(inception).pool)
    record = evaluate(of_nothing, plain, inception, 8, **OPTIONS)
    assert [record[key] for key in ("sfid", "precision", "recall")] == [None] * 3
    assert record["fid"] > 0
    assert record["inception_score"] > 1
    assert record["reference_images"] is None


# What is drawn ------------------------------------------------------------------------------------


def test_scores_are_those_of_the_images_drawn_by_hand(of_nothing, inception):
    _, expected = by_hand(of_nothing, inception, seed=5, num_images=N)
    record = evaluate(of_nothing, reference(inception), inception, N, seed=5, **OPTIONS)
    assert only_scores(record) == expected
    other = evaluate(of_nothing, reference(inception), inception, N, seed=6, **OPTIONS)
    assert other["fid"] != record["fid"]


def test_random_labels_are_drawn_with_the_seed(of_labels, inception):
    labels = random_labels(seed=5)
    _, expected = by_hand(of_labels, inception, seed=5, labels=labels)
    record = evaluate(of_labels, reference(inception), inception, N, seed=5, **OPTIONS)
    assert only_scores(record) == expected
    assert record["label_protocol"] == "random"


def test_balanced_labels_take_turns(of_labels, inception, tmp_path):
    labels = np.array([0, 1, 2] * 6 + [0, 1])
    images, expected = by_hand(of_labels, inception, labels=labels)
    record = evaluate(
        of_labels, reference(inception), inception, N, labels="balanced", folder=tmp_path, **OPTIONS
    )
    assert only_scores(record) == expected
    assert record["label_protocol"] == "balanced"
    np.testing.assert_array_equal(saved(tmp_path), images)
    np.testing.assert_array_equal(np.load(tmp_path / "000000.npz")["arr_1"], labels)
    random = evaluate(of_labels, reference(inception), inception, N, **OPTIONS)
    assert random["fid"] != record["fid"]


def test_other_label_protocols_are_refused(of_labels, inception, drawn):
    with pytest.raises(ValueError, match='"random" or "balanced". Received: \'even\''):
        evaluate(of_labels, reference(inception), inception, N, labels="even", **OPTIONS)
    assert drawn == []


def test_raw_weights_are_measured_and_recorded_on_demand(of_nothing, inception):
    real = reference(inception)
    average = evaluate(of_nothing, real, inception, 8, **OPTIONS)
    raw = evaluate(of_nothing, real, inception, 8, use_ema=False, **OPTIONS)
    assert (average["ema"], raw["ema"]) == (True, False)
    assert raw["weights"] == fingerprint(of_nothing.network) != average["weights"]
    assert raw["fid"] != average["fid"]
    _, expected = by_hand(of_nothing, inception, num_images=8, use_ema=False)
    assert only_scores(raw) == expected


def test_chunks_are_the_images_of_one_call(of_labels, inception, chunks, drawn, tmp_path):
    images, expected = by_hand(of_labels, inception, labels=random_labels(), first=0)
    drawn.clear()
    record = evaluate(of_labels, reference(inception), inception, N, folder=tmp_path, **OPTIONS)
    assert drawn == [(0, 8), (8, 8), (16, 4)]
    np.testing.assert_array_equal(saved(tmp_path), images)
    assert len(np.unique(images.reshape(N, -1), axis=0)) == N
    assert only_scores(record) == expected
    inception.batches.clear()
    assert (
        only_scores(evaluate(of_labels, reference(inception), inception, N, **OPTIONS)) == expected
    )
    assert inception.batches[1:] == [8, 8, 4]  # the first is the reference


def test_images_of_a_folder_are_the_adm_suites_with_labels(of_labels, inception, chunks, tmp_path):
    evaluate(of_labels, reference(inception), inception, N, folder=tmp_path / "a" / "b", **OPTIONS)
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["000000.npz", "000008.npz", "000016.npz", "samples.json"]
    with np.load(tmp_path / "a" / "b" / "000008.npz") as file:
        assert file["arr_0"].shape == (8, 8, 8, 3)
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_1"], random_labels()[8:16])


# Latents ------------------------------------------------------------------------------------------


def test_latents_are_decoded_and_the_autoencoder_recorded(of_latents, inception):
    of_latents.set_encoders(autoencoder=SpaceToDepth(2, scale=0.5))
    images, expected = by_hand(of_latents, inception, num_images=8)
    assert images.shape == (8, 8, 8, 3)
    record = evaluate(of_latents, reference(inception), inception, 8, **OPTIONS)
    assert only_scores(record) == expected
    assert record["autoencoder"] == "space-to-depth-2"
    assert record["latent_scale"] == 0.5
    assert record["image_size"] == [8, 8]


def test_latents_without_an_autoencoder_are_refused_before_drawing(of_latents, inception, drawn):
    of_latents.set_encoders(autoencoder=None)
    with pytest.raises(ValueError, match=r"FID is of pixels.*set_encoders\(autoencoder="):
        evaluate(of_latents, reference(inception), inception, 8, **OPTIONS)
    assert drawn == []


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_evaluation_goes_on_where_it_was(
    of_labels, inception, chunks, drawn, tmp_path, stop
):
    real = reference(inception)
    expected = evaluate(of_labels, real, inception, N, folder=tmp_path / "whole", **OPTIONS)
    drawn.clear()
    drawn.stop = stop
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        evaluate(of_labels, real, inception, N, folder=folder, **OPTIONS)
    assert drawn == [(0, 8), (8, 8)][:stop]
    drawn.clear()
    drawn.stop = None
    record = evaluate(of_labels, real, inception, N, folder=folder, **OPTIONS)
    assert drawn == [(0, 8), (8, 8), (16, 4)][stop:]
    np.testing.assert_array_equal(saved(folder), saved(tmp_path / "whole"))
    assert record == expected


def test_a_chunk_that_is_there_is_not_drawn_again(of_labels, inception, chunks, drawn, tmp_path):
    real = reference(inception)
    first = evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS)
    drawn.clear()
    again = evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS)
    assert drawn == []
    assert again == first


def test_a_chunk_that_is_missing_is_drawn_alone(of_labels, inception, chunks, drawn, tmp_path):
    real = reference(inception)
    first = evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS)
    (tmp_path / "000008.npz").unlink()
    drawn.clear()
    assert evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS) == first
    assert drawn == [(8, 8)]


@pytest.mark.parametrize("labels", ["random", "balanced"])
def test_more_images_use_those_that_are_there(
    of_labels, inception, chunks, drawn, tmp_path, labels
):
    real, options = reference(inception), dict(labels=labels, **OPTIONS)
    fewer = evaluate(of_labels, real, inception, N, folder=tmp_path / "a", **options)
    assert fewer["num_images"] == N
    drawn.clear()
    more = evaluate(of_labels, real, inception, 28, folder=tmp_path / "a", **options)
    assert drawn == [(16, 8), (24, 4)]
    whole = evaluate(of_labels, real, inception, 28, folder=tmp_path / "b", **options)
    np.testing.assert_array_equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert more == whole
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["num_images"] == 28


def test_fewer_images_use_whole_chunks_that_are_there(
    of_labels, inception, chunks, drawn, tmp_path
):
    real = reference(inception)
    evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS)
    drawn.clear()
    fewer = evaluate(of_labels, real, inception, 12, folder=tmp_path, **OPTIONS)
    assert (0, 8) not in drawn
    assert {**fewer} == {**evaluate(of_labels, real, inception, 12, **OPTIONS)}


def test_fewer_images_use_part_of_a_chunk_and_keep_the_rest(
    of_labels, inception, chunks, drawn, tmp_path
):
    real = reference(inception)
    evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS)
    drawn.clear()
    evaluate(of_labels, real, inception, 12, folder=tmp_path, **OPTIONS)
    evaluate(of_labels, real, inception, N, folder=tmp_path, **OPTIONS)
    assert drawn == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=1), "seed was 0, is 1"),
        (dict(guidance_scale=2.0), "guidance_scale was 1.0, is 2.0"),
        (
            dict(guidance_interval=(0.0, 0.5)),
            r"guidance_interval was \[0.0, 1.0\], is \[0.0, 0.5\]",
        ),
        (dict(num_steps=3), "num_steps was 2, is 3; nfe was 2, is 3"),
        (dict(sampler="ddim"), "sampler was dpm_solver_pp_2m, is ddim"),
        (dict(labels="balanced"), "label_protocol was random, is balanced"),
        (dict(use_ema=False), r"weights was \w{16}, is \w{16}; ema was True, is False"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    of_labels, inception, drawn, tmp_path, change, message
):
    real = reference(inception)
    evaluate(of_labels, real, inception, 4, folder=tmp_path, **OPTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    drawn.clear()
    with pytest.raises(
        ValueError, match=f"{tmp_path.name} holds samples of something else: .*"
    ) as e:
        evaluate(of_labels, real, inception, 4, folder=tmp_path, **OPTIONS, **change)
    assert e.match(message)
    assert drawn == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_other_weights_is_refused(inception, undrawn, tmp_path):
    model, real = make(UViT(**TINY)), reference(inception)
    evaluate(model, real, inception, 4, folder=tmp_path, **OPTIONS)
    model.ema_network.weights[0].assign(model.ema_network.weights[0] + 1e-6)
    with pytest.raises(ValueError, match=r"something else: weights was \w{16}, is \w{16}\. Choose"):
        evaluate(model, real, inception, 4, folder=tmp_path, **OPTIONS)
    assert undrawn == [(0, 4)]


def test_a_folder_of_another_sampler_made_by_hand_is_refused(
    of_nothing, inception, undrawn, tmp_path
):
    real, schedule = reference(inception), VPLinear()
    options = dict(folder=tmp_path, **OPTIONS)
    evaluate(of_nothing, real, inception, 4, sampler=samplers.named("ddim", schedule, 3), **options)
    other = samplers.named("dpm_solver_pp_2m", schedule, 3)
    with pytest.raises(ValueError, match="something else: sampler"):
        evaluate(of_nothing, real, inception, 4, sampler=other, **options)


def test_a_folder_is_free_after_a_call_that_drew_nothing(of_nothing, inception, drawn, tmp_path):
    real, folder = reference(inception), tmp_path / "images"
    with pytest.raises(ValueError, match="seed must be an int >= 0"):
        evaluate(of_nothing, real, inception, 4, folder=folder, seed=-1, **OPTIONS)
    evaluate(of_nothing, real, inception, 4, folder=folder, seed=1, **OPTIONS)
    assert drawn == [(0, 4)]


@pytest.mark.parametrize("name", ["samples.json", "000000.npz"])
def test_a_damaged_file_of_a_folder_is_named(of_nothing, inception, undrawn, tmp_path, name):
    real = reference(inception)
    evaluate(of_nothing, real, inception, 4, folder=tmp_path, **OPTIONS)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:99])
    with pytest.raises(ValueError, match=name):
        evaluate(of_nothing, real, inception, 4, folder=tmp_path, **OPTIONS)


def test_a_saved_and_loaded_model_goes_on_in_its_folder(inception, undrawn, tmp_path):
    model, real = make(UViT(**TINY)), reference(inception)
    model.global_batch.assign(4)  # as `fit` does
    first = evaluate(model, real, inception, 4, folder=tmp_path / "images", **OPTIONS)
    assert first["global_batch"] == 4
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert evaluate(loaded, real, inception, 4, folder=tmp_path / "images", **OPTIONS) == first
    assert undrawn == [(0, 4)]


# Refusals -----------------------------------------------------------------------------------------


def test_few_images_are_refused_unless_allowed(of_nothing, inception, drawn):
    real, options = reference(inception), dict(verbose=0)
    with pytest.raises(ValueError, match=r"2048 images are too few .*2049.*allow_few=True"):
        evaluate(of_nothing, real, inception, 2048, **options)
    with pytest.raises(ValueError, match="40 images are too few"):
        fid(random_images(40), real, inception, verbose=0)
    with pytest.raises(ValueError, match="40 images are too few"):
        scores([random_images(40)], 40, real, inception, verbose=0)
    assert drawn == []


def test_fewer_images_than_usual_warn(of_nothing, inception):
    real = reference(inception)
    images = random_images(2049, seed=2)
    with pytest.warns(UserWarning, match="FID of 2049 images is larger than of 50000"):
        assert fid(images, real, inception, verbose=0) > 0
    with pytest.warns(UserWarning, match="FID of 8 images is larger than of 9"):
        evaluate(of_nothing, real, inception, 8, **{**OPTIONS, "usual": 9})


def test_as_many_as_usual_do_not_warn(of_nothing, inception, recwarn):
    evaluate(of_nothing, reference(inception), inception, 8, **{**OPTIONS, "usual": 8})
    assert not [w for w in recwarn if "FID" in str(w.message)]


def test_the_warning_points_at_the_callers_line(of_nothing, inception):
    with pytest.warns(UserWarning, match="FID of") as caught:
        evaluate(of_nothing, reference(inception), inception, 4, **{**OPTIONS, "usual": 9})
    assert [w.filename for w in caught if "FID" in str(w.message)] == [__file__]


def test_another_resize_is_refused_before_drawing(of_nothing, inception, drawn):
    real = reference(StubInception("tf1"))
    with pytest.raises(ValueError, match="made with resize 'tf1', .* has 'half_pixel'"):
        evaluate(of_nothing, real, inception, 8, **OPTIONS)
    assert drawn == []
    with pytest.raises(ValueError, match="resize 'tf1'"):
        fid(random_images(8), real, inception, allow_few=True, verbose=0)


def test_another_inception_is_refused_before_drawing(of_nothing, inception, drawn):
    real = reference(StubInception(fingerprint="f" * 16))
    with pytest.raises(ValueError, match="with Inception weights 'ffffffffffffffff', .* has '0123"):
        evaluate(of_nothing, real, inception, 8, **OPTIONS)
    assert drawn == []


def test_another_image_size_is_refused_before_drawing(of_nothing, inception, drawn):
    real = reference(inception, size=16)
    with pytest.raises(ValueError, match="are of 16 x 16 images, these are 8 x 8"):
        evaluate(of_nothing, real, inception, 8, **OPTIONS)
    assert drawn == []
    with pytest.raises(ValueError, match="are of 16 x 16 images, these are 8 x 8"):
        fid(random_images(8), real, inception, allow_few=True, verbose=0)


def test_another_size_of_decoded_latents_is_refused_before_drawing(of_latents, inception, drawn):
    of_latents.set_encoders(autoencoder=SpaceToDepth(2, scale=0.5))
    with pytest.raises(ValueError, match="are of 4 x 4 images, these are 8 x 8"):
        evaluate(of_latents, reference(inception, size=4), inception, 8, **OPTIONS)
    assert drawn == []


def test_grey_models_are_refused_before_drawing(inception, undrawn):
    model = make(UViT(**{**TINY, "image_shape": (8, 8, 1)}))
    with pytest.raises(ValueError, match="grey|channel"):
        evaluate(model, reference(inception), inception, 8, **OPTIONS)
    assert undrawn == []


@pytest.mark.parametrize("keep", [0, 3])
def test_a_reference_of_too_few_features_has_no_precision_or_is_refused_before_drawing(
    of_nothing, inception, undrawn, keep
):
    real = reference(inception, keep_features=keep)
    try:
        record = evaluate(of_nothing, real, inception, 8, **OPTIONS)
    except ValueError:
        assert undrawn == []
    else:
        assert record["precision"] is None


def test_statistics_of_another_width_are_refused(of_nothing, inception):
    other = Reference((np.zeros(5), np.eye(5)))
    with pytest.raises(ValueError, match="differ in number"):
        evaluate(of_nothing, other, inception, 8, **OPTIONS)


def test_a_number_of_images_that_is_not_there_is_refused(inception):
    batches = [random_images(8), random_images(4)]
    with pytest.raises(ValueError, match="Expected 16 images. Received: 12"):
        scores(batches, 16, reference(inception), inception, **FEW)


def test_fid_is_the_score_and_zero_for_the_images_of_the_reference(inception):
    real, images = reference(inception), random_images(60, seed=4)
    found = scores([images[:50], images[50:]], 60, real, inception, **FEW)
    with pytest.warns(UserWarning, match="do not compare"):
        assert fid(images, real, inception, allow_few=True, verbose=0) == found["fid"] > 0.01
    same = scores([random_images(40, seed=1)], 40, real, inception, **FEW)
    # 1e-6: a covariance of 12 numbers in 16 features has zero eigenvalues; roots round at 1e-8.
    assert same["fid"] < 1e-6
    assert same["sfid"] < 1e-6
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
