"""Files of rows for tests, and their rows as the sources read them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from bc2exp.data.rows import BadRow, Row
from bc2exp.data.sources import find_source, read_rows


def rows_of(path: Path | str, column: str | None = "text", limit: int = 1000) -> list[Row | BadRow]:
    """All rows of a file, folder or pattern."""
    return list(read_rows(find_source("file", str(path), column, limit)))


def texts_of(path: Path | str, column: str | None = "text") -> list[str]:
    """The texts of the good rows."""
    return [row.text for row in rows_of(path, column) if isinstance(row, Row)]


def _bytes_as_text(values: list[bytes | None]) -> pa.Array:
    """A column of strings of any bytes, as a careless writer leaves it."""
    return pa.array(values, pa.binary()).view(pa.string())


def write_rows(path: Path, values: list[str | bytes | None]) -> None:
    """Rows as the format of `path` holds them: bytes are written raw, None is what the format has for it."""
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    if path.suffix == ".parquet":
        table = pa.table({"n": range(len(raw)), "text": _bytes_as_text(raw)})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".csv":
        records = [b'%d,"%s"' % (n, (value or b"").replace(b'"', b'""')) for n, value in enumerate(raw)]
        path.write_bytes(b"\n".join([b"n,text", *records, b""]))
    elif path.suffix == ".jsonl":
        quoted = [b"null" if value is None else b'"%s"' % _escaped(value) for value in raw]
        path.write_bytes(b"".join(b'{"n": 1, "text": %s}\n' % value for value in quoted))
    else:
        path.write_bytes(b"".join(b"%s\n" % value for value in raw if value is not None))


def _escaped(value: bytes) -> bytes:
    return (
        value.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n").replace(b"\0", b"\\u0000")
    )
