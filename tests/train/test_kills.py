"""Writers that are killed at random moments, and disks that refuse: what was whole stays whole."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import shutil
import subprocess
import time

import pytest
import torch

from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.storage.tensors import verify
from bc2exp.train.checkpoint import Progress
from tests.train.parts import ONE_RANK, adamw, make_checkpoints, make_model
from tests.train.test_checkpoint import bits, load, names

NUM_KILLS = int(os.environ.get("BC2EXP_KILLS", "60"))
"""200 were done by hand: BC2EXP_KILLS=200."""


def state_at(step, model, optimizer):
    """Give everything values that tell the step."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            state = optimizer.state[parameter]
            for kind, value in enumerate((parameter, state["exp_avg"], state["exp_avg_sq"])):
                value.fill_(step + number / 64 + kind / 4)


def parts():
    """A model and its optimizer, whose moments are there."""
    model = make_model()
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer, parallelize(model, Mesh(ONE_RANK), precision="fp32")


def save_for_ever(folder, first, announced):
    """Save step after step, and say of each that it is on the disk, until somebody ends this process."""
    torch.set_num_threads(1)
    model, optimizer, layout = parts()
    checkpoints, _ = make_checkpoints(folder, keep=2)
    for step in itertools.count(first):
        state_at(step, model, optimizer)
        checkpoints.save(layout, optimizer, Progress(step, 8 * step), beside=step % 2 == 0)
        checkpoints.finished(wait=True)
        announced.value = step


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_writer_killed_at_random_moments_leaves_whole_checkpoints(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_kills"])
    chance = random.Random(0)
    model, optimizer, layout = parts()
    wanted_model, wanted_optimizer, _ = parts()
    half_built = 0
    step = 0
    for kill in range(NUM_KILLS):
        announced = context.Value("q", step)
        writer = context.Process(target=save_for_ever, args=(tmp_path, step + 1, announced), daemon=True)
        writer.start()
        if kill % 4:  # else it may be killed before its first save
            while announced.value == step:
                assert writer.is_alive()
                time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
        writer.kill()
        writer.join()
        half_built += any((tmp_path / "checkpoints").glob(".step-*"))
        checkpoints, told = make_checkpoints(tmp_path, keep=2)
        for path in checkpoints.list():
            verify(path)  # whatever has its name is whole
        progress = checkpoints.load_newest(layout, optimizer)
        assert told == []
        if progress is None:
            assert announced.value == 0
            continue
        assert progress.step >= announced.value, "what was said to be on the disk is there"
        assert progress.step <= announced.value + 1
        step = progress.step
        state_at(step, wanted_model, wanted_optimizer)
        wanted = bits(wanted_model, wanted_optimizer)
        found = bits(model, optimizer)
        assert [
            key for key in found if not key.endswith(" step") and not torch.equal(found[key], wanted[key])
        ] == []
    assert step > NUM_KILLS / 2
    assert half_built > NUM_KILLS / 20, "most kills came between two saves"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 2 MiB; made by the kernel, which only root may ask for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a disk of its own can only be made by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(disk, but):
    """Leave `but` bytes free."""
    with open(disk / "other", "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - but))


def test_a_full_disk_leaves_the_checkpoints_before(small_disk, trained):
    run = trained(small_disk)
    size = sum(file.stat().st_size for file in (small_disk / "checkpoints" / "step-00000001").iterdir())
    fill_up(small_disk, size // 2)
    with pytest.raises(
        OSError, match=r"No space left on device: a checkpoint needs .* GiB, and .* are free"
    ) as error:
        run.save_next()
    assert error.value.errno == errno.ENOSPC
    assert names(small_disk) == ["step-00000001"]
    assert load(small_disk)[0] == Progress(1, 8)
    (small_disk / "other").unlink()
    assert run.save_next().step == 2


def test_a_disk_that_fills_up_while_it_is_written_leaves_the_checkpoints_before(
    small_disk, trained, monkeypatch
):
    run = trained(small_disk)
    monkeypatch.setattr(run.checkpoints, "_require_room", lambda *_: fill_up(small_disk, 100_000))
    with pytest.raises(Exception, match="No space left on device"):
        run.save_next()
    assert names(small_disk) == ["step-00000001"]
    assert load(small_disk)[0] == Progress(1, 8)


def test_a_disk_that_may_not_be_written_to_is_said_and_can_still_be_read(small_disk, trained):
    run = trained(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(Exception, match="Read-only file system"):
        run.save_next()
    assert names(small_disk) == ["step-00000001"]
    assert load(small_disk)[0] == Progress(1, 8)


@pytest.mark.parametrize("which", [1, 2, 3, 4, 5, 6])
def test_a_disk_whose_fsync_fails_leaves_the_checkpoints_before(tmp_path, trained, monkeypatch, which):
    """The data may then not be on it: the checkpoint does not get its name."""
    run = trained(tmp_path)
    calls = itertools.count(1)
    fsync = os.fsync

    def failing(descriptor):
        if next(calls) == which:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run.save_next()
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(os, "fsync", fsync)
    assert load(tmp_path)[0] == Progress(1, 8)
    assert run.save_next().step == 2
