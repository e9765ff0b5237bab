"""Ranks that hang, in real runs: the message, the stacks, and that no process is left."""

from __future__ import annotations

import os
import re
import signal
import time
from types import SimpleNamespace

import pytest

from bc2exp.tracking import mlflow as tracker
from tests.launch.commands import HOLD_A_SAVE, STEPS, events, processes, wait_for
from tests.pages import fenced

pytestmark = pytest.mark.slow

LONG = (
    "task.steps=100000",
    "task.save_every=20",
    "task.eval_every=null",
    "task.log_every=5",
    "launch.hang_s=8",
)
PAIR = (*LONG, "hardware=2cpu", "parallelism=ddp")

HANG = """
import ctypes, time
from bc2exp.train.trainer import Trainer
take = Trainer._step
def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL, PyDLL lets nobody else in
def sleep():
    time.sleep(3600)
def step(self, number, *rest):
    if number == 30 and RANK == {rank}:
        {how}()
    return take(self, number, *rest)
Trainer._step = step
"""


def left_of(command):
    """Processes that the command has left behind; its ranks name the run folder."""
    return processes(f"{command.launch}/runs")


@pytest.fixture(scope="module")
def story(launches):
    """Side by side: of two ranks one is stopped; a single one holds its interpreter."""
    stopped, single = launches("stopped"), launches("single")
    first = stopped.start(*PAIR, "tracking.enabled=true")
    second = single.start(*LONG, inject=HANG.format(rank=0, how="hold_the_interpreter"))
    wait_for(lambda: "checkpoint saved" in first.out, "a checkpoint")
    pid = stopped.rank(1)
    os.kill(pid, signal.SIGSTOP)
    left = []
    for command in (first, second):
        command.wait()
        left += left_of(command)
    return SimpleNamespace(
        pid=pid, stopped=stopped.only_run(), first=first, single=single.only_run(), second=second, left=left
    )


def test_a_stopped_rank_is_named_with_its_phase_and_the_live_ones_with_their_stacks(story):
    assert story.first.process.returncode == 1
    head, *lines = story.first.err.splitlines()
    step = r"training, step \d+"
    stopped = f"its process {story.pid} is stopped"
    said = rf"bc2exp: rank 1 hangs; last sign: {step}; no sign of life for \d+ s: {stopped}; "
    assert re.fullmatch(said + "the stacks of the ranks are in logs/stacks.txt", head), head
    assert re.match(
        rf"  rank 0, {step}: \w+ \(torch/distributed/distributed_c10d\.py:\d+\), \w+ \(", lines[0]
    )
    assert re.fullmatch(rf"  rank 1, {step}: no stack: {stopped}", lines[1])
    assert lines[2].startswith("bc2exp: the run failed; its logs are in runs/")
    assert "Traceback" not in story.first.err
    stacks = (story.stopped / "logs" / "stacks.txt").read_text()
    assert re.search(r'File ".*/bc2exp/train/trainer\.py", line \d+ in run', stacks)


def test_a_rank_whose_interpreter_is_held_tells_its_own_stack(story):
    assert story.second.process.returncode == 1
    head, line, *_ = story.second.err.splitlines()
    said = r"bc2exp: rank 0 hangs; last sign: training, step 30; no sign of life for \d+ s: its process \d+ "
    assert re.match(said + "runs, but its interpreter is held; the stacks of the ranks are in", head), head
    assert re.search(r": hold_the_interpreter \(\S+sitecustomize\.py:\d+\), step \(", line)


def as_in_a_guide(text):
    """What is said, without numbers, and of each stack only that there is one."""
    return re.sub(r"(?m)(?<=N: )\w+ \(.*", "(frames)", re.sub(r"\d+", "N", text)).splitlines()


def test_the_guide_shows_what_is_said(story):
    (shown,) = [block for block in fenced("docs/guides/interruptions.md") if " hangs" in block]
    said, end = as_in_a_guide(shown.strip())[:-1], as_in_a_guide(shown.strip())[-1]
    where = str(story.stopped.relative_to(story.first.launch))
    assert as_in_a_guide(story.first.err.replace(where, "runs/long")) == said
    assert end in as_in_a_guide(story.first.out.replace(where, "runs/long"))


def test_no_process_is_left_when_the_command_ends(story):
    assert story.left == []


def test_the_record_says_failed_and_that_it_can_go_on(story):
    for run in (story.stopped, story.single):
        (failed,) = events(run, "failed")
        assert failed["kind"] == "hung"
        assert failed["reason"].startswith("rank ")
        assert " hangs; last sign: " in failed["reason"]
    client = tracker.MlflowClient(f"sqlite:///{story.first.launch}/mlflow.db")
    (record,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert record.info.status == "FAILED"
    assert record.data.tags["resumable"] == "true"
    assert "resume   the same command again goes on from" in story.first.out


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "hold_the_interpreter",
            r"no sign of life for \d+ s: its process \d+ runs, but its interpreter is held",
        ),
        ("sleep", r"it lives, but the others have waited for it for \d+ s"),
    ],
)
def test_one_of_two_that_hangs_within_a_step(launch, how, said):
    command = launch.start(*PAIR, inject=HANG.format(rank=1, how=how))
    assert command.wait() == 1
    assert left_of(command) == []
    head, *lines = command.err.splitlines()
    assert re.match(rf"bc2exp: rank 1 hangs; last sign: training, step 30; {said}; the stacks ", head), head
    assert re.match(r"  rank 0, training, step 30: \w+ \(torch/distributed/distributed_c10d\.py:", lines[0])
    assert re.match(rf"  rank 1, training, step 30: {how} \(\S+sitecustomize\.py:\d+\), step \(", lines[1])


def test_a_single_rank_that_is_stopped(launch):
    command = launch.start(*LONG)
    wait_for(lambda: "checkpoint saved" in command.out, "a checkpoint")
    (rank,) = left_of(command)
    os.kill(rank, signal.SIGSTOP)
    assert command.wait() == 1
    assert left_of(command) == []
    said = r"bc2exp: rank 0 hangs; last sign: \w+, step \d+; no sign of life for \d+ s: its process "
    assert re.match(f"{said}{rank} is stopped; ", command.err), command.err


def test_a_save_and_a_suspended_command_that_take_longer_than_allowed_are_no_silence(launch):
    words = (*STEPS, "hardware=2cpu", "parallelism=ddp", "launch.hang_s=3")
    command = launch.start(*words, inject=HOLD_A_SAVE)
    launch.held("save", command)
    time.sleep(8)  # rank 0 is saving, rank 1 waits for it
    assert command.process.poll() is None, command.err
    command.process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    command.process.send_signal(signal.SIGCONT)
    time.sleep(2)
    (launch.aside / "go").touch()
    assert command.wait() == 0, command.err
