"""The tokens of a data set as one stream, and the samples that are cut from it.

S tokens of input need S+1 tokens of stream: labels are the inputs moved by one. Neighbouring samples share
that one token, so every token but the first is a label exactly once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from bc2exp.config.errors import UserError

# Statistics of a stream are taken from so many tokens at its beginning: enough for three digits of an
# entropy, and a fraction of a second where a stream is larger than memory.
STATISTICS_TOKENS = 2**27

_CHUNK_TOKENS = 2**22
_DIGEST_BLOCKS = 64


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other: all of a token store, or a part of it.

    Attributes:
        tokens: [tokens], int32, uint16 or int64; may be mapped from a file.
        starts: int64 [documents]: where each document begins, counted from anywhere.
        unit: what `starts` counts for one token: 1, or the bytes of a token where it is a store's own table,
            which would be too large to be converted.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    unit: int = 1

    @property
    def num_documents(self) -> int:
        """Documents, or parts of them, in the stream."""
        return len(self.starts)

    def num_samples(self, sequence_length: int) -> int:
        """Samples of sequence_length + 1 tokens, neighbours sharing one."""
        return max(0, (len(self.tokens) - 1) // sequence_length)

    def sample(self, index: int, sequence_length: int) -> torch.Tensor:
        """Tokens of sample `index`: int32 [sequence_length + 1]."""
        start = index * sequence_length
        # a copy: what is mapped from a file must not be written into
        return self.tokens[start : start + sequence_length + 1].to(torch.int32, copy=True)

    def segments(self, index: int, sequence_length: int) -> torch.Tensor:
        """Which document each token of sample `index` belongs to: int32 [sequence_length + 1], from 1 up.

        The numbers count within the sample: 1 up to the first document that begins after its first token.
        """
        first = int(self.starts[0]) + index * sequence_length * self.unit
        last = first + sequence_length * self.unit
        low, high = torch.searchsorted(self.starts, torch.tensor([first, last]), right=True).tolist()
        marks = torch.zeros(sequence_length + 1, dtype=torch.int32)
        # set and not added: an empty document begins where the next one does
        marks[(self.starts[low:high] - first) // self.unit] = 1
        return marks.cumsum(0, dtype=torch.int32) + 1

    def digest(self) -> str:
        """sha256 of the number of tokens and of the tokens as int32, hexadecimal.

        Of streams of more than 2^28 tokens up to 64 blocks of 2^22 are taken, at equal distances: a start
        must not have to read a whole store.
        """
        num_chunks = math.ceil(len(self.tokens) / _CHUNK_TOKENS)
        chosen = range(num_chunks)
        if num_chunks > _DIGEST_BLOCKS:
            chosen = range(0, num_chunks, math.ceil(num_chunks / _DIGEST_BLOCKS))
        result = hashlib.sha256(len(self.tokens).to_bytes(8, "little"))
        for chunk in chosen:
            result.update(self._chunk(chunk * _CHUNK_TOKENS, torch.int32).numpy().data)
        return result.hexdigest()

    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies in nats: the loss of a model that knows nothing but them.

        Of longer streams, the frequencies among the first STATISTICS_TOKENS.
        """
        counts = torch.zeros(0, dtype=torch.int64)
        for start in range(0, min(len(self.tokens), STATISTICS_TOKENS), _CHUNK_TOKENS):
            more = torch.bincount(self._chunk(start, torch.int64), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        probabilities = counts[counts > 0].double() / counts.sum()
        return float(-(probabilities * probabilities.log()).sum())

    def _chunk(self, start: int, dtype: torch.dtype) -> torch.Tensor:
        return self.tokens[start : start + _CHUNK_TOKENS].to(dtype)


def require_samples(stream: TokenStream, sequence_length: int, name: str) -> None:
    """Raise UserError where the tokens of `stream`, called `name`, do not fill one sample."""
    if not stream.num_samples(sequence_length):
        raise UserError(
            f"dataset.sequence_length={sequence_length}: {name} has only {len(stream.tokens)} tokens, fewer "
            f"than the {sequence_length + 1} of one sample; shorten the samples or name more text"
        )


def split_documents(num_documents: int, split: list[int]) -> Iterator[tuple[int, int]]:
    """The first document and the one behind the last of each part, by weights such as [949, 50, 1]."""
    bounds = [
        math.floor(num_documents * sum(split[:part]) / sum(split) + 0.5) for part in range(len(split) + 1)
    ]
    return pairwise(bounds)
