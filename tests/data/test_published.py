"""The published program's pickled latents: converted exactly, and never trusted."""

import ast
import contextlib
import io
import os
import pickle

import numpy as np
import pytest

from keras_uvit import data
from keras_uvit.data import LatentDataset, published, published_pickles
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
        pickle.dump(content, file, protocol=protocol)


@pytest.fixture
def features(tmp_path):
    """Ten files, saved as the published program saves them."""
    path = tmp_path / "imagenet256_features"
    path.mkdir()
    for k, (moments, label) in enumerate(zip(MOMENTS, LABELS)):
        np.save(path / f"{k}.npy", np.array([moments, np.int64(label)], dtype=object))
    return path


def _convert(features, folder, **options):
    options = {"shard_size": 4, "batch_size": 3, "verbose": 0, **options}
    return data.write_latents(published_pickles(features, 7), folder, None, **options)


# Conversion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_cache_is_the_files_in_the_order_of_their_numbers(features, tmp_path, dtype):
    content = _convert(features, tmp_path / "cache", dtype=dtype)
    assert content["source"] == "published:imagenet256_features"
    assert (content["count"], content["num_classes"], content["shape"]) == (10, 7, [2, 3, 8])
    batch = LatentDataset(tmp_path / "cache", 10, verbose=0)[0]
    np.testing.assert_array_equal(batch["moments"], MOMENTS.transpose(0, 2, 3, 1).astype(dtype))
    assert batch["label"].tolist() == LABELS


def test_numbers_are_in_order_beyond_nine_and_other_files_are_passed_over(features):
    for k in range(10, 12):
        np.save(features / f"{k}.npy", _pair(MOMENTS[k - 10] + k, 5))
    (features / "notes.txt").write_text("no latents")
    np.save(features / "empty_context.npy", np.zeros(3))
    source = published_pickles(features, 7)
    assert len(source) == 12
    np.testing.assert_array_equal(source.read(11)["moments"], (MOMENTS[1] + 11).transpose(1, 2, 0))


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("label", [5, np.int64(5), np.int32(5), np.array(5)], ids=repr)
@pytest.mark.parametrize("content", [_pair, lambda *pair: pair], ids=["array", "tuple"])
def test_every_protocol_that_numpy_has_saved_with_is_read(features, protocol, label, content):
    moments = np.ascontiguousarray(MOMENTS[0].transpose(1, 2, 0)).transpose(2, 0, 1)  # a view
    _save(features / "0.npy", content(moments, label), protocol)
    sample = published_pickles(features, 7).read(0)
    np.testing.assert_array_equal(sample["moments"], MOMENTS[0].transpose(1, 2, 0))
    assert sample["label"] == 5
    assert type(sample["label"]) is int


def test_moments_of_the_other_byte_order_are_read_as_they_are_or_refused(features):
    np.save(features / "3.npy", _pair(MOMENTS[3].astype(">f4"), 1))
    source = published_pickles(features, 7)
    with contextlib.suppress(ValueError):  # refused
        np.testing.assert_array_equal(source.read(3)["moments"], MOMENTS[3].transpose(1, 2, 0))


def test_threads_do_not_share_pythons_parser(features, monkeypatch):
    # Before Python 3.11.8 and 3.12.2, ast in several threads raises SystemError once in a while
    # (python/cpython issue 106905), and whole files are then taken for damaged ones.
    source = published_pickles(features, 7)

    def parser(*arguments):
        raise SystemError("AST constructor recursion depth mismatch (before=36, after=33)")

    monkeypatch.setattr(ast, "literal_eval", parser)
    assert source.read(3)["label"] == LABELS[3]


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_files_of_numpy_1_and_2_are_read(features, core):
    content = pickle.dumps(_pair(MOMENTS[0], np.int64(5)), protocol=2)  # names end with a newline
    module = np.ndarray.__reduce__(MOMENTS[0])[0].__module__.encode()
    assert module + b"\n" in content
    with open(features / "0.npy", "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(content.replace(module + b"\n", core + b"\n"))
    sample = published_pickles(features, 7).read(0)
    np.testing.assert_array_equal(sample["moments"], MOMENTS[0].transpose(1, 2, 0))


def test_the_autoencoder_that_made_the_files_can_be_named(features, tmp_path):
    data.write_latents(published_pickles(features, 7), tmp_path / "cache", SpaceToDepth(8))
    cache = LatentDataset(tmp_path / "cache", 2, verbose=0)
    assert (cache.fingerprint, cache.image_size) == ("space-to-depth-8", [16, 24])


# Pickles that ask for more ------------------------------------------------------------------------


class _Calls:
    """Pickled, it is a call: of `function` with `arguments`, by whoever opens the file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("name", "trap"),
    [
        ("system", lambda mark: _Calls(os.system, f"touch {mark}")),
        ("eval", lambda mark: _Calls(eval, f"open({mark!r}, 'w').close()")),
        ("exec", lambda mark: _Calls(exec, f"open({mark!r}, 'w').close()")),
        ("open", lambda mark: _Calls(open, mark, "w")),
        ("getattr", lambda mark: _Calls(getattr, "mark", "upper")),
        ("save", lambda mark: _Calls(np.save, mark, 1)),
        ("loads", lambda mark: _Calls(pickle.loads, b"cos\nsystem\n(S'x'\ntR.")),
    ],
)
@pytest.mark.parametrize("place", ["moments", "label", "pair"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    features, tmp_path, protocol, name, trap, place
):
    mark = tmp_path / "sprung"
    trap = trap(os.fspath(mark))
    moments = MOMENTS[0] if protocol < 5 else 0  # protocol 5 asks for more to pickle an array
    content = {"moments": _pair(trap, 3), "label": (moments, trap), "pair": trap}[place]
    _save(features / "4.npy", content, protocol)
    source = published_pickles(features, 7)
    with pytest.raises(ValueError, match=rf"4\.npy is not .*UnpicklingError: it asks for .*{name}"):
        source.read(4)
    assert not mark.exists()


def test_the_traps_do_spring_where_pickles_are_trusted(tmp_path):
    mark = tmp_path / "sprung"
    _save(tmp_path / "0.npy", _pair(_Calls(os.system, f"touch {mark}"), 3))
    np.load(tmp_path / "0.npy", allow_pickle=True)
    assert mark.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
        b"c_codecs\nopen\n.",
        b"cbuiltins\neval\n.",
        b"c__builtin__\neval\n.",
        b"cnumpy\nload\n.",
        b"\x80\x02\x82\x01.",  # a name from the extension registry
        b"Pid\n.",  # a persistent id
    ],
)
def test_names_are_allowed_one_by_one(features, code):
    with open(features / "0.npy", "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(code)
    with pytest.raises(ValueError, match=r"0\.npy is not a pickled pair of moments and label"):
        published_pickles(features, 7)


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
    with pytest.raises(ValueError, match="not a pickled pair"):
        published_pickles(features, 7)
    with contextlib.suppress(pickle.UnpicklingError):
        named = published._ArraysOnly(io.BytesIO(pickle.dumps(dtype, 2))).load()
        assert not isinstance(named, np.dtype)  # NumPy is never given the file's word


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 4, 8])
def test_a_missing_file_is_named(features, gap):
    (features / f"{gap}.npy").unlink()
    with pytest.raises(ValueError, match=rf"{gap}\.npy is missing, though there are later ones"):
        published_pickles(features, 7)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder at .*nowhere"):
        published_pickles(tmp_path / "nowhere")
    np.save(tmp_path / "features.npy", np.zeros(3))
    with pytest.raises(FileNotFoundError, match=r"No 0\.npy, 1\.npy, \.\.\. in"):
        published_pickles(tmp_path)


def test_a_file_truncated_anywhere_is_named(features):
    source = published_pickles(features, 7)
    content = (features / "4.npy").read_bytes()
    for length in [0, 5, 9, 64, 127, 128, *range(129, len(content), 7), len(content) - 1]:
        (features / "4.npy").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"4\.npy is not a pickled pair.*corrupt=\"skip\""):
            source.read(4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((8, 2, 3), "float32"), "no pickled pair"),
        (_pair(np.zeros((7, 2, 3), "float32"), 3), r"moments of shape \(7, 2, 3\)"),
        (_pair(np.zeros((8, 6), "float32"), 3), r"moments of shape \(8, 6\)"),
        (_pair(MOMENTS[0], 7), r"label 7, outside \[0, 7\)"),
        (_pair(MOMENTS[0], -1), r"label -1, outside \[0, 7\)"),
        (_pair(MOMENTS[0], None), "TypeError"),
        (np.array([MOMENTS[0], 3, 4], dtype=object), "too many values"),
        (np.array({"moments": 1, "label": 2}), "not enough values"),
        (_pair("moments", 3), "could not convert"),
    ],
)
def test_a_file_that_holds_something_else_is_named(features, content, reason):
    np.save(features / "6.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"6\.npy is not a pickled pair.*{reason}"):
        published_pickles(features, 7).read(6)


def test_a_text_file_is_named(features):
    (features / "0.npy").write_text("not an array, though its name says so")
    with pytest.raises(ValueError, match=r"0\.npy is not a pickled pair"):
        published_pickles(features, 7)


def test_a_file_of_another_shape_is_named(features, tmp_path):
    np.save(features / "5.npy", _pair(np.zeros((8, 4, 4), "float32"), 3))
    with pytest.raises(ValueError, match=r"5"):
        _convert(features, tmp_path / "cache")


def test_damaged_files_are_left_out_and_listed(features, tmp_path):
    (features / "3.npy").write_bytes((features / "3.npy").read_bytes()[:200])
    np.save(features / "9.npy", _pair(MOMENTS[0], 7))
    with pytest.raises(ValueError, match=r"3\.npy is not a pickled pair"):
        _convert(features, tmp_path / "cache")
    content = _convert(features, tmp_path / "cache", corrupt="skip")
    skipped = [entry for shard in content["shards"] for entry in shard["skipped"]]
    assert [index for index, _ in skipped] == [3, 9]
    assert all(f"{index}.npy" in reason for index, reason in skipped)
    batch = LatentDataset(tmp_path / "cache", 8, verbose=0)[0]
    assert batch["label"].tolist() == [k for i, k in enumerate(LABELS) if i not in (3, 9)]


def test_moments_that_float16_cannot_hold_name_their_sample(features, tmp_path):
    np.save(features / "6.npy", _pair(np.full((8, 2, 3), 1e6, "float32"), 3))
    with pytest.raises(ValueError, match="Sample 6 of published:imagenet256_features"):
        _convert(features, tmp_path / "half")
    assert _convert(features, tmp_path / "single", dtype="float32")["count"] == 10
