"""Rows to a token store: read, encoded, written and counted in one pass."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bc2exp.data.encoding import Batch, Encoder
from bc2exp.data.quarantine import Quarantine
from bc2exp.data.rows import Meter, Row
from bc2exp.data.sources import TextSource, read_rows
from bc2exp.data.store_writer import StoreWriter
from bc2exp.text.tokenizer import Tokenizer

# A tenth of a second of one process: short beside a store, long beside a message.
_BATCH_BYTES = 2**18
_BATCH_ROWS = 2**14


class Progress(NamedTuple):
    """How far a preparation has come.

    Attributes:
        stage: `fingerprint` (are these files known?), `wait` (another process prepares the same) or `encode`.
        rows: rows read, encoded and written.
        tokens: tokens written.
        bytes_done: bytes of the files that these came from.
        bytes_total: bytes of all files.
    """

    stage: str
    rows: int
    tokens: int
    bytes_done: int
    bytes_total: int


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """What is told where nobody wants to know."""


def build_store(
    source: TextSource,
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    append_eos: bool,
    workers: int,
    bytes_total: int,
    quarantine: Quarantine,
    progress: OnProgress = ignore_progress,
) -> dict[str, Any]:
    """Write the store `prefix` and return what a report says of it.

    Args:
        source: the files.
        tokenizer: the SentencePiece model.
        prefix: path of the store; its folder exists.
        append_eos: end every document with the end-of-text token.
        workers: processes that encode; fewer are started for few bytes.
        bytes_total: size of all files.
        quarantine: gets the bad rows.
        progress: is told after every batch.

    Returns:
        `documents`, `tokens`, `rows`, `empty`, `bad` {reason: rows}, `lengths` {tokens "from-to": documents},
        `longest`, `max_token` (-1 without any), `text_bytes`, `sha256` of the `.bin`, `seconds`, `mb_per_s`
        (10^6 bytes of text a second), `workers`.

    Raises:
        UserError: as `read_rows` and `Encoder.encode`; TooManyBadRows beyond the limits of the quarantine.
    """
    begin = time.perf_counter()
    reading = _Reading(source, quarantine, bytes_total)
    workers = max(1, min(workers, math.ceil(bytes_total / _BATCH_BYTES)))
    lengths: Counter[int] = Counter()
    longest = 0
    with StoreWriter(prefix) as writer, Encoder(tokenizer, append_eos=append_eos, workers=workers) as encoder:
        for batch, encoded in encoder.encode(reading.batches()):
            writer.add(encoded.lengths, encoded.tokens)
            lengths.update(map(int.bit_length, encoded.lengths))
            longest = max(longest, *encoded.lengths, 0)
            progress(Progress("encode", batch.rows, writer.num_tokens, batch.bytes_done, bytes_total))
        quarantine.check(reading.num_rows)
        digest = writer.finish()
    seconds = time.perf_counter() - begin
    return {
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "rows": reading.num_rows,
        "empty": reading.num_rows - quarantine.num_rows - writer.num_documents,
        "bad": dict(sorted(quarantine.counts.items())),
        "lengths": {_bucket(bits): count for bits, count in sorted(lengths.items())},
        "longest": longest,
        "max_token": writer.max_token,
        "text_bytes": reading.text_bytes,
        "sha256": digest,
        "seconds": round(seconds, 3),
        "mb_per_s": round(reading.text_bytes / 1e6 / seconds, 3),
        "workers": workers,
    }


class _Reading:
    """Rows on their way into batches, counted."""

    def __init__(self, source: TextSource, quarantine: Quarantine, bytes_total: int) -> None:
        self.num_rows = self.text_bytes = 0
        self._source, self._quarantine, self._bytes_total = source, quarantine, bytes_total
        self._meter = Meter()

    def batches(self) -> Iterator[Batch]:
        """The texts of the good rows; bad ones go into quarantine."""
        texts: list[bytes] = []
        size = 0
        for row in read_rows(self._source, self._meter):
            self.num_rows += 1
            if not isinstance(row, Row):
                part_read = self._meter.bytes_done / max(1, self._bytes_total)
                self._quarantine.add(row, num_rows=self.num_rows, part_read=part_read)
            else:
                texts.append(row.text.encode("utf-8"))
                size += len(texts[-1])
            if size >= _BATCH_BYTES or len(texts) >= _BATCH_ROWS:
                yield self._batch(texts, size)
                texts, size = [], 0
        # the last one may be without text: it tells that the files have been read to their end
        yield self._batch(texts, size)

    def _batch(self, texts: list[bytes], size: int) -> Batch:
        self.text_bytes += size
        return Batch(texts, self.num_rows, self._meter.bytes_done)


def _bucket(bits: int) -> str:
    return f"{2 ** (bits - 1)}-{2**bits - 1}" if bits > 1 else "1"
