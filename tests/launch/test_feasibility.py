"""What a sweep is told of its jobs before any of them starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bc2exp.launch import feasibility
from bc2exp.launch.feasibility import infeasible
from tests.guide_runs import do
from tests.small_run import SMALL, small_plain


def test_layouts_that_cannot_be_and_trainings_that_do_not_fit(tmp_path: Path) -> None:
    """By the planner in a process of its own, which says what task=plan says."""
    large, small = "hardware.memory_gib=0.02", "hardware.memory_gib=0.001"
    plain = small_plain(tmp_path, small)
    odd = small_plain(tmp_path, "hardware=2cpu", small)
    odd["task"]["global_batch"] = 7
    unknown = small_plain(tmp_path)
    tuned = small_plain(tmp_path, "task=finetune", small)
    told = infeasible([small_plain(tmp_path, large), plain, odd, unknown, tuned])
    assert told[0] is told[3] is None
    assert told[1] is not None
    assert told[4] is not None
    assert told[1].startswith("does not fit: needs 0.0")
    assert told[1].endswith("GiB of a device; of hardware.memory_gib=0.001 a plan leaves 0.0009")
    assert told[2] is not None
    assert told[2].startswith("task.global_batch=7: not a multiple of 2")
    for memory, fits in ((large, True), (small, False)):
        words = [*(word for word in SMALL if not word.startswith("task.")), "task.global_batch=8", memory]
        run, _ = do(tmp_path, ["task=plan", "task.alternatives=0", *words])
        plan = json.loads((run / "plan.json").read_text())
        assert plan["fits"] is fits
    needed = plan["plan"]["memory"]["total"] / 2**30
    assert float(told[1].split()[4]) == pytest.approx(needed, rel=0.05)


def test_nobody_is_asked_where_no_memory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert infeasible([small_plain(tmp_path), small_plain(tmp_path, "task=doctor")]) == [None, None]


@pytest.mark.parametrize("said", ["", "Traceback\nValueError: injected\n"])
def test_a_planner_that_fails_refuses_nothing(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(feasibility.subprocess, "run", lambda *_, **__: broken)
    assert infeasible([small_plain(tmp_path, "hardware.memory_gib=1")]) == [None]
    reason = "ValueError: injected" if said else "it ended with code 1"
    assert f"could not be planned: {reason}\n" in capsys.readouterr().err
