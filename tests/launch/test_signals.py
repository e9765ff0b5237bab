"""A batch system tells every process of a run to stop: a save is finished, a second request ends at once."""

from __future__ import annotations

import re
import signal
import time
from types import SimpleNamespace

import pytest

from bc2exp.launch.terminal import _ECHO_SECONDS
from bc2exp.storage.tensors import verify
from bc2exp.tracking import mlflow as tracker
from tests.launch.commands import HOLD_A_SAVE, STEPS, events, values, wait_for
from tests.pages import fenced

pytestmark = pytest.mark.slow

PAIR = (*STEPS, "hardware=2cpu", "parallelism=ddp")
ONE_RAISES_ONE_SLEEPS = """
from bc2exp.train.trainer import Trainer
take = Trainer._step
def step(self, number, *rest):
    if number == 3:
        if RANK == 1:
            raise ValueError("injected on rank 1")
        import time
        time.sleep(3600)
    return take(self, number, *rest)
Trainer._step = step
"""

STOPPING = "stopping after this step and saving"


def told_in_a_save(launch, command, number):
    """Send a signal to every process of a command that is saving; the processes before and after."""
    launch.held("save", command)
    before = command.all_processes()
    command.tell_all(number)
    wait_for(lambda: STOPPING in command.out, "the answer")
    wait_for((launch.only_run() / "stop").exists, "the stop file")
    time.sleep(1)  # whoever dies of it has died
    return before, command.all_processes()


@pytest.fixture(scope="module")
def story(launches):
    """Side by side: two ranks and a tracker that are told once, in a save; one rank that is told twice."""
    pair, single = launches("pair"), launches("single")
    # beside the training the other rank has nothing more to do, and ends before the save does
    words = (*PAIR, "tracking.enabled=true", "task.save_beside=false")
    first = pair.start(*words, inject=HOLD_A_SAVE)
    second = single.start(*STEPS, inject=HOLD_A_SAVE)
    processes_of_pair = told_in_a_save(pair, first, signal.SIGTERM)
    (pair.aside / "go").touch()
    processes_of_single = told_in_a_save(single, second, signal.SIGUSR1)
    time.sleep(_ECHO_SECONDS)
    second.tell_all(signal.SIGTERM)
    for command in (first, second):
        command.wait()
        command.nothing_left()
    return SimpleNamespace(
        processes=(*processes_of_pair, *processes_of_single),
        first=first,
        pair=pair.only_run(),
        second=second,
        single=single.only_run(),
    )


def test_nobody_dies_of_a_request_to_stop(story):
    before, after, single_before, single_after = story.processes
    assert len(before) == 5  # the command, torchrun, two ranks, the tracker
    assert after == before
    assert len(single_before) == 2
    assert single_after == single_before


def test_a_slow_save_is_finished(story):
    assert story.first.process.returncode == 3, story.first.err
    last = max(values(story.pair, "train/loss"))
    verify(story.pair / "checkpoints" / f"step-{last:08d}")
    assert events(story.pair, "checkpoint")[-1]["step"] == last
    assert len(events(story.pair, "stopped")) == 1
    assert story.first.err == ""
    client = tracker.MlflowClient(f"sqlite:///{story.first.launch}/mlflow.db")
    (record,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert record.info.status == "KILLED"
    assert record.data.tags["resumable"] == "true"


def test_the_guide_shows_what_is_said(story):
    (shown,) = [block for block in fenced("docs/guides/interruptions.md") if "stopping after" in block]
    where = str(story.pair.relative_to(story.first.launch))
    said = re.sub(r"\d+", "N", story.first.out.replace(where, "runs/long"))
    lines = iter(said.splitlines())
    assert all(line in lines for line in re.sub(r"\d+", "N", shown).strip().splitlines()), said


def test_a_second_request_ends_at_once_and_the_save_does_not_count(story):
    assert story.second.process.returncode == 1
    assert story.second.err.startswith("bc2exp: ended at once on request; the last checkpoint stands\n")
    assert list((story.single / "checkpoints").glob("step-*")) == []
    assert [event["kind"] for event in events(story.single, "failed")] == ["lost"]


def test_torchrun_still_ends_a_rank_beside_one_that_failed(launch):
    command = launch.start(*PAIR, inject=ONE_RAISES_ONE_SLEEPS)
    assert command.wait() == 1
    command.nothing_left()
    assert "ValueError: injected on rank 1" in command.err
    log = (launch.only_run() / "logs" / "launcher.log").read_text()
    assert "closing signal SIGTERM" in log
    assert "Unable to shutdown" not in log  # what torchrun writes after 30 s, before it kills
