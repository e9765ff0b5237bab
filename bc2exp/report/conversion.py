"""What a conversion of weights came to: a table and `summary.json`; torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from bc2exp.report.reading import summarize_file

Report = Mapping[str, Any]
"""The `conversion.json` of a run folder."""

_SHOWN_NAMES = 5


def summarize_conversion(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `summary.json` of the conversion in `run_folder`; returns its report.

    Raises OSError where there is no `conversion.json`.
    """
    return summarize_file(Path(run_folder), "conversion.json", "conversion")


def lines(report: Report) -> dict[str, str]:
    """{quantity: formatted value}, in order."""
    shape = report["shape"]
    size = f"{shape['num_layers']} layers of {shape['hidden_size']:,}, {shape['num_heads']} heads"
    rows = {
        "from": f"{report['kind']}, {size}",
        "to": report["format"],
        "weights": f"{report['bytes'] / 2**30:,.2f} GiB in {_number(report['tensors'], 'tensor')}, "
        f"{_number(report['files'], 'file')}",
        "types": ", ".join(f"{count:,} {dtype}" for dtype, count in report["dtypes"].items()),
        "written in": _speed(report["bytes"], report["convert_s"]),
        "compared in": "not compared (task.verify=true does it)"
        if report["verify_s"] is None
        else f"{_speed(report['bytes'], report['verify_s'])}; every bit is right",
    }
    if report["nan"]:
        rows["NaN in"] = some(report["nan"])
    if report["beside"]:
        rows["beside"] = ", ".join(report["beside"])
    return rows


def table(report: Report) -> Table:
    """The same for a rich console."""
    result = Table(show_header=False)
    result.add_column()
    result.add_column(overflow="fold")
    for name, value in lines(report).items():
        result.add_row(name, value)
    return result


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _speed(num_bytes: int, seconds: float) -> str:
    return f"{seconds:,.1f} s, {num_bytes / 1e6 / max(seconds, 1e-9):,.0f} MB/s"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)
