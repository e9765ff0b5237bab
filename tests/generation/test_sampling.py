"""Choosing tokens: each step alone against what its definition says, and the draws against probabilities."""

from __future__ import annotations

import pytest
import torch

from bc2exp.generation.sampling import Sampling, choose, draws, tokens_seen


def drawn(logits: list[float], sampling: Sampling, number: int = 4000, seen: list[int] | None = None):
    """How often each token is chosen, as parts of `number`."""
    rows = torch.tensor([logits])
    source = [draws(1)]
    marks = tokens_seen([seen or []], len(logits), rows.device)
    counts = torch.zeros(len(logits))
    for _ in range(number):
        counts[choose(rows, sampling, seen=marks, sources=source)] += 1
    return counts / number


def test_draws_follow_the_probabilities() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    found = drawn(logits, Sampling(temperature=1.0))
    assert torch.allclose(found, torch.tensor(logits).softmax(0), atol=0.025)
    cold = drawn(logits, Sampling(temperature=0.5))
    assert torch.allclose(cold, (torch.tensor(logits) / 0.5).softmax(0), atol=0.025)


def test_top_k_leaves_the_k_most_likely() -> None:
    found = drawn([0.0, 1.0, 2.0, -1.0], Sampling(temperature=1.0, top_k=2))
    assert torch.allclose(found, torch.tensor([0.0, 0.2689, 0.7311, 0.0]), atol=0.025)


@pytest.mark.parametrize(
    ("top_p", "left"), [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_leaves_the_smallest_set_that_reaches_it(top_p: float, left: set[int]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    found = drawn(logits, Sampling(temperature=1.0, top_p=top_p))
    assert set(found.nonzero()[:, 0].tolist()) == left


def test_the_penalty_makes_what_was_said_less_likely() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0], [-1.0, -1.05, -2.0]])
    seen = tokens_seen([[0], [0]], 3, logits.device)
    harsh = Sampling(repetition_penalty=1.1)  # 2.0 / 1.1 = 1.82 and -1.0 * 1.1 = -1.1
    assert choose(logits, Sampling(), seen=None, sources=[]).tolist() == [0, 0]
    assert choose(logits, harsh, seen=seen, sources=[]).tolist() == [1, 1]


def test_the_same_seed_draws_the_same() -> None:
    logits = torch.zeros(1, 1000)
    hot = Sampling(temperature=1.0)
    first, second, other = (
        [choose(logits, hot, seen=None, sources=[s]).item() for _ in range(5)]
        for s in (draws(3), draws(3), draws(4))
    )
    assert first == second != other
