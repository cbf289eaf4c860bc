"""The published program's pickled latents: converted exactly, and never trusted."""

import ast
import contextlib
import io
import os
import pickle

import numpy as np
import pytest
from caches import read_cache, write_cache
from tiny import refused

from keras_uvit.data import published, published_pickles
from keras_uvit.encoders import SpaceToDepth

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
MOMENTS = RNG.standard_normal((10, 8, 2, 3)).astype("float32")  # channels first, as published
LABELS = [3, 0, 6, 1, 1, 5, 2, 6, 0, 4]


def _pair(first, second):
    pair = np.empty(2, object)
    pair[0], pair[1] = first, second
    return pair


def _save(path, content, protocol=4):
    """As `np.save` does with an array of objects; older NumPy took protocol 2 or 3."""
    with open(path, "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(content if isinstance(content, bytes) else pickle.dumps(content, protocol))


@pytest.fixture
def features(tmp_path):
    """Ten files, saved as the published program saves them."""
    path = tmp_path / "imagenet256_features"
    path.mkdir()
    for k, (moments, label) in enumerate(zip(MOMENTS, LABELS)):
        np.save(path / f"{k}.npy", np.array([moments, np.int64(label)], dtype=object))
    return path


def _convert(features, folder, autoencoder=None, **options):
    return write_cache(folder, published_pickles(features, 7), autoencoder, **options)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_cache_is_the_files_in_the_order_of_their_numbers(features, tmp_path, dtype):
    for k in (10, 11):
        np.save(features / f"{k}.npy", _pair(MOMENTS[k - 10] + k, 5))
    (features / "notes.txt").write_text("no latents")
    np.save(features / "empty_context.npy", np.zeros(3))
    content = _convert(features, tmp_path / "cache", dtype=dtype)
    assert content["source"] == "published:imagenet256_features"
    assert (content["count"], content["num_classes"], content["shape"]) == (12, 7, [2, 3, 8])
    batch = read_cache(tmp_path / "cache", 12)[0]
    moments = np.concatenate([MOMENTS, MOMENTS[:2] + [[[[10]]], [[[11]]]]])
    np.testing.assert_array_equal(batch["moments"], moments.transpose(0, 2, 3, 1).astype(dtype))
    assert batch["label"].tolist() == [*LABELS, 5, 5]


def test_the_autoencoder_that_made_the_files_can_be_named(features, tmp_path):
    _convert(features, tmp_path / "cache", SpaceToDepth(8))
    cache = read_cache(tmp_path / "cache", 2)
    assert (cache.fingerprint, cache.image_size) == ("space-to-depth-8", [16, 24])


def _numpy(core):
    """A pair pickled by NumPy 1 or 2."""
    content = pickle.dumps(_pair(MOMENTS[0], np.int64(5)), protocol=2)  # names end with a newline
    module = np.ndarray.__reduce__(MOMENTS[0])[0].__module__.encode()
    assert module + b"\n" in content
    return content.replace(module + b"\n", core + b"\n")


VIEW = np.ascontiguousarray(MOMENTS[0].transpose(1, 2, 0)).transpose(2, 0, 1)
PAIRS = {
    **{f"{type(label)}": _pair(VIEW, label) for label in (5, np.int64(5), np.array(5))},
    "a tuple": (VIEW, np.int64(5)),
    "the other byte order": _pair(MOMENTS[0].astype(">f4"), 5),
    "NumPy 1": _numpy(b"numpy.core.multiarray"),
    "NumPy 2": _numpy(b"numpy._core.multiarray"),
}


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("pair", PAIRS)
def test_whatever_numpy_has_saved_is_read(features, protocol, pair):
    _save(features / "0.npy", PAIRS[pair], protocol)
    sample = published_pickles(features, 7).read(0)
    np.testing.assert_array_equal(sample["moments"], MOMENTS[0].transpose(1, 2, 0))
    assert (sample["label"], type(sample["label"])) == (5, int)


def test_threads_do_not_share_pythons_parser(features, monkeypatch):
    # Before Python 3.11.8 and 3.12.2, ast in several threads raises SystemError once in a while
    # (python/cpython issue 106905), and whole files are then taken for damaged ones.
    source = published_pickles(features, 7)

    def parser(*arguments):
        raise SystemError("AST constructor recursion depth mismatch (before=36, after=33)")

    monkeypatch.setattr(ast, "literal_eval", parser)
    assert source.read(3)["label"] == LABELS[3]


class _Calls:
    """Pickled, it is a call: of `function` with `arguments`, by whoever opens the file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


TRAPS = {
    "system": lambda mark: _Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: _Calls(eval, f"open({mark!r}, 'w').close()"),
    "exec": lambda mark: _Calls(exec, f"open({mark!r}, 'w').close()"),
    "open": lambda mark: _Calls(open, mark, "w"),
    "getattr": lambda mark: _Calls(getattr, "mark", "upper"),
    "save": lambda mark: _Calls(np.save, mark, 1),
    "loads": lambda mark: _Calls(pickle.loads, b"cos\nsystem\n(S'x'\ntR."),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", TRAPS)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    features, tmp_path, protocol, name
):
    mark = tmp_path / "sprung"
    trap = TRAPS[name](os.fspath(mark))
    moments = MOMENTS[0] if protocol < 5 else 0  # protocol 5 asks for more to pickle an array
    source = published_pickles(features, 7)
    for content in (_pair(trap, 3), (moments, trap), trap):
        _save(features / "4.npy", content, protocol)
        refused(ValueError, lambda: source.read(4), "4.npy is not", "UnpicklingError", name)
    assert not mark.exists()


def test_the_traps_do_spring_where_pickles_are_trusted(tmp_path):
    mark = tmp_path / "sprung"
    _save(tmp_path / "0.npy", _pair(TRAPS["system"](mark), 3))
    np.load(tmp_path / "0.npy", allow_pickle=True)
    assert mark.exists()


CODES = [
    b"cnumpy\nndarray.tofile\n.",
    b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
    b"c_codecs\nopen\n.",
    b"c__builtin__\neval\n.",
    b"cnumpy\nload\n.",
    b"\x80\x02\x82\x01.",  # a name from the extension registry
    b"Pid\n.",  # a persistent id
]


@pytest.mark.parametrize("code", CODES)
def test_names_are_allowed_one_by_one(features, code):
    _save(features / "0.npy", code)
    refused(ValueError, lambda: published_pickles(features, 7), "0.npy is not a pickled pair")


class _Dtype:
    """Pickled, it is a dtype with a state of our choice."""

    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        return np.dtype, (self.name, False, True), self.state


@pytest.mark.parametrize(
    "dtype",
    [
        _Dtype("O8", (3, "|", None, None, None, -1, -1, 0)),
        _Dtype("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
    ],
    ids=["objects", "fields"],
)
def test_no_dtype_can_turn_bytes_into_pointers(features, dtype):
    # Here it is only named. A scalar of it, made from eight bytes of the file, crashes Python.
    _save(features / "0.npy", (dtype, 3), protocol=2)
    refused(ValueError, lambda: published_pickles(features, 7), "not a pickled pair")
    with contextlib.suppress(pickle.UnpicklingError):
        named = published._ArraysOnly(io.BytesIO(pickle.dumps(dtype, 2))).load()
        assert not isinstance(named, np.dtype)  # NumPy is never given the file's word


def test_what_is_not_there_is_named(features, tmp_path):
    refused(FileNotFoundError, lambda: published_pickles(tmp_path / "nowhere"), "nowhere")
    np.save(tmp_path / "features.npy", np.zeros(3))
    refused(FileNotFoundError, lambda: published_pickles(tmp_path), "No 0.npy, 1.npy, ... in")
    for name in ("4.npy", "0.npy"):
        (features / name).unlink()
        refused(ValueError, lambda: published_pickles(features), "is missing", name)


def test_a_file_truncated_anywhere_is_named(features):
    source = published_pickles(features, 7)
    content = (features / "4.npy").read_bytes()
    for length in [0, 5, 9, 64, 127, 128, *range(129, len(content), 7), len(content) - 1]:
        (features / "4.npy").write_bytes(content[:length])
        refused(ValueError, lambda: source.read(4), "4.npy is not a pickled", 'corrupt="skip"')


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((8, 2, 3), "float32"), "no pickled pair"),
        (_pair(np.zeros((7, 2, 3), "float32"), 3), "moments of shape (7, 2, 3)"),
        (_pair(np.zeros((8, 6), "float32"), 3), "moments of shape (8, 6)"),
        (_pair(np.zeros((8, 4, 4), "float32"), 3), "moments of shape (4, 4, 8)"),
        (_pair(MOMENTS[0], 7), "label 7, outside [0, 7)"),
        (_pair(MOMENTS[0], -1), "label -1, outside [0, 7)"),
        (_pair(MOMENTS[0], None), "TypeError"),
        (np.array([MOMENTS[0], 3, 4], dtype=object), "too many values"),
        (np.array({"moments": 1, "label": 2}), "not enough values"),
        (_pair("moments", 3), "could not convert"),
        (b"not an array, though its name says so", "6.npy is not a pickled pair"),
    ],
)
def test_a_file_that_holds_something_else_is_named_or_left_out(features, tmp_path, content, reason):
    if isinstance(content, bytes):
        (features / "6.npy").write_bytes(content)
    else:
        np.save(features / "6.npy", content, allow_pickle=True)
    refused(ValueError, lambda: _convert(features, tmp_path / "cache"), "6.npy", reason)
    content = _convert(features, tmp_path / "cache", corrupt="skip")
    ((index, named),) = (entry for shard in content["shards"] for entry in shard["skipped"])
    assert (index, reason in named) == (6, True)
    labels = read_cache(tmp_path / "cache", 9)[0]["label"].tolist()
    assert labels == [*LABELS[:6], *LABELS[7:]]
