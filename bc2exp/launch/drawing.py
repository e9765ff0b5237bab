"""A sweeper of Hydra's that draws each job from what the last ones came to, such as Optuna.

It works in memory, and is told again from the ledger when a sweep goes on: with the same seed and the same
values it asks for the same jobs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.overrides import parse_word
from bc2exp.launch.ledger import Job, Ledger

_SEEDS = 2**32
_DIRECTIONS = {"lower": "minimize", "higher": "maximize"}


def draws(overrides: Iterable[str]) -> bool:
    """Whether the words of a command line choose a sweeper that draws its jobs."""
    words = map(parse_word, overrides)
    return any(word.key == "hydra/sweeper" and word.value != "basic" for word in words)


def settings(overrides: Iterable[str], plain: dict[str, Any]) -> list[str]:
    """What Optuna is told beside the words that were typed: the direction of the sweep, a seed, and one job
    at a time, so that each knows of all before it.

    Raises UserError for a direction that is not the sweep's.
    """
    typed = {word.key: str(word.value) for word in map(parse_word, overrides)}
    if typed.get("hydra/sweeper") != "optuna":
        return []
    direction, key = _DIRECTIONS[plain["sweep"]["direction"]], "hydra.sweeper.direction"
    if typed.get(key, direction) != direction:
        raise UserError(
            f"{key}={typed[key]}: sweep.direction={plain['sweep']['direction']} says otherwise, and "
            "ranks the jobs; leave the first out"
        )
    told = {
        key: direction,
        "hydra.sweeper.n_jobs": "1",
        "hydra.sweeper.sampler.seed": str(plain["seed"] % _SEEDS),
    }
    return [f"{name}={value}" for name, value in told.items() if name not in typed]


class Told:
    """The jobs that a ledger knew when its sweep went on, each of which a sweeper may ask for once."""

    def __init__(self, ledger: Ledger) -> None:
        self._jobs = list(ledger.jobs)
        self._open = list(ledger.jobs)
        self._asked = 0

    def find(self, overrides: list[str]) -> tuple[Job | None, str]:
        """The job of these words; None for a new one. And what there is to say where it is not the one that
        was asked for at this place before."""
        place = self._asked
        self._asked += 1
        before = self._jobs[place] if place < len(self._jobs) else None
        same = [job for job in self._open if job.overrides == overrides]
        found = before if before in same else next(iter(same), None)
        if found is not None:
            self._open.remove(found)
        if before is None or found is before:
            return found, ""
        return found, (
            f"as its job {place} the sweeper now asks for {' '.join(overrides)}, and before for "
            f"{' '.join(before.overrides)}: it was told other values"
        )
