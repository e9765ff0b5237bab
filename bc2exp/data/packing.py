"""How the rows of an optimizer step become the sequences that ranks compute on.

Rows differ much in length, and what is not text in a sequence is computed for nothing. Packed, the rows of a
rank's share of a step lie in as few positions as a few fixed lengths allow, each apart from its neighbours:
attention stops at the end of a row and positions begin anew, so a row is computed as if it were alone. The
other ways are there to compare with: one row a sequence, padded.

Which rows make a step, and which rank has them, is the same in all ways, and a function of the seed and the
number of samples consumed. Ranks do as many forward passes as each other, as sharded layouts exchange
something in every one of them; the plans of all ranks are made on each, so nothing need be asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bc2exp.data.batches import IGNORED, MicroBatch
from bc2exp.data.examples import Examples
from bc2exp.data.order import sample_at

WAYS = ("packed", "bucketed", "longest", "fixed")
SHORTEST = 32
"""No fixed length is shorter, unless samples are."""


class Pass(NamedTuple):
    """A forward pass: the rows of each sequence, and the length of all of them."""

    sequences: list[list[int]]
    length: int

    @property
    def positions(self) -> int:
        """Positions computed, padding included."""
        return len(self.sequences) * self.length


def fixed_lengths(sequence_length: int, multiple_of: int = 1) -> list[int]:
    """The lengths that sequences may have, ascending: 1, 3/4, 1/2, 3/8, ... of the longest, rounded up."""
    lengths, half = {sequence_length}, sequence_length / 2
    while half >= SHORTEST:
        lengths |= {math.ceil(part / multiple_of) * multiple_of for part in (half, 1.5 * half)}
        half /= 2
    return sorted(lengths)


@dataclass(frozen=True)
class Packer:
    """Plans steps.

    Args:
        examples: the rows.
        way: one of `WAYS`.
        sequence_length: the longest sequence; no row is longer.
        micro_batch: samples of a forward pass, so its positions are at most `micro_batch x sequence_length`.
        num_ranks: into how many shares the rows of a step are divided.
        stages: of a pipeline, which wants as many forward passes in a step.
        multiple_of: what lengths have to be a multiple of, for ranks that share a sequence.
    """

    examples: Examples
    way: str
    sequence_length: int
    micro_batch: int
    num_ranks: int
    stages: int = 1
    multiple_of: int = 1

    def shares(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of a step, or of less than one at the end of an evaluation, by rank: micro batch by micro
        batch, each rank takes its slice."""
        shares: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for start in range(0, len(rows), self.micro_batch):
            shares[start // self.micro_batch % self.num_ranks] += rows[start : start + self.micro_batch]
        return shares

    def plan(self, rows: Sequence[int]) -> list[list[Pass]]:
        """The forward passes of every rank for the rows of a step; as many for each rank."""
        found = [self._passes(share) for share in self.shares(rows)]
        number = max(len(passes) for passes in found)
        if self.way == "packed":
            # a pipeline with fewer passes than stages has stages that wait
            number = max(number, min(self.stages, max(sum(map(_width, passes)) for passes in found)))
            found = [_spread(passes, number) for passes in found]
        empty = Pass([[]], self._fitting(0)[0])
        return [passes + [empty] * (number - len(passes)) for passes in found]

    def batches(self, rows: Sequence[int], rank: int) -> list[MicroBatch]:
        """The micro batches of a rank for the rows of a step."""
        return [self._assemble(each) for each in self.plan(rows)[rank]]

    def _passes(self, share: list[int]) -> list[Pass]:
        """The forward passes of one rank's share."""
        if self.way == "packed":
            return self._packed(share)
        if self.way == "bucketed":
            buckets: dict[int, list[int]] = {}
            for row in share:
                buckets.setdefault(self._fitting(self.examples.length(row))[0], []).append(row)
            return [
                Pass([[row] for row in chunk], length)
                for length, bucket in sorted(buckets.items())
                for chunk in _chunks(bucket, self.micro_batch)
            ]
        passes = []
        for chunk in _chunks(share, self.micro_batch):
            longest = max(map(self.examples.length, chunk))
            longest = math.ceil(longest / self.multiple_of) * self.multiple_of
            length = self.sequence_length if self.way == "fixed" else longest
            passes.append(Pass([[row] for row in chunk], length))
        return passes

    def _packed(self, share: list[int]) -> list[Pass]:
        """The share in as few positions as any one fixed length takes; of equals the shortest length, where
        attention costs least."""
        if not share:
            return []
        best: Pass | None = None
        for length in self._fitting(max(map(self.examples.length, share))):
            candidate = Pass(first_fit(share, self.examples, length), length)
            if best is None or candidate.positions < best.positions:
                best = candidate
            if len(candidate.sequences) == 1:
                break  # a longer one only adds padding
        assert best is not None
        width = max(1, self.micro_batch * self.sequence_length // best.length)
        return [Pass(chunk, best.length) for chunk in _chunks(best.sequences, width)]

    def _fitting(self, length: int) -> list[int]:
        """The fixed lengths that hold a row of `length` positions."""
        return [each for each in fixed_lengths(self.sequence_length, self.multiple_of) if each >= length]

    def _assemble(self, planned: Pass) -> MicroBatch:
        shape = (len(planned.sequences), planned.length)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        segment_ids = torch.zeros(shape, dtype=torch.int64)
        for line, rows in enumerate(planned.sequences):
            start = 0
            for number, row in enumerate(rows, 1):
                span = self.examples.span(row)
                here = slice(start, start + self.examples.length(row))
                input_ids[line, here] = self.examples.input_ids[span].long()
                labels[line, here] = self.examples.labels[span].long()
                segment_ids[line, here] = number
                start = here.stop
        samples = [row for rows in planned.sequences for row in rows]
        return MicroBatch(input_ids, labels, samples, segment_ids)


def first_fit(share: Sequence[int], examples: Examples, length: int) -> list[list[int]]:
    """Rows in sequences of `length`, the longest row first, each where it fits first (a well-known heuristic:
    at most 11/9 of the fewest sequences possible, and one)."""
    sequences: list[list[int]] = []
    room: list[int] = []
    for row in sorted(share, key=lambda row: -examples.length(row)):
        needed = examples.length(row)
        place = next((index for index, left in enumerate(room) if left >= needed), None)
        if place is None:
            sequences.append([row])
            room.append(length - needed)
        else:
            sequences[place].append(row)
            room[place] -= needed
    return sequences


def training_batches(
    packer: Packer, *, global_batch: int, rank: int, seed: int
) -> Callable[[int], list[MicroBatch]]:
    """A function from a step (from 0) to this rank's micro batches of it."""

    def batches_of(step: int) -> list[MicroBatch]:
        positions = range(step * global_batch, (step + 1) * global_batch)
        number = len(packer.examples)
        return packer.batches(
            [sample_at(position, seed=seed, num_samples=number) for position in positions], rank
        )

    return batches_of


def evaluation_batches(
    packer: Packer, *, global_batch: int, rank: int, num_samples: int | None
) -> list[MicroBatch]:
    """This rank's share of the held-out rows, in order, as many at a time as a training step has."""
    number = len(packer.examples) if num_samples is None else min(num_samples, len(packer.examples))
    return [
        batch
        for start in range(0, number, global_batch)
        for batch in packer.batches(range(start, min(start + global_batch, number)), rank)
    ]


def _chunks(values: Sequence, size: int) -> list:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _width(planned: Pass) -> int:
    return len(planned.sequences)


def _spread(passes: list[Pass], number: int) -> list[Pass]:
    """The same sequences in `number` passes as even as can be, or in fewer where there are fewer."""
    sequences = [sequence for each in passes for sequence in each.sequences]
    number = min(number, len(sequences))
    bounds = [len(sequences) * index // max(1, number) for index in range(number + 1)]
    return [Pass(sequences[bounds[i] : bounds[i + 1]], passes[0].length) for i in range(number)]
