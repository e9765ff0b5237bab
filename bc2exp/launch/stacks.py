"""Where the ranks of this machine are in their code: asked of them by a signal, read from their logs.

The answer is faulthandler's, in C: it needs no interpreter, so a rank whose interpreter is held answers, too.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bc2exp.tracking.signals import ASK_STACKS

_QUIET_SECONDS = 0.5
_MOST_SECONDS = 5.0
_POLL_SECONDS = 0.05
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
_THREAD = re.compile(r"^(Current thread|Thread) 0x.*\(most recent call first\):$")
_SHOWN_FRAMES = 3


def ask(pids: Mapping[int, int], logs: Path) -> dict[int, str]:
    """What each rank answers; empty where it does not.

    Args:
        pids: the process of each rank.
        logs: the folder of the ranks' logs.
    """
    files = {rank: logs / f"rank-{rank}.log" for rank in pids}
    begins = {rank: _size(file) for rank, file in files.items()}
    for pid in pids.values():
        with suppress(OSError):  # it has just ended
            os.kill(pid, ASK_STACKS)
    # Stacks of many threads come a frame at a time, with nothing to say which is the last.
    sizes, changed = dict(begins), time.monotonic()
    deadline = changed + _MOST_SECONDS
    while time.monotonic() < min(deadline, changed + _QUIET_SECONDS):
        time.sleep(_POLL_SECONDS)
        if (now := {rank: _size(file) for rank, file in files.items()}) != sizes:
            sizes, changed = now, time.monotonic()
    return {rank: _stacks_in(files[rank], begins[rank]) for rank in pids}


def frames(text: str) -> list[str]:
    """The innermost frames of the main thread, the innermost first: `all_reduce (torch/distributed/x.py:12)`.

    Empty where there are none.
    """
    threads: list[list[re.Match[str]]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (frame := _FRAME.match(line)):
            threads[-1].append(frame)
    # Other threads begin in the module that starts them.
    main = [thread for thread in threads if thread and not thread[-1][1].endswith("threading.py")]
    return [f"{frame[3]} ({_short(frame[1])}:{frame[2]})" for frame in (main or [[]])[-1][:_SHOWN_FRAMES]]


def _short(file: str) -> str:
    """A source file as it is imported: from its package on."""
    for above in ("/site-packages/", "/dist-packages/"):
        if above in file:
            return file.rpartition(above)[2]
    package = str(Path(__file__).parents[2])
    return file.removeprefix(f"{package}/")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _stacks_in(file: Path, begin: int) -> str:
    """What was written to a log behind a byte, from the first stack on."""
    try:
        with file.open("rb") as log:
            log.seek(begin)
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    lines = text.splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if _THREAD.match(line.rstrip())), len(lines))
    return "".join(lines[first:])
