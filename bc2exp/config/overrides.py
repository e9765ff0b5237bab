"""The words of a command line: what a person typed, made into what Hydra's parser reads.

Hydra's grammar refuses many ordinary values unquoted (`./数据/外卖.csv`, `a=b.csv`, `train(1).csv`) and
turns others into something else (`1e3` becomes 1000.0). Where the schema says that a key is text, nothing
but text can be meant, so the value is quoted for the user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import Container, DictConfig, EnumNode, IntegerNode, Node, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode, FloatNode

from bc2exp.config.fields import describe_bounds, field_of

_WORD = re.compile(r"^(\+\+|\+|~)?([^=]*?)(?:=(.*))?$", re.DOTALL)
_QUOTED = re.compile(r"""^(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")$""", re.DOTALL)
_SWEEP_CALL = re.compile(r"^(choice|range|glob|interval|shuffle|sort|tag)\(.*\)$", re.DOTALL)


@dataclass(frozen=True)
class Word:
    """One override: `prefix` is "", "+", "++" or "~"; `value` is None where no `=` was typed."""

    text: str
    prefix: str
    key: str
    value: str | None


def parse_word(text: str) -> Word:
    """Split `key=value` at its first `=`."""
    match = _WORD.match(text)
    assert match is not None, text
    prefix, key, value = match.groups()
    return Word(text, prefix or "", key, value)


def quote(text: str) -> str:
    """Hydra's single-quoted form: quotes escaped, and backslashes only where they stand before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


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


def quote_for(node: Node, value: str, *, sweep: bool) -> str:
    """The value as Hydra must see it, for the leaf that it is meant for.

    Args:
        node: the leaf of the schema.
        value: what was typed after `=`.
        sweep: under `-m`, commas separate the values of a sweep, and `choice(...)` and its kind are calls.
    """
    if not isinstance(node, StringNode) or "${" in value or _QUOTED.match(value):
        return value
    if sweep:
        if _SWEEP_CALL.match(value):
            return value
        parts = re.findall(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,'"]|['"])+|(?<=,)(?=,|$)""", value)
        return ",".join(quote_for(node, part, sweep=False) for part in parts) if parts else "''"
    if value == "null" and node._is_optional():
        return value
    return quote(value)


def expectation(parent: DictConfig, name: str, node: Node) -> str:
    """What a leaf accepts, in words: `an integer, at least 1, or null`."""
    kinds: dict[type, str] = {
        IntegerNode: "an integer",
        FloatNode: "a number",
        BooleanNode: "true or false",
        StringNode: "text",
    }
    if isinstance(node, EnumNode):
        words = "one of " + ", ".join(member.name for member in node.enum_type)
    elif isinstance(node, Container):
        words = "a group of keys" if isinstance(node, DictConfig) else "a list of integers such as [949,50,1]"
    else:
        words = next((text for kind, text in kinds.items() if isinstance(node, kind)), "a value")
    declared = field_of(parent, name)
    if declared is not None:
        if declared.metadata["bounds"]:
            words += ", " + describe_bounds(declared.metadata["bounds"])
        if declared.metadata["choices"]:
            words = "one of " + ", ".join(declared.metadata["choices"])
    return words + (", or null" if node._is_optional() else "")


def assign(config: DictConfig, key: str, value: object) -> str | None:
    """Set a leaf; the reason in words where the schema refuses it."""
    found = leaf(config, key)
    assert found is not None, key
    try:
        OmegaConf.update(config, key, value, merge=True)
    except OmegaConfBaseException as error:
        if isinstance(found[2], DictConfig):
            return str(error).splitlines()[0]
        return f"must be {expectation(*found)}"
    return None
