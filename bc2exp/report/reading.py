"""What tasks with a report of their own have in common: it is read, and the summary written around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bc2exp.storage import atomic
from bc2exp.tracking import journal


def summarize_file(run_folder: Path, file: str, name: str, *also: str) -> dict[str, Any]:
    """Write `summary.json` of a run: how it ended, under `name` the report in `file`, and the keys of it that
    are to stand `also` at the top. Returns the report.

    Raises OSError where there is none.
    """
    report: dict[str, Any] = json.loads((run_folder / file).read_text("utf-8"))
    outcome = journal.outcome(run_folder / "metrics.jsonl") or {}
    ended = {"outcome": outcome.get("event"), "reason": outcome.get("reason")}
    atomic.write_json(
        run_folder / "summary.json", {**ended, **{key: report[key] for key in also}, name: report}
    )
    return report
