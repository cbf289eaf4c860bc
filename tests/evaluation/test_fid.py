"""Fréchet distance: closed forms, invariances, singular covariances, the published answer.

Reference statistics: files of this and other programs, damaged files, batches of any size.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
from stubs import StubInception, random_images

from keras_uvit.evaluation import Reference, frechet_distance, reference_statistics
from keras_uvit.evaluation.frechet import gaussian

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"


def features(mean, cov, n=200, seed=0):
    """n rows whose sample mean and sample covariance are exactly `mean` and `cov`."""
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z -= z.mean(axis=0)
    white = np.linalg.solve(
        np.linalg.cholesky(np.cov(z, rowvar=False).reshape([len(mean)] * 2)), z.T
    )
    values, vectors = np.linalg.eigh(np.asarray(cov, "float64"))
    return np.asarray(mean) + white.T @ (vectors * np.sqrt(np.clip(values, 0, None))).T


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def random_sets():
    rng = np.random.default_rng(1)
    return rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)), 1 + rng.normal(size=(60, 5))


def test_independent_features_add_up_one_dimension_at_a_time():
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 1.0])
    std_a, std_b = np.array([1.0, 2.0, 0.3]), np.array([1.5, 0.1, 0.3])
    a, b = features(mean_a, np.diag(std_a**2)), features(mean_b, np.diag(std_b**2), 300, seed=1)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    # 1e-10: the features have the wanted moments to float64 rounding.
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-10)


def test_one_feature():
    a, b = features([1.0], [[4.0]]), features([3.0], [[0.25]], seed=1)
    # 1e-10: as above; (1 - 3)^2 + (2 - 0.5)^2.
    np.testing.assert_allclose(frechet_distance(a, b), 4 + 2.25, rtol=1e-10)


def test_covariances_that_do_not_commute():
    s_a, s_b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    product = s_a @ s_b
    # In two dimensions the trace of the root of M is sqrt(tr M + 2 sqrt(det M)).
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    a, b = features([0, 0], s_a), features([0, 0], s_b, seed=1)
    # 1e-10: the features have the wanted moments to float64 rounding.
    np.testing.assert_allclose(
        frechet_distance(a, b), np.trace(s_a) + np.trace(s_b) - 2 * root, rtol=1e-10
    )


def test_a_set_is_at_distance_zero_from_itself():
    a, _ = random_sets()
    # 1e-9: roots of rounded eigenvalues of a covariance of size 10.
    assert 0 <= frechet_distance(a, a) < 1e-9


def test_a_shift_costs_its_square():
    a, _ = random_sets()
    # 1e-9: the same rounding of the roots.
    np.testing.assert_allclose(frechet_distance(a, a + 2.0), 5 * 4.0, rtol=1e-9)


def test_distance_is_symmetric():
    a, b = random_sets()
    # 1e-10: the root is taken of another matrix with the same eigenvalues.
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-10)


def test_rotating_both_sets_changes_nothing():
    (a, b), q = random_sets(), rotation(5)
    # 1e-10: float64 rounding.
    np.testing.assert_allclose(frechet_distance(a @ q, b @ q), frechet_distance(a, b), rtol=1e-10)


def test_order_of_the_rows_does_not_matter():
    a, b = random_sets()
    # 1e-10: sums in another order.
    np.testing.assert_allclose(frechet_distance(a[::-1], b), frechet_distance(a, b), rtol=1e-10)


@pytest.mark.parametrize("rotated", [False, True])
def test_singular_covariances(rotated):
    std_a, std_b = np.array([1.0, 0.0, 2.0, 0.0]), np.array([0.5, 1.0, 0.0, 0.0])
    q = rotation(4) if rotated else np.eye(4)
    a, b = features(np.zeros(4), np.diag(std_a**2)), features(np.ones(4), np.diag(std_b**2), seed=1)
    expected = 4.0 + np.sum((std_a - std_b) ** 2)
    # 1e-6: a zero eigenvalue rounds to 1e-16, its root to 1e-8.
    np.testing.assert_allclose(frechet_distance(a @ q, b @ q), expected, rtol=1e-6)


def test_fewer_rows_than_features():
    a = np.random.default_rng(0).normal(size=(4, 30))
    # 1e-5: 27 zero eigenvalues whose roots round to 1e-8.
    assert 0 <= frechet_distance(a, a) < 1e-5


def test_float32_features_are_summed_in_float64():
    a, b = random_sets()
    a, b = a.astype("float32"), b.astype("float32")
    assert frechet_distance(a, b) == frechet_distance(a.astype("float64"), b.astype("float64"))


@pytest.mark.parametrize("pair", ["ab", "cd"])
def test_published_distances(pair):
    golden = np.load(GOLDEN / "frechet.npz")
    distance = frechet_distance(golden[pair[0]], golden[pair[1]])
    # 1e-6: c and d have fewer rows than features, so the other root rounds at 1e-8 per dimension.
    np.testing.assert_allclose(distance, golden[f"distance_{pair}"], rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((4,), (4,), r"shape \(n, d\), n at least 2. Received: \(4,\)"),
        ((4, 2), (4, 3), "differ in number: 2 and 3"),
        ((1, 2), (4, 2), r"Received: \(1, 2\)"),
        ((4, 2), (1, 2), r"Received: \(1, 2\)"),
        ((4, 2, 1), (4, 2, 1), r"Received: \(4, 2, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(a), np.zeros(b))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    a = np.zeros((4, 2))
    a[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(np.zeros((4, 2)), a)


def test_mean_and_covariance_stand_for_features():
    a, b = random_sets()
    distance = frechet_distance(a, b)
    assert distance > 0.1
    assert frechet_distance(gaussian(a), gaussian(b)) == distance
    assert frechet_distance(a, gaussian(b)) == frechet_distance(gaussian(a), b) == distance


def test_gaussian_is_the_sample_mean_and_the_unbiased_covariance():
    a, _ = random_sets()
    mean, covariance = gaussian(a.astype("float32"))
    assert mean.dtype == covariance.dtype == np.float64
    centred = a.astype("float32").astype("float64")
    centred -= centred.sum(axis=0) / 50
    # 1e-12: float64 sums in another order.
    np.testing.assert_allclose(covariance, centred.T @ centred / 49, rtol=1e-12, atol=1e-12)


def test_widths_of_statistics_that_differ_are_named():
    a, b = random_sets()
    with pytest.raises(ValueError, match="differ in number: 5 and 4"):
        frechet_distance(gaussian(a), gaussian(b[:, :4]))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ((np.full(2, np.nan), np.eye(2)), "NaN or infinity"),
        ((np.zeros(2), np.full((2, 2), np.nan)), "NaN or infinity"),
        ((np.zeros(2), np.eye(3)), r"\(2,\).*\(3, 3\)"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(statistics, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(statistics, np.random.default_rng(0).normal(size=(9, 2)))


# Reference statistics -----------------------------------------------------------------------------


def statistics(d=4, seed=2):
    rng = np.random.default_rng(seed)
    return gaussian(rng.normal(size=(30, d)))


def full_reference():
    rng = np.random.default_rng(3)
    return Reference(
        pool=statistics(4),
        spatial=statistics(3),
        features=rng.normal(size=(7, 4)).astype("float32"),
        count=30,
        image_size=(8, 6),
        resize="half_pixel",
        inception="0123456789abcdef",
    )


def assert_same(a, b):
    for field in dataclasses.fields(Reference):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y), field.name
        if isinstance(x, tuple):
            assert len(x) == len(y)
            for p, q in zip(x, y):
                np.testing.assert_array_equal(p, q)
        elif isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y, field.name


@pytest.mark.parametrize(
    "saved", [full_reference(), Reference(statistics())], ids=["everything", "pool alone"]
)
def test_a_saved_reference_is_loaded_bit_for_bit(tmp_path, saved):
    saved.save(tmp_path / "deep" / "reference.npz")
    loaded = Reference.load(tmp_path / "deep" / "reference.npz")
    assert_same(saved, loaded)
    assert loaded.hash == saved.hash


def test_any_number_of_mean_or_covariance_changes_the_hash():
    mean, covariance = statistics()
    hashes = {Reference((mean, covariance)).hash}
    for k in range(20):
        changed = mean.copy(), covariance.copy()
        flat = changed[0] if k < 4 else changed[1].reshape(-1)
        flat[k % 4 if k < 4 else k - 4] = np.nextafter(flat[k % 4 if k < 4 else k - 4], 9)
        hashes.add(Reference(changed).hash)
    assert len(hashes) == 21
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


def test_the_hash_depends_on_numbers_not_on_their_layout():
    mean, covariance = statistics()
    turned = np.asfortranarray(covariance)
    assert Reference((mean, covariance)).hash == Reference((mean.astype(">f8"), turned)).hash


def test_a_file_of_pytorch_fid_is_read(tmp_path):
    mean, covariance = statistics()
    np.savez_compressed(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    assert_same(Reference.load(tmp_path / "fid.npz"), Reference((mean, covariance)))


def test_a_file_of_the_adm_suite_is_read_without_its_images(tmp_path):
    mean, covariance = statistics(4)
    spatial = statistics(3)
    path = tmp_path / "adm.npz"
    np.savez(path, mu=mean, sigma=covariance, mu_s=spatial[0], sigma_s=spatial[1])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY: an array whose reading fails")
    assert_same(Reference.load(path), Reference((mean, covariance), spatial))


def test_a_file_of_raw_features_is_read(tmp_path):
    features = np.random.default_rng(4).normal(size=(9, 4)).astype("float32")
    np.savez(tmp_path / "features.npz", pool_3=features)
    expected = Reference(gaussian(features), features=features, count=9)
    assert_same(Reference.load(tmp_path / "features.npz"), expected)


def test_float32_statistics_become_float64(tmp_path):
    mean, covariance = (a.astype("float32") for a in statistics())
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    loaded = Reference.load(tmp_path / "fid.npz")
    assert {a.dtype for a in loaded.pool} == {np.dtype("float64")}
    np.testing.assert_array_equal(loaded.pool[1], covariance)


def npz(**content):
    return lambda path: np.savez(path, **content)


def truncated(path):
    full_reference().save(path)
    path.write_bytes(path.read_bytes()[:-300])


def overwritten(path):
    full_reference().save(path)
    content = bytearray(path.read_bytes())
    content[200:240] = b"?" * 40  # within the mean
    path.write_bytes(content)


def overwritten_compressed(path):
    np.savez_compressed(path, mu=np.arange(999.0), sigma=np.eye(999))
    content = bytearray(path.read_bytes())
    content[300:400] = b"?" * 100
    path.write_bytes(content)


def zip_of(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "text")

    return write


def bare_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros((4, 4)))


MEAN, COVARIANCE = statistics()
# What cannot stand beside the statistics.
FACTS = {
    "count": ([3, 4], 2.5, "many"),
    "image_size": (32, [32, 32, 3], [0.5, 0.5]),
    "resize": (3, ["a", "b"]),
    "inception": (7.0, ["a"]),
}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(truncated, "damaged or no .npz", id="truncated"),
        pytest.param(overwritten, "damaged or no .npz", id="overwritten"),
        pytest.param(
            overwritten_compressed,
            "damaged or no .npz",
            id="overwritten compressed",
        ),
        pytest.param(lambda p: p.write_text("mu, sigma"), "damaged or no .npz", id="text"),
        pytest.param(lambda p: p.write_bytes(b""), "damaged or no .npz", id="empty"),
        pytest.param(zip_of("a.txt"), "expected", id="zip of text"),
        pytest.param(zip_of("mu", "sigma"), "reference", id="zip of texts named so"),
        pytest.param(bare_array, "reference", id="npy"),
        pytest.param(npz(mu=MEAN), r"\['mu'\]", id="no sigma"),
        pytest.param(
            npz(mu=np.array([{}] * 4, object), sigma=COVARIANCE), "allow_pickle", id="objects"
        ),
        pytest.param(npz(mu=MEAN[:3], sigma=COVARIANCE), r"\(3,\), \(4, 4\)", id="other width"),
        pytest.param(npz(mu=MEAN[None], sigma=COVARIANCE), r"\(1, 4\)", id="mean of rows"),
        pytest.param(npz(mu=MEAN, sigma=COVARIANCE[:, :3]), r"\(4, 3\)", id="not square"),
        pytest.param(npz(mu=MEAN * np.nan, sigma=COVARIANCE), "NaN", id="NaN in mu"),
        pytest.param(npz(mu=MEAN, sigma=COVARIANCE * np.inf), "infinity", id="inf in sigma"),
        pytest.param(
            npz(mu=MEAN, sigma=COVARIANCE, mu_s=MEAN, sigma_s=COVARIANCE[:2]),
            r"sigma_s have.*\(2, 4\)",
            id="spatial shapes",
        ),
        pytest.param(npz(mu=MEAN, sigma=COVARIANCE, mu_s=MEAN), "sigma_s", id="no sigma_s"),
        pytest.param(npz(pool_3=np.full((5, 4), np.nan)), "NaN", id="NaN features"),
        pytest.param(npz(pool_3=np.zeros(4)), r"\(4,\)", id="flat features"),
        pytest.param(
            npz(mu=MEAN, sigma=COVARIANCE, features=np.zeros((9, 3))),
            r"\(9, 3\)",
            id="features",
        ),
        *(
            pytest.param(
                npz(mu=MEAN, sigma=COVARIANCE, **{name: value}), f'"{name}" has', id=f"{name} {k}"
            )
            for name, values in FACTS.items()
            for k, value in enumerate(values)
        ),
    ],
)
def test_a_file_that_is_no_reference_is_named(tmp_path, write, message):
    path = tmp_path / "reference.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        Reference.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No reference statistics at .*nothing\.npz"):
        Reference.load(tmp_path / "nothing.npz")


def test_a_reference_is_saved_as_npz_only(tmp_path):
    with pytest.raises(ValueError, match="reference.npy must end in .npz"):
        full_reference().save(tmp_path / "reference.npy")
    assert not list(tmp_path.iterdir())


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    full_reference().save(path)
    before = path.read_bytes()

    def fails(file, **content):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        Reference(statistics(seed=9)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def batches_of(images, size):
    return [images[k : k + size] for k in range(0, len(images), size)]


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_statistics_do_not_depend_on_the_batches(size):
    images, inception = random_images(30), StubInception()
    whole = reference_statistics(images, inception, verbose=0)
    parts = reference_statistics(iter(batches_of(images, size)), inception, verbose=0)
    assert whole.count == parts.count == 30
    for key in ("pool", "spatial"):
        for a, b in zip(getattr(whole, key), getattr(parts, key)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)  # float64 rounding
    np.testing.assert_array_equal(whole.features, parts.features)


def test_statistics_are_of_all_images_with_their_network_and_size():
    images, inception = random_images(30)[:, :, :4], StubInception("tf1", "abc")
    found = reference_statistics(batches_of(images, 8), inception, keep_features=9, verbose=0)
    assert inception.batches == [8, 8, 8, 6]
    features = StubInception()(images)
    for a, b in zip(found.pool, gaussian(features["pool"])):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)  # float64 rounding
    for a, b in zip(found.spatial, gaussian(features["spatial"])):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    rows = [np.flatnonzero((features["pool"] == row).all(axis=1))[0] for row in found.features]
    assert len({*rows}) == 9
    assert max(rows) > 9  # not the first ones: images may be sorted by class
    assert (found.count, found.image_size) == (30, (8, 4))
    assert (found.resize, found.inception) == ("tf1", "abc")


def test_statistics_survive_a_file(tmp_path):
    found = reference_statistics(random_images(30), StubInception(), verbose=0)
    found.save(tmp_path / "reference.npz")
    assert_same(Reference.load(tmp_path / "reference.npz"), found)


def test_images_of_several_sizes_are_refused():
    batches = [random_images(3), random_images(3, size=4)]
    with pytest.raises(ValueError, match=r"of one size. Received: \[\(4, 4\), \(8, 8\)\]"):
        reference_statistics(batches, StubInception(), verbose=0)


def test_no_image_or_one_is_refused():
    with pytest.raises(ValueError, match="There are no images"):
        reference_statistics(iter([]), StubInception(), verbose=0)
    with pytest.raises(ValueError, match="n at least 2"):
        reference_statistics(random_images(1), StubInception(), verbose=0)


def test_one_image_without_its_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(n, H, W, 3\)"):
        reference_statistics(random_images(2)[0], StubInception(), verbose=0)
