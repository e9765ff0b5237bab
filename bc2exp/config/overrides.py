"""The words of a command line: what a person typed, made into what Hydra's parser reads.

Hydra's grammar refuses many ordinary values unquoted (`./数据/外卖.csv`, `a=b.csv`, `train(1).csv`) and
turns others into something else (`1e3` becomes 1000.0). Where the schema says that a key is text, nothing
but text can be meant, so the value is quoted for the user.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, EnumNode, IntegerNode, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode, FloatNode

from bc2exp.config.fields import describe_bounds, field_of, refusal

MAX_JOBS = 1000
"""Largest sweep that is taken; every job of it is checked before the first starts."""

_WORD = re.compile(r"(\+\+|\+|~)?([^=]*?)(?:=(.*))?", re.DOTALL)
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_QUOTED = re.compile(_STRING, re.DOTALL)
# One value of a sweep: a quoted string alone between commas, else text whose `${...}` may hold commas.
_PART = re.compile(rf"\s*{_STRING}\s*(?=,|\Z)|(?:\$\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,])*", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z0-9_/.-]+")
_CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)
_CALL = re.compile(r"(?:range|interval|shuffle|sort|tag|glob)\(.*\)", re.DOTALL)


@dataclass(frozen=True)
class Word:
    """One override: `prefix` is "", "+", "++" or "~"; `value` is None where no `=` was typed."""

    text: str
    prefix: str
    key: str
    value: str | None


@dataclass(frozen=True)
class Reading:
    """A word as Hydra must read it.

    Attributes:
        word: what was typed.
        text: the override with its text values quoted.
        jobs: the override of each value of a sweep; one without `-m`; of an interval, its two ends.
        interval: a sweeper draws the values.
    """

    word: Word
    text: str
    jobs: tuple[str, ...]
    interval: bool = False


def parse_word(text: str) -> Word:
    """Split `key=value` at its first `=`."""
    match = _WORD.fullmatch(text)
    assert match is not None, text
    prefix, key, value = match.groups()
    return Word(text, prefix or "", key, value)


def quote(text: str) -> str:
    """Hydra's single-quoted form: quotes escaped, and backslashes only where they stand before a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def quote_text(value: str) -> str:
    """Text as Hydra must see it: quoted, unless the user did so or wrote null."""
    return value if _QUOTED.fullmatch(value) or value.lower() == "null" else quote(value)


def quote_list(value: str) -> str:
    """A list of texts as Hydra must see it: the elements quoted as `quote_text` does (`[你好,a=b]`).

    Raises HydraException for what is no list.
    """
    inner = value.strip()[1:-1]
    if value.lower() == "null" or (value.strip()[:1] == "[" and not inner.strip()):
        return value
    if not (value.strip().startswith("[") and value.strip().endswith("]")):
        raise HydraException(f"{value}: no list")
    return f"[{','.join(quote_text(part) for part in split_sweep(inner))}]"


def quote_choice(value: str) -> str:
    """A group's choice as Hydra must see it: quoted where its grammar would stumble (`外卖`)."""
    return value if _QUOTED.fullmatch(value) or _PLAIN.fullmatch(value) else quote(value)


def split_sweep(value: str) -> list[str]:
    """The values that commas separate under `-m`: `a,'b,c'` is two, and so is `choice(a,'b,c')`."""
    call = _CHOICE.fullmatch(value)
    value = call[1] if call else value
    parts, position = [], 0
    while True:
        match = _PART.match(value, position)
        assert match is not None
        parts.append(match[0].strip())
        if match.end() == len(value):
            return parts
        position = match.end() + 1


@lru_cache(maxsize=4 * MAX_JOBS)
def parse(text: str) -> Override:
    """Hydra's reading of one override; raises HydraException where it cannot be read."""
    return OverridesParser.create().parse_override(text)


def read_word(word: Word, quoting: Callable[[str], str] | None, *, sweep: bool) -> Reading:
    """Read a word, a sweep as its values.

    Args:
        word: with a value.
        quoting: for a key whose values are text: what makes one readable; None: Hydra's grammar decides.
        sweep: `-m` was given: commas separate values, and `choice(...)` and its kind are calls.

    Raises:
        HydraException: the value cannot be read.
        ValueError: it is a sweep, and `-m` was not given.
    """
    assert word.value is not None
    head = f"{word.prefix}{word.key}="
    if quoting is not None and not (sweep and _CALL.fullmatch(word.value)):
        parts = split_sweep(word.value) if sweep else [word.value]
        parts = [quoting(part) for part in parts]
        return Reading(word, head + ",".join(parts), tuple(head + part for part in parts))
    override = parse(word.text)
    if not override.is_sweep_override():
        return Reading(word, word.text, (word.text,))
    if not sweep:
        raise ValueError("several values need -m")
    value = override.value()
    if isinstance(value, IntervalSweep):
        return Reading(word, word.text, (f"{head}{value.start}", f"{head}{value.end}"), True)
    choices = itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1)
    return Reading(word, word.text, tuple(head + choice for choice in choices))


def leaf(config: DictConfig, key: str) -> tuple[DictConfig, str, Node] | None:
    """The parent, the name and the node of a dotted key, or None where the schema has no such key."""
    node: object = config
    parent: object = None
    name = ""
    for name in key.split("."):
        parent = node
        if not isinstance(parent, DictConfig) or parent._is_none() or name not in parent._content:  # type: ignore[operator]
            return None
        node = parent._get_node(name)
    assert isinstance(parent, DictConfig)
    assert isinstance(node, Node)
    return parent, name, node


def expectation(parent: DictConfig, name: str, node: Node) -> str:
    """What a leaf accepts, in words: `an integer, at least 1, or null`."""
    kinds = {IntegerNode: "an integer", FloatNode: "a number", BooleanNode: "true or false"}
    if isinstance(node, EnumNode):
        words = "one of " + ", ".join(member.name for member in node.enum_type)
    elif isinstance(node, ListConfig):
        element = {int: "integers", float: "numbers", str: "texts"}.get(node._metadata.element_type, "values")
        words = f"a list of {element} in square brackets"
    else:
        words = next((text for kind, text in kinds.items() if isinstance(node, kind)), "text")
    declared = field_of(parent, name)
    if declared is not None:
        if declared.metadata["bounds"]:
            words += ", " + describe_bounds(declared.metadata["bounds"])
        if declared.metadata["choices"]:
            words = "one of " + ", ".join(declared.metadata["choices"])
        words = declared.metadata["form"] or words
    return words + (", or null" if node._is_optional() else "")


def assign(config: DictConfig, key: str, value: object) -> str | None:
    """Set a leaf; the reason in words where the schema refuses its type, its range or an empty text."""
    found = leaf(config, key)
    assert found is not None, key
    parent, name, _ = found
    try:
        OmegaConf.update(config, key, value)
        stored, declared = parent._get_node(name), field_of(parent, name)
        assert isinstance(stored, Node)
        if declared is None or stored._is_interpolation() or stored._is_missing():
            return None  # checks.check judges what it comes to
        return refusal(declared, list(stored) if isinstance(stored, ListConfig) else stored._value())
    except OmegaConfBaseException:
        return f"must be {expectation(*found)}"
