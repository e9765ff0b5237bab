"""What the kinds of rows that a model is tuned on need to have named. Checked at the door, without torch."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

NEEDED = {
    "classification": ("text_column", "label_column", "prompt"),
    "instruction": ("prompt", "answer_column"),
    "conversation": ("turns_column",),
}
ROLES = ("system", "user", "assistant")


def placeholders(template: str | None) -> list[str]:
    """The columns that a template names in braces, in order.

    Raises ValueError for a template that has anything else in braces, or leaves one open.
    """
    found: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template or ""):
        if name is not None:
            if not name or spec or conversion or set(name) & set("{}[]!:"):
                raise ValueError("braces hold the name of a column and nothing else ({{ is a brace)")
            found.append(name)
    return list(dict.fromkeys(found))


def questions_and_answers(dataset: dict[str, Any], task: str) -> Iterator[str]:
    """What speaks against tuning a model on a data set, a sentence each."""
    kind, name = dataset["kind"], dataset["name"]
    if kind == "text":
        yield (
            f"task={task}: dataset={name} holds plain text, no questions and answers; "
            "dataset=embedded_reviews would do, or a data set of your own from dataset=classification, "
            "instruction or conversation"
        )
        return
    for key in NEEDED[kind]:
        if dataset[key] is None:
            yield f"dataset.{key}: no value; dataset.kind={kind} needs it"
    for key in ("prompt", "prompt_without_input"):
        try:
            if dataset[key] is not None and not placeholders(dataset[key]):
                yield f"dataset.{key}={dataset[key]}: names no column; write one in braces, as in {{review}}"
        except ValueError as error:
            yield f"dataset.{key}={dataset[key]}: {error}"
    if dataset["input_column"] is not None and dataset["prompt_without_input"] is None:
        yield (
            f"dataset.input_column={dataset['input_column']}: needs dataset.prompt_without_input, the "
            "question of rows where it is empty"
        )
    if kind == "classification":
        yield from _labels(dataset["label_words"])
    if kind == "conversation":
        if dataset["format"] == "modelzoo":
            yield (
                "dataset.format=modelzoo: has one question and one answer; dataset.kind=conversation needs "
                "dataset.format=official"
            )
        yield from _roles(dataset["roles"])


def _labels(words: dict[str, str]) -> Iterator[str]:
    if len(words) < 2:
        yield (
            f"dataset.label_words={words}: needs a word for each label, and two labels at least; name them "
            'in a YAML file of the data set (label_words: {"1": 积极, "0": 消极})'
        )
    for word in dict.fromkeys(words.values()):
        same = [label for label, other in words.items() if other == word]
        if len(same) > 1 or not word.strip():
            yield (
                f"dataset.label_words: {' and '.join(same)} have the word {word!r}; each label needs one "
                "of its own"
            )


def _roles(roles: dict[str, str]) -> Iterator[str]:
    for name, role in roles.items():
        if role not in ROLES:
            yield f"dataset.roles.{name}={role}: must be one of {', '.join(ROLES)}"
    for role in ("user", "assistant"):
        if role not in roles.values():
            yield f"dataset.roles: none is the {role}'s"
