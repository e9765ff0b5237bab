"""Logs of trainings that drift from a reference, for jobs that only compare and need no ranks."""

from __future__ import annotations

from pathlib import Path

from tests.report.compare.logs import MODELLINK, TRAINER, lines, loss_at


def write_drifts(folder: Path, **factors: float) -> None:
    """Write the reference `b.log` and, for each name, a log whose losses are `factor` times its."""
    for name, factor in {"b": 1.0, **factors}.items():
        form = TRAINER if name == "b" else MODELLINK
        text = lines(form, range(1, 31), lambda step, factor=factor: factor * loss_at(step))
        (folder / f"{name}.log").write_text(text, encoding="utf-8")
