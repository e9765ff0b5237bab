"""The split: a function of the seed, the same everywhere; stratified where that is asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bc2exp.config.errors import UserError
from bc2exp.data.splits import shuffled, split_samples

LABELS = ["1"] * 34 + ["0"] * 66


def split(number: int = 100, **changes: Any):
    settings = {"seed": 7, "num_train": None, "num_eval": None, "weights": [8, 1, 1], "stratified": False}
    return split_samples(LABELS[:number], **{**settings, **changes})


def test_the_order_is_the_same_everywhere() -> None:
    # digests decide it: these are the numbers on any machine, with any version of anything
    assert shuffled(10, 42) == [3, 4, 1, 2, 6, 5, 9, 7, 8, 0]
    assert shuffled(10, 43) != shuffled(10, 42)


def test_parts_by_number() -> None:
    found = split(num_train=80)
    assert (len(found.train), len(found.evaluation)) == (80, 20)
    assert sorted(found.train + found.evaluation) == list(range(100))
    found = split(num_eval=30)
    assert (len(found.train), len(found.evaluation)) == (70, 30)
    found = split(num_train=10, num_eval=5)
    assert (len(found.train), len(found.evaluation)) == (10, 5)
    assert not set(found.train) & set(found.evaluation)


def test_parts_by_weight() -> None:
    found = split(number=99)
    assert (len(found.train), len(found.evaluation)) == (79, 10)


def test_a_shuffle_mixes_a_sorted_file() -> None:
    found = split(num_train=50)
    assert 10 < Counter(LABELS[index] for index in found.train)["1"] < 25


@pytest.mark.parametrize(("num_train", "ones"), [(50, 17), (51, 17), (10, 3), (99, 34)])
def test_stratified_parts_have_the_whole_s_labels(num_train: int, ones: int) -> None:
    found = split(num_train=num_train, stratified=True)
    assert len(found.train) == num_train
    assert Counter(LABELS[index] for index in found.train)["1"] == ones
    assert sorted(found.train + found.evaluation) == list(range(100))
    order = shuffled(100, 7)
    assert found.train == sorted(found.train, key=order.index)


@pytest.mark.parametrize(
    "numbers",
    [{"num_train": 100}, {"num_train": 90, "num_eval": 11}, {"num_eval": 100}, {"weights": [1, 0, 0]}],
)
def test_parts_that_do_not_come_out(numbers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"do not come out of the 100 that there are"):
        split(**numbers)
