"""The loss of a run as a picture: training, evaluations, and the loss of a model that counts words only."""

from __future__ import annotations

import math
import os
from pathlib import Path

from matplotlib.axes import Axes

from bc2exp.report.drawing import png, step_axes
from bc2exp.report.summary import History, history
from bc2exp.storage import atomic

# Blue and vermilion of the Okabe-Ito palette: told apart with any kind of colour vision, and in print.
_TRAIN, _EVALUATION, _REFERENCE = "#0072B2", "#D55E00", "#555555"
_SMOOTH_FROM = 100


def plot_loss(run_folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Draw the run's loss (nats a token) over the optimizer steps; return the PNG's path.

    Written whole to `path`, by default `loss.png` in the run folder. The first value of each step counts. A
    journal without a loss gives an empty picture that says so.
    """
    folder = Path(run_folder)
    target = folder / "loss.png" if path is None else Path(path)
    figure, axes = step_axes()
    _draw(axes, history(folder / "metrics.jsonl"))
    if axes.lines:  # the legend stands outside, where it covers no curve
        figure.legend(loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    title = "/".join(folder.resolve().parts[-2:])
    if title.isascii():  # the fonts that come with matplotlib draw anything else as boxes
        axes.set_title(title, fontsize=9, loc="left", color=_REFERENCE, parse_math=False)
    atomic.write_bytes(target, png(figure))
    return target


def _draw(axes: Axes, read: History) -> None:
    axes.set_ylabel("loss (nats a token)")
    steps, losses = _sorted(read.series.get("train/loss", {}))
    if not losses:
        axes.text(0.5, 0.5, "no loss recorded", transform=axes.transAxes, ha="center", color=_REFERENCE)
        return
    if len(losses) < _SMOOTH_FROM:
        marker = "." if len(losses) <= 30 else ""
        axes.plot(steps, losses, color=_TRAIN, linewidth=1.5, marker=marker, label="training")
    else:
        axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.3, label="training")
        reach = len(losses) // 100
        label = f"mean of {2 * reach + 1} values"
        axes.plot(steps[reach:-reach], _smooth(losses, reach), color=_TRAIN, linewidth=1.8, label=label)
    evaluated, values = _sorted(read.series.get("eval/loss", {}))
    if values:
        label = f"evaluation (lowest {min(values):.3f})"
        axes.plot(evaluated, values, "o-", color=_EVALUATION, linewidth=1.0, markersize=4.5, label=label)
    if read.entropy is not None:
        label = f"unigram entropy {read.entropy:.3f}"
        axes.axhline(read.entropy, color=_REFERENCE, linewidth=1.0, linestyle="--", label=label)


def _sorted(series: dict[int, float]) -> tuple[list[int], list[float]]:
    # Values that are not finite have no place on an axis; the line goes on at the next one.
    points = sorted((step, value) for step, value in series.items() if math.isfinite(value))
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float], reach: int) -> list[float]:
    """The mean of each value and the `reach` values on either side; `reach` fewer values at each end."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    width = 2 * reach + 1
    return [(sums[i + width] - sums[i]) / width for i in range(len(values) - width + 1)]
