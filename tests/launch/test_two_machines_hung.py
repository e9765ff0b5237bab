"""A rank that hangs on one of two machines: both name it, and each leaves the stacks of its ranks."""

from __future__ import annotations

import os
import signal

import pytest

from tests.launch import machines
from tests.launch.commands import events, hold, wait_for
from tests.launch.test_two_machines import PAIR, cluster

__all__ = ["cluster"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(machines.missing()), reason=machines.missing() or "two machines"),
]

LONG = ("task.steps=100000", "launch.hang_s=5", *PAIR[1:])


@pytest.mark.parametrize("node", [0, 1])
def test_a_stopped_rank_is_told_on_both_machines_with_the_stack_of_the_other(node, launch, cluster):
    pair = cluster()
    both = [pair.start(launch, number, *LONG) for number in (0, 1)]
    wait_for(lambda: "checkpoint saved" in both[0].out, "a checkpoint")
    os.kill(launch.rank(node), signal.SIGSTOP)
    assert [command.wait() for command in both] == [1, 1], f"{both[0].err}\n{both[1].err}"
    for command in both:
        command.nothing_left()
        head = command.err.splitlines()[0]
        assert head.startswith(f"bc2exp: rank {node} of node {node} hangs; last sign: "), command.err
        assert " is stopped; the stacks of the ranks are in logs/stacks-N.txt" in head
        assert "Traceback" not in command.err
    run = launch.only_run()
    for number in (0, 1):
        stacks = (run / "logs" / f"stacks-{number}.txt").read_text()
        assert ("no stack" in stacks) == (number == node)
        assert ("/bc2exp/train/trainer.py" in stacks) == (number != node)
    assert [event["kind"] for event in events(run, "failed")] == ["hung"]


@pytest.mark.parametrize("node", [0, 1])
def test_the_only_rank_of_a_machine_that_lives_and_does_not_come_is_found(node, launch, cluster):
    pair = cluster()
    words, inject = (*LONG, "task.log_every=5"), hold(30, rank=node)
    both = [pair.start(launch, number, *words, inject=inject) for number in (0, 1)]
    assert [command.wait() for command in both] == [1, 1], f"{both[0].err}\n{both[1].err}"
    for command in both:
        command.nothing_left()
        head = command.err.splitlines()[0]
        assert head.startswith(f"bc2exp: rank {node} of node {node} hangs; last sign: training, step 30; "), (
            head
        )
        assert "it lives, but the others have waited for it for " in head
    stacks = (launch.only_run() / "logs" / f"stacks-{node}.txt").read_text()
    assert "sitecustomize.py" in stacks
