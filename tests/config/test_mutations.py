"""Every leaf of the schema, of every task: a wrong type, a misspelt name, a value past each bound is refused.

The leaves are walked, so a new one is covered as soon as it has a schema. One command line holds a mistake in
each leaf, which proves as well that all are told at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from omegaconf import AnyNode, DictConfig, EnumNode, IntegerNode, ListConfig, Node, StringNode
from omegaconf.nodes import BooleanNode, FloatNode

from bc2exp.config.checks import leaves
from bc2exp.config.fields import field_of
from bc2exp.config.overrides import assign
from bc2exp.config.preflight import preflight
from bc2exp.config.tasks import TASKS
from tests.weights.folders import weights_for_the_door

SITE = TemporaryDirectory()
NEEDED = {
    "compare": {"task.a": "one", "task.b": "other"},
    "convert": {
        "task.source": str(weights_for_the_door(Path(SITE.name) / "weights")),
        "task.target": f"{SITE.name}/target",
    },
}
"""What a user has to name with a task, as no file can."""


def words_of(task: str, without: Iterable[str] = ()) -> list[str]:
    """The command line of a task, without some keys."""
    needed = NEEDED.get(task, {}).items()
    return [f"task={task}", *(f"{key}={value}" for key, value in needed if key not in without)]


JOBS = {task: preflight(words_of(task), sweep=False, folder=Path.cwd()).jobs[0] for task in TASKS}
# What is not of the task is the same beside every task.
LEAVES = {
    task: [leaf for leaf in leaves(job) if task == "pretrain" or leaf[0].startswith("task.")]
    for task, job in JOBS.items()
}


@dataclass(frozen=True)
class Mutation:
    """What is wrong with one leaf.

    Attributes:
        line: the mutations of a task with the same number are typed as one command line.
        kind: what is wrong.
        leaf: the key that is meant.
        key, good, bad: the key as typed, the value that the configuration has, the value as typed.
    """

    task: str
    line: int
    kind: str
    leaf: str
    key: str
    good: str
    bad: str


def misspell(name: str) -> str:
    """The name without its second letter; a short one with its last letter twice."""
    return name[0] + name[2:] if len(name) > 3 else name + name[-1]


def bounds_of(parent: DictConfig, name: str) -> dict[str, float]:
    declared = field_of(parent, name)
    assert declared is not None
    return dict(declared.metadata["bounds"])


def past(bound: str, limit: float, node: Node) -> float:
    """The value nearest to a bound that it refuses."""
    step = 0.001 if isinstance(node, FloatNode) else 1
    return {"minimum": limit - step, "maximum": limit + step}.get(bound, limit)


def wrong_types(node: Node) -> Iterator[tuple[str, str]]:
    if not node._is_optional():
        yield "null", "null"
    if isinstance(node, (StringNode, AnyNode)):  # any text may be one; what it means is checked as a whole
        yield "empty", ""
        return
    yield "word", "abc"
    yield "dictionary", "{a:1}"
    if isinstance(node, (IntegerNode, FloatNode, BooleanNode, EnumNode)):
        yield "list", "[1]"
    if isinstance(node, IntegerNode):
        yield "fraction", "1.5"
        yield "exponent", "1e3"
    if isinstance(node, ListConfig):
        if node._metadata.element_type is not str:
            yield "words", "[a,b,c]"
        yield "number", "3"
    if isinstance(node, FloatNode):
        yield from ((value, value) for value in ("nan", "inf", "-inf"))


def wrong_ranges(parent: DictConfig, name: str, node: Node) -> Iterator[tuple[str, str]]:
    for bound, limit in bounds_of(parent, name).items():
        value = past(bound, limit, node)
        yield bound, f"[1,{value},1]" if isinstance(node, ListConfig) else str(value)
    declared = field_of(parent, name)
    if declared is not None and declared.metadata["choices"]:
        yield "choice", "nonsense"


def mutations() -> Iterator[Mutation]:
    for task, found in LEAVES.items():
        for key, parent, name, node in found:
            value = parent[name]
            good = getattr(value, "name", None) or ("null" if value is None else str(value))
            typos = [("misspelt name", key.removesuffix(name) + misspell(name))]
            if "." in key:
                group, _, rest = key.partition(".")
                typos.append(("misspelt group", f"{misspell(group)}.{rest}"))
            wrong = [*wrong_types(node), *wrong_ranges(parent, name, node)]
            for line, (kind, typed) in enumerate(typos):
                yield Mutation(task, line, kind, key, typed, good, good)
            for line, (kind, bad) in enumerate(wrong, start=2):
                yield Mutation(task, line, kind, key, key, good, bad)


MUTATIONS = list(mutations())


@cache
def problems_of(task: str, line: int, sweep: bool) -> tuple[str, ...]:
    """What one command line with many mistakes is told; under -m the right value comes first."""
    mistakes = [one for one in MUTATIONS if (one.task, one.line) == (task, line)]
    words = words_of(task, without=[one.key for one in mistakes])
    for one in mistakes:
        words.append(f"{one.key}={one.good},{one.bad}" if sweep else f"{one.key}={one.bad}")
    started_in = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            result = preflight(words, sweep=sweep, folder=Path(folder))
        finally:
            os.chdir(started_in)
        assert list(Path(folder).iterdir()) == []
    assert result.jobs == []
    assert result.overrides == []
    # what has to be named has no value when the one it was given is refused
    told = [
        text
        for text in result.problems
        if not text.startswith(tuple(f"{key}: no value" for key in NEEDED.get(task, {})))
    ]
    assert len(told) == len(mistakes), "a mistake was not told, or something else was"
    return tuple(told)


def test_the_walk_finds_the_schema() -> None:
    keys = {key for found in LEAVES.values() for key, *_ in found}
    assert len(keys) > 60
    assert {"seed", "model.recipes.pretrain.lr", "dataset.split", "task.schedule.kind", "task.run"} <= keys
    kinds = {one.kind for one in MUTATIONS}
    assert {
        "misspelt name",
        "misspelt group",
        "word",
        "null",
        "nan",
        "inf",
        "-inf",
        "minimum",
        "above",
    } <= kinds
    assert {"maximum", "below", "choice", "empty"} <= kinds


@pytest.mark.parametrize("sweep", [False, True], ids=["single", "sweep"])
@pytest.mark.parametrize(
    ("task", "leaf"), [(task, leaf[0]) for task, found in LEAVES.items() for leaf in found]
)
def test_a_mutated_leaf_is_refused_by_its_name(task: str, leaf: str, sweep: bool) -> None:
    tried = [one for one in MUTATIONS if (one.task, one.leaf) == (task, leaf)]
    assert {"misspelt name"} < {one.kind for one in tried}, "a leaf without a wrong value"
    for one in tried:
        told = [text for text in problems_of(task, one.line, sweep) if text.startswith(f"{one.key}=")]
        assert len(told) == 1, one
        typed, _, reason = told[0].partition(": ")
        if one.kind.startswith("misspelt"):
            assert reason == f"no such key; nearest: {one.leaf}", one
        else:
            assert reason.startswith(("must be ", "is empty")), one
            assert sweep or typed == f"{one.key}={one.bad}", one


@pytest.mark.parametrize("task", TASKS)
def test_the_bounds_themselves_are_accepted_where_they_are_closed(task: str) -> None:
    tried = 0
    for key, parent, name, node in LEAVES[task]:
        for bound, limit in bounds_of(parent, name).items():
            if bound in ("minimum", "maximum"):
                value = [1, limit, 1] if isinstance(node, ListConfig) else limit
                assert assign(copy.deepcopy(JOBS[task]), key, value) is None, key
                tried += 1
    assert tried > 20 or task != "pretrain"
