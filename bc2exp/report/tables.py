"""Summaries of runs as a table: one column a run, one line a quantity; on the screen or as Markdown.

The throughput lines are the columns of the published tables under their names there: samples/s, tokens/s/p
and s/step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Summary = Mapping[str, Any]
"""What `summary.summarize` returns, or what `summary.json` holds."""

_MISSING = "–"


def lines(summary: Summary) -> dict[str, str]:
    """What is shown of one run: {quantity: formatted value}, in order; "–" where the run has no value."""
    loss, speed = summary["loss"], summary["throughput"]
    ends = f"{_number(loss['first'], '.4f')} → {_number(loss['last'], '.4f')}"
    lowest = _number(loss["eval_min"], ".4f")
    if loss["eval_min_step"] is not None:
        lowest += f" (step {loss['eval_min_step']})"
    mfu = _number(speed["mfu"], ".1%")
    if speed["mfu"] is not None:
        mfu += f" of {_number(speed['peak_tflops'], 'g')} TFLOP/s ({speed['peak_name'] or 'unnamed peak'})"
    return {
        "outcome": str(summary["outcome"] or "none recorded"),
        "steps": f"{summary['steps']:,}",
        "loss, first → last": ends,
        "evaluation loss, lowest": lowest,
        "unigram entropy": _number(loss["unigram_entropy"], ".4f"),
        "tokens in positions": _work(summary.get("work")),
        "speed": "rehearsal: speed not measured" if summary.get("rehearsal") else _MISSING,
        "samples/s": _number(speed["samples_per_s"], ".4g"),
        "tokens/s/p": _number(speed["tokens_per_s_per_device"], ",.1f"),
        "s/step": _number(speed["s_per_step"], ".4g"),
        "MFU": mfu,
        "peak memory": _number(summary["memory"]["peak_gib"], ".2f", " GiB"),
        "wall time": _number(summary["wall_time_s"], ",.1f", " s"),
        "identities": _identities(speed["identities"]),
    }


def table(summaries: Mapping[str, Summary]) -> Table:
    """A table for a rich console, {column title: summary}."""
    result = Table()
    result.add_column("")
    for title in summaries:
        result.add_column(title, justify="right", overflow="fold")
    for row in _rows(summaries):
        result.add_row(*row)
    return result


def markdown(summaries: Mapping[str, Summary]) -> str:
    """The same as a Markdown table, ending in a newline."""
    rows = [("", *summaries), ("---", *("---:" for _ in summaries)), *_rows(summaries)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _rows(summaries: Mapping[str, Summary]) -> list[tuple[str, ...]]:
    columns = [lines(summary) for summary in summaries.values()]
    names = columns[0] if columns else {}
    shown = [name for name in names if any(column[name] != _MISSING for column in columns)]
    return [(name, *(column[name] for column in columns)) for name in shown]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _MISSING if value is None else f"{value:{form}}{unit}"


def _work(work: Mapping[str, Any] | None) -> str:
    if work is None:
        return _MISSING
    fewer = f"{work['times_fewer']:.1f} times fewer than {work['positions_padded']:,} padded"
    return f"{work['tokens']:,} in {work['positions']:,}, {fewer}"


def _identities(checks: Mapping[str, bool | None]) -> str:
    broken = [name for name, holds in checks.items() if holds is False]
    if broken:
        return "BROKEN: " + "; ".join(broken)
    return "hold" if any(checks.values()) else _MISSING
