"""The command as a person types it, in a folder of the test's own, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bc2exp.tracking import journal
from tests.small_run import small_words

ROOT = Path(__file__).parents[2]

BOUND = 240.0
"""Seconds after which a wait is a failure; nothing here takes a tenth of it on a quiet machine."""

_ONLY_IN_RANKS = """
import os, sys
if "bc2exp.worker" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    RANK = int(os.environ.get("RANK", "0"))
"""


STEPS = ("task.steps=12", "task.save_every=4", "task.eval_every=6", "task.micro_batch=2")
"""A training of 12 steps with checkpoints after 4 and 8."""

EXACT = ("train/loss", "train/grad_norm", "train/lr", "eval/loss")
"""What must be the same to the bit however often a training is broken off."""

_AFTER_A_RECORD = """
import pathlib, time
from bc2exp.train.trainer import Trainer
record = Trainer._record
def held(self, step, values):
    record(self, step, values)
    if step == {step} and RANK == 0:  # what is written beside the training is to be there
        if self.checkpoints._saving is not None:
            self.checkpoints._saving.result()
        pathlib.Path(ASIDE, "saved-{step}").touch()
    if step == {step} and RANK == {rank}:
        while not pathlib.Path(ASIDE, "saved-{step}").exists():
            time.sleep(0.01)
        pathlib.Path(ASIDE, "held-{step}").touch()
        while not {condition}:
            time.sleep(0.01)
Trainer._record = held
"""


_GATES = """
import pathlib, time
from bc2exp.train.trainer import Trainer
record = Trainer._record
def held(self, step, values):
    record(self, step, values)
    if step in {steps} and RANK == 0:
        pathlib.Path(ASIDE, "held-%d" % step).touch()
        while not pathlib.Path(ASIDE, "go-%d" % step).exists():
            time.sleep(0.01)
        pathlib.Path(ASIDE, "held-%d" % step).unlink()
        pathlib.Path(ASIDE, "go-%d" % step).unlink()
Trainer._record = held
"""


def hold(step: int, rank: int = 0) -> str:
    """To inject: a rank comes to a stand after it has recorded a step; the others wait for it in the next."""
    return _AFTER_A_RECORD.format(step=step, rank=rank, condition="False")


def gates(*steps: int) -> str:
    """To inject: rank 0 comes to a stand after it has recorded each of these steps, until `Launch.go`."""
    return _GATES.format(steps=steps)


def hold_until_stop(step: int) -> str:
    """To inject: rank 0 goes on after it has recorded a step only when the stop file is there."""
    return _AFTER_A_RECORD.format(step=step, rank=0, condition="self.stop_file.exists()")


HOLD_A_SAVE = """
import pathlib, time
from bc2exp.storage import atomic
publish = atomic.publish_folder
def held(temporary, final):
    if pathlib.Path(final).name.startswith("step-"):
        pathlib.Path(ASIDE, "held-save").touch()
        while not pathlib.Path(ASIDE, "go").exists():
            time.sleep(0.01)
    publish(temporary, final)
atomic.publish_folder = held
"""
"""To inject: a save takes as long as it takes until the file `go` is there."""


def like_a_shell() -> None:
    """What a shell does before it runs a command: a group of its own, which Ctrl-C reaches. (Tests that run
    in the background inherit that SIGINT is ignored.)"""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + BOUND
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in {BOUND:.0f} s not seen: {what}"
        time.sleep(0.05)
    return value


def processes(text: str) -> list[int]:
    """Living processes with `text` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in words and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


@dataclass
class Command:
    """One started command; `wait` gives its exit code, `out` and `err` what it printed."""

    launch: Path
    process: subprocess.Popen
    files: tuple[Path, Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        try:
            return self.process.wait(BOUND)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {BOUND:.0f} s\n{self.out}\n{self.err}") from None

    def ctrl_c(self) -> None:
        """What a terminal does: the signal goes to the whole group of the command."""
        os.killpg(self.process.pid, signal.SIGINT)

    def all_processes(self) -> list[int]:
        """The command and everything that it started."""
        return [self.process.pid, *processes(f"{self.launch}/runs")]

    def tell_all(self, number: int) -> None:
        """What a batch system does: the signal goes to every process of the command."""
        for pid in self.all_processes():
            os.kill(pid, number)

    def kill_parent(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def out(self) -> str:
        return self.files[0].read_text()

    @property
    def err(self) -> str:
        return self.files[1].read_text()

    def nothing_left(self) -> None:
        """No process of the run lives 30 s after its end, follower included."""
        deadline = time.monotonic() + 30
        while left := processes(f"{self.launch}/runs"):
            assert time.monotonic() < deadline, f"still alive: {left}"
            time.sleep(0.05)

    def kill_all(self) -> None:
        """kill -9 of the parent and everything that it started, before any of them can notice the others'."""
        pids = self.all_processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.process.wait()
        self.nothing_left()


class Launch:
    """A folder in which commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.aside = folder.with_name(f"{folder.name}-aside")
        self.aside.mkdir()
        self._commands: list[Command] = []

    def start(self, *words: str, inject: str = "", machine: Sequence[str] = (), **how: Any) -> Command:
        """Type `python -m bc2exp` with the words of the small training and these.

        `inject` is Python that every rank runs first; it finds its number in RANK, and ASIDE is a folder.
        `machine` are the words before the command that run it on a machine of the test's own.
        `how` goes to subprocess.Popen; a preexec_fn must call `like_a_shell`.
        """
        number = len(self._commands)
        paths = [str(ROOT)]
        if inject:
            site = self.aside / f"site-{number}"
            site.mkdir()
            code = f"ASIDE = {str(self.aside)!r}\n{inject}"
            indented = "".join(f"    {line}\n" for line in code.splitlines())
            (site / "sitecustomize.py").write_text(_ONLY_IN_RANKS + indented)
            paths.insert(0, str(site))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        files = (self.aside / f"out-{number}", self.aside / f"err-{number}")
        with files[0].open("wb") as out, files[1].open("wb") as err:
            parts = {
                "stdin": subprocess.DEVNULL,
                "stdout": out,
                "stderr": err,
                "preexec_fn": like_a_shell,
                **how,
            }
            process = subprocess.Popen(
                [*machine, sys.executable, "-m", "bc2exp", *small_words(*words)],
                cwd=self.folder,
                env=environment,
                **parts,
            )
        command = Command(self.folder, process, files)
        self._commands.append(command)
        return command

    def run(self, *words: str, **how: Any) -> Command:
        """Type it and wait for its end, which is to be `code` (0)."""
        code = how.pop("code", 0)
        command = self.start(*words, **how)
        assert command.wait() == code, f"{command.out}\n{command.err}"
        return command

    def held(self, at: int | str, command: Command) -> None:
        """Wait until a rank of the command is held after a step, or in a save."""

        def there() -> bool:
            assert command.process.poll() is None, f"ended before {at}\n{command.out}\n{command.err}"
            return (self.aside / f"held-{at}").exists()

        wait_for(there, f"held at {at}")

    def go(self, step: int) -> None:
        """Let the rank that stands at one of its `gates` go on."""
        (self.aside / f"go-{step}").touch()

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid in processes(f"{self.folder}/runs"):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in variables:
                return pid
        raise AssertionError(f"no rank {number}")

    def runs(self) -> list[Path]:
        """The run folders, oldest first."""
        return sorted(file.parent for file in self.folder.glob("runs/*/*/run.json"))

    def only_run(self) -> Path:
        found = self.runs()
        assert len(found) == 1, found
        return found[0]

    def close(self) -> None:
        for command in self._commands:
            if command.process.poll() is None:
                command.process.kill()
        for pid in processes(f"{self.folder}/"):
            os.kill(pid, signal.SIGKILL)


def records(run: Path) -> list[dict[str, Any]]:
    return list(journal.read(run / "metrics.jsonl"))


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("event") == name]


def values(run: Path, metric: str, segment: int | None = None) -> dict[int, float]:
    """{step: value} of one segment, or of all, where a step run again must have the same value."""
    found: dict[int, float] = {}
    for record in records(run):
        if metric in record.get("metrics", {}) and segment in (None, record["segment"]):
            value = record["metrics"][metric]
            assert found.setdefault(record["step"], value) == value, f"{metric} at step {record['step']}"
    return found


def weights(run: Path) -> dict[str, bytes]:
    """The files of the exported weights."""
    return {file.name: file.read_bytes() for file in (run / "weights").iterdir()}


def assert_same_training(run: Path, undisturbed: Path) -> None:
    """Every value of every step, the weights and the last checkpoint are the same bits."""
    for metric in EXACT:
        assert values(run, metric) == values(undisturbed, metric)
    assert list(values(run, "train/loss")) == list(range(1, 13))
    assert weights(run) == weights(undisturbed)
    last = "checkpoints/step-00000012"
    names = [file.name for file in (undisturbed / last).glob("*.safetensors")]
    assert len(names) == 3
    assert [
        name for name in names if (run / last / name).read_bytes() != (undisturbed / last / name).read_bytes()
    ] == []


def identity(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["id"]
