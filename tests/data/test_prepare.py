import json
import os
import re
import signal
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest

from bc2exp.config.errors import UserError
from bc2exp.data import building, fingerprints
from bc2exp.data import prepare as prepare_module
from bc2exp.data.building import Progress
from bc2exp.data.encoding import encode_texts
from bc2exp.data.prepare import Prepared, prepare
from bc2exp.data.quarantine import Limits, TooManyBadRows
from bc2exp.data.sources import TextSource, documents, find_source
from bc2exp.data.store import TokenStore
from bc2exp.data.tokens import build_streams
from bc2exp.embedded import TOKENIZER
from bc2exp.text.tokenizer import Tokenizer
from tests.data.kills import dies_at
from tests.shared_data import shared_data

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"第{n}份 outside, {'very ' * (n % 40)}late <s>\t{n * 7919}" for n in range(900)]


@pytest.fixture(autouse=True)
def _many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that the short files here make many, enough for several processes."""
    monkeypatch.setattr(building, "_BATCH_BYTES", 3000)


def _source(folder: Path, texts: list[str] = TEXTS) -> TextSource:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(path, (1.6e9, 1.6e9))  # old enough for its fingerprint to be remembered
    return find_source("file", str(path), "text")


def _prepare(source: TextSource, cache: Path, **options: Any) -> Prepared:
    return prepare(source, Tokenizer(TOKENIZER), cache, name="text", **options)


def _content(prepared: Prepared) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in prepared.prefix.parent.iterdir()
        if path.name != "report.json"
    }


def _remains(cache: Path) -> list[str]:
    """What lies in a cache beside locks and the memory of fingerprints."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock" and p.name != "fingerprints.json")


# ---- what a store holds


def test_the_tokens_are_those_of_the_texts_one_after_the_other(tmp_path: Path) -> None:
    prepared = _prepare(_source(tmp_path, [*TEXTS[:50], "", *TEXTS[50:]]), tmp_path / "cache")
    encode = Tokenizer(TOKENIZER).encode
    expected = [encode(text) for text in TEXTS]
    store = TokenStore(prepared.prefix)
    assert store.tokens.tolist() == [token for ids in expected for token in ids]
    report = prepared.report
    assert store.num_documents == report["documents"] == 900
    assert (report["rows"], report["empty"], report["bad"]) == (901, 1, {})
    assert report["tokens"] == len(store.tokens)
    assert report["max_token"] == int(store.tokens.max())
    assert report["longest"] == max(map(len, expected))
    assert report["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert sum(report["lengths"].values()) == 900
    for bucket, count in report["lengths"].items():
        low, high = (int(bound) for bound in bucket.split("-"))
        assert count == sum(low <= len(ids) <= high for ids in expected)
    assert json.loads((prepared.prefix.parent / "report.json").read_text()) == report


def test_the_end_of_text_follows_every_document(tmp_path: Path) -> None:
    source = _source(tmp_path, ["a b", "", "c"])
    plain, ended = (_prepare(source, tmp_path / "cache", append_eos=value) for value in (False, True))
    tokenizer = Tokenizer(TOKENIZER)
    eos = tokenizer.eos_id
    assert plain.prefix != ended.prefix
    assert TokenStore(plain.prefix).tokens.tolist() == [*tokenizer.encode("a b"), *tokenizer.encode("c")]
    expected = [*tokenizer.encode("a b"), eos, *tokenizer.encode("c"), eos]
    assert TokenStore(ended.prefix).tokens.tolist() == expected


def test_a_text_without_a_token_is_no_document() -> None:
    # other tokenizers drop spaces; a text that they leave nothing of is like an empty one here
    encoded = encode_texts(Tokenizer(TOKENIZER), [b"", b"a", b""], append_eos=True)
    assert (encoded.lengths.tolist(), len(encoded.tokens)) == ([2], 2)


@pytest.mark.parametrize("append_eos", [False, True])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, append_eos: bool) -> None:
    path = tmp_path / "text.txt"
    lines = [text.encode() for text in TEXTS]
    lines[3:3] = [b"\xff", b"", b"a\0b", "\ufeff\u957f".encode()]
    path.write_bytes(b"\n".join(lines))
    source = find_source("file", str(path), None)
    results = [_prepare(source, tmp_path / str(n), workers=n, append_eos=append_eos) for n in (1, 2, 3)]
    assert [result.report["workers"] for result in results] == [1, 2, 3]
    assert _content(results[0]) == _content(results[1]) == _content(results[2])
    assert len(_content(results[0])["quarantine.jsonl"].splitlines()) == 3
    reports = [dict(result.report) for result in results]
    for report in reports:
        for varying in ("seconds", "mb_per_s", "workers"):
            del report[varying]
    assert reports[0] == reports[1] == reports[2]


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
    good = _prepare(find_source("file", str(clean), "text"), tmp_path / "cache")
    mixed = _prepare(find_source("file", str(harmed), "text"), tmp_path / "cache", limits=Limits(11, 0))
    listed = [json.loads(line) for line in _content(mixed)["quarantine.jsonl"].splitlines()]
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
        assert _content(mixed)[name] == _content(good)[name]


def test_the_embedded_corpus_is_a_source_like_any_other(tmp_path: Path) -> None:
    prepared = _prepare(find_source("embedded_corpus", None, None), tmp_path / "cache", workers=2)
    tokenizer = Tokenizer(TOKENIZER)
    texts = documents("embedded_corpus", None, None)
    in_memory = build_streams(tokenizer.encode_documents(texts), [9, 1, 0], None)
    stored = TokenStore(prepared.prefix).streams([9, 1, 0])
    assert [part.digest() for part in stored] == [part.digest() for part in in_memory]


def test_real_alpaca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # batches as they are
    source = find_source("file", str(shared_data("train-00000-of-00001-a09b74b3ef9c3b56.parquet")), "text")
    tokenizer = Tokenizer(shared_data("tokenizer/baichuan2_tokenizer.model"))
    prepared = prepare(source, tokenizer, tmp_path, name="alpaca", workers=2)
    report = prepared.report
    assert (report["documents"], report["tokens"], report["longest"]) == (52_002, 5_883_807, 1_192)
    assert (report["empty"], report["bad"]) == (0, {})
    assert report["sha256"] == "eda2b10b8e945de3eb5ed3840c28f84349838fa6c759391de42f3c1ea01e89c5"


def test_progress_ends_where_everything_is_done(tmp_path: Path) -> None:
    source = _source(tmp_path)
    told: list[Progress] = []
    report = _prepare(source, tmp_path / "cache", workers=2, progress=told.append).report
    encoding = [progress for progress in told if progress.stage == "encode"]
    size = source.files[0].stat().st_size
    assert told[0] == ("fingerprint", 0, 0, size, size)
    assert len(encoding) > 10
    assert encoding == sorted(encoding)
    assert encoding[-1] == ("encode", 900, report["tokens"], size, size)


# ---- once, and again where something has changed


def test_a_second_start_takes_the_finished_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    first = _prepare(source, tmp_path / "cache")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(prepare_module, "build_store", never)
    monkeypatch.setattr(fingerprints, "_hash", never)
    second = _prepare(source, tmp_path / "cache", workers=3, limits=Limits(0, 0))
    assert (first.reused, second.reused) == (False, True)
    assert second[:2] == first[:2]


def test_what_decides_the_tokens_decides_the_store(tmp_path: Path) -> None:
    cache, source = tmp_path / "cache", _source(tmp_path)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(source.files[0].read_bytes())
    as_lines = tmp_path / "moved.txt"
    as_lines.write_bytes(source.files[0].read_bytes())
    tokenizer = tmp_path / "other.model"
    tokenizer.write_bytes(TOKENIZER.read_bytes() + b"\x1a\x00")  # an empty field more
    same = [
        _prepare(source, cache),
        _prepare(TextSource((moved,), "text"), cache),
    ]
    other = [
        _prepare(source, cache, append_eos=True),
        _prepare(TextSource(source.files, "text", max_row_bytes=10_000), cache),
        _prepare(TextSource((as_lines,), "text"), cache),
        _prepare(TextSource((moved, *source.files), "text"), cache),
        prepare(source, Tokenizer(tokenizer), cache, name="text"),
    ]
    assert same[0].prefix == same[1].prefix
    assert len({result.prefix for result in (same[0], *other)}) == 6


def test_an_edited_file_is_noticed(tmp_path: Path) -> None:
    source = _source(tmp_path)
    path, cache = source.files[0], tmp_path / "cache"
    first = _prepare(source, cache)
    # the same size and the same time of writing
    path.write_bytes(path.read_bytes().replace(b"late", b"LATE"))
    os.utime(path, (1.6e9, 1.6e9))
    second = _prepare(source, cache)
    assert not second.reused
    assert TokenStore(second.prefix).tokens.tolist() != TokenStore(first.prefix).tokens.tolist()


def test_a_file_written_a_moment_ago_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    os.utime(source.files[0], (2e10, 2e10))  # will not have been written long ago for some time
    hashed: list[Path] = []
    original = fingerprints._hash
    monkeypatch.setattr(
        fingerprints, "_hash", lambda path, count: (hashed.append(path), original(path, count))[1]
    )
    for _ in range(2):
        _prepare(source, tmp_path / "cache")
    assert hashed == [*source.files] * 2


def test_a_lost_memory_of_fingerprints_is_made_again(tmp_path: Path) -> None:
    source, cache = _source(tmp_path), tmp_path / "cache"
    _prepare(source, cache)
    memory = cache / "fingerprints.json"
    whole = memory.read_bytes()
    for damaged in (b"", b"[1]", whole[:-20]):
        memory.write_bytes(damaged)
        assert _prepare(source, cache).reused
        assert memory.read_bytes() == whole


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    source, cache = _source(tmp_path), tmp_path / "cache"

    def edit(progress: Progress) -> None:
        if progress.stage == "encode":
            with source.files[0].open("a") as file:
                file.write('{"text": "more"}\n')

    with pytest.raises(UserError, match=r"text\.jsonl: was changed while it was read"):
        _prepare(source, cache, progress=edit)
    assert _remains(cache) == []


@pytest.mark.parametrize("harm", ["tokens.bin", "tokens.idx", "report.json"])
def test_a_damaged_store_in_the_cache_is_named(tmp_path: Path, harm: str) -> None:
    source, cache = _source(tmp_path), tmp_path / "cache"
    folder = _prepare(source, cache).prefix.parent
    (folder / harm).write_bytes((folder / harm).read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{folder}: is damaged: .*; remove it, and it is prepared again"):
        _prepare(source, cache)


# ---- bad rows and nothing at all


def _with_bad_rows(folder: Path, num_bad: int, num_rows: int) -> TextSource:
    path = folder / "rows.txt"
    path.write_bytes(b"\xff\xfd \n" * num_bad + b"text\n" * (num_rows - num_bad))
    return find_source("file", str(path), None)


def test_bad_rows_beyond_the_limits_stop_the_preparation(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = _with_bad_rows(tmp_path, 11, 1000)
    with pytest.raises(TooManyBadRows) as error:
        _prepare(source, cache)
    message = str(error.value)
    assert "11 of 1000 rows are bad: " in message
    assert all(f"rows.txt row {row} (invalid UTF-8)" in message for row in (1, 2, 3))
    assert "dataset.max_bad_rows=10, dataset.max_bad_fraction=0.001" in message
    (listed,) = _remains(cache)
    assert f"(all: {cache / listed})" in message
    assert re.fullmatch(r"text-[0-9a-f]{12}\.quarantine\.jsonl", listed)
    assert len((cache / listed).read_text().splitlines()) == 11
    # more are allowed: the same store, and the list moves into it
    prepared = _prepare(source, cache, limits=Limits(max_bad_rows=11))
    assert _remains(cache) == [prepared.prefix.parent.name]
    assert prepared.report["bad"] == {"invalid UTF-8": 11}
    # and then fewer: the store stays, but does not pass
    with pytest.raises(TooManyBadRows, match=rf"11 of 1000 rows .*all: {prepared.prefix.parent}/quarantine"):
        _prepare(source, cache)
    assert _prepare(source, cache, limits=Limits(0, 0.011)).reused


def test_the_larger_limit_counts(tmp_path: Path) -> None:
    # the bad rows come first: what was read until then is no measure of the file
    assert _prepare(_with_bad_rows(tmp_path, 30, 30_000), tmp_path / "a").report["rows"] == 30_000
    with pytest.raises(TooManyBadRows, match="31 of 30000 rows"):
        _prepare(_with_bad_rows(tmp_path, 31, 30_000), tmp_path / "b")
    assert _prepare(_with_bad_rows(tmp_path, 10, 20), tmp_path / "c").report["documents"] == 10


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    source = _with_bad_rows(tmp_path, 20_000, 20_000)
    with pytest.raises(TooManyBadRows, match="41 of 41 rows are bad; reading stopped there: "):
        _prepare(source, tmp_path / "cache", workers=2)


@pytest.mark.parametrize("content", ["", "\n\n\n"])
def test_files_without_text_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "none.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"none\.txt: holds no text: all {len(content)} rows are empty"):
        _prepare(find_source("file", str(path), None), tmp_path / "cache")
    assert _remains(tmp_path / "cache") == []


def test_a_wrong_column_in_the_last_file_is_named_before_anything_is_read(tmp_path: Path) -> None:
    _source(tmp_path)
    (tmp_path / "z.csv").write_text("body\nx\n")
    with pytest.raises(UserError, match=r"z\.csv has no such column; it has body"):
        _prepare(find_source("file", str(tmp_path), "text"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=rf"{tmp_path}/cache: the prepared data cannot be written there"):
        _prepare(_source(tmp_path), tmp_path / "cache")


# ---- processes that die, wait, or are killed


def _program(source: TextSource, cache: Path, at_first_batch: str) -> subprocess.Popen[str]:
    """A process that prepares with two workers, and does something once the first batch is written."""
    program = f"""
import os, signal, sys, threading
from pathlib import Path
import torch
from bc2exp.data import building
from bc2exp.data.prepare import prepare
from bc2exp.data.sources import find_source
from bc2exp.text.tokenizer import Tokenizer
torch.randn(500, 500) @ torch.randn(500, 500)  # its threads live
building._BATCH_BYTES = 3000
seen = []
def tell(progress):
    if progress.stage == "encode" and not seen:
        seen.append(progress)
        children = Path(f"/proc/self/task/{{threading.get_native_id()}}/children").read_text()
        print(children, flush=True)
        {at_first_batch}
source = find_source("file", {str(source.files[0])!r}, "text")
tokenizer, cache = Tokenizer(Path({str(TOKENIZER)!r})), Path({str(cache)!r})
prepared = prepare(source, tokenizer, cache, name="text", workers=2, progress=tell)
print(prepared.reused, flush=True)
"""
    # no guard around the main module's code: the workers must not run it again
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"ended with {process.wait()}"
    return line.strip()


def _lives(pid: int) -> bool:
    try:
        return b"bc2exp" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_kill_9_in_the_middle_leaves_no_store_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    source, cache = _source(tmp_path), tmp_path / "cache"
    expected = _content(_prepare(source, tmp_path / "clean"))
    process = _program(source, cache, "signal.pause()")
    workers = [int(pid) for pid in _line(process).split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    partial, listed = _remains(cache)
    assert re.fullmatch(r"\.text-[0-9a-f]{12}\.partial", partial)
    assert listed.endswith("quarantine.jsonl")
    while any(_lives(pid) for pid in workers):
        pass
    # another data set's start cleans up as well, and leaves what is somebody's
    living = cache / ".other-0123456789ab.partial"
    living.mkdir()
    with prepare_module.lock.hold(cache / ".other-0123456789ab.lock"):
        _prepare(find_source("embedded_reviews", None, None), cache)
        assert [name for name in _remains(cache) if not re.fullmatch("text-[0-9a-f]{12}", name)] == [
            living.name
        ]
    result = _prepare(source, cache)
    assert not result.reused
    assert _content(result) == expected
    assert not living.exists()


def test_a_kill_at_any_step_leaves_no_half_store(tmp_path: Path) -> None:
    source = _source(tmp_path)
    expected = _content(_prepare(source, tmp_path / "clean"))
    steps, died = 0, True
    while died:
        cache = tmp_path / f"cache{steps}"
        died = dies_at(steps, lambda cache=cache: _prepare(source, cache))
        for folder in cache.glob("text-*[0-9a-f]"):
            found = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert json.loads(found.pop("report.json"))["documents"] == 900
            assert found == expected
        result = _prepare(source, cache)
        assert _content(result) == expected
        assert _remains(cache) == [result.prefix.parent.name]
        assert not list(cache.glob(".*.tmp"))
        steps += 1
    assert steps > 12


def test_two_processes_prepare_once(tmp_path: Path) -> None:
    source, cache = _source(tmp_path), tmp_path / "cache"
    process = _program(source, cache, "sys.stdin.readline()")
    _line(process)
    waits = threading.Event()
    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        if progress.stage != "fingerprint":
            waits.set()

    results: list[Prepared] = []
    second = threading.Thread(target=lambda: results.append(_prepare(source, cache, progress=tell)))
    second.start()
    waits.wait()
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert _line(process) == "False"
    second.join()
    assert process.wait() == 0
    (result,) = results
    assert result.reused
    assert [progress.stage for progress in told] == ["fingerprint", "wait"]
    assert _remains(cache) == [result.prefix.parent.name]
    assert array("i", _content(result)["tokens.bin"]).tolist() == TokenStore(result.prefix).tokens.tolist()


def test_a_worker_that_is_killed_is_named(tmp_path: Path) -> None:
    source, cache = _source(tmp_path), tmp_path / "cache"

    def kill_one(progress: Progress) -> None:
        if progress.stage == "encode" and progress.rows < 100:
            pid = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()[0]
            os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a process that encodes text was ended by signal 9"):
        _prepare(source, cache, workers=2, progress=kill_one)
    assert _remains(cache) == []
