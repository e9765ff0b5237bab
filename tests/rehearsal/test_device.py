"""Rehearsed NPUs as devices: memory, random numbers, refusals, and the count of what was asked of them."""

# ruff: noqa: E402  (the devices come before torch)
from __future__ import annotations

from tests.hardware import npu_device

npu_device.require()

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_npu
from torch.nn import functional as F

from bc2exp.hardware import rehearsal
from bc2exp.hardware.phase import EVALUATE, TRAIN, phase
from bc2exp.hardware.rehearsal import census

ROOT = Path(__file__).parents[2]


def test_the_devices_say_what_they_are():
    assert rehearsal.is_active()
    assert torch.npu.get_device_name() == "Ascend910B1 (rehearsal on host memory)"
    assert torch.npu.device_count() == 8
    with pytest.raises(RuntimeError, match="device 8 of 8"):
        torch.ones(1, device="npu:8")


def test_memory_is_counted_and_runs_out():
    before = torch.npu.memory_allocated()
    block = torch.empty(60 << 30, dtype=torch.uint8, device="npu")  # more than most hosts have; never touched
    assert torch.npu.memory_allocated() - before >= 60 << 30
    with pytest.raises(torch.OutOfMemoryError, match=r"64\.00 GiB total"):
        torch.empty(5 << 30, dtype=torch.uint8, device="npu")
    del block
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    assert total == 64 << 30
    assert free > 63 << 30
    torch.npu.reset_peak_memory_stats()  # what other tests of this process look at


_IN_SEGMENTS_THAT_GROW = """
from bc2exp.hardware import rehearsal
rehearsal.activate(1, 2**28)
import torch
kept = [torch.full((2_000_000 * (i + 1),), float(i), device="npu") for i in range(6)]
assert [x.mean().item() for x in kept] == [0, 1, 2, 3, 4, 5]
assert torch.npu.memory_snapshot()[0]["is_expandable"]
try:
    torch.empty(2**27, dtype=torch.uint8, device="npu")
    raise SystemExit("more memory than there is")
except torch.OutOfMemoryError:
    pass
kept.clear()
torch.npu.empty_cache()
assert torch.npu.mem_get_info() == (2**28, 2**28)
assert torch.ones(2**25, device="npu").max() == 1
assert not rehearsal.snapshot()["refused_runtime_calls"]
"""


def test_memory_in_segments_that_grow():
    wanted = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", _IN_SEGMENTS_THAT_GROW]
    done = subprocess.run(code, env={**os.environ, **wanted}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_random_numbers_follow_the_device_and_leave_the_host_alone():
    before = torch.get_rng_state()
    torch.npu.manual_seed(1)
    first, state = torch.randn(5, device="npu"), torch.npu.get_rng_state()
    second = torch.randn(5, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(second.cpu(), torch.randn(5, device="npu").cpu())
    assert not torch.equal(first.cpu(), second.cpu())
    torch.npu.manual_seed(1)
    assert torch.equal(first.cpu(), torch.randn(5, device="npu").cpu())
    assert torch.equal(before, torch.get_rng_state())


def test_recomputation_draws_the_same_numbers():
    x = torch.ones(1000, device="npu", requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(lambda x: F.dropout(x, 0.5), x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(out.cpu(), x.grad.cpu())


def test_save_and_load():
    file = io.BytesIO()
    torch.save({"x": torch.arange(3.0, device="npu:2")}, file)
    file.seek(0)
    assert torch.load(file)["x"].device == torch.device("npu:2")
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["x"], torch.arange(3.0))


def test_tensors_of_two_devices_do_not_mix():
    x = torch.ones(4, 4, device="npu")
    with pytest.raises(RuntimeError, match="same device"):
        _ = x + torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="npu:1"):
        _ = x + torch.ones(4, 4, device="npu:1")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.ones(2).cuda()


def test_an_operator_that_is_not_covered_is_refused_by_name_and_counted():
    before = census.refused["npu::npu_gelu", "it has no kernel on host memory"]
    with pytest.raises(NotImplementedError, match="the rehearsal refuses npu::npu_gelu"):
        torch_npu.npu_gelu(torch.ones(4, device="npu"))
    assert census.refused["npu::npu_gelu", "it has no kernel on host memory"] == before + 1
    with pytest.raises(RuntimeError, match="the rehearsal refuses"):
        torch_npu.npu_format_cast(torch.ones(16, 16, device="npu"), 29)
    refused = {each["operator"] for each in rehearsal.snapshot()["refused_operators"]}
    assert {"npu::npu_gelu", "npu::npu_format_cast"} <= refused


def test_what_torch_npu_would_run_on_the_cpu_is_counted_or_refused(monkeypatch):
    x = torch.randn(3, 4, device="npu")
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "0")
    before = census.fallbacks["aten::_logcumsumexp"]
    torch.testing.assert_close(torch.logcumsumexp(x, 0).cpu(), torch.logcumsumexp(x.cpu(), 0))
    assert census.fallbacks["aten::_logcumsumexp"] == before + 1
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
    with pytest.raises(NotImplementedError, match=r"refuses aten::_logcumsumexp: torch_npu has no kernel"):
        torch.logcumsumexp(x, 0)


def test_fused_operators_are_counted_with_types_and_shapes_backward_passes_too():
    census.operators.clear()
    census.phases.clear()
    x = torch.randn(3, 8, device="npu", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(8, device="npu", requires_grad=True)
    for name in (TRAIN, EVALUATE):
        with phase(name):
            torch_npu.npu_rms_norm(x, weight, 1e-6)[0].sum().backward()
    torch.optim.AdamW([weight], fused=True).step()
    counted = rehearsal.snapshot()["operators"]
    assert counted["npu::npu_rms_norm"] == {
        "calls": 2,
        "phases": {EVALUATE: 1, TRAIN: 1},
        "tensors": [{"calls": 2, "arguments": ["bfloat16[3, 8]", "float32[8]"]}],
    }
    assert counted["npu::npu_rms_norm_backward"]["calls"] == 2
    assert counted["aten::_fused_adamw_"]["tensors"][0]["arguments"] == ["1 x float32"] * 5
