"""What the kernel tells of processes, and what is made of it for ranks that are silent."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest

from bc2exp.launch import hung, processes, stacks
from bc2exp.launch.ranks import Ranks
from bc2exp.launch.signs import Signs
from tests.launch.commands import wait_for
from tests.launch.sleepers import started

ANSWERING = """
import sys, time
from bc2exp.tracking.signals import answer_with_stacks
answer_with_stacks()
def sleep_in_the_main_thread():
    print("here", flush=True)
    time.sleep(3600)
sleep_in_the_main_thread()
"""
ABOVE = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True)
"""

SAID = """\
a line of the log
Thread 0x00007f9f9ea096c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f9fa09ffb80 (most recent call first):
  File "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/home/you/own.py", line 14 in step
  File "<frozen runpy>", line 198 in _run_module_as_main
  File "<frozen runpy>", line 88 in _run_code
"""


@pytest.fixture
def start(tmp_path):
    """start(code, *arguments): a Python process that says when it is there; its log is that of rank 0."""
    with (tmp_path / "rank-0.log").open("ab") as log, started(stderr=log, start_new_session=True) as start:
        yield start


@pytest.fixture
def silent():
    """silent(pid): the signs of a rank that has trained in a process and then was silent for a minute."""

    def silent(pid):
        time = [0.0]
        signs = Signs([0], 60.0, clock=lambda: time[0])
        signs.look([{"rank": 0, "pid": pid, "phase": "train", "step": 7, "exchanges": {}}])
        for _ in range(60):
            time[0] += 1
            signs.look([])
        return signs

    return silent


def test_of_a_stack_the_innermost_frames_of_the_main_thread_are_shown():
    assert stacks.frames(SAID) == [
        "all_reduce (torch/distributed/distributed_c10d.py:3252)",
        "step (/home/you/own.py:14)",
        "_run_module_as_main (<frozen runpy>:198)",
    ]
    assert stacks.frames("nothing\n") == []


def test_a_stopped_rank_is_said_to_be_stopped_and_tells_no_stack(start, silent, tmp_path):
    process = start(ANSWERING)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: processes.state(process.pid) == "T", "the stop")
    signs = silent(process.pid)
    stopped = f"its process {process.pid} is stopped"
    found = hung.find(signs)
    assert found == {0: f"no sign of life for 60 s: {stopped}"}
    sentence = hung.sentence(signs, found, " of node 1")
    assert sentence == f"rank 0 of node 1 hangs; last sign: training, step 7; {found[0]}"
    told = hung.stacks_of(signs, tmp_path, tmp_path / "stacks.txt")
    assert told == f"rank 0, training, step 7: no stack: {stopped}"
    processes.kill([process.pid])
    assert process.wait(60) == -signal.SIGKILL


def test_a_rank_that_is_asked_tells_its_stack_of_now_and_not_an_earlier_one(start, silent, tmp_path):
    (tmp_path / "rank-0.log").write_text(SAID)
    process = start(ANSWERING)
    told = hung.stacks_of(silent(process.pid), tmp_path, tmp_path / "stacks.txt")
    # it may be about to sleep
    frames = r"sleep_in_the_main_thread \(<string>:[67]\), <module> \(<string>:8\)"
    assert re.match(f"rank 0, training, step 7: {frames}", told), told
    whole = (tmp_path / "stacks.txt").read_text()
    assert whole.startswith(f"rank 0, training, step 7, process {process.pid}\n")
    assert "own.py" not in whole
    assert process.poll() is None


def test_where_the_stacks_cannot_be_written_they_are_told(start, silent, tmp_path):
    process = start(ANSWERING)
    told = hung.stacks_of(silent(process.pid), tmp_path, tmp_path / "missing" / "stacks.txt")
    assert "sleep_in_the_main_thread" in told


def test_a_rank_that_was_killed_does_not_hang(start, silent):
    process = start(ANSWERING)
    process.kill()
    wait_for(lambda: processes.state(process.pid) == "Z", "the end")
    assert not processes.alive(process.pid)
    assert hung.find(silent(process.pid)) == {}
    process.wait()
    assert hung.find(silent(process.pid)) == {}


def test_everything_below_a_process_is_found(start):
    process = start(ABOVE, ANSWERING)
    (below,) = processes.below(process.pid)
    assert processes.below(below) == []
    processes.kill([below, below])
    wait_for(lambda: processes.below(process.pid) == [], "its end")


def test_ranks_are_killed_though_they_are_stopped_and_in_sessions_of_their_own(start, tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *words, **how: None)
        ranks = Ranks(tmp_path, "cpu", 2)
    ranks._process = torchrun = start(ABOVE, ANSWERING)
    (rank,) = processes.below(torchrun.pid)
    os.kill(rank, signal.SIGSTOP)
    ranks.kill()
    assert torchrun.poll() is not None
    wait_for(lambda: not processes.alive(rank), "the end of the rank")
