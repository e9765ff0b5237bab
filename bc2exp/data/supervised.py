"""Rows of questions and answers, from a table or a file of conversations, good and bad.

Three kinds of rows become samples of one form: turns. Which columns mean what is configuration, so a new data
set needs no code. What is wrong with a row is said, counted and listed; a row is never changed.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from bc2exp.config.errors import UserError
from bc2exp.config.supervised import placeholders
from bc2exp.data import rows
from bc2exp.data.quarantine import Limits
from bc2exp.data.rows import MAX_ROW_BYTES, BadRow, Record
from bc2exp.data.sources import TextSource, read_records
from bc2exp.text.chat import ROLES, Turn

# The reasons of this kind of data, beside those of `rows`.
NO_WORD = "label {label!r} has no word in dataset.label_words"
NO_TURNS = "not a list of turns"
NO_ROLE = "role {role!r} is not in dataset.roles"
NO_ORDER = "turns do not alternate, user first, assistant last"
_SHOWN = 40


@dataclass(frozen=True)
class Sample:
    """A row that can be learned from.

    Attributes:
        text: what tables show of it: the review, the question, the first thing that a user says.
        turns: what is said; the last turn is the assistant's.
        label: classification: the label as it stands in the table.
        word: classification: its word, which is the last turn's content.
        file, number: where it stands, the number from 1.
    """

    text: str
    turns: tuple[Turn, ...]
    label: str | None = None
    word: str | None = None
    file: str = ""
    number: int = 0

    @property
    def prompt(self) -> str:
        """The question of a sample of one question."""
        return self.turns[0].content

    @property
    def answer(self) -> str:
        """What is said last."""
        return self.turns[-1].content


class Kind(Protocol):
    """What the rows of a data set hold."""

    def columns(self) -> dict[str, str]:
        """{column: the key of the configuration that names it}."""

    def sample(self, record: Record) -> Sample | BadRow | None:
        """The sample of a row; None where it says nothing."""


@dataclass(frozen=True)
class Classification:
    """A text and its label; see `DatasetConfig` for the meanings."""

    text_column: str
    label_column: str
    label_words: Mapping[str, str]
    prompt: str
    max_row_bytes: int = MAX_ROW_BYTES

    def columns(self) -> dict[str, str]:
        """See `Kind`."""
        named = dict.fromkeys(placeholders(self.prompt), "dataset.prompt")
        return named | {
            self.text_column: "dataset.text_column",
            self.label_column: "dataset.label_column",
        }

    def sample(self, record: Record) -> Sample | BadRow | None:
        """See `Kind`."""
        texts = _texts(record, [self.text_column, *placeholders(self.prompt)], self.max_row_bytes)
        if isinstance(texts, BadRow):
            return texts
        label = _label(record.values[self.label_column])
        if label is None:
            return BadRow(record.file, record.number, rows.NULL, "")
        if label not in self.label_words:
            return _bad(record, NO_WORD.format(label=label[:_SHOWN]), label)
        if not texts[self.text_column].strip():
            return None
        word = self.label_words[label]
        turns = (Turn("user", fill(self.prompt, texts)), Turn("assistant", word))
        return Sample(texts[self.text_column], turns, label, word, record.file, record.number)


@dataclass(frozen=True)
class Instruction:
    """A question and its answer; see `DatasetConfig` for the meanings."""

    prompt: str
    answer_column: str
    input_column: str | None = None
    prompt_without_input: str | None = None
    max_row_bytes: int = MAX_ROW_BYTES

    def columns(self) -> dict[str, str]:
        """See `Kind`."""
        named = dict.fromkeys(placeholders(self.prompt_without_input), "dataset.prompt_without_input")
        named |= dict.fromkeys(placeholders(self.prompt), "dataset.prompt")
        named |= {self.input_column: "dataset.input_column"} if self.input_column else {}
        return named | {self.answer_column: "dataset.answer_column"}

    def sample(self, record: Record) -> Sample | BadRow | None:
        """See `Kind`."""
        texts = _texts(record, self.columns(), self.max_row_bytes)
        if isinstance(texts, BadRow):
            return texts
        prompt = self.prompt
        if self.input_column and self.prompt_without_input and not texts[self.input_column].strip():
            prompt = self.prompt_without_input
        question, answer = fill(prompt, texts), texts[self.answer_column]
        if not question.strip() or not answer.strip():
            return None
        turns = (Turn("user", question), Turn("assistant", answer))
        return Sample(question, turns, file=record.file, number=record.number)


@dataclass(frozen=True)
class Conversation:
    """Turns under a key; see `DatasetConfig` for the meanings."""

    turns_column: str
    role_key: str
    content_key: str
    roles: Mapping[str, str]
    system_column: str | None = None
    max_row_bytes: int = MAX_ROW_BYTES

    def columns(self) -> dict[str, str]:
        """See `Kind`."""
        named = {self.turns_column: "dataset.turns_column"}
        return named | ({self.system_column: "dataset.system_column"} if self.system_column else {})

    def sample(self, record: Record) -> Sample | BadRow | None:
        """See `Kind`."""
        given = record.values[self.turns_column]
        if not isinstance(given, list):
            return _bad(record, NO_TURNS, given)
        if not given:
            return None
        turns: list[Turn] = []
        if self.system_column:
            said = _texts(record, [self.system_column], self.max_row_bytes)
            if isinstance(said, BadRow):
                return said
            turns += [Turn("system", text) for text in said.values() if text]
        for each in given:
            if not isinstance(each, dict) or self.role_key not in each or self.content_key not in each:
                return _bad(record, NO_TURNS, each)
            role = self.roles.get(str(each[self.role_key]))
            if role is None:
                return _bad(record, NO_ROLE.format(role=str(each[self.role_key])[:_SHOWN]), each)
            text = _text(record, each[self.content_key], self.max_row_bytes)
            if isinstance(text, BadRow):
                return text
            turns.append(Turn(role, text))
        talk = [turn for turn in turns if turn.role != "system"]
        expected = [ROLES[1 + index % 2] for index in range(len(talk))]
        first = next((index for index, turn in enumerate(turns) if turn.role != "system"), 0)
        late = any(turn.role == "system" for turn in turns[first:])
        if [turn.role for turn in talk] != expected or not talk or len(talk) % 2 or late:
            return _bad(record, NO_ORDER, given)
        return Sample(talk[0].content, tuple(turns), file=record.file, number=record.number)


def fill(template: str, texts: Mapping[str, str]) -> str:
    """A template with its columns filled in. Braces in the texts are text."""
    parts = (
        literal + ("" if name is None else texts[name])
        for literal, name, _, _ in string.Formatter().parse(template)
    )
    return "".join(parts)


@dataclass
class Reading:
    """What the files of a data set hold.

    Attributes:
        samples: the good rows, in order.
        num_rows: all rows.
        bad: {reason: rows}; they are listed in `listed`, as many as fit.
        empty: rows that say nothing.
        conflicts: texts that stand there with several labels.
    """

    samples: list[Sample] = field(default_factory=list)
    num_rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    listed: list[BadRow] = field(default_factory=list)
    empty: int = 0
    conflicts: list[str] = field(default_factory=list)


MOST_LISTED = 10_000


def read_samples(source: TextSource, kind: Kind, limits: Limits) -> Reading:
    """All samples of the files, in order; the same anywhere.

    Raises:
        UserError: a file that cannot be read, a column that is not there, more bad rows than `limits` allow,
            no sample at all, or samples of one label only.
    """
    reading = Reading()
    for record in read_records(source, kind.columns()):
        reading.num_rows += 1
        sample = kind.sample(record) if isinstance(record, Record) else record
        if sample is None:
            reading.empty += 1
        elif isinstance(sample, BadRow):
            reading.bad[sample.reason] += 1
            if len(reading.listed) < MOST_LISTED:
                reading.listed.append(sample)
        else:
            reading.samples.append(sample)
    _require_good(reading, source, limits)
    labels: dict[str, set[str]] = {}
    for sample in reading.samples:
        if sample.label is not None:
            labels.setdefault(sample.text, set()).add(sample.label)
    reading.conflicts = [text for text, found in labels.items() if len(found) > 1]
    found = set().union(*labels.values()) if labels else set()
    if len(found) == 1:
        raise UserError(
            f"dataset.label_column: every row of {source.files[0]} has the label {found.pop()!r}; there is "
            "nothing to tell apart"
        )
    return reading


def _require_good(reading: Reading, source: TextSource, limits: Limits) -> None:
    num_bad = reading.bad.total()
    if not reading.num_rows:
        raise UserError(f"dataset.path={source.files[0]}: holds no row")
    reasons = ", ".join(f"{count} {reason}" for reason, count in reading.bad.most_common(5))
    first = ", ".join(f"{row.file} row {row.number} ({row.reason})" for row in reading.listed[:3])
    if not reading.samples:
        raise UserError(
            f"dataset.path={source.files[0]}: none of {reading.num_rows} rows can be learned from"
            + (f"; bad: {reasons}; {first}" if num_bad else ": all are empty")
        )
    if num_bad > limits.allowed(reading.num_rows):
        raise UserError(
            f"dataset.max_bad_rows={limits.max_bad_rows}, dataset.max_bad_fraction="
            f"{limits.max_bad_fraction:g}: {num_bad} of {reading.num_rows} rows are bad ({reasons}): {first}"
            "; repair them or allow more"
        )


def _texts(record: Record, columns: Iterable[str], max_row_bytes: int) -> dict[str, str] | BadRow:
    texts = {}
    for column in columns:
        text = _text(record, record.values[column], max_row_bytes)
        if isinstance(text, BadRow):
            return text
        texts[column] = text
    return texts


def _text(record: Record, value: Any, max_row_bytes: int) -> str | BadRow:
    if value is not None and not isinstance(value, (str, bytes)):
        return _bad(record, rows.NOT_TEXT, value)
    judged = rows.judge(record.file, record.number, value, max_row_bytes)
    return judged if isinstance(judged, BadRow) else judged.text


def _label(value: Any) -> str | None:
    """A label as text: 1, 1.0 and "1" are one; true and false as JSON writes them."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _bad(record: Record, reason: str, content: Any) -> BadRow:
    return rows.bad(record.file, record.number, reason, str(content))
