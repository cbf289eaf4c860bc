"""`statistics` and `evaluate`, with a small stand-in for the Inception network."""

import json
from pathlib import Path

import numpy as np
import pytest
from shell import PICTURES, SCENES, refused, run, save_pngs
from stubs import StubInception, random_images

from keras_uvit import evaluation
from keras_uvit_cli.inputs import open_prompts

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:FID")]  # of few images

SCORES = {"fid", "sfid", "inception_score", "precision", "recall"}


@pytest.fixture
def inception(tmp_path, monkeypatch):
    def stub(weights, resize):
        assert Path(weights).is_file()
        return StubInception(resize)

    monkeypatch.setattr(evaluation, "InceptionFeatures", stub)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    return ("--inception", tmp_path / "inception.pth")


@pytest.fixture
def reference(tmp_path, inception):
    photos = save_pngs(tmp_path / "photos", random_images(40))
    text = run("statistics", photos, tmp_path / "ref.npz", "--image-size", 8, *inception)
    known = evaluation.Reference.load(tmp_path / "ref.npz")
    assert f"{tmp_path / 'ref.npz'}: 40 images of (8, 8), {known.hash}" in text
    return ("--reference", tmp_path / "ref.npz", *inception, "--allow-few")


def record_of(text):
    return json.loads(text[text.index("{") :])


def test_statistics_are_of_the_sources_images(tmp_path, inception):
    np.savez(tmp_path / "a.npz", image=PICTURES)
    run("statistics", tmp_path / "a.npz", tmp_path / "r.npz", *inception, "--resize", "tf1")
    known = evaluation.Reference.load(tmp_path / "r.npz")
    assert (known.count, known.image_size, known.resize) == (12, (8, 8), "tf1")
    pool = StubInception()(PICTURES)["pool"]
    np.testing.assert_allclose(known.pool[0], pool.mean(axis=0), atol=1e-5)  # float32 rounding


def test_evaluate_a_model_keeps_images_and_record(tmp_path, reference):
    words = ("evaluate", "uvit_nano_colour", *reference, "--num-images", 30, "--num-steps", 3)
    words += ("--folder", tmp_path / "drawn", "--out", tmp_path / "fid.json", "--seed", 2)
    record = record_of(run(*words))
    assert record == json.loads((tmp_path / "fid.json").read_text())
    assert record.keys() >= {*SCORES, "weights", "reference"}
    assert (record["num_images"], record["num_steps"], record["seed"]) == (30, 3, 2)
    with np.load(tmp_path / "drawn" / "000000.npz") as file:
        assert file["arr_0"].shape == (30, 8, 8, 3)
    assert "tf1" in refused(*words, "--resize", "tf1")
    # The same images, ready, give the same numbers.
    ready = record_of(run("evaluate", tmp_path / "drawn" / "000000.npz", *reference))
    assert all(ready[key] == pytest.approx(record[key], abs=1e-4) for key in SCORES)  # rounded


def test_evaluate_ready_images_of_an_npz_or_a_folder(tmp_path, reference):
    evaluation.write_npz(tmp_path / "a.npz", PICTURES)
    folder = save_pngs(tmp_path / "pictures")
    records = []
    for images in (tmp_path / "a.npz", folder):
        text = run("evaluate", images, *reference, "--out", tmp_path / "out.json")
        records.append(record_of(text))
        assert records[-1] == json.loads((tmp_path / "out.json").read_text())
        assert (records[-1]["num_images"], records[-1]["images"]) == (12, str(images))
    assert {k: records[0][k] for k in SCORES} == {k: records[1][k] for k in SCORES}


def test_a_damaged_file_is_told(tmp_path, reference):
    (tmp_path / "bad.npz").write_bytes((tmp_path / "ref.npz").read_bytes()[:500])
    assert "bad.npz" in refused("evaluate", tmp_path / "bad.npz", *reference)
    words = ("evaluate", "uvit_nano_colour", "--inception", tmp_path / "inception.pth")
    assert "bad.npz" in refused(*words, "--reference", tmp_path / "bad.npz")


def test_prompts_from_a_file_or_from_captions(coco, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text(" one \n\ntwo\n")
    assert open_prompts(str(file), None, None, 0) == ["one", "two"]
    assert open_prompts(str(file), None, 1, 0) == ["one"]
    with pytest.raises(ValueError, match="2 prompts, fewer than 3"):
        open_prompts(str(file), None, 3, 0)
    file.write_bytes("\ufeffone\r\nzwölf".encode())  # as Windows writes it
    assert open_prompts(str(file), None, None, 0) == ["one", "zwölf"]
    assert len(open_prompts("shapes:5", "test", None, 0)) == 5
    drawn = open_prompts(f"coco:{coco}", "train2014", 4, 0)
    assert len(drawn) == 4
    assert set(drawn) <= set(SCENES)
