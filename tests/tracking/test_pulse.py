"""What a rank says of itself, and that saying it never waits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from bc2exp.hardware import phase
from bc2exp.tracking.pulse import Listener, Pulse
from bc2exp.tracking.signals import ASK_STACKS
from tests.launch.commands import wait_for


@pytest.fixture
def ends():
    """The two ends of a way: the parent's, and what ranks have as standard input."""
    mine, theirs = socket.socketpair()
    yield mine, theirs
    mine.close()
    theirs.close()


def test_a_rank_says_again_and_again_what_it_is_at(ends, monkeypatch):
    monkeypatch.setattr("bc2exp.tracking.pulse.BEAT_SECONDS", 0.01)
    listener, heard = Listener(ends[0]), []
    at = {"phase": "train", "step": 1}
    pulse = Pulse(ends[1].fileno(), 3, lambda: dict(at))
    pulse.begin()
    wait_for(lambda: len(heard) > 2 or heard.extend(listener.hear()), "three signs")
    assert heard[0] == {"rank": 3, "pid": os.getpid(), "phase": "train", "step": 1}
    at["step"] = 2
    wait_for(lambda: any(sign["step"] == 2 for sign in listener.hear()), "the next step")
    pulse.end()
    wait_for(lambda: any(sign.get("ended") for sign in listener.hear()), "the end")


def test_a_parent_that_does_not_listen_is_not_waited_for(ends):
    pulse = Pulse(ends[1].fileno(), 0, lambda: {"phase": "train", "step": 1})
    for _ in range(5000):  # more than any buffer holds
        pulse.say()
    listener = Listener(ends[0])
    assert len(listener.hear()) > 10
    pulse.say()
    assert listener.hear()[-1]["step"] == 1
    ends[0].close()
    pulse.say()


def test_a_line_that_was_cut_is_left_out(ends):
    ends[1].sendall(b'{"rank": 1, "pi{"rank": 2, "pid": 7}\n[1]\n\xff\n{"rank": 3, "pid": 8}\n{"rank": 4,')
    listener = Listener(ends[0])
    assert listener.hear() == [{"rank": 3, "pid": 8}]
    ends[1].sendall(b' "pid": 9}\n')
    assert listener.hear() == [{"rank": 4, "pid": 9}]


def test_without_a_socket_there_is_nobody_to_tell(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        Pulse(file.fileno(), 0, lambda: {}).say()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_rank_that_does_not_listen_yet_lives_through_the_question():
    with subprocess.Popen([sys.executable, "-c", "print(input())"], stdin=-1, stdout=-1) as process:
        process.send_signal(ASK_STACKS)
        assert process.communicate(b"alive\n")[0] == b"alive\n"


def test_every_change_of_phase_is_told_at_once():
    told = []
    phase.tell(lambda: told.append(phase.mark()))
    try:
        with phase.phase(phase.BETWEEN):
            with phase.phase(phase.TRAIN, 7):
                assert phase.current() == phase.TRAIN
            with phase.phase(phase.SAVE):
                assert phase.current() == phase.OTHER
    finally:
        phase.tell(lambda: None)
    names = [name for name, _ in told]
    assert names == ["between", "train", "between", "save", "between", phase.START]
    assert told[3] == ("save", 7)
    assert phase.words("save", 7) == "saving, step 7"
    assert phase.words("task=convert", None) == "task=convert"
