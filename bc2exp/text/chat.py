"""Chat formats: how turns become token ids, and which of these a model learns to say.

A turn begins with the id of its role, and that id never comes from text: `encode_text` writes the piece
`<reserved_106>` in a review as the ordinary characters it is made of. The masks are those of the published
code: ModelZoo's fine-tuning (`modelzoo`) and Baichuan2's own (`official`).

Labels are aligned with the ids they belong to (-100: not learned). The shift by one, after which a position
is labelled with the token that follows, is made once, where batches are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from bc2exp.config.errors import UserError
from bc2exp.text.tokenizer import Tokenizer

USER_PIECE = "<reserved_106>"
ASSISTANT_PIECE = "<reserved_107>"
IGNORED = -100
"""The label of a token that is not learned."""
ROLES = ("system", "user", "assistant")


class Roles(NamedTuple):
    """The ids with which turns begin (195 and 196 with Baichuan2's tokenizer)."""

    user: int
    assistant: int


class Turn(NamedTuple):
    """What one side says: `role` is system, user or assistant."""

    role: str
    content: str


class Example(NamedTuple):
    """Token ids and, as many, the labels that belong to them: an id itself where it is learned, else -100."""

    input_ids: list[int]
    labels: list[int]


def role_ids(tokenizer: Tokenizer) -> Roles:
    """The role ids of a tokenizer.

    Raises UserError for a tokenizer without them.
    """
    found = [tokenizer.find_piece(piece) for piece in (USER_PIECE, ASSISTANT_PIECE)]
    if found[0] is None or found[1] is None:
        raise UserError(
            f"model.tokenizer={tokenizer.path}: has no piece {USER_PIECE} or no {ASSISTANT_PIECE}, with "
            "which turns begin; chat formats need Baichuan2's tokenizer, or the embedded one"
        )
    return Roles(found[0], found[1])


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of what a person wrote; nothing is added, and no id of a role or of a beginning, an end or an
    unknown piece is among them, whatever the text says. `tokenizer.decode` gives the text back.
    `count_marks` counts what would have been one."""
    ids: list[int] = []
    # A mark that is cut in two is no piece any more, and both halves are ordinary characters.
    start = 0
    for mark in _marks(tokenizer).finditer(text):
        ids += tokenizer.encode(text[start : mark.start() + 1])
        start = mark.start() + 1
    return ids + tokenizer.encode(text[start:])


def count_marks(tokenizer: Tokenizer, text: str) -> int:
    """How often a text says what elsewhere begins a turn or ends a text (`<reserved_106>`, `</s>`, ...)."""
    return len(_marks(tokenizer).findall(text))


@lru_cache(maxsize=8)
def _marks(tokenizer: Tokenizer) -> re.Pattern[str]:
    special = (tokenizer.piece(i) for i in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) if i >= 0)
    return re.compile("|".join(map(re.escape, (USER_PIECE, ASSISTANT_PIECE, *special))))


def modelzoo_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[user] + prompt + [assistant]: what an answer is asked for with."""
    roles = role_ids(tokenizer)
    return [roles.user, *encode_text(tokenizer, prompt), roles.assistant]


def modelzoo_example(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    """The prompt, not learned, then the answer and the end, learned."""
    asked = modelzoo_prompt(tokenizer, prompt)
    answered = [*encode_text(tokenizer, answer), tokenizer.eos_id]
    return Example(asked + answered, [IGNORED] * len(asked) + answered)


def official_example(tokenizer: Tokenizer, turns: Iterable[Turn]) -> Example:
    """Any number of turns: answers are learned, and at the id that begins a user's turn, the end of what was
    before; at last an end, learned. What the system says stands bare and is not learned."""
    roles, end = role_ids(tokenizer), tokenizer.eos_id
    example = Example([], [])
    for turn in turns:
        said = encode_text(tokenizer, turn.content)
        if turn.role == "user":
            ids, labels = [roles.user, *said], [end, *[IGNORED] * len(said)]
        elif turn.role == "assistant":
            ids, labels = [roles.assistant, *said], [IGNORED, *said]
        else:
            assert turn.role == "system", turn.role
            ids, labels = said, [IGNORED] * len(said)
        example.input_ids.extend(ids)
        example.labels.extend(labels)
    example.input_ids.append(end)
    example.labels.append(end)
    return example


def generation_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """Turns so far, and the id that asks the assistant: the system bare, no end between turns."""
    roles = role_ids(tokenizer)
    ids: list[int] = []
    for turn in turns:
        assert turn.role in ROLES, turn.role
        ids += [] if turn.role == "system" else [getattr(roles, turn.role)]
        ids += encode_text(tokenizer, turn.content)
    return [*ids, roles.assistant]
