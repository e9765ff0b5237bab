"""The jobs of a sweep on a terminal: one live table while a job runs, in the place of the job's own bar.

It is there only while the ranks of a job are watched and nobody else prints; before and after it, what a job
says scrolls by as ever. Without a terminal there are lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bc2exp.launch import ledger as states
from bc2exp.launch.conversation import Shown
from bc2exp.launch.ledger import Job, Ledger
from bc2exp.report.sweep import value_of
from bc2exp.tracking.journal import read

_FRAME_LINES = 6
_LOSS = "train/loss"
_MISSING = "–"


@dataclass
class Row:
    """What the table says of a job: the last step, of how many, its loss, its value of the metric."""

    status: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    value: float | None = None
    evaluated: bool = False

    def take(self, record: dict[str, Any], metric: str | None) -> None:
        """Learn from a record of the job's journal."""
        if "metrics" in record:
            values = record["metrics"]
            self.step = record["step"]
            self.loss = values.get(_LOSS, self.loss)
            self.evaluated = self.evaluated or "eval/loss" in values
            name = metric or ("eval/loss" if self.evaluated else _LOSS)
            self.value = values.get(name, self.value)
        elif record["event"] == "start":
            self.steps = record.get("steps", self.steps)


class SweepScreen:
    """Shows the jobs of a ledger.

    Args:
        ledger: which jobs there are.
        metric: what ranks them; None: their losses.
        console: None: the terminal, where there is one.
    """

    def __init__(self, ledger: Ledger, metric: str | None, console: Console | None = None) -> None:
        self._ledger = ledger
        self._metric = metric
        self._console = console
        self._ended: dict[int, Row] = {}

    def progress(self, job: Job) -> Callable[[], Shown] | None:
        """What makes the progress of a job that is about to run; None where there is no terminal."""
        console = self._console or Console()
        if not console.is_terminal:
            return None
        return lambda: LiveJobs(self, job, console)

    def table(self, current: Job, row: Row, height: int) -> Table:
        """The table, `row` being that of the current job; of many jobs those around it, `height` lines."""
        jobs = self._ledger.jobs
        room = max(1, height - _FRAME_LINES)
        first = max(0, min(current.number - room // 2, len(jobs) - room))
        shown = jobs[first : first + room]
        shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        result = Table()
        for name in ("job", "overrides", "status", "step", "loss", self._metric or "metric"):
            result.add_column(
                name,
                justify="left" if name in ("overrides", "status") else "right",
                overflow="ellipsis",
                no_wrap=True,
                ratio=1 if name == "overrides" else None,
            )
        for job in shown:
            its = row if job is current else self._row(job)
            steps = "" if its.steps is None else f"/{its.steps}"
            result.add_row(
                str(job.number),
                Text(" ".join(text for text in job.overrides if text not in shared)),
                its.status,
                _MISSING if its.step is None else f"{its.step}{steps}",
                _number(its.loss),
                _number(its.value),
                style="bold" if job is current else None,
            )
        if len(shown) < len(jobs):
            over = sum(job.status in states.OVER for job in jobs)
            result.caption = f"{over} of {len(jobs)} jobs are over"
        return result

    def _row(self, job: Job) -> Row:
        """The row of a job that does not run now."""
        known = self._ended.get(job.number)
        if known is not None and known.status == job.status:
            return known
        row = Row(job.status)
        for record in read(job.folder / "metrics.jsonl"):
            row.take(record, self._metric)
        if job.status in states.SETTLED:
            row.value = value_of(job.folder, self._metric)  # what the ranking goes by
        self._ended[job.number] = row
        return row


class LiveJobs:
    """The progress of one job of a sweep, as a row among the others."""

    def __init__(self, screen: SweepScreen, job: Job, console: Console) -> None:
        self._screen, self._job, self._console = screen, job, console
        self._row = Row("running")
        for record in read(job.folder / "metrics.jsonl"):  # of an earlier part of its run
            self._row.take(record, screen._metric)
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=4, transient=True)

    def update(self, record: dict[str, Any]) -> None:
        """Show one record of the journal."""
        self._row.take(record, self._screen._metric)
        if record.get("event") == "note":
            self._console.print(Text(str(record["text"])), soft_wrap=True)

    def __enter__(self) -> LiveJobs:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _table(self) -> Table:
        return self._screen.table(self._job, self._row, self._console.size.height)


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"
