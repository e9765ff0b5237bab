"""The rank processes of a run on this machine: start, watch, stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_FAILED_RANK = re.compile(r"rank\s*:\s*(\d+)\s*\(local_rank:\s*\d+\)\s*exitcode\s*:\s*(-?\d+)")


@dataclass(frozen=True)
class Failure:
    """Why the ranks ended without an outcome.

    Attributes:
        kind: `user`, `training`, `crash`, or `lost` (killed from outside).
        text: a sentence, or for a crash the traceback.
    """

    kind: str
    text: str


class Ranks:
    """One process, or several under torchrun. They end when this process does."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        self._folder = folder
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        for old in logs.glob("rank-*.error.json"):
            old.unlink()
        command = [sys.executable, "-m"]
        if num_ranks > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
        command += ["bc2exp.worker", str(folder)]
        # Installed device plug-ins load themselves on `import torch` and fail without their drivers;
        # the backend's module imports what it needs.
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1" if num_ranks > 1 else str(len(_cores())))
        self._launcher_log = logs / "launcher.log"
        self._lifeline, self._writer = os.pipe()
        with self._launcher_log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=self._lifeline,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
        os.close(self._lifeline)

    def running(self) -> bool:
        """Whether any rank may still be at work."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End every rank now: the end of the pipe ends the ranks, the signal ends what started them."""
        self._hang_up()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Release the pipe after the ranks have ended; none outlives it."""
        self._hang_up()

    def failure(self) -> Failure | None:
        """Why they ended, None for an orderly end. The first error in time is the cause; the errors of
        ranks that lost their peer follow from it."""
        code = self._process.wait()
        if code == 0:
            return None
        killed = self._killed_rank(code)
        if killed is not None:
            return killed
        errors = [json.loads(file.read_text()) for file in (self._folder / "logs").glob("rank-*.error.json")]
        if errors:
            first = min(errors, key=lambda error: error["time"])
            return Failure(first["kind"], first["text"].rstrip())
        return Failure("crash", f"the ranks ended with code {code}; last lines of {self._launcher_log}:\n{self._tail()}")

    def _killed_rank(self, code: int) -> Failure | None:
        """A rank that a signal ended; torchrun's own signal to the survivors (SIGTERM) is no cause."""
        if code < 0:
            return Failure("lost", f"rank 0 was killed by {_signal_name(-code)}")
        for rank, exit_code in _FAILED_RANK.findall(self._launcher_log.read_text(errors="replace")):
            number = -int(exit_code)
            if number > 0 and number != signal.SIGTERM:
                return Failure("lost", f"rank {rank} was killed by {_signal_name(number)}")
        return None

    def _tail(self) -> str:
        files = [self._launcher_log, *sorted((self._folder / "logs").glob("rank-*.log"))]
        lines = [line for file in files if file.exists() for line in file.read_text(errors="replace").splitlines()]
        return "\n".join(lines[-20:])

    def _hang_up(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def _cores() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
