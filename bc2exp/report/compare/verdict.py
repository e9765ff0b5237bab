"""The verdict, a line a quantity: pass, fail, or not measured with the reason.

The limits are those by which Ascend's engineers accept a run: the curves by the mean of their relative errors
(loss 2 %, gradient norm 10 %), throughput and time of a step (5 %) and memory (10 %) by how much worse than
the reference they are; better is never a failure.
"""

from __future__ import annotations

from typing import Any

from bc2exp.hardware import HOST
from bc2exp.report.compare.columns import Figure
from bc2exp.report.compare.side import Side

PASS, FAIL, NOT_MEASURED = "pass", "fail", "not measured"

_SHARED = {"num_devices": "devices", "sequence_length": "tokens a sample", "global_batch": "samples a step"}


def judge(
    a: Side, b: Side, curves: dict[str, dict[str, Any]], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """A line for each of loss, grad_norm, throughput, time, memory and identities.

    Args:
        a: the run that is judged.
        b: the reference.
        curves: {"loss": ..., "grad_norm": ...}, as `Curves.statistics` says.
        limits: by name.

    Returns:
        {"name", "limit", "value", "status", "reason"}; the value is what the limit is compared with.
    """
    return [
        *(_curve(name, curves[name], limits[name]) for name in ("loss", "grad_norm")),
        _throughput(a, b, limits["throughput"]),
        _time(a, b, limits["time"]),
        _memory(a, b, limits["memory"]),
        _identities(a, b),
    ]


def _line(name: str, limit: float | None, value: float | None, status: str, reason: str) -> dict[str, Any]:
    return {"name": name, "limit": limit, "value": value, "status": status, "reason": reason}


def _curve(name: str, found: dict[str, Any], limit: float) -> dict[str, Any]:
    lacking = [side for side in ("a", "b") if not found[f"steps_{side}"]]
    if lacking:
        return _line(name, limit, None, NOT_MEASURED, f"{' and '.join(lacking)}: none recorded")
    if not found["common"]:
        # Two curves were to be compared and cannot be: that must not end in a pass.
        return _line(name, limit, None, FAIL, "no step in common")
    mean = found["mean"]
    wrong = {side: steps for side, steps in found["not_finite"].items() if steps}
    if wrong:
        where = ", ".join(f"{side} at {len(steps)}, first {steps[0]}" for side, steps in wrong.items())
        return _line(name, limit, mean, FAIL, f"not finite: {where}")
    status = PASS if mean <= limit else FAIL
    return _line(name, limit, mean, status, f"mean over {found['compared']} steps")


def _unmeasured(a: Side, b: Side, *columns: str) -> str | None:
    """Why speeds are not compared, if they are not: they are a rehearsal's, or not of the same work."""
    played = [side for side, each in (("a", a), ("b", b)) if each.rehearsal]
    if played:
        return f"{' and '.join(played)}: a rehearsal has no speed"
    for column in columns:
        mine, other = getattr(a.columns, column), getattr(b.columns, column)
        if None not in (mine, other) and mine != other:
            return f"a has {mine} {_SHARED[column]}, b {other}"
    return None


def _missing(a: object, b: object, what: str) -> str | None:
    lacking = [side for side, figure in (("a", a), ("b", b)) if figure is None]
    return f"{' and '.join(lacking)}: no {what}" if lacking else None


def _throughput(a: Side, b: Side, limit: float) -> dict[str, Any]:
    mine, other = a.columns.tokens_per_s_per_device, b.columns.tokens_per_s_per_device
    unit, reason = "tokens/s/p", _unmeasured(a, b)
    if reason is None and (mine is None or other is None):
        mine, other, unit = a.columns.samples_per_s, b.columns.samples_per_s, "samples/s"
        reason = _unmeasured(a, b, "num_devices", "sequence_length")
    reason = reason or _missing(mine, other, "tokens/s/p and no samples/s")
    if reason is not None:
        return _line("throughput", limit, None, NOT_MEASURED, reason)
    return _worse("throughput", limit, 1 - _ratio(mine, other), f"{unit} below b's")


def _time(a: Side, b: Side, limit: float) -> dict[str, Any]:
    mine, other = a.columns.s_per_step, b.columns.s_per_step
    reason = _unmeasured(a, b, "num_devices", "global_batch", "sequence_length")
    reason = reason or _missing(mine, other, "s/step")
    if reason is not None:
        return _line("time", limit, None, NOT_MEASURED, reason)
    return _worse("time", limit, _ratio(mine, other) - 1, "s/step above b's")


def _memory(a: Side, b: Side, limit: float) -> dict[str, Any]:
    backends = [side.config.get("hardware", {}).get("backend") for side in (a, b)]
    reason = _missing(a.peak_gib, b.peak_gib, "peak memory")
    if reason is None and HOST in backends and backends[0] != backends[1]:
        reason = "a process on the host and a device count their memory differently"
    if reason is None and None not in (a.columns.num_devices, b.columns.num_devices):
        mine, other = a.columns.num_devices, b.columns.num_devices
        reason = None if mine == other else f"a has {mine} devices, b {other}"
    if reason is not None:
        return _line("memory", limit, None, NOT_MEASURED, reason)
    assert a.peak_gib is not None
    assert b.peak_gib is not None
    return _worse("memory", limit, a.peak_gib / b.peak_gib - 1, "peak memory above b's")


def _ratio(mine: Figure | None, other: Figure | None) -> float:
    assert mine is not None
    assert other is not None
    return mine.value / other.value


def _worse(name: str, limit: float, value: float, reason: str) -> dict[str, Any]:
    return _line(name, limit, value, PASS if value <= limit else FAIL, reason)


def _identities(a: Side, b: Side) -> dict[str, Any]:
    checks = [(key, check) for key, side in (("a", a), ("b", b)) for check in side.columns.identities()]
    broken = [
        f"{key}: {check['name']}, but {check['found']:.6g} against {check['expected']:.6g}"
        for key, check in checks
        if not check["holds"]
    ]
    if broken:
        return _line("identities", None, None, FAIL, "; ".join(broken))
    if not checks:
        return _line("identities", None, None, NOT_MEASURED, "no figures that could contradict each other")
    return _line("identities", None, None, PASS, f"{len(checks)} checked")
