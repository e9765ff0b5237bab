import json
import os
from pathlib import Path
from typing import Any

import pytest

from bc2exp.config.errors import UserError
from bc2exp.data import fingerprints
from bc2exp.data import prepare as prepare_module
from bc2exp.data.building import Progress
from bc2exp.data.encoding import encode_texts
from bc2exp.data.prepare import prepare
from bc2exp.data.quarantine import Limits
from bc2exp.data.rows import Row
from bc2exp.data.sources import TextSource, find_source, read_rows
from bc2exp.data.store import TokenStore
from bc2exp.embedded import TOKENIZER
from bc2exp.text.tokenizer import Tokenizer
from tests.data.preparing import TEXTS, content_of, prepare_texts, remains_in, source_of
from tests.data.stores import streams_of
from tests.shared_data import shared_data

pytestmark = pytest.mark.usefixtures("many_batches")


def test_the_tokens_are_those_of_the_texts_one_after_the_other(tmp_path: Path) -> None:
    prepared = prepare_texts(source_of(tmp_path, [*TEXTS[:50], "", *TEXTS[50:]]), tmp_path / "cache")
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
    source = source_of(tmp_path, ["a b", "", "c"])
    plain, ended = (prepare_texts(source, tmp_path / "cache", append_eos=value) for value in (False, True))
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
    results = [prepare_texts(source, tmp_path / str(n), workers=n, append_eos=append_eos) for n in (1, 2, 3)]
    assert [result.report["workers"] for result in results] == [1, 2, 3]
    assert content_of(results[0]) == content_of(results[1]) == content_of(results[2])
    assert len(content_of(results[0])["quarantine.jsonl"].splitlines()) == 3
    reports = [dict(result.report) for result in results]
    for report in reports:
        for varying in ("seconds", "mb_per_s", "workers"):
            del report[varying]
    assert reports[0] == reports[1] == reports[2]


def test_the_embedded_corpus_is_a_source_like_any_other(tmp_path: Path) -> None:
    prepared = prepare_texts(find_source("embedded_corpus", None, None), tmp_path / "cache", workers=2)
    tokenizer = Tokenizer(TOKENIZER)
    rows = read_rows(find_source("embedded_corpus", None, None))
    texts = [row.text for row in rows if isinstance(row, Row) and row.text]
    in_memory = streams_of([list(ids) for ids in tokenizer.encode_documents(texts)], [9, 1, 0])
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
    source = source_of(tmp_path)
    told: list[Progress] = []
    report = prepare_texts(source, tmp_path / "cache", workers=2, progress=told.append).report
    encoding = [progress for progress in told if progress.stage == "encode"]
    size = source.files[0].stat().st_size
    assert told[0] == ("fingerprint", 0, 0, size, size)
    assert len(encoding) > 10
    assert encoding == sorted(encoding)
    assert encoding[-1] == ("encode", 900, report["tokens"], size, size)


def test_a_second_start_takes_the_finished_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)
    first = prepare_texts(source, tmp_path / "cache")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(prepare_module, "build_store", never)
    monkeypatch.setattr(fingerprints, "_hash", never)
    second = prepare_texts(source, tmp_path / "cache", workers=3, limits=Limits(0, 0))
    assert (first.reused, second.reused) == (False, True)
    assert second[:2] == first[:2]


def test_what_decides_the_tokens_decides_the_store(tmp_path: Path) -> None:
    cache, source = tmp_path / "cache", source_of(tmp_path)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(source.files[0].read_bytes())
    as_lines = tmp_path / "moved.txt"
    as_lines.write_bytes(source.files[0].read_bytes())
    tokenizer = tmp_path / "other.model"
    tokenizer.write_bytes(TOKENIZER.read_bytes() + b"\x1a\x00")  # an empty field more
    same = [
        prepare_texts(source, cache),
        prepare_texts(TextSource((moved,), "text"), cache),
    ]
    other = [
        prepare_texts(source, cache, append_eos=True),
        prepare_texts(TextSource(source.files, "text", max_row_bytes=10_000), cache),
        prepare_texts(TextSource((as_lines,), "text"), cache),
        prepare_texts(TextSource((moved, *source.files), "text"), cache),
        prepare(source, Tokenizer(tokenizer), cache, name="text"),
    ]
    assert same[0].prefix == same[1].prefix
    assert len({result.prefix for result in (same[0], *other)}) == 6


def test_an_edited_file_is_noticed(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    path, cache = source.files[0], tmp_path / "cache"
    first = prepare_texts(source, cache)
    # the same size and the same time of writing
    path.write_bytes(path.read_bytes().replace(b"late", b"LATE"))
    os.utime(path, (1.6e9, 1.6e9))
    second = prepare_texts(source, cache)
    assert not second.reused
    assert TokenStore(second.prefix).tokens.tolist() != TokenStore(first.prefix).tokens.tolist()


def test_a_file_written_a_moment_ago_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path)
    os.utime(source.files[0], (2e10, 2e10))  # will not have been written long ago for some time
    hashed: list[Path] = []
    original = fingerprints._hash
    monkeypatch.setattr(
        fingerprints, "_hash", lambda path, count: (hashed.append(path), original(path, count))[1]
    )
    for _ in range(2):
        prepare_texts(source, tmp_path / "cache")
    assert hashed == [*source.files] * 2


def test_a_lost_memory_of_fingerprints_is_made_again(tmp_path: Path) -> None:
    source, cache = source_of(tmp_path), tmp_path / "cache"
    prepare_texts(source, cache)
    memory = cache / "fingerprints.json"
    whole = memory.read_bytes()
    for damaged in (b"", b"[1]", whole[:-20]):
        memory.write_bytes(damaged)
        assert prepare_texts(source, cache).reused
        assert memory.read_bytes() == whole


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    source, cache = source_of(tmp_path), tmp_path / "cache"

    def edit(progress: Progress) -> None:
        if progress.stage == "encode":
            with source.files[0].open("a") as file:
                file.write('{"text": "more"}\n')

    with pytest.raises(UserError, match=r"text\.jsonl: was changed while it was read"):
        prepare_texts(source, cache, progress=edit)
    assert remains_in(cache) == []


@pytest.mark.parametrize("harm", ["tokens.bin", "tokens.idx", "report.json"])
def test_a_damaged_store_in_the_cache_is_named(tmp_path: Path, harm: str) -> None:
    source, cache = source_of(tmp_path), tmp_path / "cache"
    folder = prepare_texts(source, cache).prefix.parent
    (folder / harm).write_bytes((folder / harm).read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{folder}: is damaged: .*; remove it, and it is prepared again"):
        prepare_texts(source, cache)
