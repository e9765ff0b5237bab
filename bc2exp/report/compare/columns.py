"""The columns of the published tables, and the identities between them.

    samples/s x s/step = global batch          tokens/s/p = samples/s x sequence length / devices

A row that breaks one contradicts itself: at least one of its numbers is wrong, or means something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

_SLACK = 1e-3
"""Relative difference that an identity may have beside the rounding of its printed numbers."""


@dataclass(frozen=True)
class Figure:
    """A measured number. `half_unit` is half a unit of its last printed digit: what rounding may hide."""

    value: float
    half_unit: float = 0.0
    derived: bool = False
    """Computed here from others of its row by an identity: it confirms nothing."""

    @classmethod
    def printed(cls, text: str) -> Figure:
        """A number as printed. Raises ValueError where it is none, or not above 0."""
        value = float(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{text} is not above 0")
        mantissa, _, exponent = text.lower().partition("e")
        digits = len(mantissa.partition(".")[2].strip())
        return cls(value, 0.5 * 10.0 ** (int(exponent or 0) - digits))


@dataclass(frozen=True)
class Columns:
    """One row: what was computed, and how fast."""

    global_batch: int | None = None
    sequence_length: int | None = None
    num_devices: int | None = None
    samples_per_s: Figure | None = None
    tokens_per_s_per_device: Figure | None = None
    s_per_step: Figure | None = None

    def completed(self) -> Columns:
        """The same with the figures that follow from the others; what was measured stays."""
        samples, seconds, tokens = self.samples_per_s, self.s_per_step, self.tokens_per_s_per_device
        batch, length, devices = self.global_batch, self.sequence_length, self.num_devices
        if samples is None and seconds and batch:
            samples = Figure(batch / seconds.value, derived=True)
        if samples is None and tokens and length and devices:
            samples = Figure(tokens.value * devices / length, derived=True)
        if tokens is None and samples and length and devices:
            tokens = Figure(samples.value * length / devices, derived=True)
        if seconds is None and samples and batch:
            seconds = Figure(batch / samples.value, derived=True)
        return replace(self, samples_per_s=samples, tokens_per_s_per_device=tokens, s_per_step=seconds)

    def identities(self) -> Iterator[dict[str, Any]]:
        """Each identity whose numbers are all there: {"name", "found", "expected", "holds"}."""
        samples, seconds, tokens = self.samples_per_s, self.s_per_step, self.tokens_per_s_per_device
        if samples and seconds and self.global_batch and not (samples.derived or seconds.derived):
            found = samples.value * seconds.value
            slack = _relative(samples) + _relative(seconds)
            yield _identity("samples/s x s/step = global batch", found, self.global_batch, slack)
        length, devices = self.sequence_length, self.num_devices
        if samples and tokens and length and devices and not (samples.derived or tokens.derived):
            expected = samples.value * length / devices
            slack = _relative(samples) + _relative(tokens)
            name = "tokens/s/p = samples/s x sequence / devices"
            yield _identity(name, tokens.value, expected, slack)

    def plain(self) -> dict[str, Any]:
        """As JSON has it; the names of derived figures in a list of their own."""
        names = ("samples_per_s", "tokens_per_s_per_device", "s_per_step")
        figures = {name: getattr(self, name) for name in names}
        return {
            "global_batch": self.global_batch,
            "sequence_length": self.sequence_length,
            "num_devices": self.num_devices,
            **{name: figure and figure.value for name, figure in figures.items()},
            "derived": [name for name, figure in figures.items() if figure and figure.derived],
        }


def _relative(figure: Figure) -> float:
    return figure.half_unit / figure.value


def _identity(name: str, found: float, expected: float, slack: float) -> dict[str, Any]:
    holds = abs(found - expected) <= (slack + _SLACK) * abs(expected)
    return {"name": name, "found": found, "expected": expected, "holds": holds}
