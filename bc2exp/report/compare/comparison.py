"""Everything that is said of two sides, as one piece of JSON: tables, figures and page are made of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bc2exp.config.load import differences
from bc2exp.report.compare.columns import Columns
from bc2exp.report.compare.curves import align
from bc2exp.report.compare.side import GRAD_NORM, LOSS, Side
from bc2exp.report.compare.verdict import FAIL, NOT_MEASURED, judge

_CURVES = {"loss": LOSS, "grad_norm": GRAD_NORM}


@dataclass(frozen=True)
class Tolerances:
    """How far a may lie from b; see `verdict.judge`."""

    loss: float = 0.02
    grad_norm: float = 0.1
    throughput: float = 0.05
    time: float = 0.05
    memory: float = 0.1


def compare(a: Side, b: Side, tolerances: Tolerances) -> dict[str, Any]:
    """What a, judged against the reference b, comes to.

    Keys: `a`, `b` (name, kind, columns, identities, notes, ...), `tolerances`, `curves` ({metric: {"steps",
    "a", "b", "error", "statistics"}}), `ratios`, `rows` (published rows that contradict themselves),
    `differences` ([key, a's, b's]), `verdict` (see `judge`), `passed` (None: nothing could be measured).
    """
    limits = dataclasses.asdict(tolerances)
    curves: dict[str, dict[str, Any]] = {}
    for name, metric in _CURVES.items():
        aligned = align(a.series.get(metric, {}), b.series.get(metric, {}))
        statistics = aligned.statistics(limits[name])
        curves[name] = {
            "steps": aligned.steps,
            "a": aligned.a,
            "b": aligned.b,
            "error": aligned.error,
            "statistics": statistics,
        }
    verdict = judge(a, b, {name: curve["statistics"] for name, curve in curves.items()}, limits)
    result: dict[str, Any] = words_for_infinities(
        {
            "a": _plain(a),
            "b": _plain(b),
            "tolerances": limits,
            "curves": curves,
            "ratios": _ratios(a.columns, b.columns),
            "rows": _contradictions([*a.rows, *b.rows]),
            "differences": [[key, mine, other] for key, mine, other in _differences(a, b)],
            "verdict": verdict,
            "passed": _passed(verdict),
        }
    )
    return result


def _passed(verdict: list[dict[str, Any]]) -> bool | None:
    statuses = {line["name"]: line["status"] for line in verdict}
    if FAIL in statuses.values():
        return False
    del statuses["identities"]  # a side that does not contradict itself has not been compared with anything
    return None if set(statuses.values()) == {NOT_MEASURED} else True


def words_for_infinities(node: Any) -> Any:
    """The same data with `nan`, `inf` and `-inf` as text: JSON has no numbers for them."""
    if isinstance(node, dict):
        return {key: words_for_infinities(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [words_for_infinities(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def _plain(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "kind": side.kind,
        "source": side.key.partition("=")[2],
        "rehearsal": side.rehearsal,
        **side.columns.plain(),
        "peak_gib": side.peak_gib,
        "identities": list(side.columns.identities()),
        "metrics": sorted(side.series),
        "notes": side.notes,
    }


def _ratios(a: Columns, b: Columns) -> dict[str, float | None]:
    """a's figure over b's."""
    ratios: dict[str, float | None] = {}
    for name in ("samples_per_s", "tokens_per_s_per_device", "s_per_step"):
        mine, other = getattr(a, name), getattr(b, name)
        ratios[name] = mine.value / other.value if mine and other else None
    return ratios


def _contradictions(rows: list[tuple[str, Columns]]) -> list[dict[str, Any]]:
    """The broken identities of every row of the tables that were read, chosen or not."""
    return [
        {"row": name, **identity}
        for name, columns in dict(rows).items()
        for identity in columns.identities()
        if not identity["holds"]
    ]


def _differences(a: Side, b: Side) -> list[tuple[str, Any, Any]]:
    """Fields that differ. Of two runs of this project all; else those that both sides know."""
    if a.own and b.own:
        return differences(a.config, b.config)
    mine, other = _known(a), _known(b)
    return [(key, value, other[key]) for key, value in mine.items() if key in other and value != other[key]]


def _known(side: Side) -> dict[str, Any]:
    counts = {
        "task.global_batch": side.columns.global_batch,
        "dataset.sequence_length": side.columns.sequence_length,
        "hardware.num_devices": side.columns.num_devices,
    }
    known = {**_flat(side.config), **{key: value for key, value in counts.items() if value is not None}}
    # -1 stands for what is left of the devices: another spelling of the other side's number
    return {
        key: value for key, value in known.items() if not (key.startswith("parallelism.") and value == -1)
    }


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}
