"""Bad rows: counted, listed in a file, and tolerated up to a limit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple, NoReturn

from bc2exp.config.errors import UserError
from bc2exp.data.rows import BadRow

_NAMED = 3
# While reading, the number of rows is an estimate from the bytes read so far. An estimate must not refuse
# what would have passed, so until the end bad rows may be this many times as many.
_MARGIN = 2


class Limits(NamedTuple):
    """How many bad rows a data set may have: the larger of the two.

    Attributes:
        max_bad_rows: a number of rows.
        max_bad_fraction: a part of all rows.
    """

    max_bad_rows: int = 10
    max_bad_fraction: float = 0.001

    def allowed(self, num_rows: float) -> int:
        """Bad rows that may be among `num_rows`."""
        return max(self.max_bad_rows, math.floor(self.max_bad_fraction * num_rows))


class Quarantine:
    """Writes bad rows to a file, a JSON object a line: `file`, `row`, `reason`, `excerpt`. Use in a `with`.

    Attributes:
        path: the file; it exists with no bad row, too.
        counts: how many rows there were of each reason.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.counts: dict[str, int] = {}
        self._limits = limits
        # Lone surrogates become escapes, which JSON reads as what they were.
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")

    @property
    def num_rows(self) -> int:
        """Bad rows so far."""
        return sum(self.counts.values())

    def add(self, row: BadRow, *, num_rows: int, part_read: float) -> None:
        """List a bad row.

        Args:
            row: the row.
            num_rows: rows read so far, good ones included.
            part_read: the part of all bytes they came from, 0 to 1.

        Raises:
            UserError: there are far more bad rows than the whole data set may have.
        """
        self.counts[row.reason] = self.counts.get(row.reason, 0) + 1
        line = {"file": row.file, "row": row.number, "reason": row.reason, "excerpt": row.excerpt}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.num_rows > _MARGIN * self._limits.allowed(num_rows / max(part_read, 1e-9)):
            self._file.flush()
            refuse(self.num_rows, num_rows, self._limits, self.path, "; reading stopped there")

    def check(self, num_rows: int) -> None:
        """Raise UserError where the bad rows are more than the whole data set of `num_rows` may have."""
        self._file.flush()
        if self.num_rows > self._limits.allowed(num_rows):
            refuse(self.num_rows, num_rows, self._limits, self.path)

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class TooManyBadRows(UserError):
    """More bad rows than the limits allow."""


def refuse(num_bad: int, num_rows: int, limits: Limits, path: Path, stopped: str = "") -> NoReturn:
    """Raise TooManyBadRows with the first rows listed in the file `path`."""
    if num_bad == num_rows:
        refuse_all(num_bad, num_rows, path, stopped)
    raise TooManyBadRows(
        f"dataset.max_bad_rows={limits.max_bad_rows}, dataset.max_bad_fraction={limits.max_bad_fraction:g}: "
        f"{num_bad} of {num_rows} rows are bad{stopped}: {_first(num_bad, path)}; repair them or allow more "
        f"(all: {path})"
    )


def refuse_all(num_bad: int, num_rows: int, path: Path, stopped: str = "") -> NoReturn:
    """Raise TooManyBadRows where no row of a data set is good text."""
    raise TooManyBadRows(
        f"dataset.path: no row holds text that can be used; {num_bad} of {num_rows} rows are "
        f"bad{stopped}: "
        f"{_first(num_bad, path)}; are the column or key and the encoding (UTF-8) right? (all: {path})"
    )


def _first(num_bad: int, path: Path) -> str:
    """The first of the rows listed in the file `path`."""
    first = []
    with path.open(encoding="utf-8") as file:
        for line, _ in zip(file, range(_NAMED), strict=False):
            row = json.loads(line)
            first.append(f"{row['file']} row {row['row']} ({row['reason']})")
    return ", ".join(first) + (", …" if num_bad > _NAMED else "")
