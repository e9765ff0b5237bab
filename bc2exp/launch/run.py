"""One run, seen by the parent: start the ranks, watch the journal, close the record."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.nodes import Nodes, find_nodes
from bc2exp.hardware import rehearsal
from bc2exp.launch.closing import print_places, print_report, show
from bc2exp.launch.folder import RunFolder, writable
from bc2exp.launch.machine import is_rehearsal, needed_devices
from bc2exp.launch.nodes import Alone, Others
from bc2exp.launch.ranks import Failure, Ranks
from bc2exp.launch.record import write_record
from bc2exp.launch.terminal import StopRequests, lasting_screen, stop_requests
from bc2exp.launch.tracker import NoTracker, Tracker, sync
from bc2exp.tracking.journal import Journal, Tail, last_segment, outcome
from bc2exp.tracking.progress import Progress

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3
"""Exit codes of the command."""

_POLL_SECONDS = 0.1


def run_on_ranks(
    folder: RunFolder, plain: dict[str, Any], overrides: list[str], launch_folder: Path, tags: dict[str, str]
) -> int:
    """Do a task on its ranks from start to end; returns the exit code.

    Of several machines this is node 0's part; `join.join_run` is that of the others.

    Raises UserError for a folder that cannot be written to.
    """
    path, nodes = folder.path, find_nodes(plain)
    with writable(path):
        (path / "stop").unlink(missing_ok=True)
        (path / "logs").mkdir(exist_ok=True)
        run = write_record(folder, plain, overrides, launch_folder, tags)
        others = Alone() if nodes.count == 1 else Others(path, nodes)
    segment = last_segment(path / "metrics.jsonl") + 1
    with stop_requests() as requests, lasting_screen():
        if is_rehearsal(plain):
            print(rehearsal.LABEL, flush=True)
        print(f"{'resuming' if folder.resumed else 'run'}: {show(path, launch_folder)}", flush=True)
        tracker = (
            Tracker(path, plain["tracking"]["patience_s"]) if run["tracking"]["enabled"] else NoTracker()
        )
        failure = watch(path, plain, nodes, others, requests, launch_folder)
        if is_rehearsal(plain):
            rehearsal.merge(path, plain["hardware"]["num_devices"])
        code = conclude(path, failure, segment, launch_folder)
        others.end(code, failure.text.splitlines()[-1] if failure and code in (FAILED, WRONG) else "")
        if code in (DONE, STOPPED) and not print_report(path, plain["task"]["name"]):
            code = FAILED
        heard = requests.count
        complaint = tracker.close(give_up=lambda: requests.count > heard)
        if complaint:
            print(f"bc2exp: {complaint}", file=sys.stderr)
        print_places(path, launch_folder, run["tracking"], resumable=code in (FAILED, STOPPED))
    return code


def watch(
    path: Path,
    plain: dict[str, Any],
    nodes: Nodes,
    others: Alone | Others,
    requests: StopRequests,
    launch_folder: Path,
) -> Failure | None:
    """Start the ranks and show their progress until they have ended; why they failed, if they did."""
    if nodes.count > 1:
        print(f"node 0 of {nodes.count}: waiting for the other{'s' * (nodes.count > 2)}", flush=True)
    failure = others.gather(give_up=lambda: max(requests.count, others.stops) > 0)
    if failure is not None:
        return failure
    rehearsal.clear(path)
    tail = Tail(path / "metrics.jsonl")
    tail.poll()  # what earlier segments wrote has been shown already
    deterministic = plain["hardware"]["deterministic"]
    devices = needed_devices(plain, nodes)
    ranks = Ranks(path, *devices, nodes, others.interface, deterministic=deterministic)
    others.go()
    with Progress(None) as progress:
        answered = 0
        running = True
        while running:
            running = ranks.running()  # asked before the journal, so that its last lines are shown, too
            if others.overdue():
                ranks.kill()
                return others.settle(None)
            # Not their sum: a batch system tells every machine, and means it once.
            if (asked := max(requests.count, others.stops)) > answered:
                answered = asked
                if answered > 1:
                    ranks.kill()
                    return Failure("lost", "ended at once on request; the last checkpoint stands")
                (path / "stop").touch()
                text = "stopping after this step and saving; once more (Ctrl-C) ends it at once"
                progress.update({"event": "note", "text": text})
            for record in tail.poll():
                progress.update(as_shown(record, path, launch_folder))
            time.sleep(_POLL_SECONDS if running else 0)
    ranks.close()
    return others.settle(ranks.failure())


def as_shown(record: dict[str, Any], path: Path, launch_folder: Path) -> dict[str, Any]:
    """A journal record with the path in it, which counts from the run folder, as a person would type it."""
    if record.get("event") != "checkpoint":
        return record
    return {**record, "path": show(path / record["path"], launch_folder)}


def conclude(path: Path, failure: Failure | None, segment: int, launch_folder: Path) -> int:
    """Decide how the run ended; the parent writes the outcome that no rank could write any more.

    The journal has the first word: ranks that die after the outcome was written change nothing about it.
    """
    file = path / "metrics.jsonl"
    ending = outcome(file)
    if ending is not None and ending["segment"] == segment:
        return DONE if ending["event"] == "done" else STOPPED
    failure = failure or Failure("crash", "the ranks ended without an outcome")
    print(f"bc2exp: {failure.text}", file=sys.stderr)
    if failure.kind in ("crash", "lost"):
        print(
            f"bc2exp: the run failed; its logs are in {show(path / 'logs', launch_folder)}", file=sys.stderr
        )
    try:
        with Journal(file, segment) as journal:
            journal.event("failed", kind=failure.kind, reason=failure.text.splitlines()[-1])
    except OSError as error:  # a full disk, which may be why it failed; no outcome counts as failed, too
        print(f"bc2exp: the outcome could not be written to {file}: {error.strerror}", file=sys.stderr)
    return WRONG if failure.kind == "user" else FAILED


def sync_runs(plain: dict[str, Any], launch_folder: Path) -> int:
    """The task `sync`: replay one run folder, or every one below runs/, into MLflow."""
    if named := plain["task"]["run"]:
        if not (Path(named) / "run.json").is_file():
            raise UserError(f"task.run={named}: is no run folder (it would hold run.json)")
        folders = [Path(named)]
    else:
        folders = sorted(file.parent for file in (launch_folder / "runs").glob("**/run.json"))
    if not folders:
        print("sync: no run folders below runs/")
        return DONE
    code = sync(folders)
    if code == DONE:
        print(f"sync: {len(folders)} run folder{'s' * (len(folders) > 1)} recorded")
    return code if code in (DONE, WRONG) else FAILED
