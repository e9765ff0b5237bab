"""Small models laid out for decoding, and the same text computed without a cache."""

from __future__ import annotations

from typing import Any

import torch

from bc2exp.generation.decoding import Answer, decode
from bc2exp.generation.sampling import GREEDY, Sampling
from bc2exp.parallel.layout import Layout, lay_out_copies
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from tests.parallel.problem import VOCABULARY, model_of, value_of

EOS = 2
PROMPT_LENGTHS = (1, 7, 3, 12, 7, 26)


def copies(world: World, kind: str, precision: str = "fp32", **degrees: int) -> Layout:
    """The model of a kind, its tests' weights, laid out for decoding."""
    layout = lay_out_copies(model_of(kind), Mesh(world, **degrees), precision=precision)
    layout.take_storage()
    for name in layout.own_names():
        layout.assign(name, value_of(name, layout.parts.shapes[name]))
    return layout


def prompts() -> list[list[int]]:
    """Prompts of unequal lengths, without the token that ends a text."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def answers_of(
    world: World, kind: str, degrees: dict[str, int], sampling: Sampling = GREEDY, **changes: Any
) -> list[Answer]:
    """What a rank decodes from the prompts, in one batch."""
    given = prompts()
    settings = {
        "sampling": sampling,
        "seeds": list(range(len(given))),
        "max_new_tokens": 20,
        "eos_id": EOS,
        "num_words": VOCABULARY,
    } | changes
    settings["max_new_tokens"] = [settings["max_new_tokens"]] * len(given)
    layout = copies(world, kind, **degrees)
    return decode(layout.logits, given, **settings)


def recomputed(world: World, kind: str, max_new_tokens: int = 20) -> list[Answer]:
    """The same, each prompt alone, greedily, all of the text through the model for every token."""
    layout = copies(world, kind)
    answers = []
    for prompt in prompts():
        text = list(prompt)
        answer = Answer([], "length")
        while len(answer.tokens) < max_new_tokens:
            with torch.no_grad():
                token = int(layout.model(torch.tensor([text]))[0, -1].argmax())
            if token == EOS:
                answer.ended = "eos"
                break
            answer.tokens.append(token)
            text.append(token)
        answers.append(answer)
    return answers
