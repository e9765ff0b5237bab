"""Logs as other trainers write them, with numbers that a test knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bc2exp.report.compare.columns import Columns, Figure
from bc2exp.report.compare.side import About, Side, measure
from bc2exp.report.compare.sources import read_path

MODELLINK = (
    " iteration {step:8d}/    1000 | consumed samples: {samples:12d} | "
    "elapsed time per iteration (ms): 6973.0 | learning rate: 7.000E-08 | global batch size:    32 | "
    "lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: {norm:.3f} | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)
TRAINER = "{{'loss': {loss:.4f}, 'grad_norm': {norm:.3f}, 'learning_rate': 7e-08, 'epoch': 0.01}}"


def loss_at(step: int) -> float:
    """A falling curve like that of the published figure: 1.14 to 0.90."""
    return 0.9 + 0.24 * 0.99**step


def lines(form: str, steps: range, loss: Callable[[int], float] = loss_at) -> str:
    """A log with a line a step."""
    made = (form.format(step=n, samples=32 * n, loss=loss(n), norm=9.0 + n / 100) for n in steps)
    return "".join(f"{line}\n" for line in made)


def read(folder: Path, text: str, name: str = "train.log", **about: object) -> Side:
    """The side that a text in a file comes to, as `task.a`."""
    (folder / name).write_text(text, encoding="utf-8")
    return read_path(folder / name, f"task.a={name}", About(**about))  # type: ignore[arg-type]


def side(
    loss: dict[int, float],
    norm: dict[int, float] | None = None,
    *,
    rehearsal: bool = False,
    backend: str = "npu",
    peak: float | None = None,
    batch: int | None = 32,
    devices: int | None = 8,
    seconds: float | None = None,
) -> Side:
    """A side with these curves, and the speed of its steps."""
    made = Side("task.a=x", "x", "run folder", rehearsal=rehearsal)
    made.series = {"train/loss": loss, "train/grad_norm": norm or {}}
    if seconds is not None:
        made.series["perf/step_time_s"] = dict.fromkeys(loss or range(1, 9), seconds)
    if peak is not None:
        made.series["mem/peak_gib"] = {1: peak}
    made.config = {"hardware": {"backend": backend}}
    measure(made, About(global_batch=batch, num_devices=devices, sequence_length=4096))
    return made


def row(tokens: float, **counts: int | None) -> Side:
    """A published row with nothing but tokens/s/p."""
    figures = {"num_devices": 8, "sequence_length": 4096, "global_batch": 32, **counts}
    columns = Columns(tokens_per_s_per_device=Figure(tokens), **figures)  # type: ignore[arg-type]
    return Side("task.b=y", "y", "published table", columns=columns.completed())
