import json
import os
import re
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.data.quarantine import Limits, TooManyBadRows
from bc2exp.data.sources import TextSource, find_source
from tests.data.preparing import TEXTS, content_of, prepare_texts, remains_in, source_of

pytestmark = pytest.mark.usefixtures("many_batches")


def test_bad_rows_leave_the_good_ones_as_they_are(tmp_path: Path) -> None:
    clean, harmed = tmp_path / "clean", tmp_path / "harmed"
    clean.mkdir(), harmed.mkdir()
    half = len(TEXTS) // 2
    lines = [json.dumps({"text": text}).encode() for text in TEXTS[:half]]
    (clean / "a.jsonl").write_bytes(b"\n".join(lines))
    lines[5:5] = [b'{"text": null}', b'{"txt": 1}', b'{"text": 1}', b'{"text": "\xff"}', b"{"]
    lines[200:200] = [
        b'{"text": "\\u0000"}',
        b'{"text": "' + b"x" * 50_000_000 + b'"}',
        b'{"text": "\\ufeff"}',
    ]
    (harmed / "a.jsonl").write_bytes(b"\n".join(lines))
    lines = [f'{n},"{text}"'.encode() for n, text in enumerate(TEXTS[half:])]
    (clean / "b.csv").write_bytes(b"n,text\n" + b"\n".join(lines))
    lines[7:7] = [b"1,2,3", b"x", b'1,"a"b']
    (harmed / "b.csv").write_bytes(b"n,text\n" + b"\n".join(lines))
    good = prepare_texts(find_source("file", str(clean), "text"), tmp_path / "cache")
    mixed = prepare_texts(find_source("file", str(harmed), "text"), tmp_path / "cache", limits=Limits(11, 0))
    listed = [json.loads(line) for line in content_of(mixed)["quarantine.jsonl"].splitlines()]
    assert [(os.path.basename(entry["file"]), entry["row"], entry["reason"]) for entry in listed] == [
        ("a.jsonl", 6, "null"),
        ("a.jsonl", 7, "missing key"),
        ("a.jsonl", 8, "not text"),
        ("a.jsonl", 9, "invalid UTF-8"),
        ("a.jsonl", 10, "not a JSON object"),
        ("a.jsonl", 201, "NUL character"),
        ("a.jsonl", 202, "longer than max_row_bytes"),
        ("a.jsonl", 203, "byte order mark"),
        ("b.csv", 8, "wrong number of fields"),
        ("b.csv", 9, "wrong number of fields"),
        ("b.csv", 10, "not a csv record"),
    ]
    assert sum(mixed.report["bad"].values()) == 11
    assert mixed.report["rows"] == 911
    for name in ("tokens.bin", "tokens.idx"):
        assert content_of(mixed)[name] == content_of(good)[name]


def _with_bad_rows(folder: Path, num_bad: int, num_rows: int) -> TextSource:
    path = folder / "rows.txt"
    path.write_bytes(b"\xff\xfd \n" * num_bad + b"text\n" * (num_rows - num_bad))
    return find_source("file", str(path), None)


def test_bad_rows_beyond_the_limits_stop_the_preparation(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = _with_bad_rows(tmp_path, 11, 1000)
    with pytest.raises(TooManyBadRows) as error:
        prepare_texts(source, cache)
    message = str(error.value)
    assert "11 of 1000 rows are bad: " in message
    assert all(f"rows.txt row {row} (invalid UTF-8)" in message for row in (1, 2, 3))
    assert "dataset.max_bad_rows=10, dataset.max_bad_fraction=0.001" in message
    (listed,) = remains_in(cache)
    assert f"(all: {cache / listed})" in message
    assert re.fullmatch(r"text-[0-9a-f]{12}\.quarantine\.jsonl", listed)
    assert len((cache / listed).read_text().splitlines()) == 11
    # more are allowed: the same store, and the list moves into it
    prepared = prepare_texts(source, cache, limits=Limits(max_bad_rows=11))
    assert remains_in(cache) == [prepared.prefix.parent.name]
    assert prepared.report["bad"] == {"invalid UTF-8": 11}
    # and then fewer: the store stays, but does not pass
    with pytest.raises(TooManyBadRows, match=rf"11 of 1000 rows .*all: {prepared.prefix.parent}/quarantine"):
        prepare_texts(source, cache)
    assert prepare_texts(source, cache, limits=Limits(0, 0.011)).reused


def test_the_larger_limit_counts(tmp_path: Path) -> None:
    # the bad rows come first: what was read until then is no measure of the file
    assert prepare_texts(_with_bad_rows(tmp_path, 30, 30_000), tmp_path / "a").report["rows"] == 30_000
    with pytest.raises(TooManyBadRows, match="31 of 30000 rows"):
        prepare_texts(_with_bad_rows(tmp_path, 31, 30_000), tmp_path / "b")
    assert prepare_texts(_with_bad_rows(tmp_path, 10, 20), tmp_path / "c").report["documents"] == 10


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    source = _with_bad_rows(tmp_path, 20_000, 20_000)
    with pytest.raises(TooManyBadRows, match="41 of 41 rows are bad; reading stopped there: "):
        prepare_texts(source, tmp_path / "cache", workers=2)


@pytest.mark.parametrize("content", ["", "\n\n\n"])
def test_files_without_text_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "none.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"none\.txt: holds no text: all {len(content)} rows are empty"):
        prepare_texts(find_source("file", str(path), None), tmp_path / "cache")
    assert remains_in(tmp_path / "cache") == []


def test_a_wrong_column_in_the_last_file_is_named_before_anything_is_read(tmp_path: Path) -> None:
    source_of(tmp_path)
    (tmp_path / "z.csv").write_text("body\nx\n")
    with pytest.raises(UserError, match=r"z\.csv has no such column; it has body"):
        prepare_texts(find_source("file", str(tmp_path), "text"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=rf"{tmp_path}/cache: the prepared data cannot be written there"):
        prepare_texts(source_of(tmp_path), tmp_path / "cache")


def test_where_no_row_is_good_the_column_and_the_encoding_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "gbk.csv"
    path.write_bytes("review\n很好\n冷了\n".encode("gbk"))
    with pytest.raises(
        TooManyBadRows, match=r"2 of 2 rows are bad: .*row 1 \(invalid UTF-8\).*UTF-8\) right\?"
    ) as error:
        prepare_texts(find_source("file", str(path), "review"), tmp_path / "cache")
    listed = Path(str(error.value).rpartition("all: ")[2].rstrip(")"))
    assert len(listed.read_text().splitlines()) == 2
    assert remains_in(tmp_path / "cache") == [listed.name]


def test_runs_and_stores_in_a_folder_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("words\n")
    for folder, mark in (("runs/a", "run.json"), ("runs/prepared/b", "tokens.idx")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / mark).write_text("{}")
        (tmp_path / folder / "metrics.jsonl").write_text("{}")
    (tmp_path / "runs" / "prepared" / "c.quarantine.jsonl").write_text("{}")
    assert find_source("file", str(tmp_path), None).files == (tmp_path / "own.txt",)
