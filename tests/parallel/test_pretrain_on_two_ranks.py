"""The whole task, from its configuration on, on two ranks and on one."""

from __future__ import annotations

import shutil

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.config.load import read
from bc2exp.tasks.pretrain import pretrain
from bc2exp.weights import load_hf
from tests.small_run import small_config
from tests.train.parts import Memory

STEPS = ("task.steps=8", "task.eval_every=4", "task.optimizer.clip_norm=0.5")


def do(world, folder):
    """Do the task that `folder` holds the configuration of; losses, gradient norms, evaluations."""
    journal = Memory()
    assert pretrain(read(folder / "resolved.yaml"), folder, world, journal) == "done"
    return [journal.series(name) for name in ("train/loss", "train/grad_norm", "eval/loss")]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ddp_on_two_ranks_is_one_process(two_ranks, one_rank, tmp_path, micro_batch):
    single, double = tmp_path / "single", tmp_path / "double"
    words = (*STEPS, f"task.micro_batch={micro_batch}")
    small_config(single, *words)
    small_config(double, *words, "hardware=2cpu", "parallelism=ddp")
    alone = do(one_rank, single)
    for series in two_ranks(do, double):
        for mine, theirs in zip(series, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    assert min(alone[1]) > 0.5  # so that clipping is at work
    one, two = (load_hf(folder / "weights").state_dict() for folder in (single, double))
    for name, weight in one.items():
        torch.testing.assert_close(
            two[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text
        )
    assert [len(series) for series in alone] == [8, 8, 2]


@pytest.mark.parametrize(
    "words", [("hardware=2cpu", "parallelism=pp2"), ("hardware=4cpu", "parallelism=tp2_zero3")]
)
def test_a_layout_is_one_process(ranks, one_rank, tmp_path, words):
    """From the configuration to the exported weights; and a run that goes on, in the same layout."""
    single, several = tmp_path / "single", tmp_path / "several"
    small_config(single, *STEPS)
    config = small_config(several, *STEPS, *words, "parallelism.recompute=selective")
    alone = do(one_rank, single)
    for series in ranks(config.hardware.num_devices, do, several):
        for mine, theirs in zip(series, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    one, more = (load_hf(folder / "weights").state_dict() for folder in (single, several))
    for name, weight in one.items():
        torch.testing.assert_close(more[name], weight, rtol=0, atol=1e-5)
    small_config(several, *words, "task.steps=9", "task.eval_every=4", *STEPS[2:])
    (losses, *_), *_ = ranks(config.hardware.num_devices, do, several)
    assert len(losses) == 1


def test_bf16_is_near_fp32_and_exports_fp32(one_rank, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        small_config(folder, *STEPS, f"hardware.precision={precision}")
        found[precision] = do(one_rank, folder)
        weights = load_hf(folder / "weights").state_dict()
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        # no bf16 number has a bit beyond the upper sixteen
        assert any((weight.view(torch.int32) & 0xFFFF).any() for weight in weights.values())
    for mine, theirs in zip(found["bf16"], found["fp32"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2)
        assert mine != theirs


def refused_by_both(world, folder):
    """The run of rank 1 in a folder that lacks the checkpoint of rank 0's."""
    mine = folder / f"rank-{world.rank}"
    try:
        pretrain(read(folder / "resolved.yaml"), mine, world, Memory())
    except UserError as error:
        return str(error)
    return None


def test_ranks_that_do_not_see_the_same_checkpoints_do_not_train(two_ranks, one_rank, tmp_path):
    run = tmp_path / "run"
    small_config(run, "task.steps=2", "task.eval_every=2")
    do(one_rank, run)
    shutil.copytree(run / "checkpoints", tmp_path / "rank-0" / "checkpoints")
    small_config(tmp_path, *STEPS, "hardware=2cpu")
    for text in two_ranks(refused_by_both, tmp_path):
        assert text is not None
        assert "not every rank finds the same checkpoints" in text
