"""What was answered, in numbers: `summary.json` and a line. From the journal and `answers.jsonl` alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from bc2exp.report.summary import history
from bc2exp.storage import atomic
from bc2exp.tracking import journal


def summarize_generation(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `summary.json` of the answers in `run_folder`; returns what is in it."""
    folder = Path(run_folder)
    outcome = journal.outcome(folder / "metrics.jsonl")
    series = history(folder / "metrics.jsonl").series
    answers = [json.loads(text) for text in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    speed = series.get("perf/new_tokens_per_s", {}).get(0)
    summary = {
        "outcome": outcome["event"] if outcome else None,
        "reason": (outcome or {}).get("reason"),
        "generation": {
            "answers": len(answers),
            "tokens": sum(answer["tokens"] for answer in answers),
            "ended": dict(Counter(answer["ended"] for answer in answers)),
            "new_tokens_per_s": speed,
        },
    }
    atomic.write_json(folder / "summary.json", summary)
    return summary


def line(summary: dict[str, Any]) -> str:
    """`3 answers, 120 tokens, 35.1 tokens/s`."""
    found = summary["generation"]
    speed = f", {found['new_tokens_per_s']:.1f} tokens/s" if found["new_tokens_per_s"] else ""
    plural = "s" * (found["answers"] != 1)
    return f"{found['answers']} answer{plural}, {found['tokens']:,} tokens{speed}"
