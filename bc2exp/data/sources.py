"""Documents from a file, streamed: a column of a parquet or csv, the lines of a txt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from bc2exp.config.errors import UserError
from bc2exp.embedded import CORPUS, REVIEWS

_BATCH_ROWS = 4096


def documents(source: str, path: str | None, column: str | None) -> Iterator[str]:
    """The documents of a data set, in file order; empty ones are left out.

    Args:
        source: `file`, `embedded_corpus` or `embedded_reviews`.
        path: the file of source `file`.
        column: the column that holds the text; a txt file has none.

    Raises:
        UserError: a file that cannot be read as what its name says, a missing or non-text column.
    """
    if source == "embedded_corpus":
        texts: Iterable[str] = interleave(*(list(read(file, None)) for file in CORPUS))
    elif source == "embedded_reviews":
        texts = read(REVIEWS, "review")
    else:
        assert path is not None
        texts = read(Path(path), column)
    return (text for text in texts if text)


def interleave(*groups: list[str]) -> Iterator[str]:
    """One of each group in turn, so that a split by position holds every group."""
    for index in range(max(len(group) for group in groups)):
        yield from (group[index] for group in groups if index < len(group))


def read(path: Path, column: str | None) -> Iterator[str]:
    """The texts of one file by the ending of its name."""
    readers = {".parquet": _read_parquet, ".csv": _read_csv}
    try:
        reader = readers.get(path.suffix.lower())
        yield from reader(path, column or "") if reader else _read_lines(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset.path={path}: cannot be read: {' '.join(str(error).split())}") from None


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        _require_text(path, column, file.schema_arrow)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _read_csv(path: Path, column: str) -> Iterator[str]:
    # the text column as text, whatever its first rows look like
    convert = pyarrow.csv.ConvertOptions(column_types={column: pa.string()}, strings_can_be_null=False)
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, convert_options=convert, parse_options=parse) as reader:
        _require_text(path, column, reader.schema)
        for batch in reader:
            yield from (text for text in batch.column(column).to_pylist() if text is not None)


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _require_text(path: Path, column: str, schema: pa.Schema) -> None:
    if column not in schema.names:
        raise UserError(f"dataset.column={column}: {path} has no such column; it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        text = [field.name for field in schema if pa.types.is_string(field.type)]
        raise UserError(
            f"dataset.column={column}: {path} holds {kind} there, not text; text is in {', '.join(text) or 'none'}"
        )
