"""Rows of published tables: a CSV or YAML file with the columns of ModelLink's.

Needed is a name for each row (column `row`) and one of `samples/s`, `tokens/s/p`, `s/step`; further
`devices`, `global batch`, `sequence`, and whatever else a table has (model, date, source). An empty cell or a
dash is a figure that was not published.
"""

from __future__ import annotations

import csv
import io
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.report.compare.columns import Columns, Figure
from bc2exp.report.compare.side import About, Side, about_name

_FIGURES = {
    "samples/s": "samples_per_s",
    "tokens/s/p": "tokens_per_s_per_device",
    "s/step": "s_per_step",
}
_COUNTS = {"global batch": "global_batch", "sequence": "sequence_length", "devices": "num_devices"}
_NAMES = {**_FIGURES, **_COUNTS}
_NOTHING = ("", "-", "–", "—", "null", "None")


def read_published(path: Path, side: Side, about: About) -> None:
    """Fill in `side` from the row of `path` that was chosen, the only one where none was.

    Raises UserError, naming row and column, for what cannot be read and for a row that is not there.
    """
    table = {
        name: _columns(cells, f"{side.key}: row {name}") for name, cells in _rows(path, side.key).items()
    }
    side.rows = list(table.items())
    names = ", ".join(table)
    choose = f"{about_name(side.key)}.row"
    if about.row is None and len(table) > 1:
        raise UserError(f"{side.key}: has {len(table)} rows; choose one: {choose}=... of {names}")
    name = next(iter(table)) if about.row is None else about.row
    if name not in table:
        raise UserError(f"{choose}={name}: no such row; there are {names}")
    side.name = f"{path.name}, {name}"
    row = table[name]
    counts = {}
    for field in _COUNTS.values():
        known, said = getattr(row, field), getattr(about, field)
        if known is not None and said not in (None, known):
            raise UserError(f"{about_name(side.key)}.{field}={said}: the row says {known}; leave the key out")
        counts[field] = said if known is None else known
    given = {each.name: getattr(row, each.name) for each in fields(row)}
    side.columns = Columns(**{**given, **counts}).completed()
    cells = _rows(path, side.key)[name]
    extra = {key: text for key, text in cells.items() if key not in (*_NAMES, "row") and text not in _NOTHING}
    side.notes += [", ".join(f"{key} {text}" for key, text in extra.items())] * bool(extra)


def _rows(path: Path, key: str) -> dict[str, dict[str, str]]:
    """{name of the row: {column: text}}."""
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix.lower() == ".csv":
            read: Any = list(csv.DictReader(io.StringIO(text), strict=True))
        else:
            made: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
            read = made["rows"] if isinstance(made, dict) else made
        if not read:
            raise ValueError("it has no rows")
        rows = {}
        for number, row in enumerate(read, 1):
            if None in row:
                raise ValueError(f"row {number} has more cells than the heading")
            cells = {str(name).strip(): _text(value) for name, value in row.items()}
            if cells.get("row", "") in _NOTHING:
                raise ValueError(f"row {number} has no name (column `row`)")
            if cells["row"] in rows:
                raise ValueError(f"two rows are called {cells['row']}")
            rows[cells["row"]] = cells
        return rows
    except Exception as error:  # a person's file: whatever csv, YAML and Unicode make of it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: is no table of published figures: {reason}") from None


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _columns(cells: dict[str, str], where: str) -> Columns:
    given: dict[str, Any] = {}
    for title, name in _NAMES.items():
        text = cells.get(title, "").replace(",", "")
        if text in _NOTHING:
            continue
        try:
            figure = Figure.printed(text)
            given[name] = figure if title in _FIGURES else int(text)
        except ValueError:
            raise UserError(f"{where}, column {title}: {text} is no number above 0") from None
    if not any(name in given for name in _FIGURES.values()):
        raise UserError(f"{where}: has none of {', '.join(_FIGURES)}")
    return Columns(**given)
