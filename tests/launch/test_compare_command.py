"""`task=compare` as a person types it: run folders, MLflow's runs, logs, tables; its own record and code."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from bc2exp import __main__ as door
from bc2exp.config.errors import UserError
from bc2exp.config.roots import data_root
from bc2exp.tracking import mlflow as tracker
from bc2exp.tracking import mlflow_find
from tests.launch.commands import ROOT
from tests.report.compare.logs import MODELLINK, TRAINER, lines, loss_at

TABLE = data_root() / "experiments" / "modellink_pretrain" / "published.csv"
ROW, REFERENCE = "task.about_a.row=npu-7b-2024-01-26", "task.about_b.row=reference-7b-2024-01-26"
OFF = "tracking.enabled=false"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two logs: one 1 % above the other; and one 3 % above it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the tracker's process
    for name, form, factor in (("b.log", TRAINER, 1), ("1.log", MODELLINK, 1.01), ("3.log", MODELLINK, 1.03)):
        text = lines(form, range(1, 31), lambda step, factor=factor: factor * loss_at(step))
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def compare(*words: str) -> int:
    return door.command(["task=compare", *words])


def only_run(folder: Path) -> Path:
    (found,) = folder.glob("runs/compare/*")
    return found


def finished_run(folder: Path, name: str, uri: str, factor: float = 1.0, seed: int = 1) -> Path:
    """A run folder as a training of this project leaves it, recorded in MLflow."""
    run = folder / "runs" / "pretrain-tiny_7b" / name
    run.mkdir(parents=True)
    about = {
        "id": uuid.uuid4().hex, "name": name, "task": "pretrain", "digest": "0" * 12, "created": 1.0,
        "launch_folder": str(folder), "tags": {},
        "tracking": {"enabled": True, "uri": uri, "experiment": "pretrain", "artifact_location": None},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(about))
    (run / "resolved.yaml").write_text(
        f"model: {{name: tiny_7b}}\nhardware: {{backend: cpu, num_devices: 1}}\nseed: {seed}\n"
        "dataset: {sequence_length: 128}\ntask: {global_batch: 8}\n"
    )
    records: list[dict[str, Any]] = [
        {"step": step, "metrics": {"train/loss": factor * loss_at(step), "perf/step_time_s": 0.5}}
        for step in range(1, 31)
    ]
    records.append({"event": "done"})
    common = {"time": 2.0, "segment": 0}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**common, **each}) + "\n" for each in records))
    assert tracker.main(["--sync", str(run)]) == 0
    return run


def test_a_drift_of_1_percent_ends_with_0_and_one_of_3_percent_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("task.a=1.log", "task.b=b.log", OFF, "hydra.run.dir=one") == 0
    said = capsys.readouterr().out
    assert said.startswith("run: one\n")
    assert "verdict: pass" in said
    assert "page     one/compare.html (open it in a browser)" in said
    assert compare("task.a=3.log", "task.b=b.log", OFF) == 1
    assert "verdict: FAIL (loss)" in capsys.readouterr().out
    assert compare("task.a=3.log", "task.b=b.log", OFF, "task.tolerances.loss=0.04") == 0
    written = {file.name for file in Path("one").iterdir()}
    assert written >= {"compare.json", "compare.html", "loss_overlay.png", "loss_error.png", "metrics.jsonl"}
    kept = json.loads(Path("one/compare.json").read_text())
    assert kept["verdict"][0]["value"] == pytest.approx(0.01, rel=0.01)
    assert "model" not in (folder / "one" / "resolved.yaml").read_text(), "it is not the compared runs' model"


def test_the_published_table_flags_the_row_that_contradicts_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(f"task.a={TABLE}", f"task.b={TABLE}", ROW, REFERENCE, OFF) == 1
    said = capsys.readouterr().out
    assert "row npu-13b-2024-03-17 contradicts itself: tokens/s/p = samples/s x sequence / devices" in said
    assert said.count("contradicts itself") == 1
    assert "verdict: FAIL (throughput, time)" in said
    chosen = "task.about_a.row=npu-13b-2024-03-17", "task.about_b.row=reference-13b-2024-03-17"
    assert compare(f"task.a={TABLE}", f"task.b={TABLE}", *chosen, OFF) == 1
    assert "verdict: FAIL (identities)" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_by_name_by_id_and_by_folder_and_the_record_of_the_comparison(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{folder}/mlflow.db"
    one = finished_run(folder, "one's run", uri)
    other = finished_run(folder, "other", uri, 1.03, seed=2)
    run_id = json.loads((other / "tracking.json").read_text())["run_id"]
    assert compare("task.a=one's run", f"task.b={run_id}") == 1
    said = capsys.readouterr()
    assert said.err == ""
    run = only_run(folder)
    client = tracker.MlflowClient(uri)
    (record,) = client.search_runs([client.get_experiment_by_name("compare").experiment_id])
    assert record.info.run_name == "one's run against other"
    assert record.info.status == "FINISHED"
    assert record.data.tags["bc2exp.verdict"] == "fail"
    assert record.data.tags["bc2exp.verdict.loss"] == "fail"
    assert record.data.tags["bc2exp.verdict.grad_norm"] == "not measured"
    assert record.data.metrics["compare/loss_mean"] == pytest.approx(1 - 1 / 1.03)
    assert record.data.metrics["compare/loss_first_over"] == 1
    assert record.data.metrics["compare/ratio_tokens_per_s_per_device"] == 1.0
    errors = client.get_metric_history(record.info.run_id, "loss/relative_error")
    assert [point.step for point in errors] == list(range(1, 31))
    stored = {file.path for file in client.list_artifacts(record.info.run_id)}
    assert {"compare.html", "compare.json", "loss_overlay.png", "loss_error.png"} <= stored
    by_tracker = json.loads((run / "compare.json").read_text())
    assert by_tracker["differences"] == [["seed", 1, 2]]

    # the same two runs from their folders: the same comparison, but for what the sides are called
    assert compare(f"task.a={one}", "task.b=runs/pretrain-tiny_7b/other", OFF, "hydra.run.dir=folders") == 1
    by_folder = json.loads(Path("folders/compare.json").read_text())
    for key in ("curves", "ratios", "differences", "verdict", "tolerances"):
        assert by_folder[key] == by_tracker[key], key

    finished_run(folder / "elsewhere", "other", uri)
    with pytest.raises(UserError, match=rf"other: 2 runs in MLflow have this name; .*{run_id}"):
        mlflow_find.find(uri, ["other"])
    with pytest.raises(UserError, match="nobody: no such file or folder, and no run of this id or name in"):
        mlflow_find.find(uri, ["nobody"])


def test_a_sweep_compares_each(folder: Path) -> None:
    assert door.command(["-m", "task=compare", "task.a=1.log,3.log", "task.b=b.log", OFF]) == 1
    found = sorted(folder.glob("runs/sweep/*/*/compare.json"))
    assert [json.loads(file.read_text())["passed"] for file in found] == [True, False]


REFUSED = [
    (["task.a=1.log"], "task.b: no value"),
    (["task.a=x/1.log", "task.b=b.log"], "task.a=x/1.log: no such file or folder; the folder"),
    (["task.a=2.log", "task.b=b.log"], "task.a=2.log: no such file or folder; nearest: "),
    (["task.a=.", "task.b=b.log"], "task.a=.: is no run folder (it would hold metrics.jsonl)"),
    (["task.a=1.log", "task.b=b.log", "task.tolerances.loss=0"], "task.tolerances.loss=0: must be above 0"),
    (["task.a=1.log", "task.b=b.log", "task.about_a.global_batch=8"], "1.log says 32 itself"),
    (["task.a=nobody", "task.b=b.log"], "task.a=nobody: no such file or folder, and no MLflow database at"),
    (["task.a=empty.txt", "task.b=b.log"], "task.a=empty.txt: holds no line of a training"),
    (["task.a=b.log", f"task.b={TABLE}", REFERENCE], "there is nothing to compare (loss: b: none recorded"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_what_cannot_be_compared_is_refused_and_leaves_nothing(
    words: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.txt").write_text("nothing\n")
    before = sorted(path.name for path in folder.rglob("*"))
    assert compare(*words, "hydra.run.dir=chosen") == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_comparing_loads_neither_torch_nor_mlflow(folder: Path) -> None:
    code = (
        "import sys; from bc2exp.__main__ import command\n"
        f"code = command(['task=compare', 'task.a=1.log', 'task.b=b.log', {OFF!r}])\n"
        "assert code == 0 and not {'torch', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
