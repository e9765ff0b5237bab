"""What of a conversation fits the model: its newest rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bc2exp.text.chat import Turn, generation_prompt
from bc2exp.text.tokenizer import Tokenizer


class Fitted(NamedTuple):
    """The ids to go on from, and what was left out: whole rounds, and tokens at the left of the rest."""

    ids: list[int]
    rounds: int
    tokens: int


def room_for_prompt(context: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have: what the answer leaves of the context, and half of it in any case."""
    return max(context // 2, context - max_new_tokens)


def fit_rounds(tokenizer: Tokenizer, turns: Sequence[Turn], limit: int) -> Fitted:
    """The prompt of a conversation in at most `limit` tokens.

    What the system says stays in front; of the rounds, each a user's turn and what follows, the oldest are
    left out first, as the published chat code does. A newest round that alone is too long is cut on the left.
    """
    system = [turn for turn in turns if turn.role == "system"]
    rounds: list[list[Turn]] = []
    for turn in turns:
        if turn.role == "user":
            rounds.append([])
        if turn.role != "system":
            rounds[-1].append(turn)
    for left_out in range(len(rounds)):
        kept = [turn for each in rounds[left_out:] for turn in each]
        ids = generation_prompt(tokenizer, [*system, *kept])
        if len(ids) <= limit or left_out == len(rounds) - 1:
            return Fitted(ids[-limit:], left_out, max(0, len(ids) - limit))
    raise AssertionError("a conversation begins with a user's turn")


def fit_text(ids: list[int], limit: int) -> Fitted:
    """The last `limit` ids of a text."""
    return Fitted(ids[-limit:], 0, max(0, len(ids) - limit))
