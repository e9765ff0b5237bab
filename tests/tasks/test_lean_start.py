"""What a rank alone does not import, so that its first step comes soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import small_config

DEAR = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy", "hydra")
"""Together as dear to import as torch. Several ranks need FSDP2; a rank alone needs none of them."""
TRAINING = f"""
import sys
from pathlib import Path
from bc2exp.worker import run_rank
run_rank(Path(sys.argv[1]), 0)
print([name for name in {DEAR} if name in sys.modules])
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_alone_trains_without_them(precision: str, tmp_path: Path) -> None:
    small_config(tmp_path, "task.steps=1", f"hardware.precision={precision}")
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "weights").is_dir()
