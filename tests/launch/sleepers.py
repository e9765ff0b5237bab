"""Python processes of a test's own, that say when they are there and end with the test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bc2exp.launch import processes


@contextmanager
def started(**how: Any) -> Iterator[Callable[..., subprocess.Popen]]:
    """start(code, *arguments): runs code that prints `here`. `how` goes to subprocess.Popen."""
    made = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **how)
        made.append(process)
        assert process.stdout.readline() == b"here\n"
        return process

    yield start
    for process in made:
        processes.kill([*processes.below(process.pid), process.pid])
        process.communicate()
