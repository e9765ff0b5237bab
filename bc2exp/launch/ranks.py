"""The rank processes of a run on this machine: start, watch, stop."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bc2exp.config.nodes import ALONE, Nodes
from bc2exp.hardware.probe import rank_environment
from bc2exp.launch import hung, processes
from bc2exp.launch.signs import Signs
from bc2exp.tracking.pulse import Listener
from bc2exp.tracking.signals import undisturbed

# What torchrun writes of each rank that did not end with 0, and of those that it ended itself.
_FAILED = re.compile(r"rank\s*:\s*(\d+)\s*\(local_rank:\s*\d+\)\s*exitcode\s*:\s*(-?\d+)\s*\(pid:\s*(\d+)\)")
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")

_MOST_LINES = 20
_LITTLE_ROOM = 2**20


@dataclass(frozen=True)
class Failure:
    """Why the ranks ended without an outcome.

    Attributes:
        kind: `user`, `training`, `disk`, `crash`, `hung`, or `lost` (killed from outside).
        text: a sentence, or for a crash the traceback.
        time: Unix time at which a rank reported it, seconds.
        details: more lines, for who looks into it.
    """

    kind: str
    text: str
    time: float = field(default=math.inf, compare=False)
    details: str = field(default="", compare=False)


class Ranks:
    """One process, or several under torchrun. They end when this process does.

    Args:
        folder: the run folder.
        backend: what they compute on.
        num_ranks: ranks of this machine.
        nodes: the machines of the run.
        interface: the network interface that leads to the other machines, where it is known.
        hang_s: seconds without a sign of life after which a rank counts as hung; None: none ever does.
    """

    def __init__(
        self,
        folder: Path,
        backend: str,
        num_ranks: int,
        nodes: Nodes = ALONE,
        interface: str | None = None,
        *,
        deterministic: bool = False,
        hang_s: float | None = None,
    ) -> None:
        self._folder = folder
        self._nodes = nodes
        self._under_torchrun = num_ranks > 1 or nodes.count > 1
        logs = folder / "logs"
        if nodes.rank == 0:
            for old in logs.glob("rank-*.error.json"):
                old.unlink()
        command = [sys.executable, "-m"]
        if self._under_torchrun:
            command += ["torch.distributed.run", *_meeting(nodes), f"--nproc-per-node={num_ranks}", "-m"]
        command += ["bc2exp.worker", str(folder)]
        # Installed device plug-ins load themselves on `import torch` and fail without their drivers;
        # the backend's module imports what it needs.
        fixed = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONUNBUFFERED": "1"}
        suffix = "" if nodes.count == 1 else f"-{nodes.rank}"
        self._launcher_log = logs / f"launcher{suffix}.log"
        self._stacks = logs / f"stacks{suffix}.txt"
        self._stacks.unlink(missing_ok=True)  # of an earlier start
        # Both ways: its end is the ranks' end, and they say through it that they live.
        self._lifeline, theirs = socket.socketpair()
        self._listener = Listener(self._lifeline)
        first = nodes.rank * num_ranks
        self._signs = Signs(range(first, first + num_ranks), hang_s)
        with self._launcher_log.open("wb") as log, undisturbed():
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env={
                    **rank_environment(backend, num_ranks, interface, deterministic=deterministic),
                    **os.environ,
                    **fixed,
                },
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
        theirs.close()

    def running(self) -> bool:
        """Whether any rank may still be at work."""
        return self._process.poll() is None

    def hung(self, elsewhere: Iterable[dict[str, Any]] = ()) -> Failure | None:
        """The failure where a rank hangs. Ask often: this is what listens to them.

        Args:
            elsewhere: what other machines have told of their `signs` since.
        """
        self._signs.look(self._listener.hear(), elsewhere)
        found = hung.find(self._signs)
        if not found or self._errors():  # torchrun ends what lives beside a rank that failed
            return None
        node = next(iter(found)) // len(self._signs.ranks)
        where = f" of node {node}" if self._nodes.count > 1 else ""
        files = "stacks.txt" if self._nodes.count == 1 else "stacks-N.txt"
        text = f"{hung.sentence(self._signs, found, where)}; the stacks of the ranks are in logs/{files}"
        return Failure("hung", text, time.time())

    def signs(self) -> list[dict[str, Any]]:
        """The last sign of life of each rank here, to tell node 0."""
        return self._signs.latest()

    def stacks(self) -> str:
        """Ask all ranks where they are; the innermost frames of each, the rest in a file of the logs."""
        return hung.stacks_of(self._signs, self._folder / "logs", self._stacks)

    def kill(self) -> None:
        """End every rank now, with whatever it has started, stopped or not."""
        victims = processes.below(self._process.pid)
        self.close()
        processes.kill(victims)
        if not self._under_torchrun:
            self._process.kill()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Let go of the lifeline: no rank outlives it."""
        self._lifeline.close()

    def failure(self) -> Failure | None:
        """Why they ended, None for an orderly end. The first error in time is the cause; the errors of
        ranks that lost their peer follow from it."""
        code = self._process.wait()
        if code == 0:
            return None
        killed = self._killed(code)
        if killed is not None:
            return Failure("lost", killed)
        kind, text, time = self._cause(code)
        if kind == "disk":
            text = f"the disk of {self._folder} is full ({text}); make room, and the same command goes on"
        return Failure(kind, text, time)

    def _cause(self, code: int) -> tuple[str, str, float]:
        errors = [json.loads(file.read_text()) for file in self._errors()]
        if errors:
            first = min(errors, key=lambda error: error["time"])
            return first["kind"], first["text"].rstrip(), first["time"]
        if shutil.disk_usage(self._folder).free < _LITTLE_ROOM:
            return "disk", "there was no room to say more", math.inf
        how = f"the ranks ended with code {code} before they could say why"
        return "crash", f"{how}; the last lines of their logs:\n{self._last_lines()}", math.inf

    def _errors(self) -> list[Path]:
        """What ranks have left that raised."""
        return list((self._folder / "logs").glob("rank-*.error.json"))

    def _killed(self, code: int) -> str | None:
        """The sentence for a process that a signal from outside ended."""
        if code < 0:
            where = f" of node {self._nodes.rank}" if self._nodes.count > 1 else ""
            who = f"torchrun, which started the ranks{where}," if self._under_torchrun else "rank 0"
            return f"{who} was killed by {_signal_name(-code)}"
        log = self._launcher_log.read_text(errors="replace")
        by_torchrun = _ENDED_BY_TORCHRUN.findall(log)
        for rank, exit_code, pid in _FAILED.findall(log):
            if int(exit_code) < 0 and pid not in by_torchrun:
                return f"rank {rank} was killed by {_signal_name(-int(exit_code))}"
        return None

    def _last_lines(self) -> str:
        files = [self._launcher_log, *sorted((self._folder / "logs").glob("rank-*.log"))]
        texts = [file.read_text(errors="replace") for file in files if file.exists()]
        return "\n".join([line for text in texts for line in text.splitlines()][-_MOST_LINES:])


def _meeting(nodes: Nodes) -> list[str]:
    """How the torchruns find each other. Static: c10d's own meeting numbers machines by their names, so that
    rank 0 could land on another than node 0."""
    if nodes.count == 1:
        return ["--standalone"]
    return [
        "--rdzv-backend=static",
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        f"--master-addr={nodes.host}",
        f"--master-port={nodes.port}",
    ]


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
