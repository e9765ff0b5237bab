"""What right and wrong answers come to: accuracy, F1, their intervals, and whether two models differ.

A confusion has a row a true class and a column a chosen one; a last column more counts choices that are no
class. Resampling rows with replacement is drawing the cells of their table from a multinomial, which is how
the bootstrap is done here: exactly, and without touching a row again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[Any]
Statistic = Callable[[Counts], NDArray[Any]]
"""Confusions [..., classes, choices] to values [...]."""


class Estimate(NamedTuple):
    """A value of the rows there are, and the interval it may have been in on others of their kind."""

    value: float
    low: float
    high: float


def confusion(truths: Sequence[int], choices: Sequence[int | None], num_classes: int) -> Counts:
    """Rows counted by true and chosen class, int64 [num_classes, num_classes + 1]; None is no class."""
    counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
    for truth, choice in zip(truths, choices, strict=True):
        counts[truth, num_classes if choice is None else choice] += 1
    return counts


def accuracy(counts: Counts) -> NDArray[Any]:
    """Right choices among all."""
    right = np.trace(counts, axis1=-2, axis2=-1)
    return np.asarray(right / counts.sum(axis=(-2, -1)))


def class_f1(counts: Counts) -> NDArray[Any]:
    """F1 of each class, [..., classes]: 2 right / (true + chosen); 0 for one that nobody has or chooses."""
    num_classes = counts.shape[-2]
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(axis=-1) + counts.sum(axis=-2)[..., :num_classes]
    return np.asarray(2 * right / np.maximum(either, 1))


def macro_f1(counts: Counts) -> NDArray[Any]:
    """The mean of the classes' F1."""
    return np.asarray(class_f1(counts).mean(axis=-1))


def bootstrap(
    counts: Counts, statistic: Statistic, *, resamples: int, confidence: float, seed: int
) -> Estimate:
    """A statistic of a confusion with its percentile interval (Efron 1979).

    Args:
        counts: a confusion, or any table of counts that `statistic` knows.
        statistic: of tables [resamples, ...].
        resamples: tables that are drawn.
        confidence: part of them inside the interval.
        seed: of the draws.
    """
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts.ravel() / total, size=resamples)
    values = statistic(draws.reshape(resamples, *counts.shape))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(float(statistic(counts[None])[0]), float(low), float(high))


def agreement(one: Sequence[bool], other: Sequence[bool]) -> Counts:
    """Rows counted by whether each of two models is right, int64 [2, 2]; index 1 is right."""
    counts = np.zeros((2, 2), dtype=np.int64)
    for first, second in zip(one, other, strict=True):
        counts[int(first), int(second)] += 1
    return counts


def accuracy_difference(counts: Counts) -> NDArray[Any]:
    """Accuracy of the second model less that of the first, of an `agreement`."""
    return np.asarray((counts[..., 0, 1] - counts[..., 1, 0]) / counts.sum(axis=(-2, -1)))


def mcnemar_exact(only_one: int, only_other: int) -> float:
    """The probability of a split at least as uneven, if both models were equally good (McNemar 1947, exact).

    Args:
        only_one, only_other: rows that only one of the two has right. The rows on which they agree say
            nothing about which is better.
    """
    total, fewer = only_one + only_other, min(only_one, only_other)
    ways = sum(math.comb(total, number) for number in range(fewer + 1))
    return min(1.0, 2 * ways / 2**total)  # whole numbers up to the division: no rounding adds up
