"""Inception Score, precision and recall: closed forms, formulas written out, blocks, errors."""

import numpy as np
import pytest

from keras_uvit.evaluation import inception_score, metrics, precision_recall

pytestmark = pytest.mark.once


def some_logits(n=37, classes=6, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(n, classes))


def direct_score(logits):
    """exp(mean over images of the KL divergence of p(y|x) to p(y)), term by term."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    total = 0.0
    for row in p:
        for a, b in zip(row, mean):
            total += a * (np.log(a) - np.log(b))
    return np.exp(total / len(p))


def test_images_of_which_nothing_is_known_score_one():
    # 1e-12: float64 rounding, here and below.
    np.testing.assert_allclose(inception_score(np.zeros((20, 7))), 1.0, rtol=1e-12)


def test_images_that_are_all_the_same_score_one():
    logits = np.repeat(some_logits(1), 20, axis=0)
    np.testing.assert_allclose(inception_score(logits), 1.0, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 10])
def test_sure_images_spread_over_classes_score_their_number(classes):
    logits = 50.0 * np.eye(classes)[np.arange(3 * classes) % classes]
    # 1e-12: the other classes have probability e^-50, below float64 rounding.
    np.testing.assert_allclose(inception_score(logits), classes, rtol=1e-12)


def test_a_class_that_no_image_can_be_of_counts_nothing():
    logits = 800.0 * np.eye(5)[np.arange(20) % 4]  # e^-800 is 0; class 4 is never seen
    np.testing.assert_allclose(inception_score(logits), 4, rtol=1e-12)


def test_score_is_the_formula():
    logits = some_logits()
    assert 1.5 < inception_score(logits) < 6
    np.testing.assert_allclose(inception_score(logits), direct_score(logits), rtol=1e-12)


def test_a_constant_per_image_changes_nothing():
    logits = some_logits()
    shift = np.linspace(-1000, 1000, len(logits))[:, None]  # exp of these overflows
    # 1e-10: logits of 1,000 round at 1e-13.
    np.testing.assert_allclose(inception_score(logits + shift), inception_score(logits), rtol=1e-10)


def test_splits_are_consecutive_and_a_short_last_one_counts_like_the_others():
    logits = some_logits(25)
    parts = [direct_score(part) for part in (logits[:10], logits[10:20], logits[20:])]
    assert np.std(parts) > 0.01
    np.testing.assert_allclose(inception_score(logits, 10), np.mean(parts), rtol=1e-12)
    np.testing.assert_allclose(inception_score(logits, 25), direct_score(logits), rtol=1e-12)
    assert inception_score(logits, 26) == inception_score(logits) == inception_score(logits, 25)


def test_logits_in_float32_are_scored_in_float64():
    logits = some_logits().astype("float32")
    assert inception_score(logits) == inception_score(logits.astype("float64"))


# Precision and recall -----------------------------------------------------------------------------


def brute_force(real, generated, k):
    """The definition, one pair at a time."""

    def distance(a, b):
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b)) ** 0.5

    def share(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(distance(centre, c) for j, c in enumerate(centres) if j != i)
                if distance(point, centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(generated, real), share(real, generated)


def overlapping(n=20, m=30, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 0.6 * rng.normal(size=(m, d)) + 1.4


@pytest.mark.parametrize("k", [1, 3, 5])
def test_shares_are_those_of_the_definition(k):
    real, generated = overlapping()
    expected = brute_force(real, generated, k)
    assert all(0 < share < 1 for share in expected)
    assert expected[0] != expected[1]
    assert precision_recall(real, generated, k) == expected


def test_three_neighbours_are_the_default():
    real, generated = overlapping()
    assert precision_recall(real, generated) == brute_force(real, generated, 3)
    assert brute_force(real, generated, 3) != brute_force(real, generated, 2)


@pytest.mark.parametrize("block", [1, 70, 30 * 7, 30 * 20])
def test_blocks_of_distances_change_nothing(monkeypatch, block):
    real, generated = overlapping()
    expected = precision_recall(real, generated)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert precision_recall(real, generated) == expected
    rows = [len(d) for d in metrics.squared_distances(real, generated)]
    assert sum(rows) == 20
    assert max(rows) == max(1, block // 30)


def test_distances_are_squared_and_of_all_pairs(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 64)
    a, b = overlapping()
    expected = np.square(a[:, None] - b[None]).sum(axis=-1)
    # 1e-12: |a|^2 + |b|^2 - 2 a b rounds at the size of the squares.
    np.testing.assert_allclose(
        np.concatenate([*metrics.squared_distances(a, b)]), expected, atol=1e-12
    )


def test_a_set_covers_itself():
    real, _ = overlapping()
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real[::-1]) == (1.0, 1.0)


def test_sets_far_apart_share_nothing():
    real, generated = overlapping()
    assert precision_recall(real, generated + 1000.0) == (0.0, 0.0)


def test_a_generator_of_one_cluster_is_precise_and_forgetful():
    rng = np.random.default_rng(0)
    clusters = [rng.normal(size=(20, 4)) + 100 * k for k in range(4)]
    assert precision_recall(np.concatenate(clusters), clusters[2]) == (1.0, 0.25)
    # The other way round: a real set of one cluster is all covered, by a quarter of the images.
    assert precision_recall(clusters[2], np.concatenate(clusters)) == (0.25, 1.0)


def test_reach_to_the_neighbour_itself_is_inside():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    generated = np.array([[-3.0], [-4.0], [6.0], [7.0]])
    # k = 3: the ball of 0 is [-3, 3], that of 3 is [0, 6]; -4 and 7 are outside.
    assert precision_recall(real, generated)[0] == 0.5


def test_duplicates_are_neighbours_at_distance_zero():
    # Integers: all distances are exact.
    real = np.array([[0, 0]] * 4 + [[5, 0], [0, 5]])
    generated = np.array([[0, 0], [0, 1], [5, 1], [9, 9]])
    assert precision_recall(real, generated) == brute_force(real, generated, 3)
    # Four copies: the ball of each is a point, and [0, 1] is in those of the two others only.
    assert precision_recall(real[:4], generated, 3) == (0.25, 1.0)


def test_float32_features_are_compared_in_float64():
    rng = np.random.default_rng(0)
    real = (1e4 + rng.normal(size=(20, 3))).astype("float32")  # squares round at 10 in float32
    generated = (1e4 + 2 + rng.normal(size=(20, 3))).astype("float32")
    found = precision_recall(real, generated)
    assert found == brute_force(real, generated, 3)
    assert all(0 < share < 1 for share in found)


def test_k_plus_one_rows_are_enough():
    real, generated = overlapping(4, 4)
    assert precision_recall(real, generated, 3) == brute_force(real, generated, 3)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        ((3, 2), (9, 2), r"above k=3. Received: \(3, 2\) and \(9, 2\)"),
        ((9, 2), (3, 2), r"above k=3. Received: \(9, 2\) and \(3, 2\)"),
        ((9, 2), (9, 3), r"Received: \(9, 2\) and \(9, 3\)"),
        ((9,), (9,), r"Received: \(9,\) and \(9,\)"),
    ],
)
def test_features_that_do_not_fit_are_named(real, generated, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(np.zeros(real), np.zeros(generated))
