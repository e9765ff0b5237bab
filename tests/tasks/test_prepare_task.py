"""The task `prepare`, and training on what it leaves; what both refuse."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.data.store import TokenStore
from bc2exp.embedded import TOKENIZER
from bc2exp.tasks import get_task
from bc2exp.text.tokenizer import Tokenizer
from tests.data.stores import write_by_hand
from tests.small_run import small_config
from tests.train.parts import ONE_RANK, Memory

TEXTS = [f"第{n}单：送餐{'很' * (n % 9)}快 and {'very ' * (n % 30)}hot" for n in range(400)]
SMALL = ("task.steps=2", "task.save_every=null", "task.eval_every=null")


def do(folder: Path, *words: str) -> Memory:
    """Do the task that the words name, `pretrain` without one, in `folder`; its journal."""
    config = small_config(folder, f"dataset.cache={folder.parent}/cache", *words)
    journal = Memory()
    journal.outcome = get_task(config.task.name)(config, folder, ONE_RANK, journal)
    return journal


def prepare(folder: Path, *words: str) -> tuple[Memory, dict]:
    """Prepare, in `folder`; the journal and the report."""
    journal = do(folder, "task=prepare", *words)
    assert journal.outcome == "done"
    return journal, json.loads((folder / "report.json").read_text())


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        do(folder, *SMALL, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A jsonl of the texts with two empty ones and one bad row."""
    path = tmp_path / "orders.jsonl"
    lines = [json.dumps({"text": line}) for line in [*TEXTS[:7], "", *TEXTS[7:], ""]]
    lines.insert(20, '{"text": null}')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def words(text: Path) -> tuple[str, ...]:
    """The data set of the texts."""
    return "dataset=text", f"dataset.path={text}", "dataset.column=text"


def test_the_report_counts_what_the_store_holds(tmp_path: Path, words: tuple[str, ...]) -> None:
    journal, report = prepare(tmp_path / "run", *words, "dataset.workers=2")
    encoded = list(map(len, Tokenizer(TOKENIZER).encode_documents(TEXTS)))
    store = TokenStore(report["store"])
    assert report["documents"] == store.num_documents == len(TEXTS)
    assert report["tokens"] == len(store.tokens) == sum(encoded)
    assert (report["rows"], report["empty"], report["bad"], report["bad_rows"]) == (403, 2, {"null": 1}, 1)
    assert sum(report["lengths"].values()) == len(TEXTS)
    assert report["longest"] == max(encoded)
    assert report["reused"] is False
    assert {part: count["documents"] for part, count in report["parts"].items()} == {
        "train": 380,
        "held_out": 20,
        "test": 0,
    }
    assert report["parts"]["train"]["samples"] == (sum(encoded[:380]) - 1) // 32
    (data,) = [event for event in journal.events if event["event"] == "data"]
    assert (data["documents"], data["tokens"]) == (len(TEXTS), sum(encoded))
    assert journal.steps["data/bad_rows"] == {0: 1}
    (note,) = [event["text"] for event in journal.events if event["event"] == "note"]
    assert note.startswith("bad rows were left out: 1 (1 null); they are listed in ")
    listed = Path(note.rpartition(" ")[2]).read_text()
    assert json.loads(listed) | {"excerpt": ""} == {
        "file": words[1].partition("=")[2],
        "row": 21,
        "reason": "null",
        "excerpt": "",
    }


def test_a_second_time_reuses_the_store_and_an_edited_source_makes_another(
    tmp_path: Path, text: Path, words: tuple[str, ...]
) -> None:
    _, first = prepare(tmp_path / "1", *words)
    _, second = prepare(tmp_path / "2", *words)
    assert (second["store"], second["reused"]) == (first["store"], True)
    times = text.stat()
    text.write_text(text.read_text().replace("very", "VERY", 1))
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))  # nor do size and time give it away
    _, third = prepare(tmp_path / "3", *words)
    assert third["store"] != first["store"]
    assert third["reused"] is False
    _, longer = prepare(tmp_path / "4", *words, "dataset.append_eos=true")
    assert longer["tokens"] == third["tokens"] + len(TEXTS)


def test_training_prepares_by_itself_and_a_store_trains_as_its_source_does(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    first = do(tmp_path / "1", *SMALL, *words)
    _, report = prepare(tmp_path / "2", *words)
    assert report["reused"] is True
    for number, suffix in enumerate((".bin", ".idx")):
        again = do(tmp_path / f"3{number}", *SMALL, "dataset=text", f"dataset.path={report['store']}{suffix}")
        assert again.steps["train/loss"] == first.steps["train/loss"]
        assert again.steps["eval/loss"] == first.steps["eval/loss"]


def test_separate_documents_change_the_loss_and_lose_one_label_a_document(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    together = do(tmp_path / "1", *SMALL, *words)
    apart = do(tmp_path / "2", *SMALL, *words, "dataset.separate_documents=true")
    difference = abs(together.steps["train/loss"][1] - apart.steps["train/loss"][1])
    assert 1e-6 < difference < 0.5


def test_a_store_from_elsewhere(tmp_path: Path) -> None:
    documents = [[(n * 7 + k) % 2048 for k in range(50)] for n in range(100)]
    write_by_hand(tmp_path / "theirs", documents)
    journal, report = prepare(tmp_path / "run", "dataset=text", f"dataset.path={tmp_path}/theirs.bin")
    assert (report["documents"], report["tokens"], report["bad_rows"]) == (100, 5000, 0)
    (note,) = [event["text"] for event in journal.events if event["event"] == "note"]
    assert "does not say which tokenizer made it" in note


def test_damaged_stores_are_named_before_the_first_step(tmp_path: Path) -> None:
    def store(name: str, documents: list[list[int]]) -> str:
        write_by_hand(tmp_path / name, documents)
        return f"dataset.path={tmp_path}/{name}.bin"

    good = [[n % 2048] * 40 for n in range(60)]
    words = store("short", good)
    whole = (tmp_path / "short.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:-4])
    assert "short.bin: is truncated: 9596 bytes" in refused(tmp_path / "1", "dataset=text", words)
    words = store("index", good)
    index = (tmp_path / "index.idx").read_bytes()
    (tmp_path / "index.idx").write_bytes(index[:-8])
    assert "index.idx: is truncated" in refused(tmp_path / "2", "dataset=text", words)
    words = store("foreign", [*good, [2048]])
    assert "token 2048 at 2400 (document 61) is outside the vocabulary of 2048" in refused(
        tmp_path / "3", "dataset=text", words
    )
    words = store("empty", [[], []])
    assert "the store is empty" in refused(tmp_path / "4", "dataset=text", words)
    words = store("few", [[1] * 20])
    assert "has only" in refused(tmp_path / "5", "dataset=text", words)


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    _, report = prepare(tmp_path / "1", *words)
    folder = tmp_path / "moved"
    shutil.copytree(Path(report["store"]).parent, folder)
    changed = json.loads((folder / "report.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (folder / "report.json").write_text(json.dumps(changed))
    text = refused(tmp_path / "2", "dataset=text", f"dataset.path={folder}/tokens.bin")
    assert "was prepared with another tokenizer" in text


def test_too_many_bad_rows_name_the_keys_that_allow_more(
    tmp_path: Path, text: Path, words: tuple[str, ...]
) -> None:
    text.write_text(text.read_text() + '{"text": 1}\n' * 12)
    told = refused(tmp_path / "1", *words)
    assert told.startswith("dataset.max_bad_rows=10, dataset.max_bad_fraction=0.001: 13 of ")
    assert f"{text} row 21 (null)" in told
    assert do(tmp_path / "2", *SMALL, *words, "dataset.max_bad_rows=13").outcome == "done"
    assert do(tmp_path / "3", *SMALL, *words, "dataset.max_bad_fraction=0.1").outcome == "done"


def test_a_row_beyond_the_limit_is_bad(tmp_path: Path, words: tuple[str, ...]) -> None:
    _, report = prepare(tmp_path / "1", *words, "dataset.max_row_bytes=150", "dataset.max_bad_rows=1000")
    assert report["bad"]["longer than max_row_bytes"] > 50


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"more than model\.vocab_size=100 of tiny_7b"):
        prepare(tmp_path / "1", *words, "model.vocab_size=100")
    journal, _ = prepare(tmp_path / "2", *words, "model.vocab_size=8192")
    assert any("the rest is never trained on" in event.get("text", "") for event in journal.events)
