"""`hf://user/name`, read from and written to a small server on this machine."""

import contextlib
import importlib
import sys

import numpy as np
import pytest
from hub_server import TOKEN, Hub
from tiny import assert_equal, randomize, refused, uvit, weights

from keras_uvit import DiffusionModel, presets

pytestmark = pytest.mark.once

URI = "hf://me/tiny"


@contextlib.contextmanager
def library(**variables):
    """Inside, huggingface_hub is imported with these variables: it reads them when it is."""
    own = lambda: [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]  # noqa: E731
    before = {name: sys.modules.pop(name) for name in own()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        constants = importlib.import_module("huggingface_hub.constants")
        constants.DOWNLOAD_CHUNK_SIZE = 1024  # what a broken connection loses
        yield
    for name in own():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def variables(tmp_path):
    """What leads the library to a server, with an empty cache."""
    return {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # which has servers of its own
    }


@pytest.fixture
def hub(variables):
    server = Hub()
    variables["HF_ENDPOINT"] = server.address
    with library(**variables):
        yield server
    server.close()


@pytest.fixture(scope="module")
def model():
    model = DiffusionModel(uvit(num_classes=3), num_steps=2)
    randomize(model.ema_network)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "model"
    model.save_to_preset(folder, samples=2, verbose=0)
    return folder


def share(hub, folder, **more):
    """Puts a folder there as a new commit, whose name is returned."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}
    return hub.commit("me/tiny", {**files, **more})


def fetched(hub):
    """The files that were downloaded since the last time."""
    names = [path.rpartition("/")[2] for method, path in hub.requests
             if method == "GET" and "/resolve/" in path]  # fmt: skip
    hub.requests.clear()
    return names


# Reading ------------------------------------------------------------------------------------------


def test_a_model_is_downloaded_once_and_without_what_is_not_its_own(hub, model, folder):
    share(hub, folder, **{"weights.bin": b"\x80", ".gitattributes": b""})
    for load in (presets.load, DiffusionModel.from_preset):
        assert_equal(weights(load(URI).network), weights(model.ema_network))
    assert sorted(fetched(hub)) == ["config.json", "model.safetensors", "samples.png"]
    network = uvit(num_classes=3).get_config()
    network.pop("name")
    again = presets.load("uvit_tiny_digits", URI, **network)
    assert_equal(weights(again.network), weights(model.ema_network))
    assert fetched(hub) == []


def test_a_broken_connection_is_resumed_where_it_broke(hub, model, folder):
    share(hub, folder)
    hub.breaks = 10_000
    with contextlib.suppress(OSError):  # of the library before version 2, which resumes below
        presets.load(URI)
    assert_equal(weights(presets.load(URI).network), weights(model.ema_network))
    assert hub.dropped == 1
    (asked,) = hub.ranges
    first = int(asked.removeprefix("bytes=").removesuffix("-"))
    assert 8_000 < first <= 10_000  # whole chunks of 1,024 bytes were kept


def test_the_newest_commit_is_read_and_an_older_one_by_its_name(hub, model, folder, tmp_path):
    old = share(hub, folder)
    other = DiffusionModel(uvit(num_classes=3), seed=1)
    other.save_to_preset(tmp_path / "other", samples=0, verbose=0)
    presets.load(URI)
    share(hub, tmp_path / "other")
    assert_equal(weights(presets.load(URI).network), weights(other.ema_network))
    assert_equal(weights(presets.load(f"{URI}@{old}").network), weights(model.ema_network))
    refused(FileNotFoundError, lambda: presets.load(f"{URI}@{'0' * 40}"), "no such revision")


def test_without_a_network_the_cache_is_read_and_nothing_else(hub, model, folder, variables):
    share(hub, folder)
    offline = {**variables, "HF_HUB_OFFLINE": "1"}
    with library(**offline):
        refused(FileNotFoundError, lambda: presets.load(URI), URI, "HF_HUB_OFFLINE")
    assert hub.requests == []
    presets.load(URI)
    hub.requests.clear()
    with library(**offline):
        assert_equal(weights(presets.load(URI).network), weights(model.ema_network))
    assert hub.requests == []
    with library(**{**variables, "HF_ENDPOINT": "http://127.0.0.1:9"}):  # where nothing answers
        assert_equal(weights(presets.load(URI).network), weights(model.ema_network))


def test_a_damaged_download_is_found_by_its_checksum(hub, folder):
    content = (folder / "model.safetensors").read_bytes()
    share(hub, folder, **{"model.safetensors": content[:-1] + b"\xff"})
    refused(ValueError, lambda: presets.load(URI), "model.safetensors", "checksum")


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        (None, FileNotFoundError, "does not exist, or you have no access"),
        ({"model.bin": b"\x80"}, FileNotFoundError, "no model of keras_uvit"),
        ({"config.json": b'{"model_type": "clip"}'}, ValueError, "something else"),
    ],
)
def test_a_repository_of_something_else_is_refused(hub, files, error, words):
    if files is not None:
        hub.commit("me/tiny", files)
    refused(error, lambda: presets.load(URI), URI, words)
    assert "model.bin" not in fetched(hub)


@pytest.mark.parametrize("uri", ["hf://tiny", "hf://me/tiny/deep", "hf://me/..", "hf:// /x"])
def test_another_address_is_refused_before_anything_is_asked(hub, uri):
    refused(ValueError, lambda: presets.load(uri), "hf://user/name")
    assert hub.requests == []


# Writing ------------------------------------------------------------------------------------------


def test_a_model_is_uploaded_in_one_commit_and_read_back(hub, model, capsys):
    model.save_to_preset(URI, samples=2, license="mit")
    commits = list(hub.repositories["me/tiny"].values())
    assert [len(files) for files in commits] == [1, 5]  # the repository's own file, and four
    assert f'presets.load("{URI}")' in commits[-1]["README.md"].decode()
    assert f"{hub.address}/me/tiny" in capsys.readouterr().out
    loaded = presets.load(URI)
    what = dict(labels=range(3), verbose=0)
    np.testing.assert_array_equal(loaded.generate(**what), model.generate(**what))


def test_a_folder_is_uploaded_as_it_is_and_replaces_what_is_there(hub, folder, tmp_path):
    old = {"autoencoder/model.safetensors": b"old", "notes.md": b"mine", "config.json": b"{}"}
    hub.commit("me/tiny", old)
    upload = lambda **more: presets.upload_preset(URI, folder, verbose=0, **more)  # noqa: E731
    refused(FileExistsError, upload, URI, "overwrite=True")
    assert len(hub.repositories["me/tiny"]) == 1
    upload(overwrite=True)
    names = {path.name for path in folder.iterdir()}
    assert set(hub.head("me/tiny")) == {*names, "notes.md"}
    for name in names:
        assert hub.head("me/tiny")[name] == (folder / name).read_bytes()


def test_an_existing_model_is_found_before_anything_is_drawn(hub, model, folder, monkeypatch):
    share(hub, folder)
    monkeypatch.setattr(DiffusionModel, "generate", None)
    refused(FileExistsError, lambda: model.save_to_preset(URI), "overwrite=True")


def test_a_damaged_folder_and_a_wrong_token_are_refused(hub, folder, tmp_path, variables):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    refused(ValueError, lambda: presets.upload_preset(URI, tmp_path), "something else")
    refused(ValueError, lambda: presets.upload_preset(f"{URI}@main", folder), "without a revision")
    with library(**{**variables, "HF_TOKEN": "hf_of_somebody"}):
        refused(OSError, lambda: presets.upload_preset(URI, folder), URI)
    assert hub.repositories == {}
