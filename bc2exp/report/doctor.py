"""What the doctor found, as a table. From `doctor.json` alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from bc2exp.hardware.rehearsal import LABEL
from bc2exp.report.reading import summarize_file


def summarize_doctor(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `summary.json` of the checks in `run_folder`; returns them. OSError where there are none."""
    return summarize_file(Path(run_folder), "doctor.json", "doctor", "rehearsal")


def table(report: dict[str, Any]) -> Table:
    """Every check, its verdict and what was found."""
    result = Table()
    result.add_column("")
    result.add_column("check")
    result.add_column("found", overflow="fold")
    for check in report["checks"]:
        result.add_row("ok" if check["passed"] else "FAILED", check["name"], check["found"])
    return result


def verdict(report: dict[str, Any]) -> list[str]:
    """The sum, and what to do about each failure; those with one remedy are named together."""
    failed = [check for check in report["checks"] if not check["passed"]]
    number = len(report["checks"])
    label = [f"this was a {LABEL}"] if report["rehearsal"] else []
    if not failed:
        return [f"healthy: {number} check{'s' * (number > 1)} passed", *label]
    fixes: dict[str, list[str]] = {}
    for check in failed:
        fixes.setdefault(check["fix"], []).append(check["name"])
    return [
        f"NOT healthy: {len(failed)} of {number} checks failed",
        *(f"fix {'; '.join(names)}: {fix}" for fix, names in fixes.items()),
        *label,
    ]
