"""Decoding in batches of unequal prompts, with a key-value cache.

Prompts are padded on the left, so that all texts grow at the same column. Padding is a segment of its own
(id 0), which no text sees; positions count from where a text begins, and ALiBi asks for distances only, which
padding in front does not change. So a text is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bc2exp.generation.sampling import Sampling, choose, draws, tokens_seen
from bc2exp.model.baichuan2 import PADDING_ID
from bc2exp.model.cache import Cache, KeyValueCache


class Logits(Protocol):
    """What decoding asks of a model; `parallel.layout.Layout.logits` answers it."""

    def __call__(
        self, input_ids: Tensor, *, segment_ids: Tensor | None, at: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """fp32 [n, vocabulary] at the positions `at` of input_ids [batch, sequence]."""
        ...


@dataclass
class Answer:
    """What came after a prompt.

    Attributes:
        tokens: without the one that ended it.
        ended: `eos`, `length` (as many tokens as were allowed) or `stopped`.
    """

    tokens: list[int]
    ended: str


Told = Callable[[int, int], None]
"""Gets the row of a text and its newest token, as soon as it is there; never the one that ends a text."""
Ended = Callable[[int, Answer], None]
"""Gets the row of a text and all of it, as soon as it has ended."""


def decode(
    logits: Logits,
    prompts: list[list[int]],
    *,
    sampling: Sampling,
    seeds: list[int],
    max_new_tokens: list[int],
    eos_id: int,
    num_words: int,
    told: Told = lambda row, token: None,
    ended: Ended = lambda row, answer: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Go on with every prompt until it ends, has as many new tokens as it may, or `stop` says so.

    Args:
        logits: the model. With tensor-parallel ranks all of a copy call this with the same arguments, `told`
            aside; the same logits then make the same choices everywhere.
        prompts: token ids; none is empty.
        sampling: how tokens are chosen.
        seeds: of each text's random numbers.
        max_new_tokens: of each text, at least 1.
        eos_id: the token that ends a text.
        num_words: pieces of the tokenizer. A model may have more rows; what they stand for nobody can say.
        told, ended: hear of every token and of every end.
        stop: asked before every token; must say the same on all ranks of a copy.
    """
    assert all(prompts), "nothing to go on with"
    input_ids, segment_ids = _padded(prompts)
    batch, length = input_ids.shape
    cache = KeyValueCache(length + max(max_new_tokens))
    sources = [draws(seed) for seed in seeds]
    answers = [Answer([], "length") for _ in prompts]
    open_rows = set(range(batch))
    seen: Tensor | None = None
    while open_rows:
        if stop():
            for row in sorted(open_rows):
                answers[row].ended = "stopped"
                ended(row, answers[row])
            break
        width = input_ids.shape[1]
        last = torch.arange(batch) * width + width - 1
        found = logits(input_ids, segment_ids=segment_ids, at=last, cache=cache)[:, :num_words]
        if sampling.repetition_penalty != 1.0 and seen is None:
            seen = tokens_seen(prompts, found.shape[-1], found.device)
        next_ids = choose(found, sampling, seen=seen, sources=sources)
        if seen is not None:
            seen.scatter_(1, next_ids[:, None], True)
        next_ids = next_ids.cpu()
        for row in sorted(open_rows):
            token, answer = int(next_ids[row]), answers[row]
            if token == eos_id:
                answer.ended = "eos"
            else:
                answer.tokens.append(token)
                told(row, token)
            if answer.ended == "eos" or len(answer.tokens) == max_new_tokens[row]:
                open_rows.remove(row)
                ended(row, answer)
        # Texts that have ended go on unheard: to take them out of the cache would cost more.
        input_ids = next_ids[:, None]
        if segment_ids is not None:
            segment_ids = torch.cat((segment_ids, torch.ones(batch, 1, dtype=torch.int64)), dim=1)
    return answers


def _padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Token ids and segments [batch, longest]; no segments where nothing is padded."""
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), PADDING_ID, dtype=torch.int64)
    segment_ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        segment_ids[row, length - len(prompt) :] = 1
    return input_ids, None if bool(segment_ids.all()) else segment_ids
