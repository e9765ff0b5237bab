"""What a preparation came to: a table, a picture of the documents' lengths, `summary.json`; torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from bc2exp.report.reading import summarize_file
from bc2exp.storage import atomic

Report = Mapping[str, Any]
"""The `report.json` of a run folder. A store that was made elsewhere has no counts of its making."""

_BAR = 40


def summarize_preparation(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `summary.json` and `lengths.png` of the preparation in `run_folder`; returns its report.

    Raises OSError where there is no `report.json`.
    """
    folder = Path(run_folder)
    report = summarize_file(folder, "report.json", "data")
    if report.get("lengths"):
        atomic.write_bytes(folder / "lengths.png", draw_lengths(report))
    return report


def lines(report: Report) -> dict[str, str]:
    """{quantity: formatted value}, in order; what is not known is left out."""
    tokens, documents = report["tokens"], report["documents"]
    rows = {
        "documents": f"{documents:,}",
        "tokens": f"{tokens:,}",
        "tokens a document": f"{tokens / max(1, documents):,.1f} on average",
    }
    if "longest" in report:
        rows["tokens a document"] += f", {report['longest']:,} at most"
    if "rows" in report:
        rows["rows"] = f"{report['rows']:,}"
        rows["dropped, empty"] = f"{report['empty']:,}"
        rows["dropped, bad"] = f"{report['bad_rows']:,}"
        rows |= {f"  {reason}": f"{count:,}" for reason, count in report["bad"].items()}
        rows["text"] = f"{report['text_bytes'] / 1e6:,.1f} MB"
        speed = f"{report['mb_per_s']:.2f} MB/s of text, {_number(report['workers'], 'worker')}"
        speed = f"{report['seconds']:.1f} s, {speed}"
        rows["prepared in"] = "an earlier run: taken from the cache" if report["reused"] else speed
    for part, counts in report["parts"].items():
        samples = f"{_number(counts['samples'], 'sample')} of {report['sequence_length']}"
        rows[part.replace("_", " ")] = f"{_number(counts['documents'], 'document')}, {samples}"
    return rows


def tables(report: Report) -> list[Table]:
    """The counts, and the histogram of lengths, for a rich console."""
    counts = Table(show_header=False)
    counts.add_column()
    counts.add_column(justify="right", overflow="fold")
    for name, value in lines(report).items():
        counts.add_row(name, value)
    lengths = report.get("lengths")
    if not lengths:
        return [counts]
    histogram = Table()
    histogram.add_column("tokens", justify="right")
    histogram.add_column("documents", justify="right")
    histogram.add_column("")
    most = max(lengths.values())
    for bucket, count in lengths.items():
        bar = "█" * max(1, round(_BAR * count / most))
        histogram.add_row(bucket.replace("-", "–"), f"{count:,}", bar)
    return [counts, histogram]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def draw_lengths(report: Report) -> bytes:
    """The histogram of the documents' lengths as a PNG."""
    from matplotlib.figure import Figure

    from bc2exp.report.drawing import png

    lengths = report["lengths"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar([bucket.replace("-", "–") for bucket in lengths], list(lengths.values()), color="#0072B2")
    axes.bar_label(bars, [f"{count:,}" for count in lengths.values()], fontsize=8)
    axes.set_xlabel("tokens a document")
    axes.set_ylabel("documents")
    axes.tick_params(axis="x", labelrotation=30)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return png(figure)
