"""Word likelihoods from packed texts against each word's own pass, at TP 1 and 2."""

from __future__ import annotations

import pytest
import torch

from bc2exp.evaluation.scores import word_log_likelihoods, words_with_ends
from bc2exp.parallel.world import World
from tests.generation.models import copies, prompts

SINGLE = [[17], [18]]
MIXED = [[17], [18, 19], [18, 19, 20], [21, 22]]


def scored(world: World, kind: str, words: list[list[int]], batch_tokens: int, tensor: int = 1):
    """What a rank finds."""
    return word_log_likelihoods(
        copies(world, kind, tensor=tensor).logits, prompts(), words, batch_tokens=batch_tokens
    )


def one_by_one(world: World, kind: str, words: list[list[int]]) -> list[list[float]]:
    """Each word behind each prompt, alone."""
    model = copies(world, kind).model
    found = []
    for prompt in prompts():
        found.append([])
        for word in words:
            with torch.no_grad():
                rows = model(torch.tensor([prompt + word]))[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(word) - 1)
            found[-1].append(sum(float(rows[at, token]) for at, token in zip(places, word, strict=True)))
    return found


@pytest.mark.parametrize("kind", ["7b", "13b"])
@pytest.mark.parametrize("words", [SINGLE, MIXED])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_packed_scores_are_those_of_each_word_alone(one_rank, kind, words, batch_tokens) -> None:
    found = torch.tensor(scored(one_rank, kind, words, batch_tokens))
    assert torch.allclose(found, torch.tensor(one_by_one(one_rank, kind, words)), atol=2e-5)


def test_two_tensor_parallel_ranks_find_the_same(two_ranks, one_rank) -> None:
    one, other = two_ranks(scored, "13b", MIXED, 40, 2)
    assert one == other
    assert torch.allclose(torch.tensor(one), torch.tensor(one_by_one(one_rank, "13b", MIXED)), atol=2e-5)


def test_words_of_one_token_need_each_prompt_once(one_rank) -> None:
    layout, passes = copies(one_rank, "7b"), []

    def counted(input_ids, *, segment_ids, at, cache=None):
        passes.append((input_ids.shape[1], len(at)))
        return layout.logits(input_ids, segment_ids=segment_ids, at=at, cache=cache)

    word_log_likelihoods(counted, prompts(), SINGLE, batch_tokens=10_000)
    assert passes == [(sum(map(len, prompts())), len(prompts()))]


def test_an_end_counts_where_one_word_begins_another() -> None:
    assert words_with_ends(SINGLE, 2) == SINGLE
    assert words_with_ends([[5], [5, 6]], 2) == [[5, 2], [5, 6, 2]]
