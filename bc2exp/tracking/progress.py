"""A run's progress on the screen, from its journal: a live bar on a terminal, a few plain lines elsewhere.

What is shown depends on the records alone. The time left, too, comes from the times in the journal and not
from a clock here: a journal read later shows what was shown then.
"""

from __future__ import annotations

from typing import Any

from rich import progress as bar
from rich.console import Console
from rich.text import Text

from bc2exp.tracking.journal import OUTCOMES

_STAGES = {
    "fingerprint": "looking at the files",
    "wait": "another process prepares them",
    "encode": "encoding",
    "convert": "writing",
    "verify": "comparing",
}
_LABELS = {"preparing": "data", "converting": "weights"}
_PREPARING_LINES = 10


class Progress:
    """Shows records of a journal: `update` for each, `close` at the end, or use it in a `with`.

    `total_steps` is the number of the last optimizer step, None while it is not known (a "start" event with
    `steps` tells it). `lines` is about how many steps are shown where there is no terminal.
    """

    def __init__(self, total_steps: int | None, console: Console | None = None, lines: int = 25) -> None:
        self._total = total_steps
        self._console = console or Console()
        self._lines = lines
        self._latest: dict[str, float] = {}
        self._step = 0
        self._begin: tuple[int, float] | None = None
        self._time = 0.0
        self._next = 0
        self._unshown = False
        # Work on files: its stage, where and when that began, the part of it shown next.
        self._stage = ""
        self._since = (0, 0.0)
        self._next_part = 0.0
        self._bar: bar.Progress | None = None
        if self._console.is_terminal:
            self._bar = bar.Progress(
                bar.TextColumn("{task.fields[label]}"),
                bar.BarColumn(bar_width=None),
                bar.TextColumn("{task.fields[values]}"),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, label=self._label, values="")
            self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        """Show one record of the journal."""
        if "metrics" in record:
            self._metrics(record)
        elif record["event"] in ("preparing", "converting"):
            self._working(record)
        elif record["event"] == "progress":
            self._part_done(record)
        elif text := self._event(record):
            self._show_unshown()
            self._say(text)

    def close(self) -> None:
        """Show the last step if it was not shown, and take the bar off."""
        self._show_unshown()
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _of(self) -> str:
        return "?" if self._total is None else str(self._total)

    @property
    def _label(self) -> str:
        if self._total is None and not self._step:
            return "starting"
        return f"step {self._step}/{self._of}"

    def _metrics(self, record: dict[str, Any]) -> None:
        self._step, self._time = record["step"], record["time"]
        values = record["metrics"]
        if "train/loss" in values:
            # The first step pays for start-up: time is counted from its end.
            self._begin = self._begin or (self._step, self._time)
            self._latest = values
            self._unshown = True
            if self._bar is not None:
                self._bar.update(
                    self._task,
                    completed=self._step,
                    total=self._total,
                    label=self._label,
                    values=" ".join(self._fields(short=True)),
                )
            elif self._step >= self._next:
                self._show_unshown()
        if "eval/loss" in values:
            self._show_unshown()
            self._say(f"step {self._step}/{self._of}  evaluation loss {values['eval/loss']:.4f}")

    def _show_unshown(self) -> None:
        if self._bar is not None or not self._unshown:
            return
        self._unshown = False
        self._say(f"step {self._step:>{len(self._of)}}/{self._of}  " + "  ".join(self._fields(short=False)))
        # Without a known end the lines come at growing distances, so that they stay few as well.
        pace = max(1, (self._step // 4 if self._total is None else self._total // self._lines))
        self._next = (self._step // pace + 1) * pace

    def _working(self, record: dict[str, Any]) -> None:
        """Text becoming tokens, or weights changing their layout: bytes done of all, what they came to, and
        when the rest will be."""
        stage, done, of, now = (record[key] for key in ("stage", "bytes_done", "bytes_total", "time"))
        if self._stage != stage:
            self._stage, self._since, self._next_part = stage, (done, now), 0.0
        part = done / of if of else 1.0
        fields = [f"{_STAGES[stage]} {part:.0%}"]
        if stage == "encode":
            fields += [f"{record['rows']:,} rows", f"{record['tokens']:,} tokens"]
        seconds, new = now - self._since[1], done - self._since[0]
        if seconds > 0 and new > 0:
            left = _duration((of - done) * seconds / new)
            fields += [f"{new / 1e6 / seconds:.2f} MB/s of files", f"{left} left"]
        if stage in ("convert", "verify") and self._bar is not None:
            fields.append(record["tensor"])
        text = "  ".join(fields)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, total=of, label=_LABELS[record["event"]], values=text
            )
        elif part >= self._next_part and stage != "fingerprint":
            self._say(text)
            self._next_part = part + 1 / _PREPARING_LINES

    def _part_done(self, record: dict[str, Any]) -> None:
        """Work that is not counted in steps: so many of so many. Without a bar nothing, as lines stay."""
        if self._bar is not None:
            values = f"{record['done']:,}/{record['total']:,}"
            label, total = record["label"], record["total"]
            self._bar.update(self._task, completed=record["done"], total=total, label=label, values=values)

    def _fields(self, short: bool) -> list[str]:
        values = self._latest
        fields = [f"loss {values['train/loss']:.4f}"]
        if "train/lr" in values:
            fields.append(f"lr {values['train/lr']:.2e}")
        if "train/grad_norm" in values and not short:
            fields.append(f"grad norm {values['train/grad_norm']:.3g}")
        if "perf/tokens_per_s_per_device" in values:
            unit = "tok/s/dev" if short else "tokens/s/device"
            fields.append(f"{values['perf/tokens_per_s_per_device']:.0f} {unit}")
        if (left := self._seconds_left()) is not None:
            fields.append(f"{_duration(left)} left")
        return fields

    def _seconds_left(self) -> float | None:
        if self._total is None or self._begin is None or self._step <= self._begin[0]:
            return None
        step, time = self._begin
        return (self._total - self._step) * (self._time - time) / (self._step - step)

    def _event(self, record: dict[str, Any]) -> str | None:
        kind = record["event"]
        if kind == "start":
            self._begin, self._next = None, 0
            self._total = record.get("steps") or self._total
            if self._bar is not None:
                self._bar.update(self._task, completed=0, total=self._total, label=self._label, values="")
            return f"resumed from step {record['step']}" if record["step"] else None
        if kind == "data":
            sizes = {key: record.get(key) for key in ("rows", "documents", "tokens")}
            known = [f"{size:,} {key}" for key, size in sizes.items() if size is not None]
            if self._bar is not None:
                self._bar.update(self._task, values=", ".join(known))
            return ", ".join([f"data {record['name']}", *known])
        if kind == "checkpoint":
            return f"step {record['step']}: checkpoint saved in {record['path']}"
        if kind == "note":
            return str(record["text"])
        # A run that dies before its first step has no step to name.
        where = f" at step {record['step']}" if record.get("step") is not None else ""
        reason = f": {record['reason']}" if record.get("reason") else ""
        return f"{kind}{where}{reason}" if kind in OUTCOMES else None

    def _say(self, text: str) -> None:
        # Text, not markup: a path may hold brackets. soft_wrap: a line in a log file is never broken.
        self._console.print(Text(text), soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
