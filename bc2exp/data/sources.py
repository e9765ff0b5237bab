"""The rows of a data set: which files it means, and their rows in a fixed order, streamed.

Files are read one after the other in the order of their names, so that the same files give the same rows
everywhere. The text that ships with the package is a source like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa

from bc2exp.config.errors import UserError
from bc2exp.config.text_files import find_text_files, needs_column
from bc2exp.data.csv_files import check_csv, read_csv, read_csv_records
from bc2exp.data.line_files import read_jsonl, read_jsonl_records, read_txt
from bc2exp.data.parquet_files import check_parquet, read_parquet, read_parquet_records
from bc2exp.data.rows import MAX_ROW_BYTES, BadRow, Meter, Record, Row
from bc2exp.embedded import CORPUS, REVIEWS


@dataclass(frozen=True)
class TextSource:
    """Files and how to read them.

    Attributes:
        files: in the order in which they are read.
        column: the column of a parquet or csv, the key of a jsonl, that holds the text; a txt has none.
        max_row_bytes: longer rows are bad: a record of a csv, a line of a jsonl or txt, a text of a parquet.
        alternate: one row of each file in turn, and not file after file.
    """

    files: tuple[Path, ...]
    column: str | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    alternate: bool = False


def find_source(
    source: str, path: str | None, column: str | None, max_row_bytes: int = MAX_ROW_BYTES
) -> TextSource:
    """The files that a configuration means.

    Args:
        source: `file`, `embedded_corpus` or `embedded_reviews`.
        path: of source `file`: a file, a folder (all files in it and below whose suffix is known), or a
            pattern with `*`, `?`, `[…]` and `**` (those of the files it matches).
        column: the column or key that holds the text.
        max_row_bytes: longer rows are bad.

    Raises:
        UserError: no such file, no file of a known suffix, no column named where one is needed.
    """
    if source == "embedded_corpus":
        # alternating, so that a split by position holds both languages
        return TextSource(CORPUS, None, max_row_bytes, alternate=True)
    if source == "embedded_reviews":
        return TextSource((REVIEWS,), "review", max_row_bytes)
    assert path is not None
    files = find_text_files(path)
    table = needs_column(files)
    if table and not column:
        raise UserError(
            f"dataset.column: is not set; {table} needs the name of the column or key that holds the text"
        )
    return TextSource(files, column, max_row_bytes)


def check_columns(source: TextSource) -> None:
    """Look for the column in every parquet and csv, before hours are spent on those before a wrong one.

    Raises:
        UserError: names the file, the column and the columns there are.
    """
    for path in source.files:
        with _naming(path):
            if path.suffix.lower() == ".parquet":
                check_parquet(path, source.column or "")
            elif path.suffix.lower() == ".csv":
                check_csv(path, source.column or "", source.max_row_bytes)


def read_rows(source: TextSource, meter: Meter | None = None) -> Iterator[Row | BadRow]:
    """All rows, good and bad, in order and in bounded memory.

    Args:
        source: what to read.
        meter: is told how far the reading has come.

    Raises:
        UserError: a file that is not what its name says, cannot be read, or has no such column.
    """
    meter = meter or Meter()
    readers = [_read(path, source, meter) for path in source.files]
    if not source.alternate:
        for reader in readers:
            yield from reader
    else:
        for turn in zip_longest(*readers):
            yield from (row for row in turn if row is not None)


def read_records(source: TextSource, columns: dict[str, str]) -> Iterator[Record | BadRow]:
    """The values in several columns of all rows, in order; their texts are not judged.

    Args:
        source: what to read; its own column does not count.
        columns: of every file; {column: key of the configuration that names it}.

    Raises:
        UserError: as `read_rows`; a .txt, which has no columns.
    """
    readers = {".parquet": read_parquet_records, ".csv": read_csv_records, ".jsonl": read_jsonl_records}
    for path in source.files:
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"dataset.path={path}: has no columns; .csv, .jsonl and .parquet have")
        with _naming(path):
            yield from reader(path, columns, source.max_row_bytes, Meter())


def _read(path: Path, source: TextSource, meter: Meter) -> Iterator[Row | BadRow]:
    column, limit = source.column or "", source.max_row_bytes
    with _naming(path):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from read_parquet(path, column, limit, meter)
        elif suffix == ".csv":
            yield from read_csv(path, column, limit, meter)
        elif suffix == ".jsonl":
            yield from read_jsonl(path, column, limit, meter)
        else:
            yield from read_txt(path, limit, meter)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what a reader raises about a file into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"dataset.path={path}: cannot be read: {' '.join(str(error).split())}") from None
