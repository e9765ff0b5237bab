"""csv: records by a scanner of their own, fields by the standard csv module.

Neither ready reader keeps one bad record from its neighbours. pyarrow.csv refuses a whole file whose record
does not fit into one of its blocks, reads a quote that never ends as a record, and tells the numbers of
skipped records apart from the batches they were skipped in. The csv module knows no bound on a record, and
after an error inside a record it goes on in the middle of it. So the scanner here finds where records end, in
bounded memory and whatever the bytes are, and the csv module gets one complete record at a time.

Records follow RFC 4180 (commas, quotes doubled inside quotes, line breaks inside quotes); a quote inside a
field that none opened is an ordinary character. Where a quote is left open, the record goes on to the next
quote, and is bad as a whole.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bc2exp.config.errors import UserError
from bc2exp.data import rows
from bc2exp.data.line_files import skip_mark
from bc2exp.data.rows import BadRow, Meter, Record, Row

_CHUNK_BYTES = 2**20

# Where the scanner stands: at the start of a field, in an unquoted, in a quoted one, after a quote in that.
_START, _PLAIN, _QUOTED, _QUOTE = range(4)


class _Record(NamedTuple):
    content: bytes
    whole: bool


def read_csv(path: Path, column: str, max_row_bytes: int, meter: Meter) -> Iterator[Row | BadRow]:
    """The texts in `column` of a csv file whose first record names the columns.

    Raises:
        UserError: no such column, or two of that name; a quote that never ends.
    """
    for row in read_csv_records(path, {column: "dataset.column"}, max_row_bytes, meter, blank=True):
        if isinstance(row, Record):
            yield rows.judge(row.file, row.number, row.values[column], max_row_bytes)
        else:
            yield row


def read_csv_records(
    path: Path, columns: dict[str, str], max_row_bytes: int, meter: Meter, *, blank: bool = False
) -> Iterator[Record | BadRow]:
    """The fields of a csv file in `columns` ({column: key that names it}), as text that nobody has judged.

    A line without any field is passed over; with `blank` it is a record of empty fields.

    Raises:
        UserError: as `read_csv`.
    """
    # The module's own limit is one for the whole process; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    file = rows.printable(path)
    records = _records(path, max_row_bytes, meter)
    header = _header(path, records)
    positions = {column: rows.find_column(path, header, column, key) for column, key in columns.items()}
    for number, (content, whole) in enumerate(records, 1):
        if not whole:
            yield rows.bad(file, number, rows.TOO_LONG, content)
            continue
        if b"\0" in content:
            # anywhere in the record: up to Python 3.10 the csv module refuses such a record
            yield rows.bad(file, number, rows.NUL, content)
            continue
        try:
            fields = _fields(content)
        except csv.Error:
            yield rows.bad(file, number, rows.NOT_CSV, content)
            continue
        if not fields:
            if blank:
                yield Record(file, number, dict.fromkeys(columns, ""))
        elif len(fields) != len(header):
            yield rows.bad(file, number, rows.NUM_FIELDS, content)
        else:
            yield Record(file, number, {column: fields[at] for column, at in positions.items()})


def check_csv(path: Path, column: str, max_row_bytes: int) -> None:
    """Raise as `read_csv` does for what the first record tells."""
    rows.find_column(path, _header(path, _records(path, max_row_bytes, Meter())), column)


def _header(path: Path, records: Iterator[_Record]) -> list[str]:
    content, whole = next(records, _Record(b"", True))
    try:
        if whole:
            return _fields(content)
    except csv.Error:
        pass
    raise UserError(f"dataset.path={path}: its first line does not name the columns of a csv")


def _fields(content: bytes) -> list[str]:
    """The fields of one record; what is not UTF-8 becomes lone surrogates and spoils only its field."""
    # strict: what follows a closing quote tells that another one was left open
    return next(csv.reader((content.decode("utf-8", "surrogateescape"),), strict=True), [])


def _records(path: Path, max_row_bytes: int, meter: Meter) -> Iterator[_Record]:
    """The records of a file with their line ends; of one longer than the limit, the beginning."""
    limit = max_row_bytes + len(b"\r\n")
    with path.open("rb") as stream:
        skip_mark(path, stream, meter)
        parts: list[bytes] = []
        size, state, number = 0, _START, 0
        while chunk := stream.readline(_CHUNK_BYTES):
            meter.bytes_done += len(chunk)
            state = _advance(state, chunk)
            # one chunk beyond the limit is kept, to show how the row begins
            if size <= limit:
                parts.append(chunk)
            size += len(chunk)
            if chunk.endswith(b"\n") and state != _QUOTED:
                content = b"".join(parts)
                body = size if size > limit else len(content.rstrip(b"\r\n"))
                yield _Record(content, body <= max_row_bytes)
                parts, size, state, number = [], 0, _START, number + 1
        if state == _QUOTED:
            begin = b"".join(parts)[:60].decode("utf-8", "backslashreplace")
            raise UserError(
                f"dataset.path={path}: a quote opened in row {number} ({begin!r}) never ends; close it or "
                "double it"
            )
        if parts:
            yield _Record(b"".join(parts), size <= max_row_bytes)


def _advance(state: int, chunk: bytes) -> int:
    """The state after `chunk`. A line feed ends a record in every state but _QUOTED."""
    if state in (_START, _PLAIN) and b'"' not in chunk:
        return _START if chunk.endswith(b",") else _PLAIN
    at, end = 0, len(chunk)
    while at < end:
        if state == _QUOTED:
            at = chunk.find(b'"', at) + 1
            if not at:
                return _QUOTED
            state = _QUOTE
        elif state == _PLAIN:
            at = chunk.find(b",", at) + 1
            if not at:
                return _PLAIN
            state = _START
        else:
            # a quote opens the field, or is the second of a pair
            state = {0x22: _QUOTED, 0x2C: _START}.get(chunk[at], _PLAIN)
            at += 1
    return state
