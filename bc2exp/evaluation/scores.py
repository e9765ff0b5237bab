"""How likely a model finds each of a few words as the answer to each of many prompts.

What the words share of a text is computed once: words of one token all need the model's view of the prompt
alone. Such texts share sequences, apart from each other, and logits exist only where a word's token is asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bc2exp.generation.decoding import Logits


@dataclass
class _Text:
    """Tokens that go through the model, and what is asked of it there: (position, token, row, word)."""

    tokens: list[int]
    asked: list[tuple[int, int, int, int]] = field(default_factory=list)


def words_with_ends(words: Sequence[list[int]], eos_id: int) -> list[list[int]]:
    """The tokens by which words are scored: their own, and the end of the text too where one word begins
    another, which would else never be less likely than the longer one."""
    begins = any(
        one is not other and other[: len(one)] == one for one in words for other in words if len(one) > 0
    )
    return [[*word, eos_id] if begins else list(word) for word in words]


def word_log_likelihoods(
    logits: Logits,
    prompts: Sequence[list[int]],
    words: Sequence[list[int]],
    *,
    batch_tokens: int,
    told: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """ln P(word | prompt) of every word for every prompt.

    Args:
        logits: the model.
        prompts: token ids; none is empty.
        words: token ids, see `words_with_ends`.
        batch_tokens: of a forward pass; one text is never divided.
        told: hears how many prompts are done.
    """
    assert all(words), "a word has tokens"
    found = [[0.0] * len(words) for _ in prompts]
    texts = [text for row, prompt in enumerate(prompts) for text in _texts(row, prompt, words)]
    for pack in _packs(texts, batch_tokens):
        tokens = torch.tensor([[token for text in pack for token in text.tokens]])
        lengths = torch.tensor([len(text.tokens) for text in pack])
        segments = torch.repeat_interleave(torch.arange(1, len(pack) + 1), lengths)[None]
        starts = (lengths.cumsum(0) - lengths).tolist()
        asked = [
            (start + position, token, row, word)
            for start, text in zip(starts, pack, strict=True)
            for position, token, row, word in text.asked
        ]
        positions, where = torch.tensor([each[0] for each in asked]).unique(return_inverse=True)
        rows = logits(tokens, segment_ids=segments, at=positions)
        totals = rows.logsumexp(dim=-1)[where]
        wanted = torch.tensor([each[1] for each in asked], device=rows.device)
        values = rows[where.to(rows.device), wanted] - totals.to(rows.device)
        for (_, _, row, word), value in zip(asked, values.tolist(), strict=True):
            found[row][word] += value
        told(asked[-1][2] + 1)
    return found


def _texts(row: int, prompt: list[int], words: Sequence[list[int]]) -> Iterator[_Text]:
    """The prompt with all but the last token of each word; words that agree so far share one text."""
    texts: dict[tuple[int, ...], _Text] = {}
    for number, word in enumerate(words):
        text = texts.setdefault(tuple(word[:-1]), _Text([*prompt, *word[:-1]]))
        first = len(prompt) - 1
        text.asked += [(first + index, token, row, number) for index, token in enumerate(word)]
    yield from texts.values()


def _packs(texts: list[_Text], batch_tokens: int) -> Iterator[list[_Text]]:
    """Texts in order, as many as fit a forward pass."""
    pack: list[_Text] = []
    size = 0
    for text in texts:
        if pack and size + len(text.tokens) > batch_tokens:
            yield pack
            pack, size = [], 0
        pack.append(text)
        size += len(text.tokens)
    if pack:
        yield pack
