"""The report of a preparation, from files alone."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from bc2exp.report.preparation import lines, summarize_preparation, tables

REPORT = {
    "documents": 3,
    "tokens": 30,
    "bad_rows": 2,
    "rows": 6,
    "empty": 1,
    "bad": {"NUL character": 1, "null": 1},
    "lengths": {"1": 1, "8-15": 2},
    "longest": 15,
    "text_bytes": 2_000_000,
    "seconds": 0.5,
    "mb_per_s": 4.0,
    "workers": 2,
    "reused": False,
    "sequence_length": 8,
    "parts": {
        "train": {"documents": 2, "tokens": 20, "samples": 2},
        "held_out": {"documents": 1, "tokens": 10, "samples": 1},
    },
}


def test_every_count_is_shown_with_its_name() -> None:
    shown = lines(REPORT)
    assert shown["documents"] == "3"
    assert shown["tokens a document"] == "10.0 on average, 15 at most"
    assert (shown["rows"], shown["dropped, empty"], shown["dropped, bad"]) == ("6", "1", "2")
    assert shown["  NUL character"] == shown["  null"] == "1"
    assert shown["prepared in"] == "0.5 s, 4.00 MB/s of text, 2 workers"
    assert shown["held out"] == "1 document, 1 sample of 8"
    assert "taken from the cache" in lines({**REPORT, "reused": True})["prepared in"]


def test_a_store_from_elsewhere_shows_what_is_known() -> None:
    known = {key: REPORT[key] for key in ("documents", "tokens", "bad_rows", "sequence_length", "parts")}
    assert list(lines(known)) == ["documents", "tokens", "tokens a document", "train", "held out"]
    assert len(tables(known)) == 1


def test_the_longest_bar_is_the_most_frequent_length() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(REPORT)[1])
    bars = {line.split()[1]: line.count("█") for line in console.export_text().splitlines() if "█" in line}
    assert bars == {"1": 20, "8–15": 40}


def test_summary_and_picture_are_written(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "metrics.jsonl").write_text('{"event": "done", "time": 1.0, "segment": 0}\n')
    assert summarize_preparation(tmp_path) == REPORT
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "outcome": "done",
        "reason": None,
        "data": REPORT,
    }
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
