"""Models side by side: figures, the rows they differ on, confusions. From `evaluation.json` and
`predictions.json` alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bc2exp.report.reading import summarize_file
from bc2exp.storage import atomic

Report = dict[str, Any]

_KINDS = {"likelihood": "by likelihood", "answers": "by free answer"}
_TEXT_WIDTH, _ANSWER_WIDTH = 60, 24


def summarize_evaluation(run_folder: str | os.PathLike[str]) -> Report:
    """Write `summary.json` and, of labelled data, `confusion.png` of the evaluation in `run_folder`; returns
    its report, with all rows under `table`. OSError where there is none."""
    folder = Path(run_folder)
    report = summarize_file(folder, "evaluation.json", "evaluation")
    if "words" not in report:
        return report
    from bc2exp.report.confusion import draw_confusions  # matplotlib takes half a second

    atomic.write_bytes(folder / "confusion.png", draw_confusions(report))
    return report | {"table": json.loads((folder / "predictions.json").read_text("utf-8"))}


def tables(report: Report) -> list[Table | Text]:
    """What is shown of a report, for a rich console."""
    if "words" not in report:
        return [_losses(report)]
    return [*_rows(report), _figures(report), _counts(report), *map(_comparison, report["comparisons"])]


def _losses(report: Report) -> Table:
    table = _numbers(report["losses"])
    for figure in ("loss", "perplexity"):
        values = [losses.get(figure) for losses in report["losses"].values()]
        table.add_row(figure, *("–" if value is None else f"{value:.4f}" for value in values))
    return table


def _figures(report: Report) -> Table:
    models, words = report["models"], report["words"]
    table = _numbers(models)
    for by, title in _KINDS.items():
        columns = [model.get(by) for model in models.values()]
        if not any(columns):
            continue
        table.add_row(f"{title}:", *("" for _ in columns))
        for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro F1")):
            table.add_row(f"  {name}", *(_estimate(column[key]) for column in columns))
        for index, word in enumerate(words):
            table.add_row(f"  F1 of {word}", *(f"{column['f1'][index]:.4f}" for column in columns))
        if by == "answers":
            table.add_row("  no label word", *(f"{column['free_form']:.1%}" for column in columns))
        table.add_section()
    losses = [report["losses"][name].get("loss") for name in models]
    table.add_row("loss of the answers", *("–" if loss is None else f"{loss:.4f}" for loss in losses))
    return table


def _counts(report: Report) -> Text:
    pairs = zip(report["words"], report["counts"], strict=True)
    counts = ", ".join(f"{count:,} {word}" for word, count in pairs)
    return Text(
        f"{report['rows']:,} rows: {counts}; always the most frequent: {report['majority']:.4f}; in brackets "
        f"the {report['confidence']:.0%} bootstrap interval"
    )


def _numbers(models: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("")
    for name in models:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def _estimate(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4f} ({estimate['low']:.4f}–{estimate['high']:.4f})"


def _comparison(found: dict[str, Any]) -> Text:
    difference = found["difference"]
    low, high = (f"{100 * difference[key]:+.2f}" for key in ("low", "high"))
    return Text(
        f"{found['other']} against {found['one']}, {_KINDS[found['by']]}: "
        f"{100 * difference['value']:+.2f} points ({low} to {high}); right alone {found['only_other_right']} "
        f"against {found['only_one_right']} rows; McNemar's exact p {_p(found['p'])}"
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "below 0.0001"


def _rows(report: Report) -> list[Table | Text]:
    """The first rows, and as many of those behind them on which the models differ."""
    names = list(report["models"])
    lines, shown = report["table"]["data"], report["shown"]
    said = slice(2, 2 + len(names))
    differing = [index for index, line in enumerate(lines) if len(set(line[said])) > 1]
    further = [lines[index] for index in differing if index >= shown][:shown]
    found: list[Table | Text] = []
    for title, chosen in (
        (f"the first {min(shown, len(lines))} of {len(lines):,} rows", lines[:shown]),
        (f"further rows on which the models differ; {len(differing):,} are such", further),
    ):
        if not chosen:
            continue
        table = Table()
        for column in report["table"]["columns"][: 2 + len(names)]:
            table.add_column(Text(column), overflow="fold")
        for line in chosen:
            cells = (
                _short(line[0], _TEXT_WIDTH),
                line[1],
                *(_short(text, _ANSWER_WIDTH) for text in line[said]),
            )
            table.add_row(*(Text(cell) for cell in cells))
        found += [Text(title), table]  # a title of the table's own would be broken at its width
    return found


def _short(text: str, width: int) -> str:
    """A text on one line, its end left out where it is long; control characters as blanks."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
