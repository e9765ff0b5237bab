"""`task=doctor` as a person types it, on a healthy machine and on one whose attention is wrong."""

from __future__ import annotations

import json

import pytest

LOST_CAUSALITY = """
from dataclasses import replace
import torch
from bc2exp.hardware import cpu
right = cpu.CpuBackend.ops
def attention(q, k, v, *, segment_ids, slopes, scale):
    if RANK == 1:
        return torch.softmax(scale * q @ k.transpose(-1, -2), -1) @ v
    return right.attention(q, k, v, segment_ids=segment_ids, slopes=slopes, scale=scale)
cpu.CpuBackend.ops = replace(right, attention=attention)
"""


def report_of(launch):
    return json.loads((launch.only_run() / "doctor.json").read_text())


@pytest.mark.slow
def test_a_healthy_machine(launch):
    words = ("task=doctor", "hardware=4cpu", "parallelism=tp2_zero3", "parallelism.shard=2")
    command = launch.run(*words)
    report = report_of(launch)
    names = [check["name"] for check in report["checks"]]
    assert report["passed"] is True
    for axis in ("shard", "tensor"):
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            assert f"{axis}, {kind} of 2" in names
    assert names[-1] == "one training step"
    assert f"healthy: {len(names)} checks passed" in command.out
    assert "torch" in report["checks"][0]["found"]
    assert report["checks"][1]["found"].startswith("4 ranks on ")
    assert "shard 2, tensor 2, fp32: loss " in report["checks"][-1]["found"]
    assert report["rehearsal"] is False
    assert not (launch.folder / "mlflow.db").exists()


@pytest.mark.slow
def test_one_rank_with_a_wrong_operator_is_a_verdict_of_fail_with_a_fix(launch):
    command = launch.run("task=doctor", "hardware=2cpu", "parallelism=ddp", inject=LOST_CAUSALITY, code=1)
    failed = [check["name"] for check in report_of(launch)["checks"] if not check["passed"]]
    assert {name.partition(",")[0] for name in failed} == {"attention"}
    assert "NOT healthy: " in command.out
    (fix,) = [line for line in command.out.splitlines() if line.startswith("fix ")]
    assert fix.startswith("fix attention, causal, float32; attention, segments, float32; ")
    assert "bfloat16: this operator is wrong here: hardware.fused_attention=false takes its eager twin" in fix


def test_switched_off_its_twin_is_checked_instead(launch):
    """So that what the fix says makes the doctor pass."""
    wrong = LOST_CAUSALITY.replace("RANK == 1", "RANK == 0")
    launch.run("task=doctor", "hardware.fused_attention=false", inject=wrong)
    found = {check["name"]: check["found"] for check in report_of(launch)["checks"]}
    assert found["attention, causal, float32"].endswith(", eager")
    assert not found["adamw, float32"].endswith(", eager")


RAISES_IN_THE_STEP = """
if RANK == 0:
    from bc2exp.train import optimizer
    def refused(*args, **how):
        raise RuntimeError("no room for it\\nand a trace")
    optimizer.build_optimizer = refused
"""


def test_a_check_that_raises_is_named_and_the_checks_before_it_are_shown(launch):
    command = launch.run("task=doctor", inject=RAISES_IN_THE_STEP, code=1)
    assert command.err == (
        "bc2exp: task=doctor: one training step: rank 0 failed with RuntimeError: no room for it; "
        "the trace is in logs/rank-0.log of the run folder\n"
    )
    assert "RuntimeError: no room" in (launch.only_run() / "logs" / "rank-0.log").read_text()
    report = report_of(launch)
    assert report["passed"] is False
    assert [check["name"] for check in report["checks"] if not check["passed"]] == ["one training step"]
    assert "fix one training step: the error that ended it is printed above" in command.out
    assert "NOT healthy: 1 of " in command.out
