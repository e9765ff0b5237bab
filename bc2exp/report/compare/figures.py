"""The two figures of ModelLink's page as PNG: both losses over the steps, and their relative error."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bc2exp.report.compare.tables import percent
from bc2exp.report.drawing import png, step_axes
from bc2exp.storage import atomic

OVERLAY, ERROR = "loss_overlay.png", "loss_error.png"

# Okabe-Ito: told apart with any kind of colour vision, and in print.
_A, _B, _LINE, _TEXT = "#0072B2", "#D55E00", "#009E73", "#555555"
_FEW = 30
"""Up to so many points are marked singly."""


def plot_comparison(report: dict[str, Any], folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `loss_overlay.png` and `loss_error.png` of a comparison into `folder`; returns their paths."""
    loss = report["curves"]["loss"]
    titles = f"a: {report['a']['name']}", f"b: {report['b']['name']}"
    return (
        _write(Path(folder) / OVERLAY, lambda axes: _overlay(axes, loss, titles)),
        _write(Path(folder) / ERROR, lambda axes: _error(axes, loss, report["tolerances"]["loss"])),
    )


def _write(path: Path, draw: Any) -> Path:
    figure, axes = step_axes()
    draw(axes)
    if axes.lines:
        figure.legend(loc="outside upper right", ncols=3, fontsize=9, frameon=False)
    atomic.write_bytes(path, png(figure))
    return path


def _overlay(axes: Axes, loss: dict[str, Any], titles: tuple[str, str]) -> None:
    axes.set_ylabel("training loss (nats a token)")
    # The reference lies below, wider: where both agree, both are still seen.
    for side, colour, width, title in (("b", _B, 3.0, titles[1]), ("a", _A, 1.2, titles[0])):
        steps, values = _finite(loss["steps"], loss[side])
        if values:
            # the fonts that come with matplotlib draw anything else as boxes
            label = title if title.isascii() else side
            marker = "." if len(values) <= _FEW else ""
            axes.plot(
                steps, values, color=colour, linewidth=width, marker=marker, label=label.replace("$", r"\$")
            )
    if not axes.lines:
        _say(axes, "no loss recorded")


def _error(axes: Axes, loss: dict[str, Any], line: float) -> None:
    axes.set_ylabel("relative error of the loss, |a - b| / |b|")
    steps, errors = _finite(loss["steps"], loss["error"])
    if not errors:
        _say(axes, "no step in common")
        return
    marker = "." if len(errors) <= _FEW else ""
    label = f"relative error (mean {percent(loss['statistics']['mean'])})"
    axes.plot(steps, errors, color=_A, linewidth=1.8, marker=marker, label=label)
    axes.axhline(line, color=_LINE, linewidth=1.8, linestyle="--", label=f"acceptance line {percent(line)}")
    axes.set_ylim(bottom=-line / 40)  # an error of 0 is seen, too


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=_TEXT)


def _finite(steps: list[int], values: list[float | str | None]) -> tuple[list[int], list[float]]:
    """The points that have a place on an axis; the line goes on at the next one."""
    points = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    return [step for step, _ in points], [value for _, value in points]
