"""`rehearsal.json` of a run folder, from what its ranks counted; and the words that label a rehearsal.

Loads no torch: the parent of the run merges the ranks' files when they have ended.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

FILE = "rehearsal.json"

LABEL = "rehearsal on host memory: the real torch_npu, no NPU; speed is not measured"
"""What every rehearsal says of itself, on its first line and in its journal."""

COMPARED = ("operators", "collectives", "cpu_fallbacks", "refused_runtime_calls")


def rank_file(folder: Path, rank: int) -> Path:
    """Where rank `rank` leaves its count."""
    return folder / "logs" / f"rank-{rank}.rehearsal.json"


def write_rank(folder: Path, rank: int, counted: dict[str, Any]) -> None:
    """Leave a rank's count; whole or not at all."""
    path = rank_file(folder, rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(counted), "utf-8")
    partial.replace(path)


def clear(folder: Path) -> None:
    """Remove the counts of an earlier part of the run."""
    for old in (folder / "logs").glob("rank-*.rehearsal.json"):
        old.unlink()


def merge(folder: Path, num_ranks: int) -> dict[str, Any]:
    """Write `rehearsal.json` into the run folder and return it.

    It holds rank 0's counts in full, the refusals and fallbacks of all ranks, and where the calls of another
    rank differ from rank 0's (the stages of a pipeline do). Ranks that were killed left no count and are
    named. The ranks' own files are kept in `logs`.
    """
    counted = {
        rank: json.loads(rank_file(folder, rank).read_text("utf-8"))
        for rank in range(num_ranks)
        if rank_file(folder, rank).is_file()
    }
    first: dict[str, Any] = counted.get(0, {})
    names = ("operators", "collectives", "host_kernels", "refused_runtime_calls")
    merged = {
        "rehearsal": True,
        "torch": metadata.version("torch"),
        "torch_npu": metadata.version("torch_npu"),
        "ranks": num_ranks,
        "ranks_without_a_count": [rank for rank in range(num_ranks) if rank not in counted],
        "refused_operators": [
            {"rank": rank, **refusal}
            for rank, values in counted.items()
            for refusal in values["refused_operators"]
        ],
        "cpu_fallbacks": _summed(values["cpu_fallbacks"] for values in counted.values()),
        "peak_memory_bytes": [values["peak_memory_bytes"] for values in counted.values()],
        **{name: first.get(name, {}) for name in names},
        "ranks_that_differ": {
            str(rank): found for rank, values in counted.items() if (found := differences(first, values))
        },
    }
    path = folder / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
    partial.replace(path)
    return merged


def differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What another rank counted otherwise than rank 0, {section: {name: its entry, null for none}}."""
    found: dict[str, Any] = {}
    for section in COMPARED:
        mine, theirs = first.get(section, {}), other[section]
        unlike = {name: theirs.get(name) for name in {**mine, **theirs} if not _same(mine, theirs, name)}
        if unlike:
            found[section] = unlike
    return found


def _same(mine: dict[str, Any], theirs: dict[str, Any], name: str) -> bool:
    a, b = mine.get(name), theirs.get(name)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return bool(a == b)

    # the order in which kinds of calls were first seen does not matter
    def plain(entry: dict[str, Any]) -> list[str]:
        return sorted(json.dumps(kind, sort_keys=True) for kind in entry["tensors"])

    return plain(a) == plain(b)


def _summed(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for name, calls in count.items():
            total[name] = total.get(name, 0) + calls
    return total
