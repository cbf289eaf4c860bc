"""README, the guides and the reference: their code runs, and they name what there is."""

import ast
import builtins
import inspect
import json
import re
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_uvit
from keras_uvit import presets

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
WITH_CODE = [name for name, text in PAGES.items() if "```python\n" in text]
# The packages whose names are public, and the pages that list them.
REFERENCE = {
    "": ("networks", "training"),
    "convert": ("convert",),
    "data": ("data",),
    "diffusion": ("diffusion",),
    "encoders": ("encoders",),
    "evaluation": ("evaluation",),
    "networks": ("networks",),
    "presets": ("presets",),
    "sampling": ("sampling",),
    "training": ("training",),
}


def blocks(page, heading=None):
    """The Python blocks of a page, or of the section under a heading of it."""
    text = PAGES[page]
    if heading is not None:
        text = re.split(rf"^##+ {re.escape(heading)}$", text, maxsplit=1, flags=re.M)[1]
        text = re.split(r"^##? ", text, maxsplit=1, flags=re.M)[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run(block, page, made=None):
    """The names that a block makes."""
    made = {} if made is None else made
    exec(compile(block, page, "exec"), made)
    return made


def smaller(block, *changes):
    for large, small in changes:
        assert large in block
        block = block.replace(large, small)
    return re.sub(r"epochs=\d+", "epochs=1", block)


def make_photos(folder):
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / kind / f"{i}.jpg")


def make_simple_photos(folder):
    """Two classes, bright above or below."""
    rng = np.random.default_rng(0)
    for k in range(80):
        pixels = rng.integers(0, 60, (16, 16, 3), dtype="uint8")
        pixels[8 * (k % 2) : 8 * (k % 2) + 8] += np.uint8(150)
        own = folder / ("above", "below")[k % 2]
        own.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(own / f"{k}.png", pixels)


def tiny_autoencoder():
    """The weights are a download; a random autoencoder's latents have another scale."""
    tiny = keras_uvit.encoders.AutoencoderKL(32, (1, 1, 1, 1), 1, scale=1.0)
    moments = tiny.encode(np.zeros((1, 16, 16, 3), "uint8"), verbose=0)
    tiny.scale = float(1 / np.sqrt(np.exp(moments[..., 4:]).mean()))
    return tiny


# Code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Sample"), ("docs/index.md", None)])
def test_sampling_lines_run(page, heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(page, heading)
    run(block, page)
    assert list(tmp_path.glob("*.png"))


def test_training_lines_run(tmp_path, monkeypatch):
    """README's block in short, on two simple classes, ends in pictures of the class asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras_uvit.evaluation.reports, "CLASSIFIER_STEPS", (20, 20))
    make_simple_photos(tmp_path / "my_photos")
    (simple,) = blocks("README.md", "Train on your own pictures")
    assert simple == blocks("docs/own_data.md")[0]
    simple = smaller(
        simple,
        ("image_size=32", "image_size=16"),
        (
            "for_data(photos)",
            "for_data(photos, steps=500, network=dict(hidden_dim=32, num_layers=3, patch_size=8))",
        ),
        (
            'evaluation.report(model, photos, "report")',
            'evaluation.report(model, photos, "report", num_images=20)',
        ),
    )
    made = run(simple, "README.md")
    above, below = made["images"][:, :8], made["images"][:, 8:]
    brighter = above.mean(axis=(1, 2, 3)) > below.mean(axis=(1, 2, 3))
    assert (brighter == (np.arange(16) % 2 == 0)).mean() > 0.8  # 13 of 16; chance is 8
    for name in ("photos.keras", "samples.png", "report/report.png"):
        assert (tmp_path / name).is_file()


def test_lines_with_parts_of_your_own_choice_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_simple_photos(tmp_path / "my_photos")
    (own,) = blocks("docs/own_data.md", "With parts of your own choice")
    own = smaller(own, ("hidden_dim=256", "hidden_dim=16"), ("num_layers=9", "num_layers=3"))
    assert run(own, "own_data")["images"].shape == (2, 32, 32, 3)


def test_lines_of_a_run_that_survives_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_simple_photos(tmp_path / "my_photos")
    (kept,) = blocks("docs/devices.md", "A run that survives")
    tiny = "for_data(photos, network=dict(hidden_dim=16, num_layers=1))"
    run(smaller(kept, ("for_data(photos)", tiny)), "devices")
    assert list((tmp_path / "runs" / "photos" / "checkpoints").glob("step-*"))


def test_latent_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "my_photos")
    tiny = tiny_autoencoder()
    monkeypatch.setattr(keras_uvit.encoders.AutoencoderKL, "from_file", lambda path: tiny)
    (block,) = blocks("docs/latents.md")
    block = smaller(
        block,
        ("image_size=256", "image_size=32"),
        ("image_shape=(32, 32, 4)", "image_shape=(4, 4, 4)"),
        ("hidden_dim=512", "hidden_dim=16"),
        ("num_layers=13", "num_layers=3"),
    )
    made = run(block, "latents")
    assert made["latents"].num_samples == 80
    assert made["images"].shape == (2, 32, 32, 3)


def test_variant_lines_run():
    study, own = blocks("docs/variants.md")
    made = run(smaller(study, ("base_dim=64", "base_dim=32")), "variants")
    assert made["flow"].objective.prediction == "velocity"
    assert made["rival"].network.output_shape == (None, 32, 32, 4)
    assert run(own, "variants")["model"].network.output_shape == (None, 8, 8, 1)


def test_text_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "captioned_photos"
    make_photos(folder)
    photos = sorted(path.name for path in (folder / "cats").iterdir())
    lines = [json.dumps({"file_name": f"cats/{name}", "captions": ["a cat"]}) for name in photos]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    encoders, tiny = keras_uvit.encoders, tiny_autoencoder()
    words = encoders.CLIPText.random(["a cat", "a dog"], length=8, hidden_dim=16)
    ship, train = blocks("docs/text_to_image.md")
    run(ship, "text_to_image")
    assert (tmp_path / "shapes.png").is_file()
    monkeypatch.setattr(encoders.AutoencoderKL, "from_file", lambda path: tiny)
    monkeypatch.setattr(encoders.CLIPText, "from_preset", lambda path: words)
    train = smaller(
        train,
        ("image_size=256", "image_size=32"),
        ("batch_size=32", "batch_size=8"),
        ("image_shape=(32, 32, 4)", "image_shape=(4, 4, 4)"),
        ("hidden_dim=512", "hidden_dim=16"),
        ("num_layers=13", "num_layers=3"),
    )
    made = run(train, "text_to_image")
    assert made["latents"].num_samples == 20
    assert made["images"].shape == (2, 32, 32, 3)


def test_fine_tuning_lines_run(tmp_path, monkeypatch):
    """Frozen layers stay as they were; with other classes all but their table is taken over."""
    monkeypatch.chdir(tmp_path)
    freeze, classes = blocks("docs/fine_tuning.md")
    made = run(smaller(freeze), "fine_tuning")
    before = presets.load("uvit_tiny_digits", weights="pretrained").network
    for name, is_equal in (("in_block_1", True), ("out_block_1", False)):
        pairs = zip(before.get_layer(name).weights, made["model"].network.get_layer(name).weights)
        assert all(np.array_equal(*map(np.asarray, map(numpy, pair))) for pair in pairs) == is_equal
    assert (tmp_path / "digits.keras").is_file()
    made = run(classes, "fine_tuning")
    new, old = (made[name].ema_network.get_layer("head") for name in ("new", "old"))
    assert np.array_equal(numpy(new.kernel), numpy(old.kernel))
    assert made["new"].network.num_classes == 3


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_precision_lines_run():
    (block,) = blocks("docs/precision.md")
    assert run(block, "precision")["network"].dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_stand_alone(page):
    """Each makes all that it uses."""
    for block in blocks(page):
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        made |= set(re.findall(r"\w+", " ".join(re.findall(r"^.*import (.*)$", block, re.M))))
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert used - made - set(dir(builtins)) == set(), block


def test_blocks_can_follow_one_another():
    """Caches of different data have different names."""
    caches = [
        name
        for page in WITH_CODE
        for block in blocks(page)
        for name in re.findall(r'write_latents\(\w+, "(\w+)"', block)
    ]
    assert len(caches) == len(set(caches)) > 1


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_need_files_are_python(page):
    for block in re.findall(r"```py\n(.*?)```", PAGES[page], re.S):
        ast.parse(block)


# Words --------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_listed_with_its_fid(name):
    row = presets.get(name)
    lines = PAGES["docs/presets.md"].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| `{name}`")]
    assert (f"{row.reported_fid:.2f}" if row.reported_fid else "-") in line
    assert f"{row.params / 1e6:.1f}M" in line


def test_contributing_names_every_package():
    for folder in (ROOT / "keras_uvit").iterdir():
        if (folder / "__init__.py").is_file():
            assert f"`keras_uvit/{folder.name}/`" in PAGES["CONTRIBUTING.md"]


def public_names(package):
    """What a package imports to be public, `import x as x`, but for its modules."""
    path = ROOT / "keras_uvit" / package / "__init__.py"
    imports = re.findall(r"^from \S+ import (\w+) as \1$", path.read_text(encoding="utf-8"), re.M)
    module = getattr(keras_uvit, package) if package else keras_uvit
    return [name for name in imports if not inspect.ismodule(getattr(module, name))]


@pytest.mark.parametrize("package", REFERENCE)
def test_reference_lists_every_public_name(package):
    text = "\n".join(PAGES[f"docs/reference/{page}.md"] for page in REFERENCE[package])
    missing = [
        name
        for name in public_names(package)
        if not re.search(rf"(::: keras_uvit\.{package}.*\b|### ){name}$", text, re.M)
        and name != "__version__"
    ]
    assert not missing


def test_reference_names_exist():
    for page, text in PAGES.items():
        for path in re.findall(r"^::: (keras_uvit[\w.]*)$", text, re.M):
            found = keras_uvit
            for name in path.split(".")[1:]:
                found = getattr(found, name)
            assert found.__doc__, (page, path)


def test_messages_of_troubleshooting_exist():
    parts = [
        node.value
        for folder in ("keras_uvit", "keras_uvit_cli")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    messages = re.findall(r"^\| `(.*?)` \|", PAGES["docs/troubleshooting.md"], re.M)
    assert len(messages) > 50
    unknown = [message for message in messages if not any(message in part for part in parts)]
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Also those out of docs/, which MkDocs does not check."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", PAGES[page]):
        if "://" in target or target.endswith("command_line.md"):
            continue
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_links_lead_to_the_repository_on_a_package_index():
    text = PAGES["README.md"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    readme = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in readme["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(target.startswith("https://") for target in targets), targets
