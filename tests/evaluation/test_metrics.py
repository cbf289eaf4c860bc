"""Inception Score, precision and recall: closed forms, formulas written out, blocks, errors."""

import numpy as np
import pytest
from tiny import refused

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


@pytest.mark.parametrize(
    ("logits", "score"),
    [
        (np.zeros((20, 7)), 1),  # nothing is known
        (np.repeat(some_logits(1), 20, axis=0), 1),  # all are the same
        # Sure, and spread over the classes; the others' e^-50 is below float64 rounding.
        (50.0 * np.eye(10)[np.arange(30) % 10], 10),
        # e^-800 is 0, and class 4 is never seen.
        (800.0 * np.eye(5)[np.arange(20) % 4], 4),
    ],
)
def test_scores_that_are_known(logits, score):
    # 1e-12: float64 rounding, here and below.
    np.testing.assert_allclose(inception_score(logits), score, rtol=1e-12)


def test_score_is_the_formula_in_float64_whatever_is_added_to_an_image():
    logits = some_logits().astype("float32")
    score = inception_score(logits)
    assert 1.5 < score < 6
    assert score == inception_score(logits.astype("float64"))
    np.testing.assert_allclose(score, direct_score(logits.astype("float64")), rtol=1e-12)
    shift = np.linspace(-1000, 1000, len(logits))[:, None]  # exp of these overflows
    # 1e-10: logits of 1,000 round at 1e-13.
    np.testing.assert_allclose(inception_score(logits + shift), score, rtol=1e-10)


def test_splits_are_consecutive_and_a_short_last_one_counts_like_the_others():
    logits = some_logits(25)
    parts = [direct_score(part) for part in (logits[:10], logits[10:20], logits[20:])]
    assert np.std(parts) > 0.01
    np.testing.assert_allclose(inception_score(logits, 10), np.mean(parts), rtol=1e-12)
    assert inception_score(logits, 26) == inception_score(logits) == inception_score(logits, 25)


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


def overlapping(n=20, m=30, d=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)), 0.6 * rng.normal(size=(m, d)) + 1.4


@pytest.mark.parametrize("k", [1, 3, 5])
def test_shares_are_those_of_the_definition(k):
    real, generated = overlapping()
    expected = brute_force(real, generated, k)
    assert all(0 < share < 1 for share in expected)
    assert expected[0] != expected[1]
    assert precision_recall(real, generated, k) == expected
    assert (precision_recall(real, generated) == expected) == (k == 3)  # the default


@pytest.mark.parametrize("block", [1, 70, 30 * 20])
def test_blocks_of_distances_change_nothing(monkeypatch, block):
    real, generated = overlapping()
    expected = precision_recall(real, generated)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert precision_recall(real, generated) == expected
    blocks = [*metrics.squared_distances(real, generated)]
    assert max(len(d) for d in blocks) == max(1, block // 30)
    # 1e-12: |a|^2 + |b|^2 - 2 a b rounds at the size of the squares.
    squares = np.square(real[:, None] - generated[None]).sum(axis=-1)
    np.testing.assert_allclose(np.concatenate(blocks), squares, atol=1e-12)


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


@pytest.mark.parametrize(
    ("real", "generated"), [((3, 2), (9, 2)), ((9, 2), (3, 2)), ((9, 2), (9, 3)), ((9,), (9,))]
)
def test_features_that_do_not_fit_are_named(real, generated):
    features = np.zeros(real), np.zeros(generated)
    refused(ValueError, lambda: precision_recall(*features), "k=3", f"{real} and {generated}")
