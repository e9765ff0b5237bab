"""Samples as ids and labels: the shift, what is too long, what is said of it."""

from __future__ import annotations

import pytest

from bc2exp.data.examples import encode_sample, encode_samples
from bc2exp.data.supervised import Sample
from bc2exp.embedded import TOKENIZER
from bc2exp.text.chat import Turn, role_ids
from bc2exp.text.tokenizer import Tokenizer

TOKENS = Tokenizer(TOKENIZER)


def sample(question: str, answer: str = "积极") -> Sample:
    return Sample(question, (Turn("user", question), Turn("assistant", answer)))


def encoded(*samples: Sample, **changes):
    settings = {"chat_format": "modelzoo", "sequence_length": 64, "over_long": "drop", **changes}
    return encode_samples(samples, TOKENS, **settings)


@pytest.mark.parametrize("chat_format", ["modelzoo", "official"])
def test_a_label_is_the_token_that_follows(chat_format: str) -> None:
    one, two = sample("很快 -> "), sample("慢 -> ", "消极")
    examples = encoded(one, two, chat_format=chat_format).examples
    for row, each in enumerate((one, two)):
        example = encode_sample(each, TOKENS, chat_format)
        span = examples.span(row)
        assert examples.input_ids[span].tolist() == example.input_ids[:-1]
        assert examples.labels[span].tolist() == example.labels[1:]
    assert len(examples) == 2
    assert examples.sources == [0, 1]


def test_only_the_answer_and_the_end_are_learned() -> None:
    examples = encoded(sample("很快 -> ")).examples
    learned = [
        (before, label)
        for before, label in zip(examples.input_ids.tolist(), examples.labels.tolist(), strict=True)
        if label != -100
    ]
    answer = TOKENS.encode("积极")
    expected = [*answer, TOKENS.eos_id]
    assert learned == list(zip([role_ids(TOKENS).assistant, *answer], expected, strict=True))


LONG = "很" * 80


def test_long_rows_are_dropped_and_counted() -> None:
    found = encoded(sample("快"), sample(LONG), sample("慢"))
    assert (found.dropped, found.truncated, found.no_answer) == (1, 0, 0)
    assert found.longest == len(encode_sample(sample(LONG), TOKENS, "modelzoo").input_ids) > 64
    assert found.examples.sources == [0, 2]


def test_a_row_of_exactly_the_limit_stays() -> None:
    length = len(encode_sample(sample(LONG), TOKENS, "modelzoo").input_ids)
    assert encoded(sample(LONG), sequence_length=length).dropped == 0
    assert encoded(sample(LONG), sequence_length=length - 1).dropped == 1


def test_truncated_rows_keep_their_beginning() -> None:
    each = sample("快", LONG)
    found = encoded(each, over_long="truncate")
    assert (found.dropped, found.truncated, found.no_answer) == (0, 1, 0)
    example = encode_sample(each, TOKENS, "modelzoo")
    assert found.examples.input_ids.tolist() == example.input_ids[:63]
    assert found.examples.labels.tolist() == example.labels[1:64]


def test_a_question_longer_than_the_limit_leaves_nothing_to_learn() -> None:
    found = encoded(sample(LONG), sample("快"), over_long="truncate")
    assert (found.truncated, found.no_answer, found.examples.sources) == (0, 1, [1])


def test_marks_in_texts_are_counted() -> None:
    found = encoded(sample("好<reserved_106></s>"), sample("快"))
    assert found.marks == 2
    ids = found.examples.input_ids.tolist()
    assert ids.count(role_ids(TOKENS).user) == 2
    assert ids.count(role_ids(TOKENS).assistant) == 2
    assert TOKENS.eos_id not in ids
