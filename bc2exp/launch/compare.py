"""The task `compare`: done by the parent itself, as it needs neither devices nor torch.

Both sides are read and compared before anything is written: what cannot be read leaves no run behind. The
comparison is a run of its own then, with folder, journal and record in MLflow; the two compared are not
touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.roots import absolute
from bc2exp.launch.closing import print_places, print_report, show
from bc2exp.launch.folder import RunFolder, claim, writable
from bc2exp.launch.record import tracking_record, write_record
from bc2exp.launch.terminal import lasting_screen, stop_requests
from bc2exp.launch.tracker import NoTracker, Tracker, find
from bc2exp.storage import atomic
from bc2exp.tracking.journal import Journal, last_segment

_MOST_POINTS = 2000
"""Steps whose errors go into the tracker. The files have all of them."""


def read_comparison(plain: dict[str, Any], launch_folder: Path) -> dict[str, Any]:
    """Read both sides that a configuration names, and compare them; the report.

    Raises UserError for a side that cannot be read, and for two that have nothing to compare.
    """
    from bc2exp.report.compare.comparison import Tolerances, compare
    from bc2exp.report.compare.side import About
    from bc2exp.report.compare.sources import read_path, read_tracked

    task = plain["task"]
    paths = {side: absolute(task[side], launch_folder) for side in "ab"}
    tracked = list(dict.fromkeys(task[side] for side in "ab" if not paths[side].exists()))
    try:
        records = find(tracking_record(plain, launch_folder)["uri"], tracked) if tracked else []
    except UserError as error:
        side = next((side for side in "ab" if str(error).startswith(f"{task[side]}: ")), None)
        raise UserError(f"task.{side}={error}" if side else str(error)) from None
    by_name = dict(zip(tracked, records, strict=True))
    sides = []
    for side, path in paths.items():
        key, about = f"task.{side}={task[side]}", About(**task[f"about_{side}"])
        record = by_name.get(task[side])
        sides.append(read_path(path, key, about) if record is None else read_tracked(record, key, about))
    a, b = sides
    report = compare(a, b, Tolerances(**task["tolerances"]))
    if report["passed"] is None:
        reasons = "; ".join(f"{line['name']}: {line['reason']}" for line in report["verdict"])
        raise UserError(f"{a.key}, {b.key}: there is nothing to compare ({reasons})")
    return report


def record_comparison(
    report: dict[str, Any],
    plain: dict[str, Any],
    launch_folder: Path,
    chosen: Path | None,
    overrides: list[str],
    tags: dict[str, str],
    claimed: RunFolder | None = None,
) -> bool:
    """Keep a comparison as a run in a folder of its own (`chosen`, else below runs/compare) and in MLflow.

    A job of a sweep has its folder `claimed` already. Prints it. Returns whether a passed.
    """
    name = plain["tracking"]["run_name"] or f"{report['a']['name']} against {report['b']['name']}"
    # model, hardware and layout of the composition are not those of the runs that were compared
    kept = {"task": plain["task"], "tracking": {**plain["tracking"], "run_name": name}}
    folder = claimed or claim(kept, launch_folder, chosen, datetime.now())
    verdict = {"bc2exp.verdict": "pass" if report["passed"] else "fail"}
    lines = {f"bc2exp.verdict.{line['name']}": line["status"] for line in report["verdict"]}
    with folder.lock, writable(folder.path), stop_requests() as requests, lasting_screen():
        run = write_record(folder, kept, overrides, launch_folder, {**tags, **verdict, **lines})
        print(f"run: {show(folder.path, launch_folder)}", flush=True)
        write_report(report, folder)
        tracking = run["tracking"]
        tracker = (
            Tracker(folder.path, plain["tracking"]["patience_s"]) if tracking["enabled"] else NoTracker()
        )
        passed = print_report(folder.path, "compare")
        complaint = tracker.close(give_up=lambda: requests.count > 0)
        if complaint:
            print(f"bc2exp: {complaint}", file=sys.stderr)
        print_places(folder.path, launch_folder, tracking, resumable=False)
    return passed


def write_report(report: dict[str, Any], folder: RunFolder) -> None:
    """Write the journal and the files of a comparison: JSON, page, figures, summary."""
    from bc2exp.report.compare.figures import plot_comparison
    from bc2exp.report.compare.page import write_page

    path = folder.path
    (path / "logs").mkdir(exist_ok=True)
    atomic.write_json(path / "compare.json", report)
    write_page(report, path)
    plot_comparison(report, path)
    with Journal(path / "metrics.jsonl", last_segment(path / "metrics.jsonl") + 1) as journal:
        journal.event("start", a=report["a"]["name"], b=report["b"]["name"])
        for step, values in points(report):
            journal.metrics(step, values)
        journal.event("done", reason=f"verdict: {'pass' if report['passed'] else 'fail'}")
    curves = {name: curve["statistics"] for name, curve in report["curves"].items()}
    brief = {key: value for key, value in report.items() if key not in ("curves", "differences")}
    atomic.write_json(path / "summary.json", {"outcome": "done", "reason": None, **brief, "curves": curves})


def points(report: dict[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """What the journal gets: both curves and their error a step, evenly thinned where there are very many
    steps; and at the last step what they come to."""
    steps: dict[int, dict[str, float]] = {}
    for name, curve in report["curves"].items():
        stride = -(-len(curve["steps"]) // _MOST_POINTS) or 1
        for column in ("a", "b", "error"):
            label = "relative_error" if column == "error" else column
            pairs = list(zip(curve["steps"], curve[column], strict=True))[::stride]
            for step, value in pairs:
                if value is not None:
                    steps.setdefault(step, {})[f"{name}/{label}"] = float(value)
    last = max(steps, default=0)
    totals = {f"compare/ratio_{name}": value for name, value in report["ratios"].items()}
    for name, curve in report["curves"].items():
        found = curve["statistics"]
        for key in ("mean", "max", "first_over", "num_over", "compared"):
            totals[f"compare/{name}_{key}"] = found[key] if found["compared"] else None
    known = {name: float(value) for name, value in totals.items() if value is not None}
    steps[last] = {**steps.get(last, {}), **known}
    yield from sorted(steps.items())
