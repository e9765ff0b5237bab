"""One run, seen by the parent: start the ranks, watch the journal, close the record."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bc2exp.config.errors import UserError
from bc2exp.config.register import TASKS
from bc2exp.hardware import HOST, count_devices
from bc2exp.launch.folder import RunFolder, writable
from bc2exp.launch.ranks import Failure, Ranks
from bc2exp.launch.record import write_record
from bc2exp.launch.terminal import StopRequests, lasting_screen, stop_requests
from bc2exp.launch.tracker import NoTracker, Tracker, sync
from bc2exp.report.summary import summarize
from bc2exp.tracking.journal import Journal, Tail, last_segment, outcome
from bc2exp.tracking.progress import Progress

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3
"""Exit codes of the command."""

_POLL_SECONDS = 0.1


def run_on_ranks(
    folder: RunFolder, plain: dict[str, Any], overrides: list[str], launch_folder: Path, tags: dict[str, str]
) -> int:
    """Do a task on its ranks from start to end; returns the exit code.

    Raises UserError for devices that are missing and for a folder that cannot be written to.
    """
    path = folder.path
    require_devices(plain)
    with writable(path):
        (path / "stop").unlink(missing_ok=True)
        (path / "logs").mkdir(exist_ok=True)
        run = write_record(folder, plain, overrides, launch_folder, tags)
    segment = last_segment(path / "metrics.jsonl") + 1
    with stop_requests() as requests, lasting_screen():
        print(f"{'resuming' if folder.resumed else 'run'}: {show(path, launch_folder)}", flush=True)
        tracker = (
            Tracker(path, plain["tracking"]["patience_s"]) if run["tracking"]["enabled"] else NoTracker()
        )
        failure = watch(path, plain, requests, launch_folder)
        code = conclude(path, failure, segment, launch_folder)
        if code in (DONE, STOPPED):
            print_report(path)
        heard = requests.count
        complaint = tracker.close(give_up=lambda: requests.count > heard)
        if complaint:
            print(f"bc2exp: {complaint}", file=sys.stderr)
        print_places(path, run, launch_folder, code)
    return code


def watch(path: Path, plain: dict[str, Any], requests: StopRequests, launch_folder: Path) -> Failure | None:
    """Start the ranks and show their progress until they have ended; why they failed, if they did."""
    tail = Tail(path / "metrics.jsonl")
    tail.poll()  # what earlier segments wrote has been shown already
    ranks = Ranks(path, *needed_devices(plain))
    with Progress(None) as progress:
        answered = 0
        running = True
        while running:
            running = ranks.running()  # asked before the journal, so that its last lines are shown, too
            if requests.count > answered:
                answered = requests.count
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
    return ranks.failure()


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


def needed_devices(plain: dict[str, Any]) -> tuple[str, int]:
    """Kind and number of the devices that the task is done on, a rank each."""
    if not TASKS[plain["task"]["name"]].on_devices:
        return HOST, 1
    return plain["hardware"]["backend"], plain["hardware"]["num_devices"]


def require_devices(plain: dict[str, Any]) -> None:
    """Raise UserError where this machine has fewer devices than the configuration asks for."""
    backend, wanted = needed_devices(plain)
    present = count_devices(backend)
    if present is not None and present < wanted:
        raise UserError(
            f"hardware={plain['hardware']['name']}: asks for {wanted} {backend} devices, "
            f"this machine has {present}"
        )


def print_report(path: Path) -> None:
    """Draw the loss and print the summary's table; of a preparation, what it counted."""
    from bc2exp.report.plots import plot_loss  # matplotlib takes half a second, which the door need not pay
    from bc2exp.report.preparation import summarize_preparation, tables
    from bc2exp.report.tables import table

    try:
        if (path / "report.json").is_file():
            for each in tables(summarize_preparation(path)):
                Console().print(each)
            return
        plot_loss(path)
        Console().print(table({path.name: summarize(path)}))
    except OSError as error:  # the training is done and saved: a report can be made later
        print(f"bc2exp: the report could not be written: {error}", file=sys.stderr)


def print_places(path: Path, run: dict[str, Any], launch_folder: Path, code: int) -> None:
    """Say where everything is, how to look at it, and how to go on."""
    if (path / "report.json").is_file():
        store = json.loads((path / "report.json").read_text("utf-8"))["store"]
        print(f"store    {show(Path(store), launch_folder)}.bin and .idx")
    if (path / "weights").is_dir():
        print(f"weights  {show(path / 'weights', launch_folder)} (safetensors, Hugging Face layout)")
    for plot in ("loss.png", "lengths.png"):
        if (path / plot).is_file():
            print(f"plot     {show(path / plot, launch_folder)}")
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    if code in (FAILED, STOPPED) and checkpoints:
        print(f"resume   the same command again goes on from {show(checkpoints[-1], launch_folder)}")
    tracking = run["tracking"]
    if tracking["enabled"]:
        print(f"mlflow   mlflow ui --backend-store-uri {shlex.quote(tracking['uri'])}")


def show(path: Path, launch_folder: Path) -> str:
    """A path as a person types it: relative to the launch folder where it lies below."""
    return str(path.relative_to(launch_folder)) if path.is_relative_to(launch_folder) else str(path)


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
