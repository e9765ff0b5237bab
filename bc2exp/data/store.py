"""Token stores in Megatron's format, PREFIX.bin and PREFIX.idx, as ModelLink and Megatron exchange them.

`.bin` holds the tokens of all documents without anything between them. `.idx`, little-endian throughout:

    9 bytes   "MMIDIDX" and two zero bytes
    uint64    version, 1
    uint8     type of the tokens: 4 int32, 5 int64, 8 uint16
    uint64    sequences
    uint64    documents + 1
    int32     [sequences]       tokens of each sequence
    int64     [sequences]       byte of `.bin` where it begins
    int64     [documents + 1]   the first sequence of each document, and the number of sequences

A document is one sequence, unless its writer split it into sentences. Source: Megatron-LM's
`megatron/core/datasets/indexed_dataset.py`. This module reads; `store_writer` writes.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.errors import UserError
from bc2exp.data.tokens import TokenStream, split_documents

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
INT32 = 4
HEADER = struct.Struct("<9sQBQQ")
REPORT = "report.json"

_DTYPES = {INT32: torch.int32, 5: torch.int64, 8: torch.uint16}
_CHUNK = 2**22


class TokenStore:
    """A store on the disk, mapped into memory: opening reads the index and no token.

    Attributes:
        prefix: the path without `.bin` and `.idx`.
        tokens: int32, int64 or uint16 [tokens]. Read-only: writing into it ends the process.
        num_documents: documents, empty ones included.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Open PREFIX, PREFIX.bin or PREFIX.idx.

        Raises:
            UserError: names what is missing or damaged.
        """
        self.prefix = store_prefix(prefix)
        index = Path(f"{self.prefix}.idx")
        code, num_sequences, num_entries = _read_header(index)
        dtype = _DTYPES[code]
        place = HEADER.size
        lengths = _map(index, torch.int32, num_sequences, place)
        self._pointers = _map(index, torch.int64, num_sequences, place := place + 4 * num_sequences)
        documents = _map(index, torch.int64, num_entries, place + 8 * num_sequences)
        num_tokens = _check_index(index, lengths, self._pointers, documents, dtype.itemsize)
        self.tokens = _map_tokens(Path(f"{self.prefix}.bin"), dtype, num_tokens)
        self._starts = _document_starts(self._pointers, documents, num_tokens * dtype.itemsize)
        self.num_documents = num_entries - 1

    def streams(self, split: list[int]) -> list[TokenStream]:
        """The documents cut into parts of `split` proportions, in order, e.g. [949, 50, 1]."""
        return [self._stream(first, last) for first, last in split_documents(self.num_documents, split)]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look for tokens that a vocabulary does not have; reads all tokens, except of our own stores.

        Raises:
            UserError: names the first such token, its place and document.
        """
        report = self.report()
        if report is not None and 0 <= report["max_token"] < vocab_size:
            return
        for start in range(0, len(self.tokens), _CHUNK):
            chunk = self.tokens[start : start + _CHUNK].to(torch.int64)
            low, high = (int(value) for value in chunk.aminmax())
            if low >= 0 and high < vocab_size:
                continue
            place = int(((chunk < 0) | (chunk >= vocab_size)).nonzero()[0])
            document = int(
                torch.searchsorted(self._starts, (start + place) * self.tokens.itemsize, right=True)
            )
            raise UserError(
                f"{self.prefix}.bin: token {int(chunk[place])} at {start + place} (document {document}) is "
                f"outside the vocabulary of {vocab_size}; another tokenizer made the store, or it is damaged"
            )

    def _stream(self, first: int, last: int) -> TokenStream:
        starts = self._starts[first:last]
        size = self.tokens.itemsize
        begin = int(starts[0]) // size if len(starts) else 0
        end = int(self._starts[last]) // size if last < self.num_documents else len(self.tokens)
        return TokenStream(self.tokens[begin : end if len(starts) else begin], starts, size)

    def report(self) -> dict[str, Any] | None:
        """What preparation wrote beside this store, if it is about a store of this size."""
        try:
            report = json.loads((self.prefix.parent / REPORT).read_bytes())
            fits = report["prefix"] == self.prefix.name and report["tokens"] == len(self.tokens)
            return report if fits and isinstance(report["max_token"], int) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def store_prefix(path: str | os.PathLike[str]) -> Path:
    """The prefix of a store named by it or by one of its two files."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _read_header(index: Path) -> tuple[int, int, int]:
    """Type code, number of sequences, and entries of the document table of an `.idx` of the right size."""
    try:
        size = index.stat().st_size
        with index.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise UserError(
            f"{index}: cannot be read ({error.strerror}); a token store is a .bin and an .idx of one name"
        ) from None
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise UserError(f"{index}: is not the index of a Megatron token store: it begins with {header[:9]!r}")
    if len(header) < HEADER.size:
        raise UserError(f"{index}: is truncated: {size} bytes, not even its header")
    _, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{index}: has version {version} of the format; only version {VERSION} is known")
    if code not in _DTYPES:
        raise UserError(
            f"{index}: holds tokens of type {code}; known are 4 (int32), 5 (int64) and 8 (uint16)"
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    if size != expected:
        raise UserError(
            f"{index}: is {'truncated' if size < expected else 'too long'}: {size} bytes, where "
            f"{num_sequences} sequences and {max(0, num_entries - 1)} documents need {expected}"
        )
    if not num_sequences or num_entries < 2:
        raise UserError(f"{index}: the store is empty: {num_sequences} sequences, no tokens to train on")
    return code, num_sequences, num_entries


def _check_index(
    index: Path, lengths: torch.Tensor, pointers: torch.Tensor, documents: torch.Tensor, itemsize: int
) -> int:
    """The number of tokens, after each table was compared with the one that it follows from."""
    num_tokens = 0
    for start in range(0, len(lengths), _CHUNK):
        part = lengths[start : start + _CHUNK].to(torch.int64)
        if int(part.min()) < 0:
            raise UserError(f"{index}: sequence {start + int((part < 0).nonzero()[0])} has a negative length")
        ends = part.cumsum(0)
        expected = (num_tokens + ends - part) * itemsize
        wrong = (pointers[start : start + _CHUNK] != expected).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise UserError(
                f"{index}: pointers do not fit the lengths: sequence {start + place} begins at byte "
                f"{int(pointers[start + place])} where {int(expected[place])} follows from those before it"
            )
        num_tokens += int(ends[-1])
    if (
        int(documents[0])
        or int(documents[-1]) != len(lengths)
        or bool((documents[1:] < documents[:-1]).any())
    ):
        raise UserError(
            f"{index}: the documents do not fit the sequences: they go from {int(documents[0])} to "
            f"{int(documents[-1])}, where there are {len(lengths)} sequences"
        )
    if not num_tokens:
        raise UserError(f"{index}: the store is empty: {len(lengths)} sequences without a token")
    return num_tokens


def _map_tokens(path: Path, dtype: torch.dtype, num_tokens: int) -> torch.Tensor:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the .idx beside it needs it") from None
    expected = num_tokens * dtype.itemsize
    if size != expected:
        damage = "is truncated" if size < expected else "is longer than its index says"
        raise UserError(
            f"{path}: {damage}: {size} bytes, where the {num_tokens} tokens in the lengths of the .idx need "
            f"{expected}; copy both files again"
        )
    return _map(path, dtype, num_tokens, 0)


def _map(path: Path, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    """Part of a file as a tensor [count] that is read from the disk where it is touched.

    Not torch.from_file: it maps for writing, which Linux grants up to the size of the memory only ("Cannot
    allocate memory" for a store of 40 GB on a machine of 23 GB), and it knows no offset.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(content, dtype=dtype, count=count, offset=offset)


def _document_starts(pointers: torch.Tensor, documents: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """int64 [documents]: the byte where each begins; the mapped table where sequences are documents."""
    first = documents[:-1]
    if len(first) == len(pointers) and all(
        torch.equal(first[start : start + _CHUNK], torch.arange(start, min(start + _CHUNK, len(first))))
        for start in range(0, len(first), _CHUNK)
    ):
        return pointers
    # documents without a sequence at the very end begin behind the last one
    return torch.cat([pointers, torch.tensor([num_bytes])])[first]
