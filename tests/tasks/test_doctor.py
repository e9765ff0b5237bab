"""What the doctor says of devices, on devices of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bc2exp.hardware.cpu import CpuBackend
from bc2exp.parallel.world import World
from bc2exp.tasks.doctor import devices
from tests.small_run import small_config

GIB = 2**30


class Toy(CpuBackend):
    """Devices with a memory of their own."""

    def device_name(self) -> str:
        return "Toy"


class Ranks(World):
    """Ranks with (name, total, free) of their devices."""

    def gather(self, value: Any) -> list[Any]:
        assert value == ("Toy", 0, 0)
        return found


found: list[tuple[str, int, int]] = []


def told(folder: Path, *each: tuple[str, float, float], words: tuple[str, ...] = ()) -> dict[str, Any]:
    """The check of a machine whose ranks have these devices, in GiB."""
    found[:] = [(name, int(total * GIB), int(free * GIB)) for name, total, free in each]
    hardware = small_config(folder, *words).hardware
    return devices(hardware, Ranks(rank=0, size=len(each), local_rank=0, local_size=len(each), backend=Toy()))


def test_devices_are_counted_by_kind_and_memory(tmp_path: Path) -> None:
    check = told(tmp_path, *[("B1", 64, 62)] * 3, ("B2", 32, 30))
    assert check["passed"]
    assert check["found"] == (
        "3 ranks on B1 of 64 GiB; 1 rank on B2 of 32 GiB; 30 GiB free on rank 3, which has the least"
    )


def test_devices_without_memory_of_their_own_have_no_verdict(tmp_path: Path) -> None:
    check = told(tmp_path, ("host", 0, 0), ("host", 0, 0), words=("hardware.memory_gib=64",))
    assert check["passed"]
    assert check["found"] == "2 ranks on host"


@pytest.mark.parametrize(("free", "passed"), [(58, True), (57, False)])
def test_memory_that_somebody_holds(tmp_path: Path, free: int, passed: bool) -> None:
    check = told(tmp_path, ("B1", 64, 63), ("B1", 64, free))
    assert check["passed"] is passed
    assert ("somebody else holds memory of rank 1's device" in check["fix"]) is not passed


@pytest.mark.parametrize(("total", "passed"), [(60.97, True), (32, False)])
def test_memory_that_is_declared_and_not_there(tmp_path: Path, total: float, passed: bool) -> None:
    check = told(tmp_path, ("B1", total, total), words=("hardware.memory_gib=64",))
    assert check["passed"] is passed
    assert ("hardware.memory_gib=32 makes plans for the devices that are here" in check["fix"]) is not passed
