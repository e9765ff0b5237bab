"""txt and jsonl: files in which every row is a line.

Lines are read from bytes with a limit, so that neither a line without an end nor bytes that are not UTF-8
cost more than their own row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bc2exp.config.errors import UserError
from bc2exp.data import rows
from bc2exp.data.rows import BadRow, Meter, Record, Row

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SKIP_BYTES = 2**20


def read_txt(path: Path, max_row_bytes: int, meter: Meter) -> Iterator[Row | BadRow]:
    """The lines of a text file."""
    file = rows.printable(path)
    with path.open("rb") as stream:
        for number, (line, whole) in enumerate(_lines(path, stream, max_row_bytes, meter), 1):
            if not whole:
                yield rows.bad(file, number, rows.TOO_LONG, line)
            else:
                yield rows.judge(file, number, line, max_row_bytes)


def read_jsonl(path: Path, key: str, max_row_bytes: int, meter: Meter) -> Iterator[Row | BadRow]:
    """The value under `key` of the JSON object on each line; a blank line is an empty text."""
    file = rows.printable(path)
    with path.open("rb") as stream:
        for number, (line, whole) in enumerate(_lines(path, stream, max_row_bytes, meter), 1):
            if not whole:
                yield rows.bad(file, number, rows.TOO_LONG, line)
            elif not line.strip():
                yield Row(file, number, "")
            else:
                yield _value(file, number, line, key, max_row_bytes)


def read_jsonl_records(
    path: Path, keys: dict[str, str], max_row_bytes: int, meter: Meter
) -> Iterator[Record | BadRow]:
    """What stands under `keys` ({key: who names it}) of the JSON object on each line; blank ones are passed
    over."""
    file = rows.printable(path)
    with path.open("rb") as stream:
        for number, (line, whole) in enumerate(_lines(path, stream, max_row_bytes, meter), 1):
            if not whole:
                yield rows.bad(file, number, rows.TOO_LONG, line)
            elif line.strip():
                record = _object(file, number, line, tuple(keys))
                values = {key: record[key] for key in keys} if isinstance(record, dict) else {}
                yield record if isinstance(record, BadRow) else Record(file, number, values)


def _value(file: str, number: int, line: bytes, key: str, max_row_bytes: int) -> Row | BadRow:
    record = _object(file, number, line, (key,))
    if isinstance(record, BadRow):
        return record
    value = record[key]
    if value is not None and not isinstance(value, str):
        return rows.bad(file, number, rows.NOT_TEXT, line)
    return rows.judge(file, number, value, max_row_bytes)


def _object(file: str, number: int, line: bytes, keys: tuple[str, ...]) -> dict[str, Any] | BadRow:
    """The JSON object on a line, which has all `keys`."""
    try:
        # not json.loads(line): bytes that do not look like UTF-8 would be taken for UTF-16 or UTF-32
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return rows.bad(file, number, rows.NOT_UTF8, line)
    except (ValueError, RecursionError):
        # a byte order mark outside of a string is no JSON either, but it is the mark that one must hear of
        reason = rows.BYTE_ORDER_MARK if line.startswith(_UTF8_MARK) else rows.NOT_JSON
        return rows.bad(file, number, rows.NUL if b"\0" in line else reason, line)
    if not isinstance(record, dict):
        return rows.bad(file, number, rows.NOT_JSON, line)
    if any(key not in record for key in keys):
        return rows.bad(file, number, rows.MISSING_KEY, line)
    return record


def skip_mark(path: Path, stream: BinaryIO, meter: Meter) -> None:
    """Move past a UTF-8 byte order mark at the beginning of a file.

    Raises:
        UserError: the mark of UTF-16, in which no row could be read.
    """
    start = stream.read(len(_UTF8_MARK))
    if start[:2] in _UTF16_MARKS:
        raise UserError(
            f"dataset.path={path}: is UTF-16, not UTF-8; convert it, e.g. iconv -f UTF-16 -t UTF-8"
        )
    stream.seek(len(_UTF8_MARK) if start == _UTF8_MARK else 0)
    meter.bytes_done += stream.tell()


def _lines(path: Path, stream: BinaryIO, max_row_bytes: int, meter: Meter) -> Iterator[tuple[bytes, bool]]:
    """Each line without its end, and whether that is all of it: of a longer one, the beginning."""
    skip_mark(path, stream, meter)
    limit = max_row_bytes + len(b"\r\n")
    while line := stream.readline(limit):
        meter.bytes_done += len(line)
        body = line.rstrip(b"\r\n")
        unfinished = len(line) == limit and not line.endswith(b"\n")
        part = line
        while unfinished and not part.endswith(b"\n") and (part := stream.readline(_SKIP_BYTES)):
            meter.bytes_done += len(part)
        yield body, not unfinished and len(body) <= max_row_bytes
