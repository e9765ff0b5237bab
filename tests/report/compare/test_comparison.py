"""What is said of two sides: errors a step, lines of the verdict, what cannot be measured, what differs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bc2exp.report.compare.comparison import Tolerances, compare
from bc2exp.report.compare.curves import align, relative_error
from bc2exp.report.compare.side import About, Side
from bc2exp.report.compare.sources import read_path, read_tracked
from bc2exp.report.compare.tables import sentences, tables
from tests.report.compare.logs import MODELLINK, TRAINER, lines, loss_at, read, row, side

STEPS = range(1, 1001)
CURVE = {step: loss_at(step) for step in STEPS}


def judged(a: Side, b: Side, **limits: float) -> dict[str, Any]:
    report = compare(a, b, Tolerances(**limits))
    json.dumps(report, allow_nan=False)
    assert len(list(tables(report))) >= 3
    assert sentences(report)[-1].startswith("verdict: ")
    return report


def line(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in report["verdict"] if each["name"] == name)


@pytest.mark.parametrize(("drift", "passed"), [(0.01, True), (0.03, False), (-0.01, True), (-0.03, False)])
def test_a_drift_of_1_percent_passes_and_one_of_3_percent_fails(drift: float, passed: bool) -> None:
    drifted = {step: value * (1 + drift) for step, value in CURVE.items()}
    report = judged(side(drifted), side(CURVE))
    assert report["passed"] is passed
    assert line(report, "loss")["value"] == pytest.approx(abs(drift))
    found = report["curves"]["loss"]["statistics"]
    assert found["compared"] == 1000
    assert found["max"] == pytest.approx(abs(drift))
    assert found["first_over"] == (None if passed else 1)
    assert found["num_over"] == (0 if passed else 1000)


@pytest.mark.parametrize(("drift", "passed"), [(0.01, True), (0.03, False)])
def test_the_same_from_a_megatron_log_against_a_trainers(drift: float, passed: bool, tmp_path: Path) -> None:
    a = read(tmp_path, lines(MODELLINK, STEPS, lambda n: loss_at(n) * (1 + drift)), "a.log")
    b = read(tmp_path, lines(TRAINER, STEPS), "b.log")
    report = judged(a, b)
    assert report["passed"] is passed
    assert line(report, "loss")["value"] == pytest.approx(drift, rel=0.01)
    assert line(report, "grad_norm")["value"] == pytest.approx(0.0, abs=1e-6)


def test_the_mean_decides_and_the_first_step_over_the_line_is_told() -> None:
    late = {step: value * (1.03 if step > 900 else 1.0) for step, value in CURVE.items()}
    report = judged(side(late), side(CURVE))
    found = report["curves"]["loss"]["statistics"]
    assert report["passed"] is True
    assert found["mean"] == pytest.approx(0.003)
    assert (found["first_over"], found["num_over"]) == (901, 100)
    assert 901 <= found["max_step"] <= 1000


def test_a_drift_of_exactly_the_limit_passes() -> None:
    assert judged(side({1: 1.5}), side({1: 1.0}), loss=0.5)["passed"] is True
    assert judged(side({1: 1.5}), side({1: 1.0}), loss=0.4999)["passed"] is False


def test_the_reference_is_b() -> None:
    one = judged(side({1: 1.0}), side({1: 2.0}))["curves"]["loss"]["error"]
    other = judged(side({1: 2.0}), side({1: 1.0}))["curves"]["loss"]["error"]
    assert (one, other) == ([0.5], [1.0])


def test_grad_norms_have_a_tolerance_of_their_own() -> None:
    norms = dict.fromkeys(STEPS, 1.0)
    for factor, status in [(1.09, "pass"), (1.11, "fail")]:
        worse = {step: norm * factor for step, norm in norms.items()}
        report = judged(side(CURVE, worse), side(CURVE, norms))
        assert line(report, "grad_norm")["status"] == status
        assert report["passed"] is (status == "pass")


def test_steps_that_one_side_lacks_are_left_out_and_said() -> None:
    every_tenth = {step: CURVE[step] for step in STEPS if step % 10 == 0}
    report = judged(side(every_tenth), side({**CURVE, 1010: 0.9}))
    found = report["curves"]["loss"]["statistics"]
    assert (found["compared"], found["steps_a"], found["steps_b"]) == (100, 100, 1001)
    assert report["curves"]["loss"]["a"][:10] == [None] * 9 + [CURVE[10]]
    assert "only b has 901 of its 1001 steps of the loss; left out" in sentences(report)
    assert not any(said.startswith("only a has") for said in sentences(report))


def test_no_step_in_common_is_no_pass() -> None:
    report = judged(side({1: 1.0, 2: 1.0}, seconds=7.0), side({5: 1.0}, seconds=7.0))
    assert line(report, "loss")["status"] == "fail"
    assert line(report, "loss")["reason"] == "no step in common"
    assert line(report, "throughput")["status"] == "pass"
    assert report["passed"] is False


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_fails_and_is_kept_out_of_the_mean(bad: float) -> None:
    broken = {**CURVE, 500: bad, 600: bad}
    report = judged(side(broken), side(CURVE))
    assert line(report, "loss")["reason"] == "not finite: a at 2, first 500"
    assert report["passed"] is False
    found = report["curves"]["loss"]["statistics"]
    assert (found["mean"], found["compared"]) == (0.0, 998)
    assert report["curves"]["loss"]["a"][499] == str(bad)
    both = judged(side(broken), side(broken))
    assert both["passed"] is False
    only_nan = judged(side({1: bad}), side({1: 1.0}))
    assert line(only_nan, "loss")["status"] == "fail"


def test_relative_errors() -> None:
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0) == math.inf
    assert relative_error(-1.0, 1.0) == 2.0
    assert relative_error(1.0, math.nan) is None
    assert judged(side({1: 1.0}), side({1: 0.0}))["curves"]["loss"]["statistics"]["max"] == "inf"
    assert align({}, {}).statistics(0.1)["mean"] is None


def test_a_rehearsal_has_no_speed() -> None:
    played = side(CURVE, rehearsal=True, seconds=7.0)
    report = judged(played, side(CURVE, seconds=7.0))
    assert report["a"]["tokens_per_s_per_device"] is None
    for name in ("throughput", "time"):
        assert line(report, name)["status"] == "not measured"
        assert line(report, name)["reason"] == "a: a rehearsal has no speed"
    assert report["ratios"] == dict.fromkeys(report["ratios"])
    assert report["passed"] is True


@pytest.mark.parametrize(
    ("seconds", "throughput", "time"),
    [
        (7.0, "pass", "pass"),
        (7.2, "pass", "pass"),
        (7.36, "pass", "fail"),
        (7.5, "fail", "fail"),
        (3.0, "pass", "pass"),
    ],
)
def test_speed_may_be_5_percent_worse_and_anything_better(seconds: float, throughput: str, time: str) -> None:
    report = judged(side(CURVE, seconds=seconds), side(CURVE, seconds=7.0))
    assert (line(report, "throughput")["status"], line(report, "time")["status"]) == (throughput, time)
    assert report["ratios"]["s_per_step"] == pytest.approx(seconds / 7.0)


def test_a_run_against_a_published_row() -> None:
    report = judged(side(CURVE, seconds=6.973), row(2349.0))
    assert line(report, "throughput")["status"] == "pass"
    assert line(report, "loss")["status"] == "not measured"
    assert line(report, "loss")["reason"] == "b: none recorded"
    assert report["passed"] is True
    other = judged(side(CURVE, seconds=6.973), row(3969.0, global_batch=64))
    assert line(other, "throughput")["value"] == pytest.approx(1 - 2349.6 / 3969, abs=1e-4)
    assert line(other, "time")["reason"] == "a has 32 samples a step, b 64"


def test_memory_may_be_10_percent_worse_where_it_is_the_same_thing() -> None:
    def memory(mine: Side, other: Side) -> tuple[str, str]:
        found = line(judged(mine, other), "memory")
        return found["status"], found["reason"]

    assert memory(side(CURVE, peak=21.9), side(CURVE, peak=20.0))[0] == "pass"
    assert memory(side(CURVE, peak=22.1), side(CURVE, peak=20.0))[0] == "fail"
    assert memory(side(CURVE, peak=1.0), side(CURVE, peak=20.0))[0] == "pass"
    assert memory(side(CURVE, peak=1.0), side(CURVE))[1] == "b: no peak memory"
    assert "differently" in memory(side(CURVE, peak=1.0), side(CURVE, peak=1.0, backend="cpu"))[1]
    assert memory(side(CURVE, peak=1.0, devices=4), side(CURVE, peak=1.0))[1] == "a has 4 devices, b 8"


def test_a_side_that_contradicts_itself_fails() -> None:
    mine = side(CURVE, seconds=7.0)
    mine.series["perf/samples_per_s"] = dict.fromkeys(STEPS, 5.0)
    mine = rebuilt(mine)
    report = judged(mine, side(CURVE, seconds=7.0))
    assert line(report, "identities")["reason"] == "a: samples/s x s/step = global batch, but 35 against 32"
    assert report["passed"] is False


def rebuilt(made: Side) -> Side:
    from bc2exp.report.compare.side import measure

    measure(made, About(global_batch=32, num_devices=8, sequence_length=4096))
    return made


def test_nothing_to_compare_is_neither_pass_nor_fail() -> None:
    empty = Side("task.a=x", "x", "log")
    assert compare(empty, copy.deepcopy(empty), Tolerances())["passed"] is None


CONFIG = """
model: {name: tiny_7b, hidden_size: 256}
hardware: {name: cpu, backend: cpu, num_devices: 2, rehearsal: false}
parallelism: {tensor: -1}
dataset: {sequence_length: 4096, cache: null, workers: null}
task: {name: pretrain, global_batch: 32, steps: 20, resume: auto, optimizer: {lr: 1.0e-06}}
tracking: {enabled: true}
seed: 1
"""


def run_folder(folder: Path, text: str = CONFIG, outcome: str | None = "done", seconds: float = 7.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(text)
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "metrics": {"train/loss": CURVE[step], "train/grad_norm": 1.0, "perf/step_time_s": seconds},
        }
        for step in range(1, 21)
    ]
    records += [{"event": outcome}] if outcome else []
    common = {"time": 1.0, "segment": 0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**common, **each}) + "\n" for each in records))
    return folder


def folder_side(folder: Path, key: str = "a") -> Side:
    return read_path(folder, f"task.{key}={folder}", About())


def test_two_runs_differ_only_in_what_differs(tmp_path: Path) -> None:
    other = CONFIG.replace("lr: 1.0e-06", "lr: 2.0e-06").replace("enabled: true", "enabled: false")
    other = other.replace("resume: auto", "resume: never").replace("seed: 1\n", "seed: 1\nextra: 3\n")
    a, b = folder_side(run_folder(tmp_path / "a")), folder_side(run_folder(tmp_path / "b", other), "b")
    report = judged(a, b)
    assert report["differences"] == [["task.optimizer.lr", 1e-6, 2e-6], ["extra", None, 3]]
    assert judged(a, a)["differences"] == []
    assert report["passed"] is True


def test_of_a_log_only_what_both_sides_know_is_compared(tmp_path: Path) -> None:
    top = "  lr ............... 2e-06\n  train_iters ........ 20\n  hidden_size ......... 256\n"
    top += "  seed ....... 1\n"
    top += "  tensor_model_parallel_size ..... 2\n"
    a = folder_side(run_folder(tmp_path / "a"))
    b = read(tmp_path, top + lines(MODELLINK, range(1, 21)), num_devices=2)
    assert judged(a, b)["differences"] == [["task.optimizer.lr", 1e-6, 2e-6]]


def test_a_run_folder_by_its_journal_a_run_that_is_not_done_and_a_rehearsal(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", CONFIG.replace("rehearsal: false", "rehearsal: true"), None)
    side = read_path(a / "metrics.jsonl", "task.a=x", About())
    assert side.rehearsal
    assert side.name == f"{tmp_path.name}/a"
    assert side.notes == ["the run's journal says: no outcome yet"]
    assert folder_side(run_folder(tmp_path / "b", outcome="failed")).notes == [
        "the run's journal says: failed"
    ]


def test_what_mlflow_holds_is_the_run_itself(tmp_path: Path) -> None:
    folder = folder_side(run_folder(tmp_path / "a"))
    record = {
        "run_id": "0" * 32,
        "name": "mine",
        "status": "FINISHED",
        "tags": {},
        "params": {"task.global_batch": "32", "task.optimizer.lr": "1e-06", "model.name": "tiny_7b",
                   "dataset.sequence_length": "4096", "hardware.num_devices": "2", "hardware.peak": "null"},
        "metrics": {name: [[step, value] for step, value in points.items()]
                    for name, points in folder.series.items()},
    }  # fmt: skip
    side = read_tracked(record, "task.b=mine", About())
    assert side.series == folder.series
    assert side.columns == folder.columns
    assert side.config["task"]["optimizer"]["lr"] == 1e-6
    assert side.config["hardware"]["peak"] is None
    assert side.own
    assert judged(folder, side)["curves"]["loss"]["statistics"]["max"] == 0.0


def test_mlflow_runs_of_other_trainers(tmp_path: Path) -> None:
    metrics = {
        "loss": [[1, 2.0], [2, "nan"], [1, 9.0]],
        "learning_rate": [[1, 1e-3]],
        "x": [[1, 1.7976931348623157e308]],
    }
    record = {
        "run_id": "1",
        "name": "n",
        "status": "RUNNING",
        "tags": {},
        "params": {"lr": "1"},
        "metrics": metrics,
    }
    side = read_tracked(record, "task.a=n", About(num_devices=8))
    assert side.series["train/loss"][1] == 2.0, "the first of a step that stands there twice"
    assert math.isnan(side.series["train/loss"][2])
    assert side.series["train/lr"] == {1: 1e-3}
    assert side.series["x"] == {1: math.inf}
    assert side.columns.num_devices == 8
    assert not side.own
    assert side.notes == ["MLflow says of this run: RUNNING"]
