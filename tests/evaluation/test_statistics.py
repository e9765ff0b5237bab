"""Statistics against values worked out by hand or by other means."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from bc2exp.evaluation import statistics

# true class 0: 6 right, 2 taken for class 1, 1 no class; true class 1: 3 taken for class 0, 8 right
COUNTS = np.array([[6, 2, 1], [3, 8, 0]])


def test_rows_are_counted_by_truth_and_choice() -> None:
    found = statistics.confusion([0, 0, 1, 1, 1], [0, None, 1, 0, 1], 2)
    assert found.tolist() == [[1, 0, 1], [1, 2, 0]]


def test_accuracy_and_f1_by_hand() -> None:
    assert statistics.accuracy(COUNTS) == pytest.approx(14 / 20)
    # precision 6/9, recall 6/9; precision 8/10, recall 8/11
    expected = [2 / 3, 2 * (8 / 10) * (8 / 11) / (8 / 10 + 8 / 11)]
    assert statistics.class_f1(COUNTS) == pytest.approx(expected)
    assert statistics.macro_f1(COUNTS) == pytest.approx(sum(expected) / 2)
    assert statistics.class_f1(np.array([[3, 0, 0], [0, 0, 0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 4096),  # C(12, 0) + C(12, 1) + C(12, 2) of 2^12, both sides
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (0, 6, 2 / 64),
        (1, 0, 1.0),
        # scipy.stats.binomtest(9, 52).pvalue
        (43, 9, 2.0377698612961126e-06),
    ],
)
def test_mcnemar_exact(one: int, other: int, p: float) -> None:
    assert statistics.mcnemar_exact(one, other) == pytest.approx(p, rel=1e-9)


def test_mcnemar_of_many_rows_is_near_the_normal_approximation() -> None:
    one, other = 1100, 1000
    z = (abs(one - other) - 1) / math.sqrt(one + other)
    assert statistics.mcnemar_exact(one, other) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 < statistics.mcnemar_exact(900, 100) < 1e-100


def interval(counts: np.ndarray, statistic: statistics.Statistic, seed: int = 1) -> statistics.Estimate:
    return statistics.bootstrap(counts, statistic, resamples=20_000, confidence=0.95, seed=seed)


def test_the_interval_of_an_accuracy_is_that_of_a_share() -> None:
    counts = np.array([[500, 100, 20], [80, 1200, 100]])
    found = interval(counts, statistics.accuracy)
    share, error = 0.85, math.sqrt(0.85 * 0.15 / 2000)
    assert found.value == pytest.approx(share)
    assert found.low == pytest.approx(share - 1.96 * error, abs=0.0008)
    assert found.high == pytest.approx(share + 1.96 * error, abs=0.0008)
    assert found == interval(counts, statistics.accuracy)
    assert interval(counts, statistics.macro_f1) != interval(counts, statistics.macro_f1, seed=2)


def test_tables_drawn_are_rows_drawn() -> None:
    """The F1's interval against one made by drawing rows one by one."""
    rows = [(truth, choice) for (truth, choice), n in np.ndenumerate(COUNTS) for _ in range(n)]
    draw = random.Random(3)
    values = []
    for _ in range(4000):
        counts = np.zeros_like(COUNTS)
        for truth, choice in draw.choices(rows, k=len(rows)):
            counts[truth, choice] += 1
        values.append(float(statistics.macro_f1(counts)))
    low, high = np.quantile(values, [0.025, 0.975])
    found = interval(COUNTS, statistics.macro_f1)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_a_difference_is_of_the_same_rows() -> None:
    counts = statistics.agreement([True, True, False, False, True], [True, False, True, True, True])
    assert counts.tolist() == [[0, 2], [1, 2]]
    assert statistics.accuracy_difference(counts) == pytest.approx(1 / 5)
    # models that agree on every row differ by nothing, however uncertain each is
    same = interval(np.array([[50, 0], [0, 50]]), statistics.accuracy_difference)
    assert same == (0.0, 0.0, 0.0)
