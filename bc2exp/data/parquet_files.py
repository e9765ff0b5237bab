"""parquet: a column of text, batch by batch, taken for bytes.

Arrow believes what a file says of its strings; text that is not UTF-8 would fail a whole batch on the way
into Python. As bytes every row can be judged on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from bc2exp.config.errors import UserError
from bc2exp.data import rows
from bc2exp.data.rows import BadRow, Meter, Record, Row

_BATCH_ROWS = 4096
_BATCH_BYTES = 2**22
_BUFFER_BYTES = 2**20

_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
    pa.binary(): pa.binary(),
    pa.large_binary(): pa.large_binary(),
    pa.binary_view(): pa.binary_view(),
}


def read_parquet(path: Path, column: str, max_row_bytes: int, meter: Meter) -> Iterator[Row | BadRow]:
    """The texts in `column` of a parquet file.

    Raises:
        UserError: no such column, or one of another type than text.
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    file, size, number = rows.printable(path), path.stat().st_size, 0
    with _open(path) as parquet:
        _require_text(path, column, parquet.schema_arrow)
        total = parquet.metadata.num_rows
        batches = parquet.iter_batches(_batch_rows(parquet, column), columns=[column], use_threads=False)
        for batch in batches:
            # rows of a parquet have no place in its bytes: progress is counted in rows and told in bytes
            meter.bytes_done += size * (number + len(batch)) // total - size * number // total
            for text in _bytes_of(batch.column(0)).to_pylist():
                number += 1
                yield rows.judge(file, number, text, max_row_bytes)


def read_parquet_records(
    path: Path, columns: dict[str, str], max_row_bytes: int, meter: Meter
) -> Iterator[Record | BadRow]:
    """The values of a parquet file in `columns` ({column: key that names it}); texts as bytes, other types as
    Python has them.

    Raises:
        UserError: no such column.
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    file, number = rows.printable(path), 0
    with _open(path) as parquet:
        for column, key in columns.items():
            rows.find_column(path, parquet.schema_arrow.names, column, key)
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
            lists = [_values_of(batch.column(column)) for column in columns]
            for values in zip(*lists, strict=True):
                number += 1
                yield Record(file, number, dict(zip(columns, values, strict=True)))
    meter.bytes_done += path.stat().st_size


def check_parquet(path: Path, column: str) -> None:
    """Raise as `read_parquet` does for what the end of the file tells."""
    with _open(path) as parquet:
        _require_text(path, column, parquet.schema_arrow)


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    # Without the two memory options a whole row group is read at once, and files of one row group are common.
    return pyarrow.parquet.ParquetFile(
        path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
    )


def _bytes_of(texts: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    # not cast(): that would load all of pyarrow.compute for it
    return texts.view(_AS_BYTES[texts.type])


def _values_of(values: pa.Array) -> list[Any]:
    return (_bytes_of(values) if _is_text(values.type) else values).to_pylist()


def _batch_rows(parquet: pyarrow.parquet.ParquetFile, column: str) -> int:
    """Rows a batch, so that one of average rows holds no more than _BATCH_BYTES."""
    metadata = parquet.metadata
    # counted in leaves: a nested column before this one has several
    position = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)].index(column)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_bytes = sum(group.column(position).total_uncompressed_size for group in groups)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, num_bytes)))


def _require_text(path: Path, column: str, schema: pa.Schema) -> None:
    rows.find_column(path, schema.names, column)
    if not _is_text(schema.field(column).type):
        text = [field.name for field in schema if _is_text(field.type)]
        raise UserError(
            f"dataset.column={column}: {path} holds {schema.field(column).type} there, not text; text is in "
            f"{', '.join(text) or 'none'}"
        )


def _is_text(kind: pa.DataType) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in _AS_BYTES
