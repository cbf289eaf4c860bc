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
from tiny import numpy

import keras_uvit
from keras_uvit import encoders, presets

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
# What is smaller here than on the pages: (large, small).
SMALLER = [
    (r"epochs=\d+", "epochs=1"),
    (r"hidden_dim=\d+", "hidden_dim=16"),
    (r"num_layers=\d+", "num_layers=3"),
    (r"base_dim=64", "base_dim=32"),
    (r"image_size=256", "image_size=32"),
    (r"image_shape=\(32, 32, 4\)", "image_shape=(4, 4, 4)"),
    (r"batch_size=32", "batch_size=8"),
    (r"UViT\(\(32, 32, 4\)", "UViT((32, 32, 4), hidden_dim=16, num_layers=3, num_heads=2"),
]


def blocks(page, heading=None):
    """The Python blocks of a page, or of the section under a heading of it."""
    text = PAGES[page]
    if heading is not None:
        text = re.split(rf"^##+ {re.escape(heading)}$", text, maxsplit=1, flags=re.M)[1]
        text = re.split(r"^##? ", text, maxsplit=1, flags=re.M)[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run(block, page, *changes):
    """The names that a block makes, smaller; each of the changes must be there to make."""
    for pattern, small in SMALLER:
        block = re.sub(pattern, small, block)
    for large, small in changes:
        assert large in block
        block = block.replace(large, small)
    made = {}
    exec(compile(block, page, "exec"), made)
    return made


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The present folder, with `my_photos`: two classes, bright above or below."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for k in range(40):
        pixels = rng.integers(0, 60, (16, 16, 3), dtype="uint8")
        pixels[8 * (k % 2) : 8 * (k % 2) + 8] += np.uint8(150)
        own = tmp_path / "my_photos" / ("above", "below")[k % 2]
        own.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(own / f"{k}.png", pixels)
    return tmp_path


@pytest.fixture
def downloads(monkeypatch):
    """Small ones in their place; a random autoencoder's latents have another scale."""
    tiny = encoders.AutoencoderKL(32, (1, 1, 1, 1), 1, scale=1.0)
    moments = tiny.encode(np.zeros((1, 16, 16, 3), "uint8"), verbose=0)
    tiny.scale = float(1 / np.sqrt(np.exp(moments[..., 4:]).mean()))
    words = encoders.CLIPText.random(["a cat", "a dog"], length=8, hidden_dim=16)
    monkeypatch.setattr(encoders.AutoencoderKL, "from_file", lambda path: tiny)
    monkeypatch.setattr(encoders.CLIPText, "from_preset", lambda path: words)


# Code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Sample"), ("docs/index.md", None)])
def test_sampling_lines_run(page, heading, here):
    (block,) = blocks(page, heading)
    run(block, page)
    assert list(here.glob("*.png"))


def test_training_lines_run(here, monkeypatch):
    """README's block in short, on two simple classes, ends in pictures of the class asked for."""
    monkeypatch.setattr(keras_uvit.evaluation.reports, "CLASSIFIER_STEPS", (20, 20))
    (simple,) = blocks("README.md", "Train on your own pictures")
    assert simple == blocks("docs/own_data.md")[0]
    small = "steps=200, network=dict(hidden_dim=32, num_layers=1, patch_size=16)"
    made = run(
        simple,
        "README.md",
        ("image_size=32", "image_size=16"),
        ("for_data(photos)", f"for_data(photos, {small})"),
        ('photos, "report")', 'photos, "report", num_images=20)'),
    )
    above, below = made["images"][:, :8], made["images"][:, 8:]
    brighter = above.mean(axis=(1, 2, 3)) > below.mean(axis=(1, 2, 3))
    assert (brighter == (np.arange(16) % 2 == 0)).mean() > 0.8  # 13 of 16; chance is 8
    for name in ("photos.keras", "samples.png", "report/report.png"):
        assert (here / name).is_file()


def test_lines_of_own_choice_and_of_a_run_that_survives_run(here):
    (own,) = blocks("docs/own_data.md", "With parts of your own choice")
    assert run(own, "own_data")["images"].shape == (2, 32, 32, 3)
    (kept,) = blocks("docs/devices.md", "A run that survives")
    small = "for_data(photos, network=dict(hidden_dim=16, num_layers=1))"
    run(kept, "devices", ("for_data(photos)", small))
    assert list((here / "runs" / "photos" / "checkpoints").glob("step-*"))


def test_editing_lines_run(here):
    every = re.findall(r"```py(?:thon)?\n(.*?)```", PAGES["docs/editing.md"], re.S)
    made = run("\n".join(every), "editing")  # each block follows on those before it
    assert made["film"].shape[:2] == (9, 8)  # 25 steps, every third and the last
    assert made["path"].shape == (5, 8, 8, 1)
    assert {path.name for path in here.glob("film.*")} == {"film.png", "film.webp"}


def test_latent_lines_run(here, downloads):
    (block,) = blocks("docs/latents.md")
    made = run(block, "latents")
    assert made["latents"].num_samples == 2 * 40
    assert made["images"].shape == (2, 32, 32, 3)


def test_text_lines_run(here, request):
    photos = sorted(path.name for path in (here / "my_photos" / "above").iterdir())
    lines = [json.dumps({"file_name": f"above/{name}", "captions": ["a cat"]}) for name in photos]
    (here / "my_photos" / "captions.jsonl").write_text("\n".join(lines))
    ship, train = blocks("docs/text_to_image.md")
    run(ship, "text_to_image")
    assert (here / "shapes.png").is_file()
    request.getfixturevalue("downloads")
    made = run(train, "text_to_image", ("captioned_photos", "my_photos"))
    assert made["latents"].num_samples == 20
    assert made["images"].shape == (2, 32, 32, 3)


def test_variant_and_precision_lines_run():
    study, own = blocks("docs/variants.md")
    made = run(study, "variants")
    assert made["flow"].objective.prediction == "velocity"
    assert made["rival"].network.output_shape == (None, 32, 32, 4)
    assert run(own, "variants")["model"].network.output_shape == (None, 8, 8, 1)
    (block,) = blocks("docs/precision.md")
    assert run(block, "precision")["network"].dtype_policy.name == "mixed_bfloat16"


def test_logging_lines_run(here):
    (block,) = blocks("docs/logging.md")
    run(block, "logging")
    (events,) = (here / "runs" / "digits" / "logs").iterdir()
    for tag in (b"train/loss", b"val/loss", b"loss_by_time/0.9-1", b"samples"):
        assert tag in events.read_bytes()


def test_few_steps_lines_run():
    """Two steps draw digits, and a network of one time begins a flow map with its answers."""
    drawing, training, beginning = blocks("docs/few_steps.md")
    assert run(drawing, "few_steps")["images"].shape == (10, 8, 8, 1)
    assert run(training, "few_steps")["model"].flow_map.guidance == (1.0, 4.0)
    made = run(beginning, "few_steps")
    kept = {weight.path: numpy(weight) for weight in made["new"].weights}
    for weight in made["old"].weights:
        np.testing.assert_array_equal(numpy(weight), kept[weight.path])


def test_fine_tuning_lines_run(here):
    """Classes keep the rows that are named, pairs merge, and frozen layers stay as they were."""
    classes, pairs, freeze = blocks("docs/fine_tuning.md")
    before = presets.load("uvit_tiny_digits", weights="pretrained").network
    new, old = (
        numpy(network.get_layer("label_embed").embeddings)
        for network in (run(classes, "fine_tuning")["model"].network, before)
    )
    assert np.array_equal(new[[0, 2, 3]], old[[7, 1, 10]])
    made = run(pairs, "fine_tuning")
    assert (here / "digits.safetensors").stat().st_size < 250_000
    options = dict(labels=range(10), num_steps=2, verbose=0)
    drawn = [made[name].generate(**options).astype(int) for name in ("model", "plain", "base")]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1  # rounding
    assert np.abs(drawn[0] - drawn[2]).max() > 1
    network = run(freeze, "fine_tuning")["model"].network
    for name, is_equal in (("in_block_1", True), ("out_block_1", False)):
        pairs = zip(before.get_layer(name).weights, network.get_layer(name).weights)
        assert all(np.array_equal(*map(numpy, pair)) for pair in pairs) == is_equal
    assert (here / "digits.keras").is_file()


def test_sharing_lines_run(here):
    (block,) = blocks("docs/sharing.md")
    made = run(block, "sharing")
    assert np.array_equal(made["images"], made["model"].generate(labels=range(10)))
    assert (here / "my_digits" / "samples.png").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_stand_alone_and_links_lead_to_files(page):
    for block in blocks(page):  # each makes all that it uses
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        made |= set(re.findall(r"\w+", " ".join(re.findall(r"^.*import (.*)$", block, re.M))))
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert used - made - set(dir(builtins)) == set(), block
    for block in re.findall(r"```py\n(.*?)```", PAGES[page], re.S):  # those that need files
        ast.parse(block)
    # Also those out of docs/, which MkDocs does not check.
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", PAGES[page]):
        if "://" not in target and not target.endswith("command_line.md"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_blocks_can_follow_one_another():
    """Caches of different data have different names."""
    code = "".join(block for page in PAGES for block in blocks(page))
    caches = re.findall(r'write_latents\(\w+, "(\w+)"', code)
    assert len(caches) == len(set(caches)) > 1


# Words --------------------------------------------------------------------------------------------


def test_every_preset_is_listed_with_its_fid_and_every_package_with_its_purpose():
    lines = PAGES["docs/presets.md"].splitlines()
    for name in presets.names():
        row = presets.get(name)
        (line,) = [line for line in lines if line.startswith(f"| `{name}`")]
        assert (f"{row.reported_fid:.2f}" if row.reported_fid else "-") in line
        assert f"{row.params / 1e6:.1f}M" in line
    for folder in (ROOT / "keras_uvit").iterdir():
        if (folder / "__init__.py").is_file():
            assert f"`keras_uvit/{folder.name}/`" in PAGES["CONTRIBUTING.md"]


# The packages whose names are public, and the pages that list them.
REFERENCE = {"": ["networks", "training"]} | {
    package.name: [package.name]
    for package in (ROOT / "keras_uvit").iterdir()
    if f"docs/reference/{package.name}.md" in PAGES
}


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


def test_readme_is_short_and_its_links_lead_to_the_repository_on_a_package_index():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 200
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    readme = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in readme["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(target.startswith("https://") for target in targets), targets
