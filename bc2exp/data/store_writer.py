"""Writing a token store, document after document, in memory that does not depend on their number."""

from __future__ import annotations

import hashlib
import os
from array import array
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch

from bc2exp.data.store import HEADER, INT32, MAGIC, VERSION
from bc2exp.storage import atomic

_CHUNK = 2**16
# Of more than 2^15 numbers torch finds the largest with all its threads, and these are not free: the encoding
# processes have the cores.
_ONE_THREAD = 2**14


class StoreWriter:
    """Writes PREFIX.bin and PREFIX.idx (format: `bc2exp.data.store`; int32, a document is one sequence).

    Both are written aside and take their names in `finish()`; without it, nothing appears. Use in a `with`,
    which removes what was left unfinished.

    Attributes:
        num_documents: documents so far.
        num_tokens: tokens so far.
        max_token: the largest of them, -1 without any.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.num_documents = self.num_tokens = 0
        self.max_token = -1
        prefix = Path(prefix)
        self._final = {kind: prefix.with_name(f"{prefix.name}.{kind}") for kind in ("bin", "idx")}
        self._aside = {
            kind: prefix.with_name(f".{prefix.name}.{kind}.{os.getpid()}.tmp") for kind in ("bin", "idx")
        }
        self._bin: BinaryIO = self._aside["bin"].open("wb")
        # Lengths go where they belong right away; the other two tables follow from them at the end.
        self._idx: BinaryIO = self._aside["idx"].open("w+b")
        self._idx.seek(HEADER.size)
        self._digest = hashlib.sha256()

    def add(self, lengths: array[int], tokens: array[int]) -> None:
        """Append documents.

        Args:
            lengths: int32 [documents], tokens of each.
            tokens: int32 [sum of lengths], their tokens one after the other.
        """
        assert lengths.itemsize == tokens.itemsize == 4
        assert sum(lengths) == len(tokens)
        self._bin.write(tokens)
        self._digest.update(tokens)
        self._idx.write(lengths)
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)
        if tokens:
            parts = torch.frombuffer(tokens, dtype=torch.int32).split(_ONE_THREAD)
            self.max_token = max(self.max_token, *(int(part.max()) for part in parts))

    def finish(self) -> str:
        """Bring the store to the disk under its name; the sha256 of its `.bin`, hexadecimal.

        A store of that name is replaced; a kill in between leaves a `.bin` without an `.idx`, which is none.
        """
        self._write_tables()
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._final["idx"].unlink(missing_ok=True)
        for kind in ("bin", "idx"):
            os.replace(self._aside[kind], self._final[kind])
        atomic.sync(self._final["idx"].parent)
        return self._digest.hexdigest()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._bin, self._idx):
            file.close()
        for path in self._aside.values():
            path.unlink(missing_ok=True)

    def _write_tables(self) -> None:
        num_bytes = 0
        for start in range(0, self.num_documents, _CHUNK):
            lengths = array("i")
            self._idx.seek(HEADER.size + 4 * start)
            lengths.frombytes(self._idx.read(4 * min(_CHUNK, self.num_documents - start)))
            ends = array("q", accumulate((4 * length for length in lengths), initial=num_bytes))
            num_bytes = ends.pop()
            self._idx.seek(HEADER.size + 4 * self.num_documents + 8 * start)
            self._idx.write(ends)
        self._idx.seek(HEADER.size + 12 * self.num_documents)
        for start in range(0, self.num_documents + 1, _CHUNK):
            self._idx.write(array("q", range(start, min(start + _CHUNK, self.num_documents + 1))))
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, INT32, self.num_documents, self.num_documents + 1))
