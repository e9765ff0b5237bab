"""What the doctor found, as a table. From `doctor.json` alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from bc2exp.storage import atomic
from bc2exp.tracking import journal


def summarize_doctor(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `summary.json` of the checks in `run_folder`; returns them. OSError where there are none."""
    folder = Path(run_folder)
    report: dict[str, Any] = json.loads((folder / "doctor.json").read_text("utf-8"))
    outcome = journal.outcome(folder / "metrics.jsonl")
    ended = {"outcome": outcome["event"] if outcome else None, "reason": (outcome or {}).get("reason")}
    atomic.write_json(folder / "summary.json", {**ended, "doctor": report})
    return report


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
    """What to do about each failure, and the sum."""
    failed = [check for check in report["checks"] if not check["passed"]]
    number = len(report["checks"])
    if not failed:
        return [f"healthy: {number} checks passed"]
    return [
        f"NOT healthy: {len(failed)} of {number} checks failed",
        *(f"fix {check['name']}: {check['fix']}" for check in failed),
    ]
