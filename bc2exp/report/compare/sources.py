"""From what a person names to a `Side`: a run folder, an MLflow run, a log, a published table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.report.compare.huggingface import read_printed, read_state
from bc2exp.report.compare.megatron import read_megatron
from bc2exp.report.compare.published import read_published
from bc2exp.report.compare.side import GRAD_NORM, LOSS, RATE, About, Side, measure, nested, typed
from bc2exp.report.summary import history
from bc2exp.tracking import journal

_TABLES = (".csv", ".yaml", ".yml")
_ALIASES = {"loss": LOSS, "train_loss": LOSS, "grad_norm": GRAD_NORM, "learning_rate": RATE, "lr": RATE}
"""What other trainers' MLflow runs call the same thing."""
_LARGEST = 1.797e308
"""Databases keep the infinities as the largest finite numbers."""


def read_path(path: Path, key: str, about: About) -> Side:
    """The side in a file or a run folder. `key` is the word that named it.

    Raises UserError for what is none of the known kinds, damaged, or at odds with `about`.
    """
    if path.name == "metrics.jsonl":
        path = path.parent
    try:
        if path.is_dir():
            return _run_folder(path, key, about)
        if path.suffix.lower() in _TABLES:
            side = Side(key, path.name, "published table")
            read_published(path, side, about)
            return side
        return _log(path, key, about)
    except OSError as error:
        raise UserError(f"{key}: cannot be read: {error.strerror or error}") from None


def read_tracked(record: dict[str, Any], key: str, about: About) -> Side:
    """The side that MLflow holds. `record` is what `tracking.mlflow` says of a run."""
    side = Side(key, str(record["name"]), f"MLflow run {record['run_id']}")
    for name, points in record["metrics"].items():
        known = side.series.setdefault(_ALIASES.get(name, name), {})
        for step, value in points:
            number = float(value)
            known.setdefault(step, number if abs(number) < _LARGEST else number * 10)
    side.config = nested({name: typed(text) for name, text in record["params"].items()})
    side.own = _is_own(side.config)
    side.rehearsal = record["tags"].get("bc2exp.rehearsal") == "true"
    if record["status"] != "FINISHED":
        side.notes.append(f"MLflow says of this run: {record['status']}")
    measure(side, about)
    return side


def _run_folder(path: Path, key: str, about: About) -> Side:
    side = Side(key, "/".join(path.parts[-2:]), "run folder")
    try:
        side.series = history(path / "metrics.jsonl").series
        ended = journal.outcome(path / "metrics.jsonl")
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
    if (path / "resolved.yaml").is_file():
        config = OmegaConf.to_container(OmegaConf.load(path / "resolved.yaml"))
        assert isinstance(config, dict)
        side.config = {str(name): value for name, value in config.items()}
        side.own = _is_own(side.config)
    side.rehearsal = bool(side.config.get("hardware", {}).get("rehearsal"))
    if ended is None or ended["event"] != "done":
        side.notes.append(f"the run's journal says: {ended['event'] if ended else 'no outcome yet'}")
    measure(side, about)
    return side


def _is_own(config: dict[str, Any]) -> bool:
    return all(isinstance(config.get(group), dict) for group in ("model", "hardware", "dataset", "task"))


def _log(path: Path, key: str, about: About) -> Side:
    if path.suffix.lower() == ".json":
        return _trainer_state(path, key, about)
    side = Side(key, path.name, "Megatron log")
    side.series, side.config, side.notes = read_megatron(_lines(path))
    if LOSS in side.series or "perf/step_time_s" in side.series:
        measure(side, about)
        return side
    side = Side(key, path.name, "Hugging Face log")
    side.series, speed = read_printed(_lines(path), about.log_every)
    if not side.series:
        raise UserError(
            f"{key}: holds no line of a training: neither Megatron's ` iteration 7/ 1000 | ... |` nor "
            "Hugging Face's `{'loss': 1.13, ...}`"
        )
    side.notes.append(f"its lines bear no step: they are counted as every {_ordinal(about.log_every)}step")
    measure(side, about, speed)
    return side


def _ordinal(log_every: int) -> str:
    return "" if log_every == 1 else f"{log_every}. "


def _trainer_state(path: Path, key: str, about: About) -> Side:
    side = Side(key, path.name, "Hugging Face trainer_state.json")
    try:
        side.series, speed, side.config = read_state(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}: is no trainer_state.json, which has a log_history ({reason})") from None
    measure(side, about, speed)
    return side


def _lines(path: Path) -> Iterator[str]:
    # Progress bars end their lines with a carriage return, which counts as a line's end here.
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file
