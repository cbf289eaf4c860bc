"""Finished caches and folders of pictures that several files of tests read."""

import pytest
from caches import IMAGES, content, grey, save, write_captioned


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What is in a finished cache of three shards, with labels and captions, by name of file."""
    path = tmp_path_factory.mktemp("whole")
    write_captioned(path)
    return content(path)


@pytest.fixture
def photos(tmp_path):
    """Ten files of two classes, of which 2 and 7 are no images."""
    for k in range(10):
        save(tmp_path / "photos" / "ab"[k % 2] / f"{k}.png", IMAGES[k])
    for name in ("a/2.png", "b/7.png"):
        (tmp_path / "photos" / name).write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture
def numbered(tmp_path):
    """Ten images, each of one grey level, its number; no classes."""
    for k in range(10):
        save(tmp_path / f"{k}.png", grey(k))
    return tmp_path
