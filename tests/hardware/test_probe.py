"""Devices are counted from what the operating system shows, in folders made for the purpose."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bc2exp.hardware import probe


@pytest.fixture
def machine(tmp_path):
    """machine(files, drivers): a root folder with GPU device files, and cards in the driver's list."""

    def make(files, drivers):
        (tmp_path / "dev").mkdir()
        for name in [*(f"nvidia{number}" for number in files), "nvidiactl", "nvidia-uvm", "null"]:
            (tmp_path / "dev" / name).touch()
        for number in range(drivers):
            (tmp_path / f"proc/driver/nvidia/gpus/0000:{number}").mkdir(parents=True)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("files", "drivers", "number"),
    [([], 0, 0), (range(8), 8, 8), ([3], 8, 1), (range(12), 12, 12), ([], 2, 2)],
)
def test_cards_are_device_files_else_the_drivers_list(machine, files, drivers, number):
    assert probe._count_cuda({}, machine(files, drivers)) == number


@pytest.mark.parametrize(
    ("chosen", "number"),
    [
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("3,1", 2),
        (" 0, 1 ", 2),
        ("0,-1,2", 1),
        ("0,9,1", 1),
        ("GPU-8932f937,GPU-1", 2),
        ("MIG-1,MIG-2,MIG-3,MIG-4,MIG-5", 5),
        ("none", 0),
    ],
)
def test_what_the_person_leaves_visible_counts(machine, chosen, number):
    assert probe._count_cuda({"CUDA_VISIBLE_DEVICES": chosen}, machine(range(4), 4)) == number


def test_without_cards_nothing_is_visible(machine):
    assert probe._count_cuda({"CUDA_VISIBLE_DEVICES": "GPU-1"}, machine([], 0)) == 0


def test_devices_are_counted_without_torch():
    code = "import sys; from bc2exp.hardware import *; print(count_devices('cuda'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
