"""Who heeds a request to stop: not what the parent starts, but for what torchrun tells its ranks."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from bc2exp.tracking.signals import REQUESTS, undisturbed
from tests.launch.commands import wait_for
from tests.launch.sleepers import started

SLEEPER = "print('here', flush=True); import time; time.sleep(3600)"
RANK = f"from bc2exp.tracking.signals import heed_torchrun_only; heed_torchrun_only(); {SLEEPER}"
OF_A_SHELL = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.fixture
def start():
    """start(code, *arguments): a Python process that says when it is there."""
    with started() as start:
        yield start


def from_elsewhere(process, number):
    """Send a signal that comes from a process of its own."""
    code = f"import os; os.kill({process.pid}, {int(number)})"
    subprocess.run([sys.executable, "-c", code], check=True)


def pending(process):
    """The signals that wait for a process for ever, as it blocks them."""
    with open(f"/proc/{process.pid}/status") as file:
        masks = {line.partition(":")[0]: int(line.split()[1], 16) for line in file if "Pnd" in line}
    return {number for number in REQUESTS if masks["ShdPnd"] >> (number - 1) & 1}


def test_what_is_started_undisturbed_hears_no_request_and_neither_does_what_it_starts(start):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with undisturbed():
        process = start(SLEEPER)
        below = start(OF_A_SHELL, SLEEPER)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    for each in (process, below):
        for number in REQUESTS:
            each.send_signal(number)
        assert pending(each) == set(REQUESTS)
        assert each.poll() is None


def test_a_rank_heeds_the_process_above_and_nobody_else(start):
    rank = start(RANK)
    for number in REQUESTS:
        from_elsewhere(rank, number)
    wait_for(lambda: pending(rank) == set(), "the rank to have heard")
    assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(60) == -signal.SIGKILL
