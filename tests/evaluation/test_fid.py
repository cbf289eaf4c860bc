"""Fréchet distance: closed forms, invariances, singular covariances, the published answer.

Reference statistics: files of this and other programs, damaged files, batches of any size.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
from stubs import StubInception, random_images
from tiny import assert_equal, refused

from keras_uvit.evaluation import Reference, frechet_distance, reference_statistics
from keras_uvit.evaluation.frechet import gaussian

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"
close = np.testing.assert_allclose


def features(mean, cov, n=200, seed=0):
    """n rows whose sample mean and sample covariance are exactly `mean` and `cov`."""
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z -= z.mean(axis=0)
    white = np.linalg.solve(np.linalg.cholesky(np.atleast_2d(np.cov(z, rowvar=False))), z.T)
    values, vectors = np.linalg.eigh(np.asarray(cov, "float64"))
    return np.asarray(mean) + white.T @ (vectors * np.sqrt(np.clip(values, 0, None))).T


ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]


def random_sets():
    rng = np.random.default_rng(1)
    return rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)), 1 + rng.normal(size=(60, 5))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (([1.0], [3.0]), ([2.0], [0.5])),
        (([0.0, 1.0, -2.0], [0.5, 1.0, 1.0]), ([1.0, 2.0, 0.3], [1.5, 0.1, 0.3])),
    ],
)
def test_independent_features_add_up_one_dimension_at_a_time(mean, std):
    mean, std = np.array(mean), np.array(std)
    a, b = features(mean[0], np.diag(std[0] ** 2)), features(mean[1], np.diag(std[1] ** 2), seed=1)
    expected = np.sum((mean[0] - mean[1]) ** 2) + np.sum((std[0] - std[1]) ** 2)
    # 1e-10: the features have the wanted moments to float64 rounding.
    close(frechet_distance(a, b), expected, rtol=1e-10)


def test_covariances_that_do_not_commute():
    s_a, s_b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    product = s_a @ s_b
    # In two dimensions the trace of the root of M is sqrt(tr M + 2 sqrt(det M)).
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    a, b = features([0, 0], s_a), features([0, 0], s_b, seed=1)
    # 1e-10: as above.
    close(frechet_distance(a, b), np.trace(s_a) + np.trace(s_b) - 2 * root, rtol=1e-10)


def test_a_set_is_at_distance_zero_from_itself_and_a_shift_costs_its_square():
    a, _ = random_sets()
    # 1e-9: roots of rounded eigenvalues of a covariance of size 10.
    assert 0 <= frechet_distance(a, a) < 1e-9
    close(frechet_distance(a, a + 2.0), 5 * 4.0, rtol=1e-9)


@pytest.mark.parametrize(
    "change",
    [lambda a, b: (b, a), lambda a, b: (a @ ROTATION, b @ ROTATION), lambda a, b: (a[::-1], b)],
    ids=["exchanged", "both rotated", "in another order"],
)
def test_what_does_not_change_the_distance(change):
    a, b = random_sets()
    # 1e-10: the root is of another matrix with the same eigenvalues; sums are in another order.
    close(frechet_distance(*change(a, b)), frechet_distance(a, b), rtol=1e-10)


@pytest.mark.parametrize("q", [np.eye(5), ROTATION], ids=["axes", "rotated"])
def test_singular_covariances(q):
    std_a, std_b = np.array([1.0, 0.0, 2.0, 0.0, 0.0]), np.array([0.5, 1.0, 0.0, 0.0, 0.0])
    a, b = features(np.zeros(5), np.diag(std_a**2)), features(np.ones(5), np.diag(std_b**2), seed=1)
    expected = 5.0 + np.sum((std_a - std_b) ** 2)
    # 1e-6: a zero eigenvalue rounds to 1e-16, its root to 1e-8.
    close(frechet_distance(a @ q, b @ q), expected, rtol=1e-6)


@pytest.mark.parametrize("pair", ["ab", "cd"])
def test_published_distances(pair):
    golden = np.load(GOLDEN / "frechet.npz")
    distance = frechet_distance(golden[pair[0]], golden[pair[1]])
    # 1e-6: c and d have fewer rows than features, so the other root rounds at 1e-8 per dimension.
    close(distance, golden[f"distance_{pair}"], rtol=1e-6)


def test_mean_and_covariance_stand_for_features():
    a, b = random_sets()
    distance = frechet_distance(a, b)
    assert frechet_distance(a, gaussian(b)) == frechet_distance(gaussian(a), b) == distance > 0.1


def test_gaussian_is_the_sample_mean_and_the_unbiased_covariance():
    a = random_sets()[0].astype("float32")
    mean, covariance = gaussian(a)
    assert mean.dtype == covariance.dtype == np.float64
    centred = a.astype("float64") - a.astype("float64").sum(axis=0) / 50
    # 1e-12: float64 sums in another order.
    close(covariance, centred.T @ centred / 49, rtol=1e-12, atol=1e-12)


NAN, INF = np.full((4, 2), np.nan), np.full((4, 2), np.inf)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros(4), np.zeros(4), ["n at least 2", "(4,)"]),
        (np.zeros((4, 2)), np.zeros((4, 3)), ["differ in number", "2 and 3"]),
        (np.zeros((4, 2)), np.zeros((1, 2)), ["n at least 2", "(1, 2)"]),
        (np.zeros((4, 2, 1)), np.zeros((4, 2, 1)), ["(4, 2, 1)"]),
        (np.zeros((4, 2)), NAN, ["NaN or infinity"]),
        (INF, np.zeros((4, 2)), ["NaN or infinity"]),
        (np.zeros((4, 2)), (np.zeros(3), np.eye(3)), ["differ in number", "2 and 3"]),
        (np.zeros((4, 2)), (NAN[0], np.eye(2)), ["NaN or infinity"]),
        (np.zeros((4, 2)), (np.zeros(2), NAN[:2]), ["NaN or infinity"]),
        (np.zeros((4, 2)), (np.zeros(2), np.eye(3)), ["(2,)", "(3, 3)"]),
    ],
)
def test_what_has_no_distance_is_refused(a, b, words):
    refused(ValueError, lambda: frechet_distance(a, b), *words)


# Reference statistics -----------------------------------------------------------------------------


def statistics(d=4, seed=2):
    return gaussian(np.random.default_rng(seed).normal(size=(30, d)))


MEAN, COVARIANCE = statistics()
SPATIAL = statistics(3)
ROWS = np.random.default_rng(3).normal(size=(7, 4)).astype("float32")
FULL = Reference(
    *((MEAN, COVARIANCE), SPATIAL, ROWS, 30, (8, 6)), "half_pixel", inception="0123456789abcdef"
)
HALF = MEAN.astype("float32"), COVARIANCE.astype("float32")


def assert_same(a, b):
    for field in dataclasses.fields(Reference):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y), field.name
        if isinstance(x, tuple | np.ndarray):
            assert_equal(x, y)
            assert [np.asarray(p).dtype for p in x] == [np.asarray(p).dtype for p in y]
        else:
            assert x == y, field.name


@pytest.mark.parametrize("saved", [FULL, Reference(FULL.pool)], ids=["everything", "pool alone"])
def test_a_saved_reference_is_loaded_bit_for_bit(tmp_path, saved):
    saved.save(tmp_path / "deep" / "reference.npz")
    loaded = Reference.load(tmp_path / "deep" / "reference.npz")
    assert_same(saved, loaded)
    assert loaded.hash == saved.hash


def test_any_number_of_mean_or_covariance_changes_the_hash_and_their_layout_does_not():
    hashes = {Reference((MEAN, COVARIANCE)).hash}
    for k in range(20):
        changed = np.concatenate([MEAN, COVARIANCE.ravel()])
        changed[k] = np.nextafter(changed[k], 9)
        hashes.add(Reference((changed[:4], changed[4:].reshape(4, 4))).hash)
    assert len(hashes) == 21
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
    turned = MEAN.astype(">f8"), np.asfortranarray(COVARIANCE)
    assert Reference(turned).hash in hashes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (dict(mu=MEAN, sigma=COVARIANCE), Reference((MEAN, COVARIANCE))),
        (
            dict(mu=HALF[0], sigma=HALF[1]),
            Reference((HALF[0].astype("float64"), HALF[1].astype("float64"))),
        ),
        (
            dict(mu=MEAN, sigma=COVARIANCE, mu_s=SPATIAL[0], sigma_s=SPATIAL[1]),
            Reference((MEAN, COVARIANCE), SPATIAL),
        ),
        (dict(pool_3=ROWS), Reference(gaussian(ROWS), features=ROWS, count=7)),
    ],
    ids=["pytorch-fid", "float32", "the ADM suite", "raw features"],
)
def test_files_of_other_programs_are_read(tmp_path, content, expected):
    path = tmp_path / "reference.npz"
    np.savez_compressed(path, **content)
    with zipfile.ZipFile(path, "a") as archive:  # gigabytes of images, which nobody needs
        archive.writestr("arr_0.npy", b"\x93NUMPY: an array whose reading fails")
    assert_same(Reference.load(path), expected)


def npz(**content):
    return lambda path: np.savez(path, **content)


def with_fact(**content):
    return npz(mu=MEAN, sigma=COVARIANCE, **content)


def truncated(path):
    FULL.save(path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        # Other damages: test_files.py, which reads with the same function.
        (truncated, ["damaged or no .npz"]),
        (npz(mu=MEAN), ["no statistics", "['mu']"]),
        (npz(mu=MEAN[:3], sigma=COVARIANCE), ["(3,), (4, 4)"]),
        (npz(mu=MEAN[None], sigma=COVARIANCE), ["(1, 4)"]),
        (npz(mu=MEAN, sigma=COVARIANCE[:, :3]), ["(4, 3)"]),
        (npz(mu=MEAN, sigma=COVARIANCE * np.inf), ["infinity"]),
        (with_fact(mu_s=MEAN, sigma_s=COVARIANCE[:2]), ["sigma_s have", "(2, 4)"]),
        (with_fact(mu_s=MEAN), ["no statistics", "sigma_s"]),
        (npz(pool_3=np.full((5, 4), np.nan)), ["NaN"]),
        (npz(pool_3=np.zeros(4)), ["(4,)"]),
        (with_fact(features=np.zeros((9, 3))), ["features", "(9, 3)"]),
        (with_fact(count=2.5), ['"count" has']),
        (with_fact(image_size=[0.5, 0.5]), ['"image_size" has']),
        (with_fact(resize=3), ['"resize" has']),
        (with_fact(inception=["a"]), ['"inception" has']),
    ],
)
def test_a_file_that_is_no_reference_is_named(tmp_path, write, words):
    path = tmp_path / "reference.npz"
    write(path)
    refused(ValueError, lambda: Reference.load(path), str(path), *words)


def test_a_missing_file_and_another_suffix_are_named(tmp_path):
    path = tmp_path / "reference.npy"
    refused(FileNotFoundError, lambda: Reference.load(path), "No reference statistics", path.name)
    refused(ValueError, lambda: FULL.save(path), "reference.npy must end in .npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 7, 100])
def test_statistics_do_not_depend_on_the_batches(tmp_path, size):
    images, inception = random_images(30)[:, :, :4], StubInception("tf1", "abc")
    batches = [images[k : k + size] for k in range(0, 30, size)]
    found = reference_statistics(iter(batches), inception, keep_features=9, verbose=0)
    assert inception.batches == [len(batch) for batch in batches]
    features = inception(images)
    for key in ("pool", "spatial"):
        for a, b in zip(getattr(found, key), gaussian(features[key])):
            close(a, b, rtol=1e-12, atol=1e-12)  # float64 rounding
    rows = [np.flatnonzero((features["pool"] == row).all(axis=1))[0] for row in found.features]
    assert len({*rows}) == 9
    assert max(rows) > 9  # not the first ones: images may be sorted by class
    assert (found.count, found.image_size) == (30, (8, 4))
    assert (found.resize, found.inception) == ("tf1", "abc")
    assert_same(reference_statistics(images, inception, keep_features=9, verbose=0), found)
    found.save(tmp_path / "reference.npz")
    assert_same(Reference.load(tmp_path / "reference.npz"), found)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([random_images(3), random_images(3, size=4)], ["of one size", "[(4, 4), (8, 8)]"]),
        (iter([]), ["no images"]),
        (random_images(1), ["n at least 2"]),
    ],
)
def test_images_without_statistics_are_refused(images, words):
    refused(ValueError, lambda: reference_statistics(images, StubInception(), verbose=0), *words)
