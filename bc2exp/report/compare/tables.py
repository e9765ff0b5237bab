"""A comparison on the screen: throughput in ModelLink's columns, curves, configuration, verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

_MISSING = "–"
_COLUMNS = {"samples_per_s": "samples/s", "tokens_per_s_per_device": "tokens/s/p", "s_per_step": "s/step"}
_CURVES = {"loss": "loss", "grad_norm": "gradient norm"}
_NAMES = {"grad_norm": "gradient norm", "memory": "peak memory"}
_MOST_DIFFERENCES = 40


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """The tables of a comparison, for a rich console."""
    yield _throughput(report)
    yield _errors(report)
    if report["differences"]:
        yield _differences(report["differences"])
    yield _verdict(report)


def sentences(report: dict[str, Any]) -> list[str]:
    """What the tables do not hold: notes, rows that contradict themselves, and the verdict in one line."""
    said = [f"{side}, {report[side]['name']}: {note}" for side in "ab" for note in report[side]["notes"]]
    said += [f"only {text}" for text in _gaps(report)]
    said += [
        f"row {broken['row']} contradicts itself: {broken['name']}, but {broken['found']:.6g} against "
        f"{broken['expected']:.6g}"
        for broken in report["rows"]
    ]
    if not report["differences"]:
        said.append("configuration: no field that both sides know differs")
    failed = [line["name"] for line in report["verdict"] if line["status"] == "fail"]
    return [*said, "verdict: pass" if report["passed"] else f"verdict: FAIL ({', '.join(failed)})"]


def _gaps(report: dict[str, Any]) -> Iterator[str]:
    for name, shown in _CURVES.items():
        found = report["curves"][name]["statistics"]
        for side in "ab":
            alone = found[f"steps_{side}"] - found["common"]
            if alone and found["common"]:
                yield f"{side} has {alone} of its {found[f'steps_{side}']} steps of the {shown}; left out"


def _throughput(report: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("", overflow="fold")
    for title in ("devices", "batch", "sequence", *_COLUMNS.values(), "GiB"):
        table.add_column(title, justify="right")
    for side in "ab":
        row = report[side]
        figures = [_number(row[name]) + ("*" if name in row["derived"] else "") for name in _COLUMNS]
        counts = [_number(row[name]) for name in ("num_devices", "global_batch", "sequence_length")]
        label = f"{side}: {row['name']}" + (" (rehearsal)" if row["rehearsal"] else "")
        table.add_row(label, *counts, *figures, _number(row["peak_gib"]))
    ratios = [_number(report["ratios"][name]) for name in _COLUMNS]
    table.add_row("ratio a / b", "", "", "", *ratios, "")
    if report["a"]["derived"] or report["b"]["derived"]:
        table.caption = "* follows from the others of its row"
    return table


def _errors(report: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("relative error")
    for title in ("steps", "mean", "max", "at step", "line", "first over", "over"):
        table.add_column(title, justify="right")
    for name, shown in _CURVES.items():
        found = report["curves"][name]["statistics"]
        table.add_row(
            shown,
            _number(found["compared"]),
            percent(found["mean"]),
            percent(found["max"]),
            _number(found["max_step"]),
            percent(found["line"]),
            "never" if found["first_over"] is None and found["compared"] else _number(found["first_over"]),
            _number(found["num_over"]),
        )
    return table


def _differences(differences: list[list[Any]]) -> Table:
    table = Table()
    for title in ("configuration: fields that differ", "a", "b"):
        table.add_column(title, overflow="fold")
    for key, mine, other in differences[:_MOST_DIFFERENCES]:
        table.add_row(key, str(mine), str(other))
    if len(differences) > _MOST_DIFFERENCES:
        table.caption = f"{len(differences) - _MOST_DIFFERENCES} more are in compare.json"
    return table


def _verdict(report: dict[str, Any]) -> Table:
    table = Table()
    for title, justify in (("verdict", "left"), ("limit", "right"), ("found", "right"), ("", "left")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("of what", overflow="fold")
    for line in report["verdict"]:
        name = _NAMES.get(line["name"], line["name"])
        table.add_row(name, percent(line["limit"]), percent(line["value"]), line["status"], line["reason"])
    return table


def percent(value: float | str | None) -> str:
    """A part as a percentage with three digits; below 0.01 % as it is."""
    if value is None or isinstance(value, str):
        return _MISSING if value is None else value
    if 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{100 * value:.3g} %"


def _number(value: float | int | str | None) -> str:
    if value is None or isinstance(value, str):
        return _MISSING if value is None else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
