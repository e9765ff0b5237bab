"""Packing: every row once, apart from its neighbours, in few positions; as many passes for every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bc2exp.data.batches import IGNORED, MicroBatch
from bc2exp.data.examples import Examples
from bc2exp.data.order import sample_at
from bc2exp.data.packing import WAYS, Packer, evaluation_batches, first_fit, fixed_lengths, training_batches

LENGTH = 128


def rows_of(lengths: Sequence[int]) -> Examples:
    """Rows of numbers that tell the row: token 1000 r + i at place i, and the last two are labelled."""
    starts = [0]
    ids: list[int] = []
    labels: list[int] = []
    for row, length in enumerate(lengths):
        ids += range(1000 * row + 1, 1000 * row + 1 + length)
        labels += [IGNORED] * (length - 2) + [5, 2]
        starts.append(len(ids))
    tensors = (torch.tensor(each, dtype=torch.int32) for each in (ids, labels))
    return Examples(*tensors, starts, list(range(len(lengths))))


def packer(examples: Examples, **changes: Any) -> Packer:
    settings = {"way": "packed", "sequence_length": LENGTH, "micro_batch": 4, "num_ranks": 1, **changes}
    return Packer(examples, **settings)


def some_lengths(number: int, low: int, high: int) -> list[int]:
    generator = random.Random(3)
    return [generator.randint(low, high) for _ in range(number)]


EXAMPLES = rows_of([*some_lengths(40, 2, LENGTH), LENGTH, 2, LENGTH - 1])


def rows_in(batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    """The rows that lie in the segments of micro batches, as tuples of their tokens; checks all else."""
    found = []
    for batch in batches:
        assert batch.segment_ids is not None
        for ids, labels, segments in zip(batch.input_ids, batch.labels, batch.segment_ids, strict=True):
            for number in range(1, int(segments.max()) + 1):
                places = (segments == number).nonzero().flatten()
                assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
                row = int(ids[places[0]]) // 1000
                assert labels[places].tolist() == EXAMPLES.labels[EXAMPLES.span(row)].tolist()
                found.append(tuple(ids[places].tolist()))
            assert (labels[segments == 0] == IGNORED).all()
            assert (ids[segments == 0] == 0).all()
    return found


def whole(row: int) -> tuple[int, ...]:
    return tuple(EXAMPLES.input_ids[EXAMPLES.span(row)].tolist())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_every_row_of_a_step_once_whatever_the_way(way: str, num_ranks: int) -> None:
    rows = list(range(len(EXAMPLES)))[:32]
    plan = packer(EXAMPLES, way=way, num_ranks=num_ranks)
    by_rank = [plan.batches(rows, rank) for rank in range(num_ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    found = [row for batches in by_rank for row in rows_in(batches)]
    assert sorted(found) == sorted(map(whole, rows))
    for batches, share in zip(by_rank, plan.shares(rows), strict=True):
        assert sorted(row for batch in batches for row in batch.samples) == sorted(share)
        assert all(batch.input_ids.numel() <= 4 * LENGTH for batch in batches)
    planned = [each.positions for passes in plan.plan(rows) for each in passes]
    assert planned == [batch.input_ids.numel() for batches in by_rank for batch in batches]


def test_shares_are_those_of_pretraining() -> None:
    plan = packer(EXAMPLES, micro_batch=2, num_ranks=2)
    assert plan.shares(range(8)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert plan.shares(range(3)) == [[0, 1], [2]]


def test_lengths_are_a_few_fixed_ones() -> None:
    assert fixed_lengths(1024) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert fixed_lengths(20) == [20]
    assert all(length % 24 == 0 for length in fixed_lengths(960, 24))
    used = {
        batch.input_ids.shape[1]
        for start in range(0, 40, 4)
        for batch in packer(EXAMPLES).batches(range(start, start + 4), 0)
    }
    assert used <= set(fixed_lengths(LENGTH))


def test_short_rows_lie_close_together() -> None:
    examples = rows_of(some_lengths(320, 10, 60))
    positions = {}
    for way in WAYS:
        plan = packer(examples, way=way, sequence_length=1024, micro_batch=32)
        positions[way] = sum(
            each.positions for start in range(0, 320, 32) for each in plan.plan(range(start, start + 32))[0]
        )
    tokens = examples.starts[-1]
    assert tokens < positions["packed"] < 1.15 * tokens
    assert 1.15 * tokens < positions["bucketed"] < positions["longest"] < positions["fixed"]
    assert positions["fixed"] == 320 * 1024


def test_of_equal_plans_the_shortest_sequences() -> None:
    examples = rows_of([60, 60, 60, 60])
    (planned,) = packer(examples, sequence_length=256).plan(range(4))[0]
    assert (planned.length, len(planned.sequences)) == (64, 4)
    (planned,) = packer(rows_of([90, 30, 30, 30]), sequence_length=256).plan(range(4))[0]
    assert (planned.length, len(planned.sequences)) == (96, 2)


def test_first_fit_leaves_no_sequence_that_another_had_room_for() -> None:
    for sequence in (sequences := first_fit(range(len(EXAMPLES)), EXAMPLES, LENGTH)):
        assert sum(map(EXAMPLES.length, sequence)) <= LENGTH
    filled = sorted(sum(map(EXAMPLES.length, sequence)) for sequence in sequences)
    assert filled[0] + filled[1] > LENGTH


@pytest.mark.parametrize("way", ["packed", "bucketed"])
def test_ranks_with_less_do_empty_passes(way: str) -> None:
    examples = rows_of([LENGTH] * 4 + [4] * 4)
    plan = packer(examples, way=way, micro_batch=1, num_ranks=2)
    shares = plan.shares([0, 4, 1, 5, 2, 6, 3, 7])  # one rank has the long rows
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7]]
    long, short = (plan.batches([0, 4, 1, 5, 2, 6, 3, 7], rank) for rank in (0, 1))
    assert len(long) == len(short) == 4
    if way == "packed":
        assert [batch.num_labels for batch in short] == [8, 0, 0, 0]
        assert short[-1].samples == []
        assert (short[-1].segment_ids == 0).all()


def test_a_pipeline_gets_a_pass_a_stage_where_there_are_sequences_enough() -> None:
    rows = list(range(12))
    number = len(packer(EXAMPLES, micro_batch=12).plan(rows)[0][0].sequences)
    assert number > 4
    passes = packer(EXAMPLES, micro_batch=12, stages=4).plan(rows)[0]
    assert len(passes) == 4
    assert max(len(each.sequences) for each in passes) - min(len(each.sequences) for each in passes) <= 1
    (alone,) = packer(rows_of([LENGTH]), stages=4).plan([0])[0]
    assert len(alone.sequences) == 1


def test_a_shared_sequence_divides_evenly() -> None:
    for way in ("packed", "bucketed", "longest"):
        plan = packer(EXAMPLES, way=way, sequence_length=144, multiple_of=24)
        assert all(each.length % 24 == 0 for each in plan.plan(range(40))[0])


def test_the_order_is_a_function_of_seed_and_step() -> None:
    batches = training_batches(packer(EXAMPLES), global_batch=8, rank=0, seed=5)
    number = len(EXAMPLES)
    for step in (0, 4, 5, 11):  # the second epoch begins inside step 5
        expected = [sample_at(place, seed=5, num_samples=number) for place in range(step * 8, step * 8 + 8)]
        assert sorted(row for batch in batches(step) for row in batch.samples) == sorted(expected)
        again = training_batches(packer(EXAMPLES), global_batch=8, rank=0, seed=5)(step)
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches(step), again, strict=True))
    epochs = [
        [row for step in steps for batch in batches(step) for row in batch.samples]
        for steps in (range(5), range(6, 11))
    ]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_evaluation_has_every_row_once(num_ranks: int) -> None:
    plan = packer(EXAMPLES, num_ranks=num_ranks)
    parts = [
        evaluation_batches(plan, global_batch=12, rank=rank, num_samples=None) for rank in range(num_ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for row in rows_in(part)) == sorted(map(whole, range(len(EXAMPLES))))
    few = evaluation_batches(plan, global_batch=12, rank=0, num_samples=5)
    assert all(row < 5 for batch in few for row in batch.samples)
