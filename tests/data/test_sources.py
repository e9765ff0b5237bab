import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bc2exp.config.errors import UserError
from bc2exp.data import rows
from bc2exp.data.rows import BadRow, Meter, Row
from bc2exp.data.sources import find_source, read_rows
from tests.data.row_files import rows_of, texts_of, write_rows
from tests.shared_data import shared_data

TEXTS = ["送餐很快", 'said "hot", was cold', "two\nlines", "  spaces  ", "1234"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_texts_with_quotes_newlines_and_digits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_rows(path, [*TEXTS])
    assert rows_of(path) == [Row(str(path), number, text) for number, text in enumerate(TEXTS, 1)]


def test_the_lines_of_a_txt(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一\r\n\n two \nthree".encode())
    assert texts_of(path, None) == ["一", "", " two ", "three"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_way_a_parquet_holds_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    nested = pa.array([{"a": 1, "b": 2}] * 5)  # has more leaves than columns
    table = pa.table({"nested": nested, "text": pa.array(TEXTS, pa.string()).cast(kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_a_mark_at_the_beginning_of_a_file_is_not_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_rows(path, ["one", "two"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts_of(path) == ["one", "two"]
    path.write_bytes(path.read_bytes()[3:].decode().encode("utf-16"))
    with pytest.raises(UserError, match=r"is UTF-16, not UTF-8"):
        rows_of(path)


def test_the_meter_ends_at_the_size_of_the_files(tmp_path: Path) -> None:
    for suffix in (".parquet", ".csv", ".jsonl", ".txt"):
        write_rows(tmp_path / f"a{suffix}", ["x" * 2000, "\ufeff"] * 3000)
    meter = Meter()
    list(read_rows(find_source("file", str(tmp_path), "text", 1000), meter))
    assert meter.bytes_done == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_folders_and_patterns_mean_their_files_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        "b/2.txt",
        "b/1.jsonl",
        "a.csv",
        "c.PARQUET",
        "b/notes.md",
        ".hidden.txt",
        ".git/x.txt",
        "b/z/0.txt",
    ]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        lower = path.with_suffix(path.suffix.lower())
        write_rows(lower, [name])
        lower.rename(path)
    monkeypatch.chdir(tmp_path)
    everything = ["a.csv", "b/1.jsonl", "b/2.txt", "b/z/0.txt", "c.PARQUET"]
    assert texts_of(tmp_path) == everything
    assert texts_of(".") == everything
    assert texts_of("**") == everything
    assert texts_of("b/*") == ["b/1.jsonl", "b/2.txt"]
    assert texts_of("b/**/*.txt", None) == ["b/2.txt", "b/z/0.txt"]
    assert texts_of("[ac].*") == ["a.csv", "c.PARQUET"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts_of("~/b/2.txt", None) == ["b/2.txt"]
    Path("[x]*.txt").write_text("a name and no pattern")
    assert texts_of("[x]*.txt", None) == ["a name and no pattern"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nothing.txt", "no such file or folder"),
        ("note.md", "no such file or folder; nearest: .*notes.md"),
        ("none*.txt", "no file matches this pattern"),
        ("empty", "none of the 0 files there: cannot be read; .parquet, .csv, .jsonl, .txt can"),
        ("notes.md", "cannot be read; .parquet, .csv, .jsonl, .txt can"),
    ],
)
def test_a_path_without_files_is_named(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=f"dataset\\.path=.*{path.replace('*', '.')}: {reason}"):
        find_source("file", str(tmp_path / path), None)


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xb2\xe2.txt"))
    path.write_bytes(b"one\n\xff\n")
    good, bad = rows_of(path)
    assert good.file == bad.file == str(tmp_path) + r"/\xb2\xe2.txt"
    json.dumps([good, bad], ensure_ascii=False).encode()


def test_the_embedded_texts_alternate_languages() -> None:
    corpus, reviews = (
        [row.text for row in read_rows(find_source(name, None, None)) if isinstance(row, Row)]
        for name in ("embedded_corpus", "embedded_reviews")
    )
    assert any("\u4e00" <= char <= "\u9fff" for char in corpus[0])
    assert corpus[1].isascii()
    assert len(reviews) > 300


def test_real_alpaca_and_waimai() -> None:
    alpaca = rows_of(shared_data("train-00000-of-00001-a09b74b3ef9c3b56.parquet"), limit=rows.MAX_ROW_BYTES)
    assert len(alpaca) == 52_002
    waimai_path = shared_data("waimai_10k.csv")
    waimai = rows_of(waimai_path, "review", limit=rows.MAX_ROW_BYTES)
    with waimai_path.open(encoding="utf-8", newline="") as file:
        expected = [fields["review"] for fields in csv.DictReader(file)]
    assert len(expected) == 11_987
    assert [row.text for row in waimai if isinstance(row, Row)] == expected
    assert not [row for row in (*alpaca, *waimai) if isinstance(row, BadRow)]
