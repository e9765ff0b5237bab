"""One side of a comparison, whatever it was read from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.report.compare.columns import Columns, Figure
from bc2exp.report.summary import SECONDS, History, throughput

LOSS, GRAD_NORM, RATE, MEMORY = "train/loss", "train/grad_norm", "train/lr", "mem/peak_gib"

Series = dict[str, dict[int, float]]
"""{metric: {optimizer step: value}}; the first value of each counts."""


@dataclass
class About:
    """What a person says of a side whose source does not."""

    row: str | None = None
    sequence_length: int | None = None
    num_devices: int | None = None
    global_batch: int | None = None
    log_every: int = 1


@dataclass
class Side:
    """A run as far as its source tells of it."""

    key: str
    """The word of the command line that named it: `task.a=...`. Errors begin with it."""
    name: str
    kind: str
    """What the source is, in words."""
    series: Series = field(default_factory=dict)
    columns: Columns = field(default_factory=Columns)
    config: dict[str, Any] = field(default_factory=dict)
    """Nested, under this project's names; parts of it where the source is not a run of this project."""
    own: bool = False
    """A run of this project: its configuration is whole."""
    rehearsal: bool = False
    peak_gib: float | None = None
    rows: list[tuple[str, Columns]] = field(default_factory=list)
    """Every row of a published table, by name."""
    notes: list[str] = field(default_factory=list)


def settle(side: Side, about: About) -> dict[str, Any]:
    """Global batch, sequence length and devices, from the configuration, else from what was said of it.

    Raises UserError where both know, and differ; and for a row where there is no table.
    """
    places = {
        "global_batch": "task.global_batch",
        "sequence_length": "dataset.sequence_length",
        "num_devices": "hardware.num_devices",
    }
    about_key = about_name(side.key)
    if about.row is not None and not side.rows:
        raise UserError(f"{about_key}.row={about.row}: {side.name} is no published table; leave the key out")
    settled: dict[str, Any] = {}
    for name, place in places.items():
        known, said = OmegaConf.select(OmegaConf.create(side.config), place), getattr(about, name)
        if known is not None and said not in (None, known):
            raise UserError(f"{about_key}.{name}={said}: {side.name} says {known} itself; leave the key out")
        settled[name] = said if known is None else known
    return settled


def about_name(key: str) -> str:
    """`task.about_a` for `task.a=...`."""
    return key.partition("=")[0].replace("task.", "task.about_")


def measure(side: Side, about: About, rates: Columns | None = None) -> None:
    """Fill in the columns of a side from its series: means over the steady steps.

    Args:
        side: its series and configuration are read already.
        about: what they do not say.
        rates: figures that the source gives for the run as a whole; they are taken where no step has any.
    """
    known = settle(side, about)
    history = History(series=side.series, first_steps=set(list(side.series.get(SECONDS, {}))[:1]))
    config = {
        "task": {"global_batch": known["global_batch"]},
        "dataset": {"sequence_length": known["sequence_length"]},
        "hardware": {"num_devices": known["num_devices"] or 1},
    }
    made = OmegaConf.create(config)
    assert isinstance(made, DictConfig)
    speed = throughput(history, made)
    names = ("samples_per_s", "tokens_per_s_per_device", "s_per_step")
    figures: dict[str, Any] = {name: _figure(speed[name]) for name in names}
    if rates is not None:
        figures = {name: figures[name] or getattr(rates, name) for name in names}
    if not side.rehearsal:  # the host's speed says nothing of the devices that it plays
        side.columns = Columns(**known, **figures).completed()
    else:
        side.columns = Columns(**known)
    side.peak_gib = max(side.series.get(MEMORY, {}).values(), default=None)


def _figure(value: float | None) -> Figure | None:
    return Figure(value) if value is not None and math.isfinite(value) and value > 0 else None


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"task.steps": 3} as {"task": {"steps": 3}}. A key that is both a value and a group stays a group."""
    result: dict[str, Any] = {}
    for key, value in sorted(flat.items()):
        node = result
        *groups, name = key.split(".")
        for group in groups:
            below = node.get(group)
            node = node.setdefault(group, {}) if isinstance(below, dict) or below is None else {}
        node.setdefault(name, value)
    return result


def typed(text: str) -> Any:
    """A value that was recorded as text: JSON where it is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
