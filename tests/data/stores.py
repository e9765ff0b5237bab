"""Token stores for tests, made without the code under test."""

from __future__ import annotations

import struct
from itertools import accumulate
from pathlib import Path

import torch

from bc2exp.data.tokens import TokenStream, split_documents


def write_by_hand(
    prefix: Path, documents: list[list[int]], *, code: int = 4, first_sequences: list[int] | None = None
) -> None:
    """PREFIX.bin and PREFIX.idx of `documents`, packed field by field; tokens of type `code`.

    `first_sequences` makes documents of several sequences, which `documents` then are.
    """
    letter, size = {4: ("i", 4), 5: ("q", 8), 8: ("H", 2)}[code]
    lengths = [len(document) for document in documents]
    starts = [size * start for start in accumulate(lengths, initial=0)][:-1]
    table = first_sequences or list(range(len(documents) + 1))
    tokens = [token for document in documents for token in document]
    prefix.with_name(prefix.name + ".bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(documents))
        + struct.pack("<Q", len(table))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(starts)}q", *starts)
        + struct.pack(f"<{len(table)}q", *table)
    )


def streams_of(documents: list[list[int]], split: list[int]) -> list[TokenStream]:
    """The parts of documents that are in memory and in no store."""
    parts = [documents[first:last] for first, last in split_documents(len(documents), split)]
    return [
        TokenStream(
            torch.tensor([token for document in part for token in document], dtype=torch.int32),
            torch.tensor(list(accumulate(map(len, part), initial=0))[: len(part)], dtype=torch.int64),
        )
        for part in parts
    ]
