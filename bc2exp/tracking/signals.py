"""The signals that pass between the processes of a run, and who heeds them.

A batch system tells every process of a job that it is to stop; a terminal its whole group. The parent of the
run answers for all: it starts the others so that they do not hear, from their first instruction on.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to stop: a person or a system; with the last two Slurm warns before the end of the time."""

ASK_STACKS = signal.SIGURG
"""Asks a rank for its stacks. One that does not listen yet passes it over: by default it does nothing."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is started in the block never hears of a request to stop, nor what it starts itself.

    The signals wait for this process meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_torchrun_only() -> None:
    """Live through requests to stop, but for one: torchrun sends it to the ranks beside one that failed.

    It comes from the process above; a batch system's does not. Where nobody can tell who sent one, as on
    macOS, each is heeded.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    above = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(REQUESTS).si_pid != above:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def answer_with_stacks() -> None:
    """Write the stacks of all threads to the standard error, a rank's log, whenever they are asked for.

    In C, without the interpreter: so a rank answers, too, whose interpreter is held.
    """
    faulthandler.register(ASK_STACKS, file=2, all_threads=True)
