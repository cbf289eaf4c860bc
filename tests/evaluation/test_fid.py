"""Fréchet distance: closed forms, invariances, singular covariances, the published answer."""

from pathlib import Path

import numpy as np
import pytest

from keras_uvit.evaluation import frechet_distance

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
