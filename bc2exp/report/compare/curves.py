"""Two curves on one axis of steps: the relative error at each step that both have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Curves:
    """A metric of a (judged) and b (the reference).

    Attributes:
        steps: every step of either side, ascending.
        a, b: value at each of them; None where a side has no such step.
        error: |a - b| / |b| there; None where it cannot be formed. Infinite where only b is 0.
        not_finite: steps where a value is NaN or infinite, by side.
    """

    steps: list[int]
    a: list[float | None]
    b: list[float | None]
    error: list[float | None]
    not_finite: dict[str, list[int]]

    @property
    def compared(self) -> int:
        """Number of steps with a relative error."""
        return sum(error is not None for error in self.error)

    def statistics(self, line: float) -> dict[str, Any]:
        """What the errors come to; None where there are none.

        Args:
            line: the relative error whose first crossing is looked for.
        """
        known = [
            (error, step) for error, step in zip(self.error, self.steps, strict=True) if error is not None
        ]
        largest = max(known, default=None, key=lambda pair: pair[0])
        return {
            "compared": len(known),
            "steps_a": sum(value is not None for value in self.a),
            "steps_b": sum(value is not None for value in self.b),
            "common": self.common,
            "mean": fmean(error for error, _ in known) if known else None,
            "max": largest and largest[0],
            "max_step": largest and largest[1],
            "line": line,
            "first_over": next((step for error, step in known if error > line), None),
            "num_over": sum(error > line for error, _ in known),
            "not_finite": self.not_finite,
        }

    @property
    def common(self) -> int:
        """Number of steps that both sides have, whatever the values."""
        return sum(None not in pair for pair in zip(self.a, self.b, strict=True))


def align(a: dict[int, float], b: dict[int, float]) -> Curves:
    """Put two series ({step: value}) on one axis."""
    steps = sorted({*a, *b})
    errors = [relative_error(a[step], b[step]) if step in a and step in b else None for step in steps]
    not_finite = {
        side: [step for step in steps if step in series and not math.isfinite(series[step])]
        for side, series in (("a", a), ("b", b))
    }
    return Curves(steps, [a.get(step) for step in steps], [b.get(step) for step in steps], errors, not_finite)


def relative_error(a: float, b: float) -> float | None:
    """|a - b| / |b|; None where one of them is not finite, infinite where only b is 0."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return None
    if a == b:
        return 0.0
    return abs(a - b) / abs(b) if b else math.inf
