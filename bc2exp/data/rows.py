"""A row of a source: its text, or the reason why it has none that can be trained on.

What makes a row bad is decided here, once for every file format. An empty text is not bad: it is a row that
says nothing, and whoever reads the rows leaves it out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bc2exp.config.errors import UserError

MAX_ROW_BYTES = 16 * 2**20

# The reasons, as they stand in reports and quarantine files.
NULL = "null"
MISSING_KEY = "missing key"
NOT_TEXT = "not text"
NOT_JSON = "not a JSON object"
NUM_FIELDS = "wrong number of fields"
NOT_CSV = "not a csv record"
NOT_UTF8 = "invalid UTF-8"
BYTE_ORDER_MARK = "byte order mark"
NUL = "NUL character"
TOO_LONG = "longer than max_row_bytes"

_EXCERPT = 200


class Row(NamedTuple):
    """A good row.

    Attributes:
        file: the path of its file, printable.
        number: its number in that file, from 1: a line of a jsonl or txt, a record below the header of a csv.
        text: valid Unicode without NUL and byte order mark; may be empty.
    """

    file: str
    number: int
    text: str


class Record(NamedTuple):
    """A row of several columns, whose values nobody has judged.

    Attributes:
        file: the path of its file, printable.
        number: its number in that file, from 1, counted as for good rows.
        values: {column: value}: text from a csv, what JSON or Arrow have elsewhere.
    """

    file: str
    number: int
    values: dict[str, Any]


class BadRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        file: the path of its file, printable.
        number: its number in that file, from 1, counted as for good rows.
        reason: one of the constants of this module.
        excerpt: its first 200 characters as far as it has any; what is not Unicode is shown as `\\xff`.
    """

    file: str
    number: int
    reason: str
    excerpt: str


@dataclass
class Meter:
    """How far the reading of the files has come, in bytes of the files."""

    bytes_done: int = 0


def judge(file: str, number: int, text: bytes | str | None, max_row_bytes: int) -> Row | BadRow:
    """A text as a good or a bad row.

    Bytes are taken for UTF-8. A str may hold lone surrogates; its row was measured where it was read.
    """
    if text is None:
        return BadRow(file, number, NULL, "")
    try:
        if isinstance(text, bytes):
            if len(text) > max_row_bytes:
                return bad(file, number, TOO_LONG, text)
            text = text.decode("utf-8")
        elif not text.isascii():
            text.encode("utf-8")
    except UnicodeError:
        return bad(file, number, NOT_UTF8, text)
    if "\0" in text:
        return bad(file, number, NUL, text)
    if "\ufeff" in text:
        return bad(file, number, BYTE_ORDER_MARK, text)
    return Row(file, number, text)


def bad(file: str, number: int, reason: str, content: bytes | str) -> BadRow:
    """A bad row with the beginning of its content, made printable."""
    if isinstance(content, str):
        content = _as_bytes(content[:_EXCERPT])
    start = content[: 4 * _EXCERPT].decode("utf-8", "backslashreplace")
    return BadRow(file, number, reason, start[:_EXCERPT])


def printable(path: Path) -> str:
    """A path as text that any file can hold: names on Linux are bytes, and not always UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_column(path: Path, names: list[str], column: str, key: str = "dataset.column") -> int:
    """The position of `column`, which the configuration names under `key`, among the columns of a file, which
    must have it once.

    Raises:
        UserError: no such column, or several.
    """
    if (count := names.count(column)) != 1:
        found = f"{count} columns of that name" if count else "no such column"
        raise UserError(f"{key}={column}: {path} has {found}; it has {', '.join(names) or 'none'}")
    return names.index(column)


def _as_bytes(text: str) -> bytes:
    try:
        # bytes that a reader smuggled through a str
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")
