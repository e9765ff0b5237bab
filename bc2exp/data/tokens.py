"""The tokens of a data set as one stream, and the samples that are cut from it.

S tokens of input need S+1 tokens of stream: labels are the inputs moved by one. Neighbouring samples share
that one token, so every token but the first is a label exactly once.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bc2exp.config.errors import UserError


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other.

    Attributes:
        tokens: int32 [tokens].
        num_documents: how many documents they came from.
    """

    tokens: torch.Tensor
    num_documents: int

    def num_samples(self, sequence_length: int) -> int:
        """Samples of sequence_length + 1 tokens, neighbours sharing one."""
        return max(0, (len(self.tokens) - 1) // sequence_length)

    def sample(self, index: int, sequence_length: int) -> torch.Tensor:
        """Tokens of sample `index`: [sequence_length + 1]."""
        start = index * sequence_length
        return self.tokens[start : start + sequence_length + 1]

    def digest(self) -> str:
        """sha256 of the tokens, hexadecimal."""
        return hashlib.sha256(memoryview(self.tokens.numpy())).hexdigest()  # type: ignore[arg-type]

    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies in nats: the loss of a model that knows nothing but them."""
        counts = torch.bincount(self.tokens.long()).double()
        probabilities = counts[counts > 0] / counts.sum()
        return float(-(probabilities * probabilities.log()).sum())


def build_streams(encoded: Iterable[array[int]], split: list[int], eos_id: int | None) -> list[TokenStream]:
    """Concatenate documents and cut them into parts of `split` proportions, by documents, in order.

    Args:
        encoded: ids of each document.
        split: weights of the parts, e.g. [949, 50, 1].
        eos_id: appended to every document; None: nothing is.
    """
    tokens, ends = array("i"), [0]
    for ids in encoded:
        tokens.extend(ids)
        if eos_id is not None:
            tokens.append(eos_id)
        ends.append(len(tokens))
    num_documents = len(ends) - 1
    if not num_documents:
        raise UserError("the data set holds no text: every row or line is empty")
    whole = torch.frombuffer(tokens, dtype=torch.int32) if len(tokens) else torch.empty(0, dtype=torch.int32)
    bounds = [math.floor(num_documents * sum(split[:part]) / sum(split) + 0.5) for part in range(len(split) + 1)]
    return [
        TokenStream(whole[ends[first] : ends[last]], last - first)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]
