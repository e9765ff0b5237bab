"""Samples as token ids and labels, in one chat format; what does not fit is counted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bc2exp.data.supervised import Sample
from bc2exp.text.chat import IGNORED, Example, count_marks, modelzoo_example, official_example
from bc2exp.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Examples:
    """Rows of ids and labels, ready to be learned: labels are already those of the position before.

    A row of n tokens has n - 1 positions, as nothing follows the last token.

    Attributes:
        input_ids, labels: int32, the rows one after the other.
        starts: where each row begins, and at last where all end.
        sources: the index of each row's sample among those that were encoded.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    starts: list[int]
    sources: list[int]

    def __len__(self) -> int:
        return len(self.sources)

    def length(self, row: int) -> int:
        """Positions of a row."""
        return self.starts[row + 1] - self.starts[row]

    def span(self, row: int) -> slice:
        """Where a row lies in `input_ids` and `labels`."""
        return slice(self.starts[row], self.starts[row + 1])

    def digest(self) -> str:
        """sha256 of the rows, hexadecimal."""
        result = hashlib.sha256(array("q", self.starts).tobytes())
        for part in (self.input_ids, self.labels):
            result.update(part.contiguous().numpy().data)
        return result.hexdigest()

    @property
    def num_labels(self) -> int:
        """Labels of all rows."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Encoded:
    """What encoding came to.

    Attributes:
        examples: the rows that fit.
        dropped: rows left out, because they are longer than the limit.
        truncated: rows whose end was cut off.
        no_answer: rows left out, because nothing that is learned was left of them within the limit.
        longest: tokens of the longest row, as it was.
        marks: places where a text says what begins a turn or ends a text; they became ordinary characters.
    """

    examples: Examples
    dropped: int
    truncated: int
    no_answer: int
    longest: int
    marks: int


def encode_samples(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    chat_format: str,
    sequence_length: int,
    over_long: str,
) -> Encoded:
    """Encode samples, in order.

    Args:
        chat_format: `modelzoo` (samples of one question) or `official`.
        sequence_length: tokens that a row may have.
        over_long: `drop` or `truncate` longer ones.
    """
    input_ids, labels = array("i"), array("i")
    starts, sources = [0], []
    dropped = truncated = no_answer = longest = marks = 0
    for index, sample in enumerate(samples):
        example = encode_sample(sample, tokenizer, chat_format)
        marks += sum(count_marks(tokenizer, turn.content) for turn in sample.turns)
        longest = max(longest, len(example.input_ids))
        over = len(example.input_ids) > sequence_length
        if over and over_long == "drop":
            dropped += 1
            continue
        targets = example.labels[1:sequence_length]
        if all(label == IGNORED for label in targets):
            no_answer += 1
            continue
        truncated += over
        input_ids.extend(example.input_ids[: len(targets)])
        labels.extend(targets)
        starts.append(len(input_ids))
        sources.append(index)
    examples = Examples(
        torch.tensor(input_ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32), starts, sources
    )
    return Encoded(examples, dropped, truncated, no_answer, longest, marks)


def encode_sample(sample: Sample, tokenizer: Tokenizer, chat_format: str) -> Example:
    """The ids and labels of a sample in a chat format."""
    if chat_format == "official":
        return official_example(tokenizer, sample.turns)
    assert chat_format == "modelzoo", chat_format
    return modelzoo_example(tokenizer, sample.prompt, sample.answer)
