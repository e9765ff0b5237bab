"""Two ranks under torchrun: what is said when one is lost or raises, and the exact way on from there."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from tests.launch.commands import (
    EXACT,
    STEPS,
    assert_same_training,
    events,
    hold,
    hold_until_stop,
    records,
    values,
)

pytestmark = pytest.mark.slow  # five trainings on two ranks

PAIR = (*STEPS, "hardware=2cpu", "parallelism=ddp")

RAISE_ON_RANK_1 = """
from bc2exp.train.trainer import Trainer
take = Trainer._step
def step(self, number, *rest):
    if (RANK, number) == (1, 3):
        raise ValueError("injected on rank " + str(RANK))
    return take(self, number, *rest)
Trainer._step = step
"""


@pytest.fixture(scope="module")
def story(launches):
    """An unbroken run; one that loses rank 1 by kill -9, is stopped by SIGTERM when it goes on, and goes on
    again; one whose rank 1 raises; and one process alone. Side by side, as each leaves a core idle."""
    calm, broken, raising = launches("calm"), launches("broken"), launches("raising")
    single_launch = launches("single")
    unbroken = calm.start(*PAIR)
    lost = broken.start(*PAIR, inject=hold(7, rank=1))
    broken.held(7, lost)
    os.kill(broken.rank(1), signal.SIGKILL)
    lost.wait()
    lost.nothing_left()
    raised = raising.start(*PAIR, inject=RAISE_ON_RANK_1)
    stopped = broken.start(*PAIR, inject=hold_until_stop(9))
    broken.held(9, stopped)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.wait()
    stopped.nothing_left()
    finished = broken.start(*PAIR)
    single = single_launch.start(*STEPS)
    for command in (unbroken, raised, finished, single):
        command.wait()
        command.nothing_left()
    for command in (unbroken, finished, single):
        assert command.process.returncode == 0, command.err
    return SimpleNamespace(
        lost=lost,
        raised=raised,
        stopped=stopped,
        finished=finished,
        run=broken.only_run(),
        unbroken=calm.only_run(),
        single=single_launch.only_run(),
        raising=raising.only_run(),
    )


def test_a_killed_rank_is_named_with_its_signal(story):
    assert story.lost.process.returncode == 1
    assert story.lost.err.startswith("bc2exp: rank 1 was killed by SIGKILL (signal 9)\n")
    # rank 0 has lost its peer and said so in its log: that is a consequence, and nothing to print
    assert "Traceback" not in story.lost.err
    failed = events(story.run, "failed")
    assert [event["segment"] for event in failed] == [0]
    assert failed[0]["reason"] == "rank 1 was killed by SIGKILL (signal 9)"


def test_the_first_traceback_is_printed_once_and_alone(story):
    assert story.raised.process.returncode == 1
    assert story.raised.err.count("Traceback (most recent call last)") == 1
    assert story.raised.err.count("ValueError: injected on rank 1") == 1
    assert "Traceback" not in story.raised.out
    assert [(e["kind"], e["reason"]) for e in events(story.raising, "failed")] == [
        ("crash", "ValueError: injected on rank 1")
    ]


def test_sigterm_stops_with_a_checkpoint_of_the_step(story):
    assert story.stopped.process.returncode == 3
    assert "resumed from step 4" in story.stopped.out
    assert "stopping after this step and saving" in story.stopped.out
    at = f"{story.run.relative_to(story.run.parents[2])}/checkpoints/step-00000009"
    assert f"step 9: checkpoint saved in {at}\n" in story.stopped.out
    assert f"the same command again goes on from {at}\n" in story.stopped.out
    assert [event["segment"] for event in events(story.run, "stopped")] == [1]


def test_after_both_the_run_ends_as_the_unbroken_one(story):
    assert "resumed from step 9" in story.finished.out
    assert_same_training(story.run, story.unbroken)
    assert [record["segment"] for record in records(story.run)] == sorted(
        record["segment"] for record in records(story.run)
    )


def test_two_processes_end_where_one_ends(story):
    for metric in EXACT:
        assert values(story.unbroken, metric) == pytest.approx(values(story.single, metric), rel=1e-5)
    name = "model-00001-of-00001.safetensors"
    one, two = (load_file(run / "weights" / name) for run in (story.single, story.unbroken))
    assert one.keys() == two.keys()
    for tensor in one:
        assert two[tensor] == pytest.approx(one[tensor], rel=0, abs=1e-5)
