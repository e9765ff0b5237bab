"""One run, killed ten times at random moments of its life, ends bit by bit as the run that was not."""

from __future__ import annotations

import random
import time

import pytest

from tests.launch.commands import EXACT, events, values, weights

NUM_KILLS, NUM_STEPS = 10, 60
LONG = (f"task.steps={NUM_STEPS}", "task.save_every=2", "task.eval_every=5", "task.micro_batch=2")

SLOWLY = """
import time
from bc2exp.train.trainer import Trainer
step = Trainer._step
def slow(self, *arguments):
    time.sleep(0.15)
    return step(self, *arguments)
Trainer._step = slow
"""
"""Steps that take as long as larger ones do, so that kills come between and within them."""


@pytest.mark.slow
def test_ten_kills_change_no_bit(launches):
    killed, whole = launches("killed"), launches("whole")
    chance = random.Random(0)
    begun = 0
    for _ in range(NUM_KILLS):
        command = killed.start(*LONG, inject=SLOWLY)
        while command.process.poll() is None:
            if killed.runs() and len(events(killed.only_run(), "start")) > begun:
                break
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.5))
        if chance.random() < 0.2:  # the parent alone: its ranks and its tracker have to notice
            command.kill_parent()
            command.nothing_left()
        else:
            command.kill_all()
        begun = len(events(killed.only_run(), "start"))
    last = killed.run(*LONG)
    run = killed.only_run()
    assert "resuming: " in last.out
    starts = [event["step"] for event in events(run, "start")]
    assert len(starts) > NUM_KILLS / 2, "most kills came before the ranks had started"
    assert starts == sorted(starts), "no kill lost a checkpoint"
    assert starts[-1] > 0
    whole.run(*LONG)
    other = whole.only_run()
    for metric in EXACT:
        assert values(run, metric) == values(other, metric)
    assert list(values(run, "train/loss")) == list(range(1, NUM_STEPS + 1))
    assert weights(run) == weights(other)
