"""A lock is seen by every process and dies with its holder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from bc2exp.storage import lock

HOLDER = """
import sys
from bc2exp.storage import lock
held = lock.hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """(path, process): another process that holds the lock on path."""
    path = tmp_path / "owner.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.communicate()


def test_another_process_is_refused_until_the_holder_is_killed(holder):
    path, process = holder
    assert lock.is_held(path)
    with pytest.raises(lock.LockHeld, match=r"owner\.lock"):
        lock.hold(path)
    process.kill()
    process.wait()
    assert not lock.is_held(path)
    with lock.hold(path):
        assert lock.is_held(path)
    assert not lock.is_held(path)


def test_waiting_for_a_lock(holder):
    path, process = holder
    threading.Timer(0.3, process.kill).start()
    begin = time.monotonic()
    lock.hold(path, wait_seconds=20).release()
    assert time.monotonic() - begin >= 0.25


def test_asking_about_a_lock_neither_takes_nor_creates_it(tmp_path):
    path = tmp_path / "owner.lock"
    assert not lock.is_held(path)
    assert not path.exists()
    for _ in range(3):
        lock.hold(path).release()
        assert not lock.is_held(path)


def test_a_question_that_is_being_asked_refuses_no_owner(tmp_path):
    path = tmp_path / "owner.lock"
    path.touch()
    question = os.open(path, os.O_RDONLY)
    fcntl.flock(question, fcntl.LOCK_SH)  # what is_held holds for a moment
    threading.Timer(0.03, os.close, [question]).start()
    lock.hold(path).release()


def test_a_started_program_does_not_inherit_the_lock(tmp_path):
    path = tmp_path / "owner.lock"
    held = lock.hold(path)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    try:
        child.stdout.readline()  # the kernel closes descriptors a moment after Popen has returned
        held.release()
        held.release()
        assert not lock.is_held(path)
    finally:
        child.communicate()
