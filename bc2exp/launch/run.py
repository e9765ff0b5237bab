"""One run, seen by the parent: start the ranks, watch the journal, close the record."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.nodes import Nodes, find_nodes
from bc2exp.hardware import rehearsal
from bc2exp.launch.closing import print_places, print_report, show
from bc2exp.launch.conversation import Conversation
from bc2exp.launch.folder import RunFolder, writable
from bc2exp.launch.machine import is_rehearsal, needed_devices
from bc2exp.launch.nodes import Alone, Others
from bc2exp.launch.ranks import Failure, Ranks
from bc2exp.launch.record import tracking_record, write_record
from bc2exp.launch.terminal import StopRequests, lasting_screen, stop_requests
from bc2exp.launch.tracker import NoTracker, Tracker, sync, to_sync
from bc2exp.tracking.journal import Journal, Tail, last_segment, outcome

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3
"""Exit codes of the command."""

_POLL_SECONDS = 0.1


def run_on_ranks(
    folder: RunFolder,
    plain: dict[str, Any],
    overrides: list[str],
    launch_folder: Path,
    tags: dict[str, str],
    conversation: Conversation,
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
        conversation.begin(path)
        others = Alone() if nodes.count == 1 else Others(path, nodes)
    segment = last_segment(path / "metrics.jsonl") + 1
    with stop_requests() as requests, lasting_screen():
        if is_rehearsal(plain):
            print(rehearsal.LABEL, flush=True)
        print(f"{'resuming' if folder.resumed else 'run'}: {show(path, launch_folder)}", flush=True)
        tracker = (
            Tracker(path, plain["tracking"]["patience_s"]) if run["tracking"]["enabled"] else NoTracker()
        )
        failure = watch(path, plain, nodes, others, requests, launch_folder, conversation)
        if is_rehearsal(plain):
            rehearsal.merge(path, plain["hardware"]["num_devices"])
        code = conclude(path, failure, segment, launch_folder)
        others.end(code, failure.text.splitlines()[-1] if failure and code in (FAILED, WRONG) else "")
        ended = code in (DONE, STOPPED)
        # What the doctor found before it was broken off is worth reading.
        if (
            (ended or (path / "doctor.json").is_file())
            and not print_report(path, plain["task"]["name"])
            and ended
        ):
            code = FAILED
        heard = requests.count
        complaint = tracker.close(give_up=lambda: requests.count > heard)
        if complaint:
            print(f"bc2exp: {complaint}", file=sys.stderr)
        # of a job the sweep says how it goes on
        resumable = code in (FAILED, STOPPED) and "bc2exp.job" not in run["tags"]
        print_places(path, launch_folder, run["tracking"], resumable=resumable)
    return code


def watch(
    path: Path,
    plain: dict[str, Any],
    nodes: Nodes,
    others: Alone | Others,
    requests: StopRequests,
    launch_folder: Path,
    conversation: Conversation,
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
    ranks = start_ranks(path, plain, nodes, others.interface)
    others.go()
    with conversation.progress() as progress:
        answered = 0
        running = True
        while running:
            running = ranks.running()  # asked before the journal, so that its last lines are shown, too
            if running and (hung := ranks.hung(others.signs()) or others.hung()) is not None:
                others.ask_for_stacks()
                details = "\n".join(filter(None, (hung.details, ranks.stacks())))
                ranks.kill()
                return others.settle(replace(hung, details=details))
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
                progress.update({"event": "note", "text": conversation.stopping})
            conversation.tend(stop=answered > 0)
            for record in tail.poll():
                progress.update(as_shown(record, path, launch_folder))
            time.sleep(_POLL_SECONDS if running else 0)
    ranks.close()
    return others.settle(ranks.failure())


def start_ranks(path: Path, plain: dict[str, Any], nodes: Nodes, interface: str | None) -> Ranks:
    """The ranks of this machine, for the task of a configuration."""
    return Ranks(
        path,
        *needed_devices(plain, nodes),
        nodes,
        interface,
        deterministic=plain["hardware"]["deterministic"],
        hang_s=plain["launch"]["hang_s"],
    )


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
    for line in failure.details.splitlines():
        print(f"  {line}", file=sys.stderr)
    if failure.kind in ("crash", "hung", "lost"):
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
    """The task `sync`: replay runs into the MLflow that each names, or into the one of `tracking.uri`.

    A run folder that is named is recorded in any case; else every one below runs/ that is over and tracked.
    """
    left_out: list[str] = []
    if named := plain["task"]["run"]:
        if not (Path(named) / "run.json").is_file():
            raise UserError(f"task.run={named}: is no run folder (it would hold run.json)")
        folders = [Path(named)]
    else:
        folders, left_out = to_sync(launch_folder / "runs")
    uri = tracking_record(plain, launch_folder)["uri"] if plain["tracking"]["uri"] else None
    code = sync(folders, uri, plain["tracking"]["patience_s"]) if folders else DONE
    if not folders and not left_out:
        print("sync: no run folders below runs/")
    elif code == DONE:
        number = len(folders)
        print("; ".join([f"sync: {number} run folder{'s' * (number != 1)} recorded", *left_out]))
    return code if code in (DONE, WRONG) else FAILED
