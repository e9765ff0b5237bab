"""A finished run's folder with a journal whose numbers are known."""

from __future__ import annotations

import json

import pytest

BATCH, LENGTH, DEVICES = 32, 4096, 8


def _line(step, seconds, segment=0, **more):
    metrics = {
        "train/loss": 10.0 - step / 10,
        "perf/step_time_s": seconds,
        "perf/samples_per_s": BATCH / seconds,
        "perf/tokens_per_s_per_device": BATCH / seconds * LENGTH / DEVICES,
        "mem/peak_gib": 20.0 + step / 100,
        **more,
    }
    return {"step": step, "time": 100.0 + 10 * step + 1000 * segment, "segment": segment, "metrics": metrics}


def _event(name, time, /, segment=0, **fields):
    return {"event": name, "time": time, "segment": segment, **fields}


@pytest.fixture
def line():
    """line(step, seconds, segment=0, **metrics): a metric record; the three columns agree."""
    return _line


@pytest.fixture
def run_folder(tmp_path):
    """Make a run's folder: run_folder(records, peak_tflops=None) -> path; without records, 40 even steps."""

    def make(records=None, peak_tflops=None):
        folder = tmp_path / "run"
        folder.mkdir()
        peak = "null" if peak_tflops is None else peak_tflops
        if records is None:
            records = [
                _event("data", 100.0, name="embedded", documents=3, tokens=9, unigram_entropy=5.5),
                _event("start", 100.0, step=0, world_size=8),
                *(_line(step, 30.0 if step == 1 else 6.5 + step % 2) for step in range(1, 41)),
                {"step": 20, "time": 310.0, "segment": 0, "metrics": {"eval/loss": 8.5}},
                {"step": 40, "time": 510.0, "segment": 0, "metrics": {"eval/loss": 7.5}},
                _event("done", 511.0, step=40, reason=None),
            ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        (folder / "resolved.yaml").write_text(
            f"task: {{global_batch: {BATCH}}}\ndataset: {{sequence_length: {LENGTH}}}\n"
            f"hardware: {{num_devices: {DEVICES}, peak_tflops: {peak}, peak_name: 910B3 bf16}}"
        )
        return folder

    return make
