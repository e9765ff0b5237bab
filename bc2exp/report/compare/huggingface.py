"""The log of a Hugging Face Trainer: what it prints, or its `trainer_state.json`.

Printed lines are dictionaries of Python: `{'loss': 1.1342, 'grad_norm': 9.811, 'learning_rate': 7e-08,
'epoch': 0.01}`; transformers 5 prints the numbers as strings. They are read as text and never evaluated. They
bear no step: the n-th line with a loss is step n x `log_every`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bc2exp.report.compare.columns import Columns, Figure
from bc2exp.report.compare.side import GRAD_NORM, LOSS, RATE, Series, nested

_DICTIONARY = re.compile(r"\{'[^{}]*\}")
_PAIR = re.compile(r"'([^']+)':\s*'?([^',}]+)'?")

_NAMES = {"loss": LOSS, "grad_norm": GRAD_NORM, "learning_rate": RATE, "eval_loss": "eval/loss"}
_MARKS = ("loss", "eval_loss", "train_runtime")
"""A dictionary without one of these is something else."""
_STATE = {"max_steps": "task.steps", "train_batch_size": "task.micro_batch"}


def read_printed(lines: Iterable[str], log_every: int) -> tuple[Series, Columns]:
    """Series, and the speed of the whole run where the last line tells it; empty where nothing is a log."""

    def entries() -> Iterator[tuple[int, dict[str, float]]]:
        step = 0
        for line in lines:
            for found in _DICTIONARY.findall(line):
                values = {name: _number(text) for name, text in _PAIR.findall(found)}
                if not any(mark in values for mark in _MARKS):
                    continue
                step += log_every if "loss" in values else 0
                yield step, {name: value for name, value in values.items() if value is not None}

    return _collect(entries())


def read_state(state: Mapping[str, Any]) -> tuple[Series, Columns, dict[str, Any]]:
    """Series, speed of the whole run and configuration (nested) of a `trainer_state.json`.

    Raises KeyError, TypeError or ValueError where it is something else.
    """

    def entries() -> Iterator[tuple[int, dict[str, float]]]:
        for entry in state["log_history"]:
            values = {name: _number(str(value)) for name, value in entry.items() if name != "step"}
            yield int(entry["step"]), {name: value for name, value in values.items() if value is not None}

    series, columns = _collect(entries())
    flat = {key: state[name] for name, key in _STATE.items() if isinstance(state.get(name), int)}
    return series, columns, nested(flat)


def _collect(entries: Iterable[tuple[int, dict[str, float]]]) -> tuple[Series, Columns]:
    series: Series = {}
    whole: dict[str, float] = {}
    for step, values in entries:
        if "train_runtime" in values:
            whole = values
        for name, value in values.items():
            series.setdefault(_NAMES.get(name, f"log/{name}"), {}).setdefault(step, value)
    samples, steps = whole.get("train_samples_per_second"), whole.get("train_steps_per_second")
    # both are rounded to three digits, which is much of a slow run's steps a second
    return series, Columns(
        samples_per_s=Figure(samples, 5e-4) if samples else None,
        s_per_step=Figure(1 / steps, 5e-4 / steps**2) if steps else None,
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
