"""The life of the process beside a run that replays its journal, and the replay of runs that are over.

The tracker may be away at any moment. While the training runs, the follower tries again, more and more
rarely; at the end it tries for a bounded time and then says what to do later. Nothing is lost by it: the
journal has it all.
"""

from __future__ import annotations

import gc
import os
import select
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bc2exp.config.secrets import hide
from bc2exp.tracking import runs
from bc2exp.tracking.replay import Connect, Replay

DONE, WRONG, UNREACHED = 0, 2, 4
"""Exit codes: recorded; not a run that can be replayed; the tracker could not be reached."""

_POLL_SECONDS = 0.5
_PAUSE_PER_WORK = 100.0
"""Seconds of pause for a second of the processor's: a replay has a fixed price, so many small ones beside
short steps would slow them (benchmarks/tracking_cost.py: 1.8 % of a training's time on two cores with two
replays a second, 0.4 % with these pauses)."""
_LONGEST_PAUSE_WHILE_REACHED = 10.0
_LONGEST_PAUSE_WHILE_RUNNING = 30.0
_LONGEST_PAUSE_AT_THE_END = 5.0


class Refused(Exception):
    """The tracker was reached and says no: asking again changes nothing until a person does something."""


class Parent:
    """The other end of the pipe on `descriptor`: a parent that lives, asks to close, or is gone."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._heard = b""

    def wait(self, seconds: float) -> str | None:
        """Wait at most `seconds`; "close" when the parent asked for it, "gone" at the end of the pipe."""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return None
        data = os.read(self._descriptor, 4096)
        self._heard += data
        if b"close\n" in self._heard:
            return "close"
        return None if data else "gone"


def follow(folder: Path, connect: Connect, patience: float, parent: Parent) -> int:
    """Replay the run in `folder` while it is written, until `parent` ends; return an exit code.

    Also closes runs beside it that were abandoned. Once the parent has ended, the tracker has `patience`
    seconds to be there.
    """
    run = _load(folder)
    if run is None:
        return WRONG
    replay: Replay | None = None
    told = False
    pause = 0.0
    while (word := parent.wait(pause)) is None:
        try:
            if replay is None:
                replay = Replay(run, connect, live=True)
                replay.advance()
                _close_abandoned(run, connect)
                gc.freeze()  # MLflow is 280,000 objects; to look at them again takes as long as 400 steps
            began = time.process_time()
            replay.advance()
            pause = _pause_after(time.process_time() - began)
        except Exception as error:  # whatever a tracker, a network or a disk can do, the next try may work
            _close(replay)
            replay = None
            pause = min(max(2 * pause, _POLL_SECONDS), _LONGEST_PAUSE_WHILE_RUNNING)
            if not told:
                _say(f"{_unreached(run, error)}; the training goes on")
                told = True
    gc.unfreeze()
    return _finish(run, replay, connect, patience, orphaned=word == "gone")


def _pause_after(work: float) -> float:
    """Seconds to wait after a replay that took `work` seconds of the processor."""
    return min(max(_POLL_SECONDS, _PAUSE_PER_WORK * work), _LONGEST_PAUSE_WHILE_REACHED)


def sync(folders: Iterable[Path], connect: Connect, patience: float, uri: str | None = None) -> int:
    """Replay runs that are over, into `uri` where it is given; return the worst exit code.

    A tracker that was waited for in vain is asked once for each of the others, and not waited for again.
    """
    worst = DONE
    away: set[str] = set()
    for folder in folders:
        run = _load(folder)
        if run is not None and run.owned:
            _say(f"{folder} is still running, and its own follower records it")
            run = None
        if run is None:
            worst = max(worst, WRONG)
            continue
        if uri is not None and uri != run.uri:
            run = replace(run, uri=uri, artifact_location=None)
        code = _finish(run, None, connect, 0.0 if run.uri in away else patience, orphaned=False)
        if code == UNREACHED:
            away.add(run.uri)
        worst = max(worst, code)
    return worst


def _finish(run: runs.Run, replay: Replay | None, connect: Connect, patience: float, orphaned: bool) -> int:
    deadline = time.monotonic() + patience
    pause = _POLL_SECONDS
    while True:
        try:
            if replay is None:
                replay = Replay(run, connect, live=False)
            # Ranks outlive a killed parent by moments: what they still write belongs to the run.
            while orphaned and replay.advance():
                time.sleep(_POLL_SECONDS)
            replay.finish()
            return DONE
        except Exception as error:  # as in follow(); here the patience ends it
            if isinstance(error, Refused) or time.monotonic() + pause > deadline:
                later = f"`python -m bc2exp task=sync task.run={run.folder}` records it later"
                _say(f"{_unreached(run, error)}: the run is complete in {run.folder}; {later}")
                return UNREACHED
        finally:
            _close(replay)
        replay = None
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_AT_THE_END)


def _close_abandoned(run: runs.Run, connect: Connect) -> None:
    for other in runs.abandoned(run):
        replay = None
        try:
            replay = Replay(other, connect, live=False)
            # Between the look and the lock somebody may have resumed it: then it is not ours to close.
            if not other.owned:
                replay.finish()
        except Exception as error:  # it stays open for the next start; this run goes on
            _say(f"{other.folder} was abandoned and could not be closed ({_reason(error)})")
            return
        finally:
            _close(replay)


def _load(folder: Path) -> runs.Run | None:
    try:
        return runs.load(folder)
    except (OSError, ValueError, KeyError) as error:
        _say(f"{folder} is not the folder of a run ({_reason(error)})")
        return None


def _close(replay: Replay | None) -> None:
    if replay is not None:
        replay.close()


def _unreached(run: runs.Run, error: Exception) -> str:
    return f"the tracker at {run.uri} could not be reached ({_reason(error)})"


def _reason(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    # A client of HTTP tells at length what it asked; why it got no answer comes last.
    _, found, cause = first.rpartition("(Caused by ")
    if found:
        return textwrap.shorten(cause.removesuffix(")"), 200, placeholder=" …")
    return textwrap.shorten(f"{type(error).__name__}: {first}", 200, placeholder=" …")


def _say(text: str) -> None:
    print(f"bc2exp: {hide(text)}", file=sys.stderr, flush=True)
