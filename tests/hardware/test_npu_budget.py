"""A memory that is too small, as a person sees it: a real out-of-memory error of torch_npu's allocator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="needs an environment with torch_npu"
)


def test_a_budget_that_is_too_small_ends_with_what_would_fit(tmp_path):
    words = ("hardware=1npu", "hardware.rehearsal=true", "hardware.memory_gib=0.06", "model=tiny_7b")
    done = subprocess.run(
        [sys.executable, "-m", "bc2exp", "task=pretrain", *words, "task.steps=2", "tracking.enabled=false"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 1, done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if "out of memory" in line)
    assert sentence.startswith("bc2exp: rank 0 is out of memory: ")
    assert "of 61.4 MiB were taken by tensors when more was asked; this run takes " in sentence
    assert "these would fit: " in sentence
    assert "parallelism.recompute=full" in sentence
    assert "task.micro_batch=1" in sentence
    assert "Traceback" not in done.stderr
