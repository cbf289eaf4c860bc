"""`share`, and the folders it writes where other commands take a model."""

import numpy as np
import pytest
from shell import misused, refused, run

from keras_uvit import evaluation, presets

pytestmark = pytest.mark.once

LABELS = "0,1,2"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of the small digits, and what was printed."""
    folder = tmp_path_factory.mktemp("shared") / "digits"
    words = ("share", "uvit_tiny_digits", folder, "--weights", "pretrained", "--num-images", 2)
    return folder, run(*words, "--data", "digits of scikit-learn", "--license", "apache-2.0")


def test_a_shared_folder_is_generated_from(shared, tmp_path):
    folder, said = shared
    assert f"{folder}: weights 1.7 MB." in said
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "| data | digits of scikit-learn |" in readme
    assert 'license: "apache-2.0"' in readme
    words = ("--labels", LABELS, "--num-steps", 2, "--seed", 3)
    run("generate", folder, tmp_path / "a.npz", *words)
    preset = ("uvit_tiny_digits", tmp_path / "b.npz", "--weights", "pretrained")
    run("generate", *preset, *words)
    images = [evaluation.read_images(tmp_path / name) for name in ("a.npz", "b.npz")]
    np.testing.assert_array_equal(*images)


def test_a_shared_folder_is_fine_tuned(shared, tmp_path):
    words = ("--from", shared[0], "--steps", 1, "--batch-size", 512, "--grid-every", 0)
    assert "Trained" in run("train", "digits", tmp_path / "run", *words)
    assert (tmp_path / "run" / "model.keras").is_file()


def test_a_text_model_is_shared_with_its_prompts_or_without_its_encoder(tmp_path):
    words = ("share", "uvit_tiny_shapes", tmp_path / "m", "--weights", "pretrained")
    said = run(*words, "--no-encoders", "--prompt", "a red circle")
    assert "text encoder 'uvit_tiny_shapes_text' not included (0.5 MB)" in said
    assert (tmp_path / "m" / "samples.png").is_file()
    assert not (tmp_path / "m" / "text_encoder").exists()


def test_a_shared_folder_is_uploaded_as_it_is(shared, monkeypatch):
    uploaded = []
    monkeypatch.setattr(presets, "upload_preset", lambda *words: uploaded.append(words))
    words = ("share", shared[0], "hf://me/digits")
    run(*words)
    run(*words, "--overwrite")
    here = ("hf://me/digits", str(shared[0]))
    assert uploaded == [(*here, False), (*here, True)]
    assert "as it is" in misused(*words, "--license", "mit")
    assert len(uploaded) == 2


def test_what_does_not_fit_is_refused(shared, tmp_path, monkeypatch):
    folder, _ = shared
    assert "--overwrite" in refused("share", folder, folder)
    assert "its own weights" in misused("share", folder, tmp_path / "m", "--weights", "pretrained")
    assert "hf://user/name" in refused("generate", "hf://me", tmp_path / "a.png", "--labels", "1")
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "config.json").write_text("{}", encoding="utf-8")
    words = ("generate", folder.parent / "other", tmp_path / "a.png", "--labels", "1")
    assert "something else" in refused(*words)
