"""The process beside a run that replays its journal into MLflow.

A process of its own: the parent stays light, and a tracker that hangs or fails can neither slow the training
nor end it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_POLL_SECONDS = 0.1


class Tracker:
    """Follows a run from its start. `close` waits until MLflow has everything, for `patience_s` at most."""

    def __init__(self, folder: Path, patience_s: float) -> None:
        self._folder = folder
        self._log = folder / "logs" / "tracker.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                _command(folder, "--patience", str(patience_s)),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )

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
        while True:
            try:
                code = self._process.wait(_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if give_up():
                    self._process.kill()
                    self._process.wait()
                    later = f"`python -m bc2exp task=sync task.run={self._folder}` records it later"
                    return f"the tracker was not waited for; {later}"
        if code == 0:
            return None
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("bc2exp: ") if lines else f"the tracker ended with code {code}"


class NoTracker:
    """For runs that are not recorded in MLflow."""

    def close(self, give_up: Callable[[], bool]) -> None:
        """Nothing was followed."""


def sync(folders: list[Path]) -> int:
    """Bring MLflow up to what run folders hold; returns the exit code."""
    return subprocess.run([*_command(*folders), "--sync"], check=False, stdin=subprocess.DEVNULL).returncode


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bc2exp.tracking.mlflow", *map(str, arguments)]
