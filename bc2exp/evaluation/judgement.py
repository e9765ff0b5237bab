"""What models chose on the same labelled rows, turned into the figures and tables of a report. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from bc2exp.evaluation import statistics


@dataclass(frozen=True)
class Row:
    """A labelled row.

    Attributes:
        text: what tables show of it.
        truth: its class, an index of the words.
        file, number: where it stands, the number from 1.
    """

    text: str
    truth: int
    file: str = ""
    number: int = 0


@dataclass
class Choices:
    """What one model made of every row.

    Attributes:
        scores: ln P(word | prompt) of every word.
        answers: what it said freely; None where it was not asked.
    """

    scores: list[list[float]] = field(default_factory=list)
    answers: list[str] | None = None

    def likeliest(self) -> list[int]:
        """The most likely class of each row; of equals the first."""
        return [max(range(len(each)), key=each.__getitem__) for each in self.scores]


@dataclass(frozen=True)
class Method:
    """How statistics are made: bootstrap samples, the part an interval covers, and their seed."""

    resamples: int
    confidence: float
    seed: int

    def estimate(self, counts: statistics.Counts, statistic: statistics.Statistic) -> dict[str, float]:
        """A statistic and its interval, as JSON holds them."""
        found = statistics.bootstrap(
            counts, statistic, resamples=self.resamples, confidence=self.confidence, seed=self.seed
        )
        return found._asdict()


def said(answer: str, words: Sequence[str]) -> int | None:
    """The class whose word an answer is, white space around it aside; None for anything else."""
    stripped = answer.strip()
    return words.index(stripped) if stripped in words else None


def judge(
    rows: Sequence[Row], models: dict[str, Choices], words: Sequence[str], method: Method
) -> dict[str, Any]:
    """The figures of every model, and of every two of them, as JSON holds them."""
    truths = [row.truth for row in rows]
    chosen: dict[str, dict[str, list[int | None]]] = {"likelihood": {}, "answers": {}}
    for name, model in models.items():
        chosen["likelihood"][name] = list(model.likeliest())
        if model.answers is not None:
            chosen["answers"][name] = [said(answer, words) for answer in model.answers]
    counts = [truths.count(index) for index in range(len(words))]
    return {
        "rows": len(rows),
        "words": list(words),
        "counts": counts,
        "majority": max(counts) / len(rows),
        "confidence": method.confidence,
        "models": {
            name: {
                by: figures(truths, choices[name], words, method)
                for by, choices in chosen.items()
                if name in choices
            }
            for name in models
        },
        "comparisons": [
            {"by": by, "one": one, "other": other} | compare(truths, choices[one], choices[other], method)
            for by, choices in chosen.items()
            for one, other in combinations(choices, 2)
        ],
    }


def figures(
    truths: Sequence[int], choices: Sequence[int | None], words: Sequence[str], method: Method
) -> dict[str, Any]:
    """Accuracy and macro F1 with intervals, F1 of the classes, confusion, and the share that is no class."""
    counts = statistics.confusion(truths, choices, len(words))
    return {
        "accuracy": method.estimate(counts, statistics.accuracy),
        "macro_f1": method.estimate(counts, statistics.macro_f1),
        "f1": statistics.class_f1(counts).tolist(),
        "confusion": counts.tolist(),
        "free_form": int(counts[:, -1].sum()) / len(truths),
    }


def compare(
    truths: Sequence[int], one: Sequence[int | None], other: Sequence[int | None], method: Method
) -> dict[str, Any]:
    """Whether the second model is better than the first: the difference, and McNemar's exact p."""
    right = [[choice == truth for choice, truth in zip(each, truths, strict=True)] for each in (one, other)]
    counts = statistics.agreement(*right)
    only_one, only_other = int(counts[1, 0]), int(counts[0, 1])
    return {
        "difference": method.estimate(counts, statistics.accuracy_difference),
        "only_one_right": only_one,
        "only_other_right": only_other,
        "p": statistics.mcnemar_exact(only_one, only_other),
    }


def table(
    rows: Sequence[Row], models: dict[str, Choices], words: Sequence[str], text: str
) -> tuple[list[str], list[list[Any]]]:
    """Columns and lines of all rows: the text under its own name, `label`, what each model said (or found
    likeliest, where it was not asked), then for each model its likeliest word and ln P of every word."""
    columns, lines = [text, "label"], [list[Any]((row.text, words[row.truth])) for row in rows]
    for name, model in models.items():
        columns.append(name)
        shown = [words[choice] for choice in model.likeliest()] if model.answers is None else model.answers
        for line, value in zip(lines, shown, strict=True):
            line.append(value)
    for name, model in models.items():
        columns += [f"{name}: likeliest", *(f"{name}: ln P({word})" for word in words)]
        for line, choice, scores in zip(lines, model.likeliest(), model.scores, strict=True):
            line += [words[choice], *(round(score, 6) for score in scores)]
    columns += ["file", "row"]
    for line, row in zip(lines, rows, strict=True):
        line += [row.file, row.number]
    return columns, lines
