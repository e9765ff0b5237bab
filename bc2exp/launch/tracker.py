"""The process beside a run that replays its journal into MLflow.

A process of its own: the parent stays light, and a tracker that hangs or fails can neither slow the training
nor end it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.secrets import ADDRESS, whole
from bc2exp.storage.lock import is_held
from bc2exp.tracking.signals import undisturbed

_POLL_SECONDS = 0.1
_LAST = 19
"""The niceness that gives way to every other."""
_GRACE_SECONDS = 5.0
"""The follower ends its own patience, with a reason. One that a request keeps from it is ended after this."""


class Tracker:
    """Follows a run from its start. `close` waits until MLflow has everything, for little more than
    `patience_s`: that a server is slow or hangs is no reason not to end."""

    def __init__(self, folder: Path, patience_s: float) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self._uri = json.loads((folder / "run.json").read_text("utf-8"))["tracking"]["uri"]
        self._log = folder / "logs" / "tracker.log"
        with self._log.open("wb") as log, undisturbed():
            self._process = subprocess.Popen(
                _command(folder, "--patience", str(patience_s)),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(self._uri),
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
        # Where the ranks keep all processors busy, it takes its turn in the gaps that they leave.
        os.setpriority(os.PRIO_PROCESS, self._process.pid, _LAST)

    def close(self, give_up: Callable[[], bool]) -> str | None:
        """Say that the run is over and wait, until `give_up` says that nobody wants to wait any longer.

        Returns a sentence where something could not be recorded.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"close\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already; its exit code says how
        deadline = time.monotonic() + self._patience_s + _GRACE_SECONDS
        while True:
            try:
                code = self._process.wait(_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                later = f"`python -m bc2exp task=sync task.run={self._folder}` records it later"
                if give_up():
                    self._kill()
                    return f"the tracker was not waited for; {later}"
                if time.monotonic() > deadline:
                    self._kill()
                    return (
                        f"the tracker at {self._uri} is too slow (tracking.patience_s={self._patience_s:g}): "
                        f"the run is complete in {self._folder}; {later}"
                    )
        if code == 0:
            return None
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("bc2exp: ") if lines else f"the tracker ended with code {code}"

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()


class NoTracker:
    """For runs that are not recorded in MLflow."""

    def close(self, give_up: Callable[[], bool]) -> None:
        """Nothing was followed."""


def to_sync(runs: Path) -> tuple[list[Path], list[str]]:
    """The run folders below `runs` to bring into MLflow, and a phrase for each kind that is left out."""
    folders = sorted(file.parent for file in runs.glob("**/run.json"))
    running = [folder for folder in folders if is_held(folder / "owner.lock")]
    private = [folder for folder in folders if folder not in running and not _is_tracked(folder)]
    left_out = []
    if running:
        left_out.append(f"left out: {len(running)} still running, whose own followers record them")
    if private:
        left_out.append(
            f"left out: {len(private)} with tracking.enabled=false (task.run=FOLDER records one of them)"
        )
    return [folder for folder in folders if folder not in (*running, *private)], left_out


def _is_tracked(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "run.json").read_text("utf-8"))["tracking"]["enabled"])
    except (OSError, ValueError, KeyError, TypeError):
        return True  # the replay says what is wrong with it


def sync(folders: list[Path], uri: str | None, patience_s: float) -> int:
    """Bring MLflow up to what run folders hold: each its own, or the one at `uri`; returns the exit code."""
    command = [*_command(*folders), "--sync", "--patience", str(patience_s)]
    command += [] if uri is None else ["--uri", uri]
    environment = None if uri is None else _environment(uri)
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL, env=environment).returncode


def find(uri: str, wanted: list[str]) -> list[dict[str, Any]]:
    """What the tracker at `uri` holds of runs named by id or name; see `tracking.mlflow_find.find`.

    Raises UserError where a run is not there, or the tracker.
    """
    command = [*_command("--uri", uri, "--find"), "--", *wanted]
    parts: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, env=_environment(uri), **parts)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise UserError(said[-1] if said else f"the tracker ended with code {done.returncode}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment(uri: str) -> dict[str, str]:
    """Ours; name and password of the tracker's address are in there and in no list of processes."""
    address = whole(uri)
    return {**os.environ, ADDRESS: address} if address != uri else dict(os.environ)


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bc2exp.tracking.mlflow", *map(str, arguments)]
