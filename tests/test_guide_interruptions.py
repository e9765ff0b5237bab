"""The guide to interruptions: twins whose commands pass the door, a job that runs, messages of the program.

What it shows of a screen is compared with real runs by tests/launch/test_signals.py and test_hung_ranks.py.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from bc2exp.config.launch import LaunchConfig
from bc2exp.config.preflight import preflight
from bc2exp.config.task import PretrainConfig
from bc2exp.launch import processes
from bc2exp.launch.run import DONE, FAILED, STOPPED, WRONG
from bc2exp.tracking.signals import REQUESTS
from tests.launch.commands import STEPS, hold_until_stop, values
from tests.launch.conftest import launch
from tests.pages import REPOSITORY, broken_links, commands, fenced, read, shape, table
from tests.small_run import small_words

__all__ = ["launch"]

ENGLISH, CHINESE = GUIDES = ("docs/guides/interruptions.md", "docs/guides/interruptions.zh.md")
SBATCH = "docs/examples/requeued.sbatch"
SIGNALS, CODES, KEYS, SAVED, HUNG, MESSAGES = range(6)  # the tables of the guide
TYPED = [line for line in commands(ENGLISH) if "-m bc2exp" in line]


def words_of(command: str) -> list[str]:
    """The overrides of a command line."""
    words = shlex.split(command)
    return words[words.index("bc2exp") + 1 :]


def job() -> str:
    """The command line of the job."""
    (line,) = [line for line in read(SBATCH).splitlines() if line.startswith("srun ")]
    return line


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    for number in (SIGNALS, CODES, KEYS, SAVED, HUNG, MESSAGES):
        one, other = ([row[0] for row in table(name, number)] for name in GUIDES)
        assert one == other


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


@pytest.mark.parametrize("command", [*TYPED, job()])
def test_the_commands_pass_the_door(command: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "long").mkdir(parents=True)
    (tmp_path / "runs" / "long" / "run.json").touch()
    assert preflight(words_of(command), sweep=False, folder=tmp_path).problems == []


def test_the_command_that_goes_on_is_the_one_that_was_stopped() -> None:
    assert TYPED[0] == TYPED[-1]


def test_the_signals_are_those_that_are_heeded() -> None:
    named = re.findall(r"`(SIG\w+)`", " ".join(row[0] for row in table(ENGLISH, SIGNALS)))
    assert sorted(named) == sorted(number.name for number in REQUESTS)


def test_the_codes_are_those_of_the_program() -> None:
    assert [int(row[0]) for row in table(ENGLISH, CODES)] == [DONE, FAILED, WRONG, STOPPED]


def test_the_keys_are_those_of_the_program() -> None:
    known = {f"`task.{field.name}`" for field in fields(PretrainConfig)}
    assert {row[0] for row in table(ENGLISH, KEYS)} <= known
    assert PretrainConfig.__dataclass_fields__["save_beside"].default is True


@pytest.mark.parametrize("name", GUIDES)
def test_the_limit_is_the_default(name: str) -> None:
    assert LaunchConfig().hang_s == 300
    assert re.search(r"`launch\.hang_s` (is|默认为) 300", read(name))


@pytest.mark.parametrize(
    "message", [row[0].strip("`") for number in (SAVED, HUNG, MESSAGES) for row in table(ENGLISH, number)]
)
def test_the_messages_are_those_of_the_program(message: str) -> None:
    sources = [file for part in ("launch", "train") for file in (REPOSITORY / "bc2exp" / part).glob("*.py")]
    text = "".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in sources)
    assert message in text


@pytest.mark.slow
def test_the_job_that_slurm_warns_saves_and_asks_to_be_queued_again(launch) -> None:
    """With an srun that runs its words, and a scontrol that writes them down."""
    programs, asked = launch.aside / "programs", launch.aside / "asked"
    programs.mkdir()
    (launch.folder / ".venv" / "bin").mkdir(parents=True)
    (launch.folder / ".venv" / "bin" / "activate").touch()
    small = shlex.join(word for word in small_words(*STEPS) if not word.startswith("task.steps"))
    for name, body in {
        "python": f'exec {shlex.quote(sys.executable)} "$@"',
        "srun": f'exec "$@" {small}',
        "scontrol": f"echo $@ > {shlex.quote(str(asked))}",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    path = f"PATH={programs}{os.pathsep}{os.environ['PATH']}"
    for step in (6, 9):
        asked.unlink(missing_ok=True)
        slurm = ("env", path, "SLURM_JOB_ID=4711", f"SLURM_SUBMIT_DIR={launch.folder}", "SLURM_NNODES=1")
        script = (*slurm, "bash", str(REPOSITORY / SBATCH))
        command = launch.start(machine=script, inject=hold_until_stop(step))
        launch.held(step, command)
        # the steps of the job are told, not its script
        for pid in processes.below(command.process.pid):
            os.kill(pid, signal.SIGUSR1)
        assert command.wait() == 3, f"{command.out}\n{command.err}"
        assert asked.read_text() == "requeue 4711\n"
    run = launch.folder / "runs" / "long"
    assert list(values(run, "train/loss")) == list(range(1, 10))
    assert "resumed from step 6" in command.out
