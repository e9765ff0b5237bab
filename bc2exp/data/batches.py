"""What one rank computes in one optimizer step.

The global batch of a step is a list of positions in the order of samples; micro batch by micro batch, each
rank takes its slice. So the same samples make the same step on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bc2exp.data.order import sample_at
from bc2exp.data.tokens import TokenStream

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank.

    Attributes:
        input_ids: int64 [batch, sequence].
        labels: int64 [batch, sequence]: the token after each input, or -100.
        samples: the sample of each row, -1 for a row that only fills up; of packed rows, all that are in it.
        segment_ids: int64 [batch, sequence]: the document of each input, from 1 up, 0 in a row that only
            fills up; None where attention does not stop at the end of a document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    samples: list[int]
    segment_ids: torch.Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORED).sum())


def assemble(
    stream: TokenStream, samples: list[int], sequence_length: int, *, separate_documents: bool = False
) -> MicroBatch:
    """Rows of a micro batch; a sample of -1 becomes a row that counts for nothing.

    With `separate_documents` the last token of a document has no label: what follows is another text.
    """
    shape = (len(samples), sequence_length + 1)
    tokens = torch.zeros(shape, dtype=torch.int64)
    segments = torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        if sample >= 0:
            tokens[row] = stream.sample(sample, sequence_length)
            if separate_documents:
                segments[row] = stream.segments(sample, sequence_length)
    labels = tokens[:, 1:].clone()
    labels[torch.tensor(samples) < 0] = IGNORED
    if not separate_documents:
        return MicroBatch(tokens[:, :-1], labels, samples)
    labels[segments[:, 1:] != segments[:, :-1]] = IGNORED
    return MicroBatch(tokens[:, :-1], labels, samples, segments[:, :-1])


def training_batches(
    stream: TokenStream,
    *,
    sequence_length: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    seed: int,
    separate_documents: bool = False,
) -> Callable[[int], list[MicroBatch]]:
    """A function from a step (from 0) to this rank's micro batches of it."""
    num_samples = stream.num_samples(sequence_length)

    def batches_of(step: int) -> list[MicroBatch]:
        micro_batches = []
        for start in range(step * global_batch, (step + 1) * global_batch, micro_batch * num_ranks):
            first = start + rank * micro_batch
            positions = range(first, first + micro_batch)
            chosen = [sample_at(position, seed=seed, num_samples=num_samples) for position in positions]
            micro_batches.append(
                assemble(stream, chosen, sequence_length, separate_documents=separate_documents)
            )
        return micro_batches

    return batches_of


def evaluation_batches(
    stream: TokenStream,
    *,
    sequence_length: int,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    num_samples: int | None,
    separate_documents: bool = False,
) -> list[MicroBatch]:
    """This rank's share of the held-out samples, in order.

    Every rank gets the same number of micro batches of the same size (sharded layouts communicate in every
    forward pass), the last ones filled up with rows that count for nothing.
    """
    available = stream.num_samples(sequence_length)
    count = available if num_samples is None else min(num_samples, available)
    unit = micro_batch * num_ranks
    micro_batches = []
    for start in range(0, count, unit):
        first = start + rank * micro_batch
        chosen = [index if index < count else -1 for index in range(first, first + micro_batch)]
        micro_batches.append(assemble(stream, chosen, sequence_length, separate_documents=separate_documents))
    return micro_batches
