"""A sweep side by side: its jobs ranked by one metric, as a table, as a picture and as `sweep.json`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bc2exp.report.summary import history
from bc2exp.storage import atomic

_FALLBACKS = ("eval/loss", "train/loss")
_MISSING = "–"
_MOST_LABEL = 60


def named_value(run_folder: Path, metric: str | None) -> tuple[str, float] | None:
    """A metric and its last value in a run's journal; for None the first fallback that is there."""
    series = history(run_folder / "metrics.jsonl").series
    for name in _FALLBACKS if metric is None else (metric,):
        if steps := series.get(name):
            return name, steps[max(steps)]
    return None


def value_of(run_folder: Path, metric: str | None) -> float | None:
    """The value alone."""
    found = named_value(run_folder, metric)
    return None if found is None else found[1]


def rank(jobs: Sequence[dict[str, Any]], metric: str | None, direction: str) -> dict[str, Any]:
    """Rank the jobs of a sweep.

    Args:
        jobs: each with "number", "folder", "overrides", "status", "reason", and "settled": only what did
            all that it was to do has a rank.
        metric: None: eval/loss where every settled job has it, else train/loss.
        direction: "lower" or "higher" is better.

    Returns:
        "metric", "direction" and "jobs", the best first and those without a rank at the end by number, each
        with "rank" and "value" (None where there is none; a value that is not finite has no rank) and with
        "differs": the overrides that not all jobs share.
    """
    settled = [job for job in jobs if job["settled"]]
    if metric is None:
        everywhere = settled and all(
            value_of(Path(job["folder"]), "eval/loss") is not None for job in settled
        )
        metric = _FALLBACKS[0] if everywhere else _FALLBACKS[1]
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    told: list[dict[str, Any]] = []
    for job in jobs:
        value = value_of(Path(job["folder"]), metric) if job["settled"] else None
        differs = [text for text in job["overrides"] if text not in shared]
        finite = value if value is not None and math.isfinite(value) else None
        told.append({**job, "differs": differs, "value": finite, "rank": None})
    sign = 1 if direction == "lower" else -1
    ranked = sorted((job for job in told if job["value"] is not None), key=lambda job: sign * job["value"])
    for place, job in enumerate(ranked, start=1):
        job["rank"] = place
    rest = [job for job in told if job["value"] is None]
    return {"metric": metric, "direction": direction, "jobs": [*ranked, *rest]}


def write_ranking(ranking: dict[str, Any], folder: Path) -> None:
    """Write `sweep.json` and `sweep.png` into a sweep's folder."""
    atomic.write_json(folder / "sweep.json", ranking)
    plot_ranking(ranking, folder / "sweep.png")


def table(ranking: dict[str, Any]) -> Table:
    """The ranking for a rich console."""
    result = Table(title=f"by {ranking['metric']}, {ranking['direction']} is better", title_justify="left")
    result.add_column("rank", justify="right")
    result.add_column("job", justify="right")
    result.add_column("overrides", overflow="fold")
    result.add_column(ranking["metric"], justify="right")
    result.add_column("status")
    result.add_column("reason", overflow="fold")
    for job in ranking["jobs"]:
        value = _MISSING if job["value"] is None else f"{job['value']:.6g}"
        place = str(job["rank"] or _MISSING)
        words = " ".join(job["differs"])
        result.add_row(place, str(job["number"]), words, value, job["status"], job["reason"])
    return result


def plot_ranking(ranking: dict[str, Any], path: Path) -> None:
    """Draw a dot a ranked job, the best at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranked = [job for job in ranking["jobs"] if job["rank"] is not None]
    figure = Figure(figsize=(8, 1.5 + 0.3 * max(2, min(len(ranked), 100))), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(f"{ranking['metric']} ({ranking['direction']} is better)", parse_math=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if ranked:
        places = range(len(ranked))
        axes.plot([job["value"] for job in ranked], places, "o", color="#0072B2")
        axes.set_yticks(places, [_label(job) for job in ranked], fontsize=8, parse_math=False)
        axes.invert_yaxis()
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no job has a value", transform=axes.transAxes, ha="center", color="#555555")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    atomic.write_bytes(path, buffer.getvalue())


def _label(job: dict[str, Any]) -> str:
    words = " ".join(job["differs"])
    # the fonts that come with matplotlib draw anything but ASCII as boxes
    text = f"{job['number']}: {words}" if words.isascii() and words else f"job {job['number']}"
    return text if len(text) <= _MOST_LABEL else text[: _MOST_LABEL - 3] + "..."
