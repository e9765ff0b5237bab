"""The summary says what the journal says, checks the published identities, and ignores re-runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from bc2exp.report.summary import history, steady, summarize

BATCH, TOKENS = (
    "samples_per_s * s_per_step == global_batch",
    "tokens_per_s_per_device == samples_per_s * sequence_length / num_devices",
)


def test_a_run(run_folder):
    folder = run_folder()
    (folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000040").mkdir()
    (folder / "tracking.json").write_text('{"uri": "sqlite:////x/mlflow.db", "status": "RUNNING"}')
    summary = summarize(folder)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["outcome"], summary["steps"], summary["segments"]) == ("done", 40, 1)
    assert summary["wall_time_s"] == 411.0
    assert summary["loss"] == {
        "first": pytest.approx(9.7),
        "last": pytest.approx(6.2),
        "eval_min": 7.5,
        "eval_min_step": 40,
        "unigram_entropy": 5.5,
    }
    speed = summary["throughput"]
    assert speed["steady_steps"] == 36
    assert speed["s_per_step"] == pytest.approx(7.0)
    assert speed["samples_per_s"] == pytest.approx(32 / 7)
    assert speed["tokens_per_s_per_device"] == pytest.approx(32 / 7 * 4096 / 8)
    assert speed["identities"] == {BATCH: True, TOKENS: True}
    assert speed["mfu"] is None
    assert summary["memory"] == {"peak_gib": 20.4}
    assert summary["folders"] == {
        "run": str(folder),
        "last_checkpoint": str(folder / "checkpoints" / "step-00000040"),
        "weights": None,
        "tracker": "sqlite:////x/mlflow.db",
    }


def test_the_seed_row_of_the_published_table(run_folder, line):
    """4.59 samples/s, 2349 tokens/s/p, 6.973 s/step: ModelLink's own row fits its identities."""
    summary = summarize(run_folder([line(step, 6.973) for step in range(1, 30)]))
    assert round(summary["throughput"]["samples_per_s"], 2) == 4.59
    assert round(summary["throughput"]["tokens_per_s_per_device"]) == 2350  # 2349 from the rounded 4.59


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("perf/samples_per_s", {BATCH, TOKENS}),
        ("perf/step_time_s", {BATCH}),
        ("perf/tokens_per_s_per_device", {TOKENS}),
    ],
)
def test_one_number_that_is_off_breaks_its_identities(run_folder, line, name, broken):
    records = [line(step, 6.5) for step in range(1, 41)]
    records[30]["metrics"][name] *= 1 + 3e-6
    checks = summarize(run_folder(records))["throughput"]["identities"]
    assert {identity for identity, holds in checks.items() if not holds} == broken


def test_rounding_is_not_a_broken_identity(run_folder, line):
    records = [line(step, 6.5) for step in range(1, 41)]
    records[30]["metrics"]["perf/samples_per_s"] *= 1 + 1e-9
    assert all(summarize(run_folder(records))["throughput"]["identities"].values())


def test_steps_run_again_are_ignored_and_breaks_are_not_time(run_folder, line):
    records = [line(step, 7.0) for step in range(1, 21)]
    records += [
        line(step, 50.0 if step == 16 else 7.0, 1, **{"train/loss": 99.0} if step <= 20 else {})
        for step in range(16, 41)
    ]
    folder = run_folder(records)
    summary = summarize(folder)
    assert summary["segments"] == 2
    assert summary["loss"]["last"] == pytest.approx(6.2)
    assert history(folder / "metrics.jsonl").series["train/loss"][18] == pytest.approx(8.2)
    assert summary["throughput"]["s_per_step"] == pytest.approx(7.0), "step 16 counts as first run"
    assert summary["wall_time_s"] == 190.0 + 240.0
    assert summary["outcome"] is None


def test_the_first_step_of_a_resumed_segment_is_not_steady(run_folder, line):
    records = [line(step, 7.0) for step in range(1, 21)]
    records += [line(step, 50.0 if step == 21 else 7.0, 1) for step in range(21, 41)]
    assert summarize(run_folder(records))["throughput"]["s_per_step"] == pytest.approx(7.0)


@pytest.mark.parametrize(("steps", "left"), [(1, 1), (2, 1), (10, 9), (40, 36), (100, 90), (1000, 990)])
def test_how_many_steps_count(run_folder, line, steps, left):
    folder = run_folder([line(step, 7.0) for step in range(1, steps + 1)])
    assert len(steady(history(folder / "metrics.jsonl"))) == left


def test_mfu_is_reported_with_its_peak(run_folder, line):
    summary = summarize(run_folder([line(s, 7.0, **{"perf/mfu": 0.385}) for s in range(1, 9)], 294.9))
    speed = summary["throughput"]
    assert (speed["mfu"], speed["peak_tflops"]) == (pytest.approx(0.385), 294.9)
    assert speed["peak_name"] == "910B3 bf16"


def test_a_run_without_a_step(run_folder):
    summary = summarize(run_folder([]))
    assert (summary["outcome"], summary["steps"], summary["segments"]) == (None, 0, 0)
    assert summary["loss"]["first"] is None
    assert summary["throughput"]["samples_per_s"] is None
    assert set(summary["throughput"]["identities"].values()) == {None}


def test_a_run_that_diverged(run_folder, line):
    records = [line(step, 7.0, **{"train/loss": "nan"}) for step in range(1, 4)]
    records += [{"step": 3, "time": 0.0, "segment": 0, "metrics": {"eval/loss": value}} for value in ("nan",)]
    records += [{"step": 2, "time": 0.0, "segment": 0, "metrics": {"eval/loss": 4.0}}]
    folder = run_folder(records)
    summary = summarize(folder)
    assert summary["loss"]["first"] is None
    assert summary["loss"]["eval_min"] == 4.0
    assert not math.isnan(json.loads((folder / "summary.json").read_text())["loss"]["eval_min"])


def test_reports_tracking_and_storage_load_neither_torch_nor_mlflow():
    modules = (
        "storage.atomic", "storage.lock", "tracking.journal", "tracking.progress", "tracking.runs",
        "tracking.replay", "tracking.follow", "report.summary", "report.tables", "report.plots",
    )  # fmt: skip
    imports = "; ".join(f"import bc2exp.{name}" for name in modules)
    code = f"{imports}; import sys; assert not {{'torch', 'mlflow', 'matplotlib.pyplot'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_went_on_with_fewer_devices_keeps_its_identities(tmp_path):
    lines = []
    for segment, (ranks, steps) in enumerate([(4, (1, 2, 3)), (2, (4, 5, 6))]):
        lines.append({"event": "start", "step": steps[0] - 1, "world_size": ranks, "segment": segment})
        for step in steps:
            speed = {"perf/samples_per_s": 16.0, "perf/step_time_s": 0.5}
            speed["perf/tokens_per_s_per_device"] = 16.0 * 10 / ranks
            lines.append({"step": step, "segment": segment, "metrics": speed})
    journal = "".join(json.dumps({"time": float(n), **line}) + "\n" for n, line in enumerate(lines))
    (tmp_path / "metrics.jsonl").write_text(journal)
    text = "{task: {global_batch: 8}, dataset: {sequence_length: 10}, hardware: {num_devices: 2}}"
    (tmp_path / "resolved.yaml").write_text(text)
    assert set(summarize(tmp_path)["throughput"]["identities"].values()) == {True}
    (tmp_path / "metrics.jsonl").write_text(journal.replace('"world_size": 4', '"world_size": 3'))
    assert False in summarize(tmp_path)["throughput"]["identities"].values()


def test_the_two_ends_of_a_short_run_share_no_step(run_folder, line):
    summary = summarize(run_folder([line(step, 7.0) for step in range(1, 6)]))
    assert summary["loss"]["first"] == pytest.approx((9.9 + 9.8) / 2)
    assert summary["loss"]["last"] == pytest.approx((9.6 + 9.5) / 2)
