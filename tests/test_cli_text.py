"""Captions and prompts from a shell: encode, train, generate, evaluate."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from keras_uvit import cli, data, presets
from keras_uvit.data import captioned, shapes
from keras_uvit.latent import CLIPText

SCENES = [str(scene) for scene in shapes.scenes(40)]


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def run(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words):
    result = invoke(*words)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An untrained text encoder of the shape that `uvit_tiny_shapes` reads."""
    folder = tmp_path_factory.mktemp("clip") / "words"
    CLIPText.random(SCENES, length=12, hidden_dim=64, vocabulary_size=600).save(folder)
    return folder


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    (folder / "train2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for k in range(6):
        Image.fromarray(np.full((20, 30, 3), 40 * k, "uint8")).save(
            folder / "train2014" / f"{k}.jpg"
        )
        images.append({"id": k, "file_name": f"{k}.jpg"})
        annotations += [{"image_id": k, "caption": SCENES[(k + j) % 40]} for j in range(1 + k % 3)]
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_train2014.json").write_text(json.dumps(content))
    return folder


def test_encode_coco(coco, clip, tmp_path):
    words = ("encode", f"coco:{coco}", tmp_path / "cache", "--split", "train2014")
    words += ("--image-size", 16, "--autoencoder", "space-to-depth", "--text", clip)
    text = run(*words)
    assert "float16 contexts of 12 captions" in text
    assert "6 samples" in text
    cache = data.LatentDataset(tmp_path / "cache", 6, verbose=0)
    assert list(cache.contexts.rows[:, 1]) == [1, 2, 3, 1, 2, 3]
    assert cache.contexts.context_shape == (12, 64)
    assert cache.contexts.id == "words"


def test_encode_captions_needs_an_encoder(coco, tmp_path):
    words = ("encode", f"coco:{coco}", tmp_path / "cache", "--image-size", 16)
    assert "has captions: pass --text, or --no-captions" in refused(
        *words, "--autoencoder", "space-to-depth"
    )
    assert "annotations_trainval2014.zip" in refused(
        "encode", "coco:nowhere", tmp_path / "cache", "--pixels"
    )
    assert "No folder at nowhere" in refused(*words, "--pixels", "--text", "nowhere")


def test_encode_a_folder_with_captions(clip, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for k in range(3):
        Image.fromarray(np.full((9, 9, 3), k, "uint8")).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "captions": [SCENES[k]]}))
    (folder / captioned.CAPTIONS).write_text("\n".join(lines))
    run("encode", folder, tmp_path / "cache", "--image-size", 8, "--pixels", "--text", clip)
    cache = data.image_shards(tmp_path / "cache", 3, verbose=0)
    assert set(cache[0]) == {"image", "context"}
    assert not cache.flip


@pytest.mark.parametrize("spec", ["shapes:", "shapes:0", "shapes:many"])
def test_a_number_of_shapes_is_needed(spec, tmp_path):
    assert "Expected a number of pictures" in refused("encode", spec, tmp_path / "c", "--pixels")


@pytest.fixture
def tiny(monkeypatch):
    """`uvit_tiny_shapes` with fewer weights and steps."""
    row = presets.PRESETS["uvit_tiny_shapes"]
    monkeypatch.setitem(row.network, "hidden_dim", 16)
    monkeypatch.setitem(row.network, "num_layers", 1)


def test_from_shapes_to_pictures(tiny, clip, tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "run"
    run("encode", "shapes:16", cache, "--pixels", "--text", clip)
    words = ("train", "uvit_tiny_shapes", cache, folder, "--iterations", 2, "--batch-size", 8)
    words += ("--text", clip, "--grid-every", 1)
    run(*words, "--prompt", SCENES[0], "--prompt", SCENES[1])
    assert list((folder / "grids").glob("*.png"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{SCENES[2]}\n\n{SCENES[3]}\n")
    model = folder / "model.keras"
    out = tmp_path / "images.npz"
    how = ("--text", clip, "--num-steps", 2)
    run("generate", model, out, "--prompt", SCENES[0], "--prompts", prompts, *how)
    images = np.load(out)["arr_0"]
    assert images.shape == (3, 32, 32, 3)
    run("generate", model, out, "--prompt", SCENES[0], *how, "--negative-prompt", SCENES[1])
    away = np.load(out)["arr_0"]
    assert (away != images[:1]).any()
    assert "need a text encoder" in refused("generate", model, out, "--prompt", "a dog")
    assert "from `prompts`" in refused("generate", model, out, "--labels", 0)
    other = tmp_path / "other"
    CLIPText.random(SCENES, length=12, hidden_dim=64, vocabulary_size=600, seed=1).save(other)
    assert "is of text encoder" in refused("generate", model, out, "--prompt", "a", "--text", other)


def test_what_does_not_go_together_is_refused(coco, clip, tmp_path, tiny):
    cache = tmp_path / "cache"
    assert "no --image-size" in refused("encode", "shapes:4", cache, "--pixels", "--image-size", 64)
    # The source is looked at before CLIP is loaded, which takes long.
    assert "No folder at nowhere" in refused("encode", "nowhere", cache, "--image-size", 8)
    words = ("encode", f"coco:{coco}", cache, "--image-size", 8, "--pixels")
    assert "6 samples" in run(*words, "--no-captions")
    assert "has no captions for --text" in refused(*words, "--no-captions", "--text", clip)
    words = ("train", "uvit_tiny_shapes")
    assert "keras-uvit encode shapes:8 CACHE" in refused(*words, "shapes:8", tmp_path / "run")
    assert "for models of text, with --text" in refused(*words, cache, "run", "--prompt", "a")
    assert "No file of prompts" in refused(
        "generate", "uvit_tiny_shapes", tmp_path / "a.png", "--prompts", "missing.txt"
    )


def test_prompts_from_a_file_or_from_captions(coco, tmp_path):
    from keras_uvit.specs import open_prompts

    file = tmp_path / "p.txt"
    file.write_text(" one \n\ntwo\n")
    assert open_prompts(str(file), None, None, 0) == ["one", "two"]
    assert open_prompts(str(file), None, 1, 0) == ["one"]
    with pytest.raises(ValueError, match="holds 2 prompts, fewer than 3"):
        open_prompts(str(file), None, 3, 0)
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")  # as Windows writes it
    assert open_prompts(str(file), None, None, 0) == ["one", "two"]
    assert len(open_prompts("shapes:5", "test", None, 0)) == 5
    drawn = open_prompts(f"coco:{coco}", "train2014", 4, 0)
    assert len(drawn) == 4
    assert set(drawn) <= set(SCENES)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        open_prompts(str(file), None, None, 0)
