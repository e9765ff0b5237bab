"""The live table of a sweep's jobs, on a terminal that a test reads."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from pathlib import Path

import pytest
from rich.console import Console

from bc2exp.launch import ledger as states
from bc2exp.launch.ledger import Ledger
from bc2exp.launch.sweep_screen import Row, SweepScreen
from bc2exp.tracking.journal import Journal
from tests.launch.commands import STEPS
from tests.small_run import small_plain

PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def console(height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=height)


def ledger(folder: Path, number: int) -> Ledger:
    made, plain = Ledger(folder), small_plain(folder)
    for job in range(number):
        made.add(plain, folder / str(job), ["task.steps=9", f"seed={job}"])
    return made


def text(screen: SweepScreen, job: states.Job, row: Row, height: int = 24) -> list[str]:
    """The rows of the table, their cells one space apart."""
    wide = Console(file=io.StringIO(), width=100)
    wide.print(screen.table(job, row, height))
    found = wide.file.getvalue().splitlines()
    return [" ".join(line.replace("│", " ").split()) for line in found if line.startswith("│")]


def test_a_row_follows_the_journal_of_its_job(tmp_path: Path) -> None:
    made = ledger(tmp_path, 3)
    for job, status in ((made.jobs[0], states.DONE), (made.jobs[2], states.INFEASIBLE)):
        made.ended(job, status, 0, "")
    (tmp_path / "0").mkdir()
    with Journal(tmp_path / "0" / "metrics.jsonl", 0) as journal:
        journal.event("start", step=0, steps=9)
        journal.metrics(8, {"train/loss": 2.5, "eval/loss": 2.25})
        journal.metrics(9, {"train/loss": 2.0})
        journal.event("done")
    screen = SweepScreen(made, None, shown := console())
    progress = screen.progress(made.jobs[1])
    assert progress is not None
    with progress() as live:
        live.update({"event": "start", "step": 0, "steps": 9, "segment": 0})
        live.update({"step": 3, "segment": 0, "metrics": {"train/loss": 4.0, "train/lr": 0.1}})
        assert text(screen, made.jobs[1], live._row) == [
            "0 seed=0 done 9/9 2.0000 2.2500",
            "1 seed=1 running 3/9 4.0000 4.0000",
            "2 seed=2 infeasible – – –",
        ]
        live.update({"step": 4, "segment": 0, "metrics": {"train/loss": 3.5, "eval/loss": 3.25}})
        live.update({"step": 5, "segment": 0, "metrics": {"train/loss": 3.0}})
        assert text(screen, made.jobs[1], live._row)[1] == "1 seed=1 running 5/9 3.0000 3.2500"
        live.update({"event": "note", "text": "a [bold] note", "segment": 0})
    said = PLAIN.sub("", shown.file.getvalue())
    assert "a [bold] note" in said
    assert "│" in said


def test_what_ranks_the_jobs_has_a_column(tmp_path: Path) -> None:
    made = ledger(tmp_path, 1)
    screen, row = SweepScreen(made, "eval/accuracy", console()), Row("running")
    row.take({"step": 1, "metrics": {"train/loss": 4.0}}, "eval/accuracy")
    assert text(screen, made.jobs[0], row) == ["0 task.steps=9 seed=0 running 1 4.0000 –"]
    row.take({"step": 2, "metrics": {"train/loss": 3.0, "eval/accuracy": 0.5}}, "eval/accuracy")
    assert text(screen, made.jobs[0], row) == ["0 task.steps=9 seed=0 running 2 3.0000 0.5000"]


def test_of_many_jobs_those_around_the_current_one_are_shown(tmp_path: Path) -> None:
    made = ledger(tmp_path, 12)
    for current, first in ((0, 0), (6, 4), (11, 8)):
        rows = text(SweepScreen(made, None, console()), made.jobs[current], Row("running"), height=10)
        assert [int(row.split()[0]) for row in rows] == [first, first + 1, first + 2, first + 3]
        (running,) = [row for row in rows if "running" in row]
        assert running.split()[0] == str(current)


def test_without_a_terminal_there_are_lines(tmp_path: Path) -> None:
    made = ledger(tmp_path, 1)
    assert SweepScreen(made, None, Console(file=io.StringIO())).progress(made.jobs[0]) is None


@pytest.mark.slow
def test_on_a_terminal_the_table_takes_the_place_of_the_jobs_bars(launch, monkeypatch) -> None:
    reader, writer = pty.openpty()
    heard: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                heard.append(os.read(reader, 1 << 16))
            except OSError:  # the other side is closed
                return

    thread = threading.Thread(target=listen)
    thread.start()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "40")
    command = launch.start("-m", *STEPS, "seed=1,2", stdout=writer, stderr=writer)
    os.close(writer)
    assert command.wait() == 0, b"".join(heard).decode()
    thread.join()
    os.close(reader)
    said = PLAIN.sub("", b"".join(heard).decode())
    assert re.search(r"│\s+0 │ seed=1\s+│ running │\s+12/12 │", said)
    assert re.search(r"│\s+1 │ seed=2\s+│ waiting │\s+– │", said)
    assert re.search(r"│\s+0 │ seed=1\s+│ done\s+│\s+12/12 │[^\n]*\n│\s+1 │ seed=2\s+│ running │", said)
    assert "━━" not in re.sub(r"[┏┡┃┠][^\n]*", "", said)  # a bar of its own would be drawn of these
    assert "job 1: done, eval/loss " in said
