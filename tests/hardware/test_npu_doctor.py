"""`task=doctor` in a rehearsal: what it says of devices, and that it says no speed."""

from __future__ import annotations

import json

import pytest

from tests.hardware import npu_device
from tests.launch.commands import Launch

npu_device.require()

REHEARSED = ("task=doctor", "hardware.rehearsal=true", "model=tiny_7b", "model.num_heads=8")


@pytest.fixture
def launch(tmp_path):
    made = Launch(tmp_path / "launch")
    yield made
    made.close()


def report_of(launch):
    return json.loads((launch.only_run() / "doctor.json").read_text())


def test_two_devices_are_healthy_and_nobody_hears_how_fast(launch):
    words = ("hardware=8npu", "hardware.num_devices=2", "parallelism=tp")
    command = launch.run(*REHEARSED, *words)
    report = report_of(launch)
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert report["rehearsal"] is report["passed"] is True
    assert "torch and torch_npu pair" in found["versions"]
    assert found["devices"].startswith("2 ranks on Ascend910B1 (rehearsal on host memory) of 64 GiB")
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        assert found[f"tensor, {kind} of 2"] == "right; rehearsal: speed not measured"
    assert "GB/s" not in command.out
    assert not [text for name, text in found.items() if text.endswith("eager")]
    assert "this was a rehearsal on host memory" in command.out
    assert json.loads((launch.only_run() / "summary.json").read_text())["rehearsal"] is True
    counted = json.loads((launch.only_run() / "rehearsal.json").read_text())
    for name in ("npu::npu_fusion_attention_v2", "npu::npu_rotary_mul", "aten::_fused_adamw_"):
        assert counted["operators"][name]["calls"] > 0
    assert counted["cpu_fallbacks"] == {}


def test_too_little_memory_is_said_in_a_sentence_with_what_was_found_before(launch):
    command = launch.run(*REHEARSED, "hardware=1npu", "hardware.memory_gib=0.01", code=1)
    assert command.err.startswith(
        "bc2exp: task=doctor: operations: rank 0 is out of memory (NPU out of memory. Tried to allocate "
    )
    assert len(command.err.splitlines()) == 1
    assert [check["name"] for check in report_of(launch)["checks"] if not check["passed"]] == ["operations"]
    assert "1 rank on Ascend910B1" in command.out
