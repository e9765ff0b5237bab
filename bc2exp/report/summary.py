"""What a run came to: `summary.json`, from its journal and its resolved configuration alone.

The columns are those of the published tables (ModelLink): samples/s, tokens/s/p (a device) and s/step. They
are read from the journal one by one, so that the identities between them can be checked and not assumed:
samples/s × s/step = global batch, and tokens/s/p = samples/s × sequence length / devices.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bc2exp.storage import atomic
from bc2exp.tracking import journal

_TOLERANCE = 1e-6
_ENDS = 5
_MOST_LEFT_OUT = 10

SAMPLES = "perf/samples_per_s"
TOKENS = "perf/tokens_per_s_per_device"
SECONDS = "perf/step_time_s"
STEP_TOKENS = "data/tokens_per_step"
STEP_POSITIONS = "data/positions_per_step"
"""Recorded where samples differ in length: what a step's samples hold, and what was computed with padding."""


@dataclass
class History:
    """A journal, read once: the first value of each (metric, step); steps run again are left out."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    """{metric: {optimizer step: value}}, steps in the order they were run."""
    first_steps: set[int] = field(default_factory=set)
    """The first recorded step of each segment: it pays for the start."""
    events: list[dict[str, Any]] = field(default_factory=list)
    devices: dict[int, int] = field(default_factory=dict)
    """{optimizer step: ranks that ran it}, as far as the starts of the segments tell."""
    seconds: float = 0.0
    """From the first to the last line of each segment, summed: without the time between segments."""

    @property
    def entropy(self) -> float | None:
        """Unigram entropy of the training data, nats a token, where the journal knows it."""
        known = (event.get("unigram_entropy") for event in self.events)
        return next((value for value in known if value is not None), None)


def history(path: str | os.PathLike[str]) -> History:
    """Read the journal at `path`. Raises ValueError as `journal.read` does."""
    result = History()
    begin: dict[int, float] = {}
    end: dict[int, float] = {}
    stepped: set[int] = set()
    ranks: dict[int, int] = {}
    for record in journal.read(path):
        segment = record["segment"]
        begin.setdefault(segment, record["time"])
        end[segment] = record["time"]
        if "event" in record:
            result.events.append(record)
            if record["event"] == "start" and "world_size" in record:
                ranks[segment] = record["world_size"]
            continue
        step = record["step"]
        if segment in ranks:
            result.devices.setdefault(step, ranks[segment])
        if segment not in stepped and SECONDS in record["metrics"]:
            stepped.add(segment)
            result.first_steps.add(step)
        for name, value in record["metrics"].items():
            result.series.setdefault(name, {}).setdefault(step, value)
    result.seconds = sum(end[segment] - begin[segment] for segment in begin)
    return result


def summarize(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Summarize the run in `run_folder`, write `summary.json` there, and return what was written.

    Losses are in nats a token, times in seconds, memory in GiB; null where the journal has no value, and for
    values that are not finite. Raises OSError where there is no `resolved.yaml`.
    """
    folder = Path(run_folder).resolve()
    config = OmegaConf.load(folder / "resolved.yaml")
    assert isinstance(config, DictConfig)
    read = history(folder / "metrics.jsonl")
    outcome = journal.outcome(folder / "metrics.jsonl")
    losses = list(read.series.get("train/loss", {}).values())
    ends = max(1, min(_ENDS, len(losses) // 2))  # of a short run fewer, that the two share no step
    evaluations = read.series.get("eval/loss", {})
    best = min(evaluations, key=lambda step: _ordered(evaluations[step]), default=None)
    result = {
        "outcome": outcome["event"] if outcome else None,
        "reason": outcome.get("reason") if outcome else None,
        "rehearsal": bool(config["hardware"].get("rehearsal")),
        "steps": max(read.series.get("train/loss", {}), default=0),
        "segments": journal.last_segment(folder / "metrics.jsonl") + 1,
        "wall_time_s": read.seconds,
        "loss": {
            "first": _mean(losses[:ends]),
            "last": _mean(losses[-ends:]),
            "eval_min": None if best is None else evaluations[best],
            "eval_min_step": best,
            "unigram_entropy": read.entropy,
        },
        "throughput": throughput(read, config),
        "work": work(read, config),
        "memory": {"peak_gib": max(read.series.get("mem/peak_gib", {}).values(), default=None)},
        "folders": _folders(folder),
    }
    finite = _finite(result)
    atomic.write_json(folder / "summary.json", finite)
    return finite


def throughput(read: History, config: DictConfig) -> dict[str, Any]:
    """The published columns over the steady steps of a run, with the identities between them.

    An identity holds if it does on every steady step and on the means, to a relative 1e-6; null where there
    is nothing to check. Means are arithmetic for times, harmonic for rates: total work over total time.
    """
    steps = steady(read)
    rows = {}
    for name in _COLUMNS:
        series = read.series.get(name, {})
        rows[name] = [series[step] for step in steps if step in series]
    # Summed up over a run, rates go with the harmonic mean exactly as times go with the arithmetic one.
    samples, tokens = _rate(rows[SAMPLES]), _rate(rows[TOKENS])
    seconds = _mean(rows[SECONDS])
    batch = config["task"].get("global_batch")
    # Where samples differ in length there is none that a speed in tokens could follow from.
    length = None if STEP_TOKENS in read.series else config["dataset"].get("sequence_length")
    hardware = config["hardware"]
    devices = hardware["num_devices"]
    # A resumed run may have gone on with another number of devices: each step has its own.
    counts = [read.devices.get(step, devices) for step in steps]
    checks = list(zip(rows[SAMPLES], rows[SECONDS], rows[TOKENS], counts, strict=False))
    if checks and samples and seconds and tokens and len(set(counts)) == 1:
        checks.append((samples, seconds, tokens, counts[0]))
    return {
        "steady_steps": len(steps),
        "samples_per_s": samples,
        "tokens_per_s_per_device": tokens,
        "s_per_step": seconds,
        "mfu": _rate(rows["perf/mfu"]),
        "peak_tflops": hardware.get("peak_tflops"),
        "peak_name": hardware.get("peak_name"),
        "global_batch": batch,
        "sequence_length": length,
        "num_devices": devices,
        "identities": {
            "samples_per_s * s_per_step == global_batch": _hold((s * t, batch) for s, t, _, _ in checks),
            "tokens_per_s_per_device == samples_per_s * sequence_length / num_devices": _hold(
                (p, length and s * length / count) for s, _, p, count in checks
            ),
        },
    }


def work(read: History, config: DictConfig) -> dict[str, Any] | None:
    """What all steps came to, of samples that differ in length: real tokens, positions computed, and those of
    the same samples padded to the full length. None where all samples have one length."""
    if STEP_TOKENS not in read.series:
        return None
    steps = sorted(read.series[STEP_TOKENS])
    # What is recorded is the mean over the steps since the record before.
    numbers = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    tokens, positions = (
        round(sum(read.series[name][step] * number for step, number in zip(steps, numbers, strict=True)))
        for name in (STEP_TOKENS, STEP_POSITIONS)
    )
    samples = config["task"]["global_batch"] * sum(numbers)
    padded = samples * config["dataset"]["sequence_length"]
    return {
        "packing": config["dataset"].get("packing"),
        "samples": samples,
        "tokens": tokens,
        "positions": positions,
        "positions_padded": padded,
        "times_fewer": padded / positions if positions else None,
    }


def steady(read: History) -> list[int]:
    """The steps whose speed counts, ascending. Where the rules leave none, all of them.

    Left out are the first tenth (at least 1, at most 10) and the first of each segment.
    """
    steps = sorted(read.series.get(SECONDS, {}))
    left_out = min(max(1, len(steps) // 10), _MOST_LEFT_OUT)
    return [step for step in steps[left_out:] if step not in read.first_steps] or steps


_COLUMNS = (SAMPLES, TOKENS, SECONDS, "perf/mfu")


def _hold(pairs: Iterable[tuple[float, float | None]]) -> bool | None:
    checks = [math.isclose(left, right, rel_tol=_TOLERANCE) for left, right in pairs if right is not None]
    return all(checks) if checks else None


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _rate(values: list[float]) -> float | None:
    return harmonic_mean(values) if values else None


def _ordered(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _finite(node: Any) -> Any:
    # A run that diverged has NaN in its losses; summary.json is JSON, which has none.
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _folders(folder: Path) -> dict[str, Any]:
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    weights = folder / "weights"
    tracking = folder / "tracking.json"
    return {
        "run": str(folder),
        "last_checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "weights": str(weights) if weights.is_dir() else None,
        "tracker": json.loads(tracking.read_text("utf-8"))["uri"] if tracking.exists() else None,
    }
