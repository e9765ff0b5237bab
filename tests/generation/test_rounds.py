"""What of a conversation is left where it does not fit."""

from __future__ import annotations

import pytest

from bc2exp.embedded import TOKENIZER
from bc2exp.generation.rounds import fit_rounds, fit_text, room_for_prompt
from bc2exp.text.chat import Turn, encode_text, generation_prompt, role_ids
from bc2exp.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


TURNS = [
    Turn("system", "be kind"),
    Turn("user", "送餐快吗"),
    Turn("assistant", "很快"),
    Turn("user", "好吃吗"),
    Turn("assistant", "好吃"),
    Turn("user", "谢谢"),
]


def test_everything_is_kept_where_it_fits(tokenizer: Tokenizer) -> None:
    whole = generation_prompt(tokenizer, TURNS)
    assert fit_rounds(tokenizer, TURNS, len(whole)) == (whole, 0, 0)


def test_the_oldest_rounds_go_first_and_the_system_stays(tokenizer: Tokenizer) -> None:
    whole = generation_prompt(tokenizer, TURNS)
    for left_out in (1, 2):
        kept = generation_prompt(tokenizer, [TURNS[0], *TURNS[1 + 2 * left_out :]])
        longer = generation_prompt(tokenizer, [TURNS[0], *TURNS[2 * left_out - 1 :]])
        for limit in (len(kept), len(longer) - 1):
            assert fit_rounds(tokenizer, TURNS, limit) == (kept, left_out, 0)
    assert len(kept) < len(whole)


def test_a_last_round_that_is_too_long_is_cut_on_the_left(tokenizer: Tokenizer) -> None:
    kept = generation_prompt(tokenizer, [TURNS[0], TURNS[-1]])
    found = fit_rounds(tokenizer, TURNS, 3)
    assert found == (kept[-3:], 2, len(kept) - 3)
    assert found.ids[-1] == role_ids(tokenizer).assistant


def test_a_text_keeps_its_end(tokenizer: Tokenizer) -> None:
    ids = encode_text(tokenizer, "送餐很快,态度也好")
    assert fit_text(ids, 4) == (ids[-4:], 0, len(ids) - 4)
    assert fit_text(ids, 400) == (ids, 0, 0)


def test_a_prompt_has_what_the_answer_leaves_and_half_in_any_case() -> None:
    assert room_for_prompt(4096, 2048) == 2048
    assert room_for_prompt(4096, 5) == 4091
    assert room_for_prompt(4096, 4000) == 2048
