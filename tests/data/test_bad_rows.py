import csv
import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bc2exp.config.errors import UserError
from bc2exp.data import csv_files, line_files, rows
from bc2exp.data.rows import BadRow, Row
from bc2exp.data.sources import check_columns, find_source
from tests.data.row_files import rows_of, texts_of, write_rows

CLEAN = [f'第{number} row, said "{"long " * (number % 7)}"' for number in range(40)]
BAD: dict[str, tuple[str | bytes | None, str, set[str]]] = {
    "null": (None, rows.NULL, {".parquet", ".jsonl"}),
    "invalid UTF-8": (b"caf\xe9 au lait", rows.NOT_UTF8, {".parquet", ".csv", ".jsonl", ".txt"}),
    "surrogate in UTF-8": (b"a\xed\xa0\x80b", rows.NOT_UTF8, {".parquet", ".csv", ".jsonl", ".txt"}),
    "byte order mark": ("a\ufeffb", rows.BYTE_ORDER_MARK, {".parquet", ".csv", ".jsonl", ".txt"}),
    "mark at the start of a row": ("\ufeffb", rows.BYTE_ORDER_MARK, {".parquet", ".csv", ".jsonl", ".txt"}),
    "NUL": ("a\0b", rows.NUL, {".parquet", ".csv", ".jsonl", ".txt"}),
    "too long": ("long " * 201, rows.TOO_LONG, {".parquet", ".csv", ".jsonl", ".txt"}),
    "too long in characters of three bytes": (
        "长" * 334,
        rows.TOO_LONG,
        {".parquet", ".csv", ".jsonl", ".txt"},
    ),
}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".txt"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_costs_no_other(tmp_path: Path, kind: str, suffix: str) -> None:
    value, reason, suffixes = BAD[kind]
    if suffix not in suffixes:
        assert (kind, suffix) in {("null", ".csv"), ("null", ".txt")}  # which have no null
        return
    path = tmp_path / f"a{suffix}"
    write_rows(path, [*CLEAN])
    clean = rows_of(path)
    for place in (0, 7, 40):
        write_rows(path, [*CLEAN[:place], value, *CLEAN[place:]])
        if suffix in (".jsonl", ".txt") and place == 0 and kind == "mark at the start of a row":
            # there it is the mark of the file, or inside the first string
            assert len(rows_of(path)) == 41
            continue
        found = rows_of(path)
        (bad,) = (row for row in found if isinstance(row, BadRow))
        assert (bad.file, bad.number, bad.reason) == (str(path), place + 1, reason)
        assert len(bad.excerpt) <= 200
        bad.excerpt.encode()
        assert [row.text for row in found if isinstance(row, Row)] == [row.text for row in clean]
        assert [row.number for row in found] == list(range(1, 42))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"other": "x"}', rows.MISSING_KEY),
        (b'{"text": 3}', rows.NOT_TEXT),
        (b'{"text": ["x"]}', rows.NOT_TEXT),
        (b'{"text": "x"', rows.NOT_JSON),
        (b"['x']", rows.NOT_JSON),
        (b'["text"]', rows.NOT_JSON),
        (b'"text"', rows.NOT_JSON),
        (b'{"text": "a"} {"text": "b"}', rows.NOT_JSON),
        (b"[" * 450 + b"]" * 450, rows.NOT_JSON),
        (b'{"n": ' + b"9" * 900 + b', "text": {}}', rows.NOT_TEXT),
        (rb'{"text": "\ud800"}', rows.NOT_UTF8),
        (rb'{"text": "a\u0000"}', rows.NUL),
        (b'{"text": "x"}\0', rows.NUL),
        (b'\xef\xbb\xbf{"text": "x"}', rows.BYTE_ORDER_MARK),
        (b'{"text": "x", "n": "\xff"}', rows.NOT_UTF8),
    ],
)
def test_bad_lines_of_a_jsonl(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": "two"}')
    first, bad, blank, last = rows_of(path)
    assert (first, blank, last) == (
        Row(str(path), 1, "one"),
        Row(str(path), 3, ""),
        Row(str(path), 4, "two"),
    )
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.reason) == (2, reason)
    bad.excerpt.encode()
    assert bad.excerpt


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"1", rows.NUM_FIELDS),
        (b"1,a,b", rows.NUM_FIELDS),
        (b'1,"a,b\n",c', rows.NUM_FIELDS),
        (b"1,a\rb", rows.NOT_CSV),
        (b'1,"a"b', rows.NOT_CSV),
        (b'1,"left open\n2,"two"', rows.NOT_CSV),
        (b"\0,a", rows.NUL),
        (b"1," + b"x" * 999, rows.TOO_LONG),
        (b'1,"' + b'x,""\n' * 300 + b'"', rows.TOO_LONG),
    ],
)
def test_bad_records_of_a_csv(tmp_path: Path, record: bytes, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'n,text\n0,"one\n"\n' + record + b'\n2,"tw""o"\n')
    first, bad, last = rows_of(path)
    assert (first, last) == (Row(str(path), 1, "one\n"), Row(str(path), 3, 'tw"o'))
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.reason) == (2, reason)


def test_bytes_of_another_column_do_not_spoil_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"n,text\n\xff,one\n")
    assert texts_of(path) == ["one"]
    assert [row.reason for row in rows_of(path, "n") if isinstance(row, BadRow)] == [rows.NOT_UTF8]


def test_what_is_not_unicode_is_shown_as_bytes(tmp_path: Path) -> None:
    for suffix in (".parquet", ".csv", ".jsonl", ".txt"):
        path = tmp_path / f"a{suffix}"
        write_rows(path, [b"caf\xe9"])
        (bad,) = rows_of(path)
        assert isinstance(bad, BadRow)
        assert r"caf\xe9" in bad.excerpt


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".txt"])
def test_a_row_is_too_long_by_one_byte(tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"a{suffix}", "x" * 500
    around = {".parquet": 0, ".csv": len('0,""'), ".jsonl": len('{"n": 1, "text": ""}'), ".txt": 0}[suffix]
    for ending in (b"\n", b"\r\n", b""):
        write_rows(path, [text])
        if suffix != ".parquet":
            path.write_bytes(path.read_bytes().rstrip(b"\n") + ending)
        (fits,) = rows_of(path, limit=500 + around)
        (long,) = rows_of(path, limit=499 + around)
        assert isinstance(fits, Row)
        assert isinstance(long, BadRow)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".txt"])
def test_a_row_of_50_mb_costs_no_other(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_rows(path, ["one", "长" * (50_000_000 // 3), "two"])
    first, bad, last = rows_of(path, limit=rows.MAX_ROW_BYTES)
    assert [first.number, bad.number, last.number] == [1, 2, 3]
    assert isinstance(bad, BadRow)
    assert bad.reason == rows.TOO_LONG
    assert "长长" in bad.excerpt
    assert [row.text for row in (first, last) if isinstance(row, Row)] == ["one", "two"]


def test_chunks_of_any_size_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"a{suffix}" for suffix in (".csv", ".jsonl", ".txt")]
    for path in paths:
        write_rows(path, [*CLEAN, '"', '""', ",", "x" * 2000, '","' * 2000, "end"])
    whole = [rows_of(path) for path in paths]
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(csv_files, "_CHUNK_BYTES", size)
        monkeypatch.setattr(line_files, "_SKIP_BYTES", size)
        for path, expected in zip(paths, whole, strict=True):
            assert [row[:3] for row in rows_of(path)] == [row[:3] for row in expected]


def test_records_end_where_the_csv_module_ends_them(tmp_path: Path) -> None:
    path, generator = tmp_path / "a.csv", random.Random(5)
    for _ in range(600):
        content = "".join(generator.choices('",\nab', [3, 3, 2, 2, 1], k=generator.randrange(1, 60))) + "\n"
        path.write_text(f"text,n\n{content}", newline="")
        *expected, last = csv.reader(io.StringIO(f"{content}z\n", newline=""))
        if last != ["z"]:
            # the module takes everything behind a quote without an end for its field
            with pytest.raises(UserError, match="never ends"):
                rows_of(path)
            continue
        found = [row.text if isinstance(row, Row) else row.reason for row in rows_of(path)]
        fitting = [fields[0] if len(fields) == 2 else rows.NUM_FIELDS for fields in expected if fields]
        blank = [number for number, fields in enumerate(expected) if not fields]
        for number in blank:
            fitting.insert(number, "")
        # where quotes are misplaced, the record ends at the same place and is bad
        judged = [
            text if text == rows.NOT_CSV else expected for text, expected in zip(found, fitting, strict=True)
        ]
        assert found == judged, content
        assert rows.NOT_CSV not in found or re.search('"[ab]', content)


def test_wrong_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    parquet, table = tmp_path / "a.parquet", tmp_path / "a.csv"
    pyarrow.parquet.write_table(pa.table({"n": [1], "text": ["a"]}), parquet)
    table.write_text("n,text\n1,a\n")
    for path in (parquet, table):
        for reader in (rows_of, lambda path, column: check_columns(find_source("file", str(path), column))):
            with pytest.raises(UserError, match=r"dataset\.column=txt: .* no such column; it has n, text"):
                reader(path, "txt")
    with pytest.raises(UserError, match=r"holds int64.*text is in text"):
        rows_of(parquet, "n")
    table.write_text("text,n,text\n1,2,3\n")
    with pytest.raises(UserError, match="2 columns of that name"):
        rows_of(table)
    with pytest.raises(UserError, match=r"dataset\.column: is not set; .*a\.csv needs"):
        rows_of(table, None)


def _flip_a_bit(path: Path) -> None:
    table = pa.table({"text": [f"row {n * 7919}" for n in range(500)]})
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"row 79190", b"row 79191", 1))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("a.parquet", lambda path: path.write_bytes(b"text\nx\n")),
        ("a.parquet", lambda path: path.write_bytes(b"")),
        ("a.parquet", lambda path: path.write_bytes(path.read_bytes()[:-20])),
        ("a.parquet", _flip_a_bit),
        ("a.csv", lambda path: path.write_bytes(b"")),
        ("a.csv", lambda path: path.write_bytes(b"x" * 5000)),
        ("a.txt", lambda path: (path.unlink(), path.symlink_to("nowhere"))),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    path = tmp_path / name
    write_rows(path, [f"{n * 7919 % 10007:x}" * 9 for n in range(500)])
    harm(path)
    with pytest.raises(UserError, match=rf"dataset\.(path|column)=.*{name}") as error:
        rows_of(path)
    assert "\n" not in str(error.value)


def test_a_quote_that_never_ends_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('n,text\n1,"one\n"\n2,"two\n3,three\n' + "4,four\n" * 1000)
    with pytest.raises(UserError, match=r"a\.csv: a quote opened in row 2 \('2,\"two.*never ends"):
        rows_of(path)
