"""`train` and `generate`: that options arrive at the library, and what is left on disk."""

import json

import keras
import numpy as np
import pytest
from PIL import Image
from shell import PICTURES, SCENES, misused, refused, run, save_pngs

from keras_uvit import DiffusionModel, data, evaluation, presets, training
from keras_uvit.encoders import AutoencoderKL
from keras_uvit.presets import own_data

pytestmark = pytest.mark.once

# train --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    words = ("train", "digits", folder, "--preset", "uvit_nano_digits", "--steps", 1)
    words += ("--batch-size", 512)
    return folder, words, run(*words)


def test_train_on_digits_leaves_a_run_and_pictures(trained):
    folder, words, text = trained
    assert f"Trained: {folder / 'model.keras'}" in text
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.keras", "ema.weights.h5", "log.csv", "grids", "checkpoints"}
    assert [path.name for path in (folder / "grids").iterdir()] == ["epoch-0001.png"]
    assert "differs in ['seed']" in refused(*words, "--seed", 5)


@pytest.fixture
def asked(monkeypatch):
    """What `train` would train; nothing is."""
    seen = {}

    def train(model, samples, folder, iterations, **more):
        seen.update(model=model, samples=samples, folder=folder, iterations=iterations, **more)
        return model

    monkeypatch.setattr(training, "train", train)
    return seen


def test_train_takes_the_presets_numbers_unless_others_are_given(tmp_path, asked):
    run("train", "digits", tmp_path, "--preset", "uvit_nano_digits")
    row = presets.get("uvit_nano_digits")
    assert (asked["samples"].batch_size, asked["iterations"]) == (row.batch_size, row.iterations)
    assert not asked["samples"].flip  # a mirrored digit is no digit
    (grids,) = asked["callbacks"]
    every = row.iterations // len(asked["samples"]) // 10
    assert (grids.every, grids.folder) == (every, tmp_path / "grids")
    assert asked["every_steps"] == 1000
    words = ("--batch-size", 7, "--steps", 9, "--seed", 3, "--grid-every", 0)
    words += ("--preset", "uvit_nano_digits", "--learning-rate", 0.5, "--layers", 5)
    run("train", "digits", tmp_path, *words, "--precision", "mixed_bfloat16")
    assert asked["model"].optimizer_config["learning_rate"] == 0.5
    assert asked["model"].network.get_config()["num_layers"] == 5
    assert (asked["samples"].batch_size, asked["iterations"]) == (7, 9)
    assert (asked["model"].seed, asked["samples"].seed) == (3, 3)
    assert asked["model"].network.dtype_policy.name == "mixed_bfloat16"
    assert asked["callbacks"] == []


def test_train_fits_the_classes_to_the_data_and_the_pictures_to_the_network(tmp_path, asked):
    np.savez(tmp_path / "a.npz", image=PICTURES[..., :1], label=np.arange(12) % 3)
    run("encode", tmp_path / "a.npz", tmp_path / "cache", "--pixels")
    words = (tmp_path / "run", "--batch-size", 4, "--preset")
    text = run("train", tmp_path / "cache", *words, "uvit_nano_digits")
    assert "10 classes and the data has 3" in text
    assert isinstance(asked["samples"], data.images.ImageDataset)
    assert asked["model"].network.num_classes == 3
    assert max(asked["callbacks"][0].options["labels"]) == 2
    np.testing.assert_array_equal(asked["samples"].images[:], PICTURES[..., :1])
    # Pictures of another size are fitted to the network.
    photos = save_pngs(tmp_path / "photos", PICTURES.repeat(2, 1).repeat(3, 2))
    run("train", photos, *words, "uvit_nano_colour", "--image-size", 8)
    assert asked["samples"].images.shape == (12, 8, 8, 3)


@pytest.mark.usefixtures("small_autoencoder")
def test_train_on_latents_draws_pictures_only_with_an_autoencoder(tmp_path, asked):
    AutoencoderKL().save_weights(tmp_path / "a.weights.h5")
    np.savez(tmp_path / "a.npz", image=PICTURES[..., :1], label=np.arange(12) % 10)
    run("encode", tmp_path / "a.npz", tmp_path / "cache", "--autoencoder", "space-to-depth")
    words = ("train", tmp_path / "cache", tmp_path / "run", "--preset", "uvit_nano_latent")
    words += ("--batch-size", 4)
    run(*words)
    assert asked["callbacks"] == []
    assert asked["samples"].sample_shape == (4, 4, 8)
    run(*words, "--autoencoder", tmp_path / "a.weights.h5")
    assert len(asked["callbacks"]) == 1
    autoencoder = asked["model"].encoders.autoencoder
    assert (autoencoder.id, autoencoder.scale) == ("a", 1.0)


def test_train_a_model_of_text(tmp_path, asked, clip):
    cache = tmp_path / "cache"
    run("encode", "shapes:16", cache, "--pixels", "--text", clip)
    words = ("train", cache, tmp_path / "run", "--preset", "uvit_nano_shapes", "--batch-size", 8)
    run(*words, "--text", clip, "--prompt", SCENES[0], "--prompt", SCENES[1])
    assert set(asked["samples"][0]) == {"image", "context"}
    assert asked["model"].encoders.text_encoder.id == "words"
    assert asked["callbacks"][0].options["prompts"] == SCENES[:2]
    run(*words)
    assert asked["callbacks"] == []  # there is nothing to draw
    assert "--prompt needs" in misused(*words, "--prompt", "a")


# From trained weights -----------------------------------------------------------------------------


def test_a_preset_is_fine_tuned_and_then_the_run_with_low_rank_pairs(tmp_path, asked, trained):
    words = ("--from", trained[0] / "ema.weights.h5", "--preset", "uvit_nano_digits", "--epochs", 2)
    text = run("train", "digits", tmp_path, *words, "--num-classes", 12, "--learning-rate", 0.25)
    assert "Resized: label_embed/embeddings." in text
    model = asked["model"]
    assert model.network.num_classes == 12
    assert asked["iterations"] == 2 * len(asked["samples"])
    expected = dict(learning_rate=0.25, warmup_steps=0.05, decay_steps="run")
    assert {key: model.optimizer_config[key] for key in expected} == expected

    (tmp_path / "run").mkdir()
    photos = save_pngs(tmp_path / "photos")  # read in grey, as the model is
    model.save(tmp_path / "m.keras")
    words = ("--from", tmp_path / "m.keras", "--image-size", 4, "--steps", 3, "--lora", 2)
    run("train", photos, tmp_path / "run", *words, "--precision", "mixed_bfloat16", "--seed", 7)
    tuned = asked["model"]
    config = dict(image_shape=(4, 4, 1), num_classes=12, dtype="mixed_bfloat16")
    assert {key: getattr(tuned.network.config, key) for key in config} == config
    assert tuned.network.config.lora["rank"] == 2
    assert (tuned.seed, asked["iterations"]) == (7, 3)
    assert (tmp_path / "run" / "lora.safetensors").is_file()


# Without a preset ---------------------------------------------------------------------------------


def test_train_says_what_a_folder_holds_and_chooses_a_model_for_it(tmp_path, asked):
    for k in range(12):
        folder = tmp_path / "photos" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size = (40, 9) if k < 2 else (9, 9)
        Image.new("L" if k % 3 else "RGB", size, color=20 * k).save(folder / f"{k}.png")
    text = run("train", tmp_path / "photos", tmp_path / "run", "--width", 16, "--layers", 1)
    for words in (
        "12 pictures of 9x9 to 9x40 pixels",
        "8 are grey, the others in colour",
        "2 are more than twice as long as wide",
        "2 classes have fewer than 10 pictures",
        "They are resized to 8x8; --image-size",
    ):
        assert words in text
    assert asked["model"].network.image_shape == (8, 8, 3)
    assert asked["samples"].batch_size == 12
    assert asked["iterations"] == asked["model"].planned_steps == 5000
    assert asked["validation_data"] is None


def test_train_takes_flags_for_what_it_chooses(tmp_path, asked):
    photos = save_pngs(tmp_path / "photos", np.tile(PICTURES, (2, 1, 1, 1)))
    words = ("train", photos, tmp_path / "run", "--image-size", 8, "--batch-size", 3)
    words += ("--width", 16, "--layers", 3, "--learning-rate", 0.25, "--epochs", 7)
    run(*words, "--validation-share", 0.25)
    config = asked["model"].network.get_config()
    assert (config["hidden_dim"], config["num_layers"]) == (16, 3)
    assert asked["model"].optimizer.schedule.config["learning_rate"] == 0.25
    assert (asked["samples"].num_samples, asked["validation_data"].num_samples) == (18, 6)
    assert asked["iterations"] == asked["model"].planned_steps == 7 * 6


def test_train_for_hours_is_timed(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(own_data, "seconds_per_step", lambda *_: 36.0)
    words = ("--image-size", 8, "--width", 16, "--layers", 1, "--hours", 0.1)
    run("train", save_pngs(tmp_path / "photos"), tmp_path / "run", *words)
    assert asked["model"].planned_steps == 10


def test_report_of_a_trained_model(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(evaluation.reports, "CLASSIFIER_STEPS", (2, 2))
    words = ("report", trained[0] / "model.keras", "digits", tmp_path, "--num-images", 20)
    assert f"Look at {tmp_path / 'report.png'}" in run(*words)
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 20


# generate -----------------------------------------------------------------------------------------


def test_generate_from_shipped_weights_into_a_grid(tmp_path):
    words = ("generate", "uvit_tiny_digits", tmp_path / "a.png", "--weights", "pretrained")
    text = run(*words, "--labels", "0,1,2,3", "--zoom", 3, "--num-steps", 2)
    assert f"4 images: {tmp_path / 'a.png'}" in text
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (2 * 24 + 2, 2 * 24 + 2)


def test_generate_from_a_trained_model_into_arrays_and_files(tmp_path, trained):
    model = trained[0] / "model.keras"
    run("generate", model, tmp_path / "a.npz", "--labels", "3,1,4")
    with np.load(tmp_path / "a.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [3, 1, 4]
    expected = keras.saving.load_model(model).generate(labels=[3, 1, 4], verbose=0)
    np.testing.assert_array_equal(images, expected)
    run("generate", trained[0] / "checkpoints", tmp_path / "pictures", "--labels", "3,1,4")
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    drawn = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_array_equal(drawn, images[..., 0])
    # The average that a run keeps is that model's.
    words = ("--weights", trained[0] / "ema.weights.h5", "--labels", "3,1,4")
    run("generate", "uvit_nano_digits", tmp_path / "b.npz", *words)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["arr_0"], images)


@pytest.fixture
def drawn(monkeypatch):
    """The arguments that `generate` hands to the model; nothing is drawn."""
    seen = {}

    def generate(self, **options):
        seen.clear()
        seen.update(options, model=self)
        return PICTURES

    monkeypatch.setattr(DiffusionModel, "generate", generate)
    return seen


def test_the_options_arrive(tmp_path, drawn):
    def options(*words):
        run("generate", "uvit_nano_colour", tmp_path / "a.npz", "--num-images", 2, *words)
        return {key: value for key, value in drawn.items() if value is not None and key != "model"}

    plain = {"num_images": 2, "seed": 0, "use_ema": True}
    assert options() == plain
    words = ("--seed", 1, "--guidance-scale", 9, "--sampler", "ddpm", "--raw", "--batch-size", 5)
    more = dict(seed=1, guidance_scale=9.0, sampler="ddpm", use_ema=False, batch_size=5)
    assert options(*words) == plain | more
    assert options("--fast") == plain | presets.FAST
    assert options("--fast", "--num-steps", 2) == plain | presets.FAST | {"num_steps": 2}


def test_prompts_arrive_at_a_saved_model_with_its_encoder(tmp_path, clip, drawn):
    presets.load("uvit_nano_shapes").save(tmp_path / "m.keras")
    file = tmp_path / "prompts.txt"
    file.write_text(f"{SCENES[2]}\n\n{SCENES[3]}\n")
    words = ("--prompt", SCENES[0], "--prompts", file, "--negative-prompt", SCENES[1])
    run("generate", tmp_path / "m.keras", tmp_path / "a.png", "--text", clip, *words)
    assert drawn["prompts"] == [SCENES[0], SCENES[2], SCENES[3]]
    assert drawn["negative_prompts"] == SCENES[1]
    assert drawn["model"].encoders.text_encoder.id == "words"
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(picture, evaluation.image_grid(PICTURES))


def test_an_edit_arrives_and_its_grid_shows_before_mask_and_after(tmp_path, drawn):
    before, mask = PICTURES[0], np.zeros((8, 8), "uint8")
    mask[:, 4:] = 255
    Image.fromarray(before).save(tmp_path / "before.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ("generate", "uvit_nano_colour", tmp_path / "a.png", "--num-images", 12)
    words += ("--image", tmp_path / "before.png")
    run(*words, "--mask", tmp_path / "mask.png", "--resamples", 3)
    np.testing.assert_array_equal(drawn["image"], before)
    np.testing.assert_array_equal(drawn["mask"], mask > 0)
    assert drawn["resamples"] == 3
    assert "strength" not in drawn
    white = mask[..., None].repeat(3, -1)
    rows = [image for after in PICTURES for image in (before, white, after)]
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(picture, evaluation.image_grid(np.stack(rows), 3))
    run(*words, "--strength", 0.5)
    assert drawn["strength"] == 0.5
    rows = [image for after in PICTURES for image in (before, after)]
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(picture, evaluation.image_grid(np.stack(rows), 2))


def test_every_image_has_a_picture_of_its_own_to_start_from(tmp_path, drawn):
    files = [tmp_path / f"{k}.png" for k in range(len(PICTURES))]
    for file, image in zip(files, PICTURES[::-1]):
        Image.fromarray(image).save(file)
    words = [word for file in files for word in ("--image", file)]
    target = tmp_path / "a.png"
    run("generate", "uvit_nano_colour", target, "--num-images", 12, *words, "--strength", 0.5)
    np.testing.assert_array_equal(drawn["image"], PICTURES[::-1])
    rows = np.stack([PICTURES[::-1], PICTURES], axis=1).reshape(-1, 8, 8, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(target)), evaluation.image_grid(rows, 2))


def test_bad_edits_are_refused(tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "whole.png")
    Image.fromarray(PICTURES[0][:4]).save(tmp_path / "half.png")
    words = ("generate", "uvit_nano_colour", tmp_path / "a.png", "--num-images", 1)
    assert "strength goes with" in refused(*words, "--strength", 0.5)
    text = refused(*words, "--image", tmp_path / "half.png", "--strength", 0.5)
    assert "(8, 8, 3)" in text
    assert "strength" in misused(*words, "--strength", 2)
    two = ("--image", tmp_path / "half.png", "--image", tmp_path / "whole.png")
    assert "of one size" in misused(*words, *two, "--strength", 0.5)
    assert not (tmp_path / "a.png").exists()
