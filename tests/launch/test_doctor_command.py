"""`task=doctor` as a person types it, on a healthy machine and on one whose attention is wrong."""

from __future__ import annotations

import json

import pytest

LOST_CAUSALITY = """
import torch
from bc2exp.hardware import cpu
right = cpu.CpuBackend.ops
def attention(q, k, v, *, segment_ids, slopes, scale):
    if RANK == 1:
        return torch.softmax(scale * q @ k.transpose(-1, -2), -1) @ v
    return right.attention(q, k, v, segment_ids=segment_ids, slopes=slopes, scale=scale)
cpu.CpuBackend.ops = cpu.replace(right, attention=attention)
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
    assert not (launch.folder / "mlflow.db").exists()


def test_one_rank_with_a_wrong_operator_is_a_verdict_of_fail_with_a_fix(launch):
    command = launch.run("task=doctor", "hardware=2cpu", "parallelism=ddp", inject=LOST_CAUSALITY, code=1)
    failed = [check["name"] for check in report_of(launch)["checks"] if not check["passed"]]
    assert {name.partition(",")[0] for name in failed} == {"attention"}
    assert "NOT healthy: " in command.out
    assert "fix attention, causal, float32: driver, runtime and torch do not fit together" in command.out
