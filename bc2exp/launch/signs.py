"""The signs of life of a machine's ranks, and what their absence means: what was heard, without processes.

Two things tell a hung rank:

- It says nothing while its process lives: it is stopped, or something holds its interpreter.
- It lives, but others wait for it: nobody has moved for as long, and in a group of ranks it has begun fewer
  exchanges than they. Only training counts, after its first step, and three times the longest wait so far:
  one that saves alone or prepares data lets the others wait for good reason, and slow machines take long.

Time is the time in which this process looked. While it was suspended itself, as with the lid of a laptop
closed, nobody was late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from bc2exp.hardware.phase import BETWEEN, START, TRAIN, words

START_SECONDS = 120.0
"""Patience with a rank at its start, whatever `launch.hang_s`: importing holds the interpreter for long."""

_LONGEST_LOOK = 1.0
"""Seconds between two looks that count; more were spent suspended."""

_LONGEST_NEWS = 10.0
"""Seconds for which what another machine told of a rank is news: one that is suspended tells nothing."""

_TRAINING = (TRAIN, BETWEEN)
_TIMES_THE_LONGEST = 3


@dataclass
class Rank:
    """What is known of one rank.

    Attributes:
        pid: its process; None before it said so.
        phase, step: what it is at, as `hardware.phase.mark` has it.
        exchanges: how many exchanges it has begun, by group of ranks.
        heard, moved: when it was last heard, and when that last told something new, in seconds of looking.
        ended: it has said that it ends.
    """

    pid: int | None = None
    phase: str = START
    step: int | None = None
    exchanges: dict[str, int] = field(default_factory=dict)
    heard: float = 0.0
    moved: float = 0.0
    ended: bool = False

    @property
    def words(self) -> str:
        """What it is at."""
        return words(self.phase, self.step)

    def take(self, sign: dict[str, Any], now: float) -> None:
        """Note a sign of life."""
        self.pid, self.heard = sign["pid"], now
        self.ended = sign.get("ended", False)
        if self.ended:
            return
        mark = sign["phase"], sign["step"], sign["exchanges"]
        if mark != (self.phase, self.step, self.exchanges):
            self.phase, self.step, self.exchanges = mark
            self.moved = now


class Signs:
    """What was heard of ranks, and since when nothing.

    Attributes:
        ranks: those of this machine, by number.
        elsewhere: those of other machines that were told of. Their own machine finds the silent among them.

    Args:
        numbers: of the ranks of this machine.
        limit: seconds without a sign of life after which a rank counts as hung; None: none ever does.
        clock: seconds, of any beginning.
    """

    def __init__(
        self, numbers: Iterable[int], limit: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ranks = {number: Rank() for number in numbers}
        self.elsewhere: dict[int, Rank] = {}
        self._limit = limit
        self._clock = clock
        self._last = clock()
        self._now = 0.0
        # of moves within training: the last, the longest that one took, the step in which they began
        self._moved, self._longest = 0.0, 0.0
        self._first_step: int | None = None

    def look(self, signs: Iterable[dict[str, Any]], elsewhere: Iterable[dict[str, Any]] = ()) -> None:
        """Take note of the signs that have come since the last look, here and on other machines."""
        now = self._clock()
        self._now += min(now - self._last, _LONGEST_LOOK)
        self._last = now
        for sign in signs:
            if sign["rank"] in self.ranks:
                self._take(self.ranks[sign["rank"]], sign)
        for sign in elsewhere:
            self._take(self.elsewhere.setdefault(sign["rank"], Rank()), sign)

    def latest(self) -> list[dict[str, Any]]:
        """The last sign of every rank of this machine that has given one, to tell another machine."""
        return [
            {"rank": number, **asdict(rank)} for number, rank in self.ranks.items() if rank.pid is not None
        ]

    def silent(self) -> dict[int, float]:
        """The ranks that should have been heard, and for how many seconds they were not."""
        if self._limit is None:
            return {}
        silence = {number: self._now - rank.heard for number, rank in self._going()}
        return {number: seconds for number, seconds in silence.items() if seconds >= self._patience(number)}

    def behind(self) -> dict[int, float]:
        """The ranks that others wait for in an exchange, and for how many seconds nobody has moved."""
        still = self._now - self._moved
        if self._limit is None or still < max(self._limit, _TIMES_THE_LONGEST * self._longest):
            return {}
        told_of = self.elsewhere.items()
        fresh = {number: rank for number, rank in told_of if self._now - rank.heard < _LONGEST_NEWS}
        going = {**dict(self._going()), **fresh}
        late = [
            number for number, rank in going.items() if self._is_in_training(rank) and _is_late(rank, going)
        ]
        return dict.fromkeys(late, still)

    def _going(self) -> list[tuple[int, Rank]]:
        return [(number, rank) for number, rank in self.ranks.items() if not rank.ended]

    def _patience(self, number: int) -> float:
        assert self._limit is not None
        return max(self._limit, START_SECONDS) if self.ranks[number].phase == START else self._limit

    def _take(self, rank: Rank, sign: dict[str, Any]) -> None:
        before = rank.phase
        rank.take(sign, self._now)
        if rank.moved < self._now:
            return
        if self._first_step is None:
            self._first_step = rank.step
        elif before in _TRAINING:
            self._longest = max(self._longest, self._now - self._moved)
        self._moved = self._now

    def _is_in_training(self, rank: Rank) -> bool:
        """Whether a rank is behind its first step, and at one."""
        if rank.phase not in _TRAINING or rank.step is None or self._first_step is None:
            return False
        return rank.step > self._first_step


def _is_late(rank: Rank, others: dict[int, Rank]) -> bool:
    """Whether a rank has begun fewer exchanges than another of a group that both are in."""
    return any(
        begun < other.exchanges.get(group, 0)
        for other in others.values()
        for group, begun in rank.exchanges.items()
    )
