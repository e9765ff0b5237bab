"""Which token comes next: the most likely one, or one drawn from the likely ones.

The order of the steps is the one that published settings are made for: repetition penalty, temperature,
top-k, top-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and draws nothing.
        top_k: only so many of the most likely tokens are left; None: all.
        top_p: only the most likely tokens that together reach this probability are left.
        repetition_penalty: makes tokens that stand in the text already less likely (Keskar et al. 2019,
            "CTRL"): positive logits are divided by it, negative ones multiplied; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def draws(seed: int) -> torch.Generator:
    """The source of one text's random numbers: on the host, so that a device changes none of them."""
    return torch.Generator().manual_seed(seed)


def choose(
    logits: Tensor, sampling: Sampling, *, seen: Tensor | None, sources: list[torch.Generator]
) -> Tensor:
    """The next token of each text, int64 [batch].

    Args:
        logits: fp32 [batch, vocabulary].
        sampling: how to choose.
        seen: bool [batch, vocabulary], the tokens of each text so far; needed for a repetition penalty.
        sources: one for each text, which makes its choices independent of what else is in the batch.
    """
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    words = logits.shape[-1]
    kept = words if sampling.top_k is None else min(sampling.top_k, words)
    likely, ids = torch.topk(logits / sampling.temperature, kept, dim=-1)
    probabilities = likely.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities * (before < sampling.top_p)  # the most likely token always stays
    totals = probabilities.cumsum(dim=-1)
    numbers = torch.tensor([torch.rand((), generator=source).item() for source in sources])
    targets = numbers.to(totals)[:, None] * totals[:, -1:]
    # The first token whose total lies above the number: one of probability 0 never is the first.
    columns = (totals <= targets).sum(dim=-1, keepdim=True).clamp_max(kept - 1)
    return ids.gather(-1, columns)[:, 0]


def tokens_seen(prompts: list[list[int]], num_words: int, device: torch.device) -> Tensor:
    """Which tokens stand in each prompt: bool [batch, num_words]."""
    seen = torch.zeros(len(prompts), num_words, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(prompt, dtype=torch.int64, device=device)] = True
    return seen
