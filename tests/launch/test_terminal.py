"""A person or a terminal that leaves: Ctrl-C twice, a closed window, streams that were never there."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest

from bc2exp.launch import terminal
from bc2exp.launch.terminal import _ECHO_SECONDS, stop_requests
from tests.launch.commands import STEPS, events, hold, like_a_shell, values, wait_for

WAIT = """
import pathlib, time
from bc2exp.train.trainer import Trainer
record = Trainer._record
def waiting(self, step, values):
    record(self, step, values)
    if step == 3:
        pathlib.Path(ASIDE, "held-3").touch()
        while not pathlib.Path(ASIDE, "go").exists():
            time.sleep(0.01)
Trainer._record = waiting
"""


def without_standard_input():
    like_a_shell()
    os.close(0)


@pytest.fixture(scope="module")
def story(launches):
    """Side by side: a command whose rank does not answer to Ctrl-C, and gets a second one; and a command
    without standard input, whose terminal is closed while it trains."""
    deaf, alone = launches("deaf"), launches("alone")
    ended = deaf.start(*STEPS, inject=hold(6))
    window, terminal = os.openpty()
    streams = {"stdin": None, "stdout": terminal, "stderr": terminal, "preexec_fn": without_standard_input}
    left = alone.start(*STEPS, inject=WAIT, **streams)
    os.close(terminal)
    alone.held(3, left)
    os.close(window)
    (alone.aside / "go").touch()
    deaf.held(6, ended)
    ended.ctrl_c()
    wait_for(lambda: "once more (Ctrl-C) ends it at once" in ended.out, "the answer to Ctrl-C")
    wait_for((deaf.only_run() / "stop").exists, "the stop file")
    assert ended.process.poll() is None
    time.sleep(_ECHO_SECONDS)
    ended.ctrl_c()
    ended.wait()
    ended.nothing_left()
    left.wait()
    left.nothing_left()
    return SimpleNamespace(ended=ended, deaf=deaf.only_run(), left=left, alone=alone.only_run())


def test_a_second_ctrl_c_ends_at_once(story):
    assert story.ended.process.returncode == 1
    assert "ended at once on request" in story.ended.err
    assert "Traceback" not in story.ended.err
    (failed,) = events(story.deaf, "failed")
    assert failed["kind"] == "lost"
    assert max(values(story.deaf, "train/loss")) == 6
    assert "goes on from" in story.ended.out


def test_a_training_outlives_the_terminal_it_was_started_from(story):
    assert story.left.process.returncode == 0
    assert len(values(story.alone, "train/loss")) == 12
    assert len(events(story.alone, "done")) == 1
    assert (story.alone / "weights").is_dir()
    assert (story.alone / "summary.json").is_file()


@pytest.fixture
def clock(monkeypatch):
    """The time of the parent, as the test sets it: `clock.time`."""
    found = SimpleNamespace(time=100.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: found.time)
    return found


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
)
def test_requests_to_stop_are_counted_and_then_again_what_they_were(number, clock):
    before = signal.getsignal(number)
    with stop_requests() as requests:
        assert requests.count == 0
        for count in (1, 2):
            signal.raise_signal(number)
            assert requests.count == count
            clock.time += 1
    assert signal.getsignal(number) is before


def test_under_nohup_a_terminal_that_closes_asks_for_nothing(clock):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert requests.count == 0
            with stop_requests() as inner:
                signal.raise_signal(signal.SIGTERM)
                assert inner.count == 1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_comes_right_behind_a_request_is_the_same_one(clock):
    with stop_requests() as requests:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
            clock.time += 0.1
        assert requests.count == 1
        clock.time += 0.5
        signal.raise_signal(signal.SIGTERM)
        assert requests.count == 2
