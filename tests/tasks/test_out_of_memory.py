"""A device that is out of memory: the sentence says what would fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from bc2exp.hardware import get_backend
from bc2exp.parallel.world import World
from bc2exp.tasks import out_of_memory
from bc2exp.tasks.out_of_memory import telling_what_fits, what_fits
from bc2exp.train import TrainingError
from bc2exp.worker import describe
from tests.small_run import small_config
from tests.train.parts import Memory

ZERO3 = ("hardware=8cpu", "parallelism=zero3", "task.global_batch=64")


class Device:
    """The CPU, if it had memory of its own."""

    def __init__(self, total):
        self._cpu, self._total = get_backend("cpu"), total

    def __getattr__(self, name):
        return getattr(self._cpu, name)

    def peak_allocated_bytes(self):
        return self._total // 2

    def total_memory_bytes(self):
        return self._total


def told(folder, config, total, task=None):
    """What the task's error says on a device of `total` bytes, None: no memory of its own."""

    def too_large(config, folder, world, journal):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 4096.00 GiB\nmore")

    backend = get_backend("cpu") if total is None else Device(total)
    (folder / "logs").mkdir(exist_ok=True)
    world = World(3, 8, 3, 8, backend)
    with pytest.raises(TrainingError) as caught:
        telling_what_fits(task or too_large)(config, folder, world, Memory())
    assert describe(caught.value) == ("training", str(caught.value))
    return str(caught.value)


UNITS = {"MiB": 2**20, "GiB": 2**30}


def in_bytes(said):
    """The sizes in brackets."""
    return [float(size) * UNITS[unit] for size, unit in re.findall(r"\(([\d.e+-]+) (MiB|GiB)\)", said)]


def own_bytes(config):
    size, unit = re.search(r"takes ([\d.e+-]+) (MiB|GiB)", what_fits(config, 2**50)).groups()
    return float(size) * UNITS[unit]


@pytest.mark.slow
def test_the_nearest_that_fit_are_named_with_their_memory(tmp_path):
    config = small_config(tmp_path, *ZERO3)
    own = own_bytes(config)
    total = int(own * 0.8)
    said = told(tmp_path, config, total)
    assert said.startswith("rank 3 is out of memory: ")
    assert "were taken by tensors when more was asked; this run takes " in said
    sizes = in_bytes(said)
    assert 1 <= len(sizes) <= 3
    assert max(sizes) <= total * 0.9 * 1.01
    # and the words are overrides that a person may type: the plan of them is what was said
    listed = re.findall(r"(?:fit: |, or )([^(]+) \(", said)
    for number, (words, size) in enumerate(list(zip(listed, sizes, strict=True))[:2]):
        again = small_config(tmp_path / str(number), *ZERO3, *words.split())
        assert own_bytes(again) == pytest.approx(size, rel=0.03)


def test_where_the_plan_thought_it_would_fit_less_is_offered(tmp_path):
    config = small_config(tmp_path, *ZERO3)
    own = own_bytes(config)
    sizes = in_bytes(what_fits(config, 2**50))
    assert sizes
    assert max(sizes) <= own * 0.91


def test_where_nothing_fits_the_smallest_is_named(tmp_path):
    said = told(tmp_path, small_config(tmp_path, *ZERO3), 10_000)
    assert re.search(
        r"no layout of 8 devices fits .* MiB: the smallest is .*=.* \(.* MiB\); more devices", said
    )


def test_without_a_memory_to_plan_for_it_says_what_takes_less(tmp_path):
    said = told(tmp_path, small_config(tmp_path), None)
    assert said.startswith(
        "rank 3 is out of memory (out of memory. Tried to allocate 4096.00 GiB); a smaller "
    )
    assert "task.micro_batch" in said


def test_the_declared_memory_serves_where_the_device_names_none(tmp_path):
    said = told(tmp_path, small_config(tmp_path, *ZERO3, "hardware.memory_gib=0.0001"), None)
    assert "this run takes" in said


@pytest.mark.parametrize("trouble", [OSError("no processes"), None])
def test_a_plan_that_fails_does_not_hide_what_happened(tmp_path, monkeypatch, trouble):
    config = small_config(tmp_path)
    if trouble is None:
        (tmp_path / "resolved.yaml").write_text("model: 3\n")
    else:
        monkeypatch.setattr(out_of_memory.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(trouble))
    said = told(tmp_path, config, 2**30)
    assert said.startswith("rank 3 is out of memory: 512 MiB of 1 GiB")
    assert said.endswith(out_of_memory._WITHOUT_PLAN)


def test_other_errors_pass_as_they_are(tmp_path):
    def broken(config, folder, world, journal):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        telling_what_fits(broken)(small_config(tmp_path), tmp_path, World(0, 1, 0, 1, Device(1)), Memory())


def test_twins_count_in_the_plan(tmp_path):
    words = ("hardware=1npu", "model=tiny_7b", "parallelism=single", "dataset.sequence_length=512")
    config = small_config(tmp_path, *words)
    plain = replace(config, hardware=replace(config.hardware, fused_attention=False))
    # the twin keeps scores of 512 x 512 for each of 4 heads, 8 rows and 2 layers, in fp32
    assert own_bytes(plain) > own_bytes(config) + 4 * 512**2 * 4 * 8 * 2
