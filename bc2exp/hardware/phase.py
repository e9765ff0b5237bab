"""What this rank is at, for those who count or report what it does.

A rehearsal counts the operators of training and of evaluation apart. The parent of the run is told by
`tracking.pulse`, and names it where a rank hangs. It is what the main thread does: no other may say it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRAIN, EVALUATE, OTHER = "train", "evaluate", "other"
START, DATA, LOAD, SAVE, BETWEEN = "start", "data", "load", "save", "between"

_WORDS = {
    START: "its start",
    DATA: "preparing data",
    LOAD: "loading weights",
    SAVE: "saving",
    TRAIN: "training",
    EVALUATE: "evaluation",
    BETWEEN: "training",
}

_current = START
_step: int | None = None


def _nobody() -> None:
    """Nobody listens yet."""


_tell: Callable[[], None] = _nobody


def current() -> str:
    """The phase that this process is in, as operators are counted by it: TRAIN, EVALUATE or OTHER."""
    return _current if _current in (TRAIN, EVALUATE) else OTHER


def mark() -> tuple[str, int | None]:
    """The phase by its own name, and the last step that was begun; None before the first."""
    return _current, _step


def words(name: str, step: int | None) -> str:
    """A mark as a person reads it: `training, step 7`."""
    return _WORDS.get(name, name) + ("" if step is None else f", step {step}")


def tell(listener: Callable[[], None]) -> None:
    """Call `listener` at every change from now on."""
    global _tell
    _tell = listener


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Be in the phase `name` for the time of the block; `step` is the one that begins with it."""
    global _current, _step
    before, _current = _current, name
    _step = _step if step is None else step
    _tell()
    try:
        yield
    finally:
        _current = before
        _tell()
