"""How a field of a schema says what it accepts.

A dataclass gives OmegaConf the name and the type; `setting` adds what a type cannot say: the range, the
unit, that a string is a path. `checks.py` reads it, and so does whoever wants to list the keys.
"""

from __future__ import annotations

import math
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

LARGEST_INTEGER = 2**63 - 1
"""No integer of a configuration is larger: the libraries behind it count in 64 bits."""


def setting(
    help: str,
    default: Any = MISSING,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    form: str = "",
    default_factory: Any = None,
) -> Any:
    """A dataclass field with its meaning and its range.

    Args:
        help: one line for people: meaning and unit.
        default: the value when no YAML gives one; without it the key is mandatory.
        minimum, above, maximum, below: closed or open bounds of a number (for a list: of each element).
        choices: the strings that are accepted; empty: any.
        path: the string is a path; it is made absolute before ranks start, `~` is the home folder. So are
            the elements of a list or a mapping.
        form: what a value looks like, where a type cannot say it.
        default_factory: for lists.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {
        "help": help,
        "path": path,
        "choices": choices,
        "form": form,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
    }
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def field_of(node: DictConfig, key: str) -> Field[Any] | None:
    """The dataclass field behind `node.key`, or None where the node has no schema."""
    schema = OmegaConf.get_type(node)
    if not (isinstance(schema, type) and is_dataclass(schema)):
        return None
    return next((f for f in fields(schema) if f.name == key), None)


def describe_bounds(bounds: dict[str, float]) -> str:
    """`at least 1`, `above 0 and at most 1`: the range in words."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    return " and ".join(f"{words[name]} {value}" for name, value in bounds.items())


def refusal(declared: Field[Any], value: Any) -> str | None:
    """Why a value of the right type is refused (range, choices, emptiness), in words; None where it is not.

    Args:
        declared: the field of the schema.
        value: the value, or a list of values that are judged one by one.
    """
    bounds, choices = declared.metadata["bounds"], declared.metadata["choices"]
    for element in value if isinstance(value, (list, tuple)) else [value]:
        if element is None or isinstance(element, bool):
            continue
        if isinstance(element, (int, float)):
            if not math.isfinite(element):
                return "must be a finite number" + (f", {describe_bounds(bounds)}" if bounds else "")
            if not within(element, bounds):
                return f"must be {describe_bounds(bounds)}"
            if abs(element) > LARGEST_INTEGER and isinstance(element, int):
                return f"must be at most {LARGEST_INTEGER}"
        elif choices and element not in choices:
            return f"must be one of {', '.join(choices)}"
        elif isinstance(element, str) and not element.strip():
            return "is empty; name a value, or leave the key out"
    return None


def within(value: float, bounds: dict[str, float]) -> bool:
    """Whether a finite number lies in the declared range."""
    tests = {
        "minimum": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "maximum": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    return all(tests[name](bound) for name, bound in bounds.items())
