"""Decoding with the cache, in batches: token for token what the whole text gives, at TP 1 and 2."""

from __future__ import annotations

import pytest

from bc2exp.generation.decoding import decode
from bc2exp.generation.sampling import GREEDY, Sampling
from tests.generation.models import EOS, answers_of, copies, prompts, recomputed
from tests.parallel.problem import VOCABULARY

KINDS = ("7b", "13b")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_the_cache_is_greedy_without(one_rank, kind: str) -> None:
    found = answers_of(one_rank, kind, {})
    assert found == recomputed(one_rank, kind)
    assert len({tuple(answer.tokens) for answer in found}) == len(found)  # the prompts matter


@pytest.mark.parametrize("kind", KINDS)
def test_two_tensor_parallel_ranks_decode_the_same(two_ranks, one_rank, kind: str) -> None:
    found = two_ranks(answers_of, kind, {"tensor": 2})
    assert found[0] == found[1] == recomputed(one_rank, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_with_eos(one_rank, kind: str) -> None:
    whole = answers_of(one_rank, kind, {}, eos_id=-1)
    eos = whole[2].tokens[4]
    ended = answers_of(one_rank, kind, {}, eos_id=eos)
    for answer, full in zip(ended, whole, strict=True):
        if eos in full.tokens:
            assert answer.tokens == full.tokens[: full.tokens.index(eos)]
            assert answer.ended == "eos"
        else:
            assert answer == full


SAMPLING = Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.05)


def test_a_sampled_text_depends_neither_on_its_batch_nor_on_the_layout(two_ranks, one_rank) -> None:
    together = answers_of(one_rank, "13b", {}, sampling=SAMPLING)
    layout = copies(one_rank, "13b")
    alone = [
        decode(
            layout.logits,
            [prompt],
            sampling=SAMPLING,
            seeds=[seed],
            max_new_tokens=[20],
            eos_id=EOS,
            num_words=VOCABULARY,
        )[0]
        for seed, prompt in enumerate(prompts())
    ]
    assert together == alone
    assert two_ranks(answers_of, "13b", {"tensor": 2}, SAMPLING) == [together, together]
    assert together != answers_of(one_rank, "13b", {}, sampling=SAMPLING, seeds=[9, 8, 7, 6, 5, 4])
    assert together != answers_of(one_rank, "13b", {})


def test_tokens_are_told_as_they_come_and_a_stop_is_heard(one_rank) -> None:
    heard: list[tuple[int, int]] = []
    layout = copies(one_rank, "7b")
    found = decode(
        layout.logits,
        prompts(),
        sampling=GREEDY,
        seeds=[0] * len(prompts()),
        max_new_tokens=[20] * len(prompts()),
        eos_id=EOS,
        num_words=VOCABULARY,
        told=lambda row, token: heard.append((row, token)),
        stop=lambda: len(heard) >= 3 * len(prompts()),
    )
    assert {answer.ended for answer in found} == {"stopped"}
    for row, answer in enumerate(found):
        assert len(answer.tokens) == 3
        assert [token for who, token in heard if who == row] == answer.tokens
    assert [row for row, _ in heard[:6]] == list(range(6))


def test_a_row_without_a_piece_is_never_said(one_rank) -> None:
    few = max(max(prompt) for prompt in prompts()) - 20
    assert any(token >= few for answer in answers_of(one_rank, "7b", {}) for token in answer.tokens)
    found = answers_of(one_rank, "7b", {}, num_words=few)
    assert all(token < few for answer in found for token in answer.tokens)
