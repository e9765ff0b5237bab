"""Rows of questions and answers: what becomes a sample, and what of a bad row is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bc2exp.config.errors import UserError
from bc2exp.data.quarantine import Limits
from bc2exp.data.sources import TextSource
from bc2exp.data.supervised import Classification, Conversation, Instruction, read_samples
from bc2exp.text.chat import Turn

REVIEWS = Classification("review", "label", {"1": "积极", "0": "消极"}, "{review} -> ")
ALPACA = Instruction("{instruction}\n{input}", "output", "input", "{instruction}")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
TALKS = Conversation("conversations", "from", "value", ROLES, None)


def written(path: Path, content: str | bytes) -> TextSource:
    """A source of one file with a content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return TextSource((path,))


def table(path: Path, *rows: tuple) -> TextSource:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "review"), *rows])
    return TextSource((path,))


def lines(path: Path, *objects: object) -> TextSource:
    return written(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects))


STRICT = Limits(0, 0.0)


def refused(source: TextSource, kind=REVIEWS, limits: Limits = STRICT) -> str:
    with pytest.raises(UserError) as error:
        read_samples(source, kind, limits)
    assert "\n" not in str(error.value)
    return str(error.value)


GOOD = [(1, "好吃"), (0, "慢，\n凉了"), (1, 'a "b", c')]


def test_a_table_of_labels(tmp_path: Path) -> None:
    reading = read_samples(table(tmp_path / "a.csv", *GOOD), REVIEWS, Limits(0, 0.0))
    assert [sample.text for sample in reading.samples] == [text for _, text in GOOD]
    first = reading.samples[0]
    assert first.turns == (Turn("user", "好吃 -> "), Turn("assistant", "积极"))
    assert (first.prompt, first.answer, first.label, first.word) == ("好吃 -> ", "积极", "1", "积极")
    assert [sample.number for sample in reading.samples] == [1, 2, 3]
    assert (reading.num_rows, reading.bad, reading.conflicts) == (3, {}, [])


def test_a_label_means_the_same_in_every_format(tmp_path: Path) -> None:
    rows = [{"label": label, "review": text} for label, text in GOOD]
    columns = {"label": [float(label) for label, _ in GOOD], "review": [text for _, text in GOOD]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    for source in (lines(tmp_path / "a.jsonl", *rows), TextSource((tmp_path / "a.parquet",))):
        samples = read_samples(source, REVIEWS, Limits(0, 0.0)).samples
        assert [(sample.label, sample.text) for sample in samples] == [(str(n), text) for n, text in GOOD]
    yes = Classification("review", "label", {"true": "好", "false": "坏"}, "{review}")
    flags = lines(tmp_path / "b.jsonl", *({"label": bool(label), "review": text} for label, text in GOOD))
    assert [sample.word for sample in read_samples(flags, yes, Limits()).samples] == ["好", "坏", "好"]


def test_a_text_with_two_labels_is_kept_and_told(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", *GOOD, (0, "好吃"), (1, 'a "b", c'))
    reading = read_samples(source, REVIEWS, Limits())
    assert reading.conflicts == ["好吃"]
    assert len(reading.samples) == 5


def test_braces_in_a_text_are_text(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", (1, "{review} {0} {{"), (0, "}"))
    kind = Classification("review", "label", REVIEWS.label_words, "{{{label}}} {review}")
    assert read_samples(source, kind, Limits()).samples[0].prompt == "{1} {review} {0} {{"


def test_a_column_that_is_missing_is_named_with_its_key(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", *GOOD)
    for kind, told in (
        (Classification("text", "label", {}, "{label}"), "dataset.text_column=text: "),
        (Classification("review", "lable", {}, "{review}"), "dataset.label_column=lable: "),
        (Classification("review", "label", {}, "{revew}"), "dataset.prompt=revew: "),
        (Instruction("{review}", "answer"), "dataset.answer_column=answer: "),
    ):
        text = refused(source, kind)
        assert text.startswith(told + str(tmp_path / "a.csv"))
        assert text.endswith("has no such column; it has label, review")
    assert "none of 1 rows can be learned from; bad: 1 missing key" in refused(
        lines(tmp_path / "a.jsonl", {"label": 1, "text": "x"})
    )


def test_a_label_outside_the_map_is_counted_and_named(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", *GOOD, (2, "不知道"), ("", "没有"), (" 1", "空格"))
    text = refused(source, limits=Limits(2, 0.0))
    assert "3 of 6 rows are bad (1 label '2' has no word in dataset.label_words, 1 label ''" in text
    assert "row 4 (label '2' has no word" in text
    reading = read_samples(source, REVIEWS, Limits(3, 0.0))
    assert len(reading.samples) == 3
    assert [(row.number, row.excerpt) for row in reading.listed] == [(4, "2"), (5, ""), (6, " 1")]


def test_broken_quoting_is_named(tmp_path: Path) -> None:
    never_closed = written(tmp_path / "a.csv", 'label,review\n1,好\n0,"慢\n1,快\n')
    assert "a quote opened in row 2 ('0,\"慢" in refused(never_closed)
    swallowed = written(tmp_path / "b.csv", 'label,review\n1,好\n0,"慢\n1,快",x\n0,差\n')
    assert "1 wrong number of fields): " in refused(swallowed)
    reading = read_samples(swallowed, REVIEWS, Limits(1, 0.0))
    assert [sample.text for sample in reading.samples] == ["好", "差"]


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    assert "dataset.text_column=review: " in refused(written(tmp_path / "a.csv", ""))
    assert refused(written(tmp_path / "b.csv", "label,review\n")).endswith("b.csv: holds no row")
    assert refused(table(tmp_path / "c.csv", (1, " "), (0, ""))).endswith(
        "rows can be learned from: all are empty"
    )


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    text = refused(table(tmp_path / "a.csv", (1, "好"), (1, "快")))
    assert text.startswith("dataset.label_column: every row of ")
    assert "has the label '1'" in text


TWO = '{"label": 1, "review": "a"}\n{"label": 0, "review": "b"}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"label,review\n1,\xff\xfe\n1,a\n0,b\n", "invalid UTF-8"),
        (b"label,review\n1,a\0\n1,a\n0,b\n", "NUL character"),
        (
            '{"label": 1, "review": ["x"]}\n{"label": 1, "review": "a"}\n{"label": 0, "review": "b"}',
            "not text",
        ),
        ('{"label": null, "review": "x"}\n{"label": 1, "review": "a"}\n{"label": 0, "review": "b"}', "null"),
        ('{"label": 1, "review": null}\n{"label": 1, "review": "a"}\n{"label": 0, "review": "b"}', "null"),
        ('{"label": 1,\n{"label": 1, "review": "a"}\n{"label": 0, "review": "b"}', "not a JSON object"),
    ],
)
def test_a_bad_row_is_left_out_with_its_reason(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / ("a.csv" if str(content[:5]) == str(b"label") else "a.jsonl")
    reading = read_samples(written(path, content), REVIEWS, Limits(1, 0.0))
    assert reading.bad == {reason: 1}
    assert reading.listed[0].number == 1
    assert [sample.text for sample in reading.samples] == ["a", "b"]


def test_instructions(tmp_path: Path) -> None:
    rows = [
        {"instruction": "翻译", "input": "cat", "output": "猫"},
        {"instruction": "问好", "input": "", "output": "你好"},
        {"instruction": "不答", "input": "", "output": ""},
    ]
    reading = read_samples(lines(tmp_path / "a.jsonl", *rows), ALPACA, Limits(0, 0.0))
    assert [(sample.prompt, sample.answer) for sample in reading.samples] == [
        ("翻译\ncat", "猫"),
        ("问好", "你好"),
    ]
    assert (reading.empty, reading.samples[0].label) == (1, None)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    again = read_samples(TextSource((tmp_path / "a.parquet",)), ALPACA, Limits(0, 0.0))
    assert [sample.turns for sample in again.samples] == [sample.turns for sample in reading.samples]


def turn(role: str, text: object) -> dict:
    return {"from": role, "value": text}


def test_conversations(tmp_path: Path) -> None:
    talk = [
        turn("system", "简短"),
        turn("human", "你好"),
        turn("gpt", "你好！"),
        turn("human", "?"),
        turn("gpt", "!"),
    ]
    source = lines(tmp_path / "a.jsonl", {"conversations": talk, "extra": 1})
    (sample,) = read_samples(source, TALKS, Limits(0, 0.0)).samples
    assert [each.role for each in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert (sample.text, sample.answer) == ("你好", "!")
    other = Conversation("turns", "role", "content", {"user": "user", "bot": "assistant"}, "system")
    row = {"turns": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], "system": "短"}
    (sample,) = read_samples(lines(tmp_path / "b.jsonl", row), other, Limits(0, 0.0)).samples
    assert sample.turns == (Turn("system", "短"), Turn("user", "a"), Turn("assistant", "b"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("text", "not a list of turns"),
        ([{"from": "human"}], "not a list of turns"),
        ([turn("narrator", "x"), turn("gpt", "y")], "role 'narrator' is not in dataset.roles"),
        ([turn("gpt", "x")], "turns do not alternate, user first, assistant last"),
        ([turn("human", "x")], "turns do not alternate, user first, assistant last"),
        ([turn("human", "x"), turn("human", "y")], "turns do not alternate, user first, assistant last"),
        (
            [turn("human", "x"), turn("system", "s"), turn("gpt", "y")],
            "turns do not alternate, user first, assistant last",
        ),
        ([turn("human", "x"), turn("gpt", 3)], "not text"),
    ],
)
def test_a_conversation_that_is_none(tmp_path: Path, turns: object, reason: str) -> None:
    good = [turn("human", "x"), turn("gpt", "y")]
    source = lines(tmp_path / "a.jsonl", {"conversations": turns}, {"conversations": good})
    reading = read_samples(source, TALKS, Limits(1, 0.0))
    assert reading.bad == {reason: 1}
    assert len(reading.samples) == 1
