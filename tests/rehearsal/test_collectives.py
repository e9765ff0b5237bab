"""Ranks of a rehearsal meet, exchange, and fail instead of hanging; nothing is left of them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bc2exp.hardware import rehearsal
from tests.hardware import npu_device

npu_device.require()

ROOT = Path(__file__).parents[2]


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir() if not entry.is_dir()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(how: str, folder: Path, size: int = 3) -> list[subprocess.Popen]:
    shared = {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "HCCL_EXEC_TIMEOUT": "5",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank.py")), how, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes; what a rank said is shown where it failed."""
    for process in processes:
        _, err = process.communicate(timeout=120)
        if process.returncode:
            print(err[-2000:])
    return [process.returncode for process in processes]


def test_every_collective_and_its_count(tmp_path):
    before = shared_memory()
    assert end(start("well", tmp_path)) == [0, 0, 0]
    assert shared_memory() <= before
    counted = rehearsal.merge(tmp_path, 3)
    assert counted["ranks_that_differ"] == {}
    assert counted["ranks_without_a_count"] == []
    reduced = counted["collectives"]["all_reduce"]
    kinds = {(each["dtype"], *each["shape"], each["ranks"]): each["calls"] for each in reduced["tensors"]}
    assert kinds[("float32", 300_003, 3)] == 4
    assert kinds[("bfloat16", 7, 3)] == 1
    assert counted["collectives"]["reduce_scatter"]["tensors"] == [
        {"calls": 1, "dtype": "float32", "shape": [15], "ranks": 3}
    ]
    names = {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send", "recv"}
    assert names <= set(counted["collectives"])


def test_two_jobs_at_once(tmp_path):
    jobs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jobs.append(start("well", tmp_path / name, 2))
    assert [end(job) for job in jobs] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("how", "says"), [("killed", "is gone"), ("left", "is gone"), ("late", "waited more than 5 s")]
)
def test_ranks_fail_instead_of_hanging(how, says, tmp_path):
    before, began = shared_memory(), time.monotonic()
    processes, said = start(how, tmp_path), []
    for rank in (0, 2):
        out, err = processes[rank].communicate(timeout=60)  # rank 1 is not reaped until after this
        assert processes[rank].returncode != 0
        said.append(says in err)
        # whichever of two waiting ranks gives up first is gone to the other, which then says that
        assert said[-1] or (how == "late" and "is gone" in err), err[-2000:]
        waited = float(re.search(r"waited ([\d.]+) s", out)[1])
        assert waited < (8 if how == "late" else 2)
    assert any(said)
    assert time.monotonic() - began < 60
    processes[1].kill()
    processes[1].communicate()
    assert shared_memory() <= before
