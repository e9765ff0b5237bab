"""A plan as tables: memory, exchanges, other layouts. From `plan.json` alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from bc2exp.report.reading import summarize_file

_GIB = 2**30
_PARTS = ("parameters", "gradients", "optimizer", "gathered", "activations")


def summarize_plan(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `summary.json` of the plan in `run_folder`; returns the plan."""
    return summarize_file(Path(run_folder), "plan.json", "plan")


def verdict(report: dict[str, Any]) -> str:
    """One sentence: does it fit?"""
    total = _gib(report["plan"]["memory"]["total"])
    if report["fits"] is None:
        return f"{total} GiB a device; hardware.memory_gib is not set: nothing says whether that fits"
    limit, reserve = report["memory_gib"], report["reserve"]
    how = "fits" if report["fits"] else "does NOT fit"
    text = f"{how}: {total} GiB of the {limit:g} GiB of a device, of which {reserve:.0%} are kept free"
    if report["fits"] or report["alternatives"]:
        return text
    devices = report["num_devices"]
    return f"{text}; no layout of {devices} device{'s' * (devices != 1)} does: it takes more of them"


def _gib(num_bytes: int) -> str:
    """Gibibytes, with more digits where there are few."""
    return f"{num_bytes / _GIB:.{2 if num_bytes >= _GIB / 8 else 4}f}"


def tables(report: dict[str, Any]) -> list[Table]:
    """The chosen layout, what it exchanges, and the others, for a rich console."""
    return [_layout(report), _exchanges(report["plan"]), *_others(report)]


def _layout(report: dict[str, Any]) -> Table:
    plan = report["plan"]
    choice, time = plan["choice"], plan["time"]
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    degrees = (f"{axis} {choice[axis]}" for axis in ("pipeline", "replicate", "shard", "tensor"))
    table.add_row("model on hardware", f"{report['model']} on {report['hardware']}")
    table.add_row("degrees", ", ".join(degrees))
    table.add_row("recompute", choice["recompute"])
    batch = f"{report['global_batch']} samples of {report['sequence_length']}"
    parts = f"{plan['num_micro_batches']} micro batch{'es' * (plan['num_micro_batches'] != 1)}"
    table.add_row("batch", f"{batch}; {parts} of {choice['micro_batch']}")
    table.add_section()
    where = f"GiB, stage {plan['stage']}" if choice["pipeline"] > 1 else "GiB"
    table.add_row("memory of a device", where)
    for part in _PARTS:
        table.add_row(f"  {part}", f"{plan['memory'][part] / _GIB:.3f}")
    table.add_row("  together", f"{plan['memory']['total'] / _GIB:.3f}")
    table.add_section()
    table.add_row("operations of a device", f"{plan['flops'] / 1e12:,.2f} TFLOP a step")
    if time is not None:
        parts = ", ".join(f"{name} {time[name]:.3g}" for name in ("compute", "exchange", "bubble"))
        table.add_row("time of a step", f"{time['step']:.3g} s ({parts})")
        table.add_row("tokens/s/p", f"{time['tokens_per_s_per_device']:,.0f}, an estimate")
    return table


def _exchanges(plan: dict[str, Any]) -> Table:
    table = Table()
    for name in ("axis", "collective", "ranks", "times a step", "MiB a step"):
        table.add_column(name, justify="left" if name in ("axis", "collective") else "right")
    for exchange in plan["exchanges"]:
        table.add_row(
            exchange["axis"],
            exchange["kind"],
            str(exchange["ranks"]),
            f"{exchange['calls']:,}",
            f"{exchange['sent'] / 2**20:,.1f}",
        )
    if not plan["exchanges"]:
        table.add_row("none", "", "", "", "")
    return table


def _others(report: dict[str, Any]) -> list[Table]:
    if not report["alternatives"]:
        return []
    table = Table()
    table.add_column("GiB", justify="right")
    table.add_column("s/step", justify="right")
    title = "nearest that fit" if report["fits"] is False else "others that fit, the fastest first"
    if report["plan"]["time"] is None:
        title = title.replace("the fastest first", "the smallest first")
    table.add_column(title, overflow="fold")
    for plan in report["alternatives"]:
        time = f"{plan['time']['step']:.3g}" if plan["time"] else "–"
        table.add_row(_gib(plan["memory"]["total"]), time, plan["words"])
    return [table]
