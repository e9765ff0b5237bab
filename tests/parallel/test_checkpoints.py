"""A checkpoint saved in any layout loads into any other, bit for bit; so do weights of published folders."""

from __future__ import annotations

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.parallel.shard import local
from bc2exp.train import state as state_module
from bc2exp.train.checkpoint import Progress
from bc2exp.weights import load_hf_into, save_hf
from tests.parallel.problem import CASES, adamw, laid_out, model_of, trainer_of
from tests.train.parts import make_checkpoints, save

NAME = "step-00000002"


def saved(world, folder, case, precision="fp32"):
    """Train two steps and save."""
    layout = laid_out(world, "7b", case, precision)
    optimizer = adamw(layout)
    trainer = trainer_of(layout, optimizer, steps=2, evaluation=[], eval_every=None)
    trainer.run(0)
    save(make_checkpoints(folder, world=world)[0], layout, optimizer, Progress(2, 16))


def passed_on(world, source, target, case, precision="fp32", changes=None):
    """Load into other weights, save again; the loss of the step after the third as this layout goes on."""
    for name, value in (changes or {}).items():
        setattr(state_module, name, value)
    layout = laid_out(world, "7b", case, precision)
    with torch.no_grad():
        for parameter in layout.model.parameters():
            parameter.zero_()
    optimizer = adamw(layout)
    checkpoints, told = make_checkpoints(source, world=world)
    progress = checkpoints.load_newest(layout, optimizer)
    assert progress == Progress(2, 16), told
    if target is not None:
        save(make_checkpoints(target, world=world)[0], layout, optimizer, progress)
    trainer = trainer_of(layout, optimizer, steps=4)
    trainer.run(2)
    return trainer.journal.series("train/loss"), trainer.journal.series("train/grad_norm")


def files(folder):
    """Names and bytes of what a checkpoint consists of."""
    return {path.name: path.read_bytes() for path in (folder / "checkpoints" / NAME).iterdir()}


CHAIN = ("zero3 4", "tp2 x pp2", "zero2 2", "tp2 x zero3 2", "pp2")
MORE = ("hsdp4", "tp4", "tp8", "tp2 x pp2 x zero3 2", "single", "ddp2")


@pytest.mark.parametrize("chain", [CHAIN, pytest.param(CHAIN + MORE, marks=pytest.mark.slow)], ids=len)
def test_a_checkpoint_passes_from_layout_to_layout_without_losing_a_bit(ranks, tmp_path, chain):
    ranks(2, saved, tmp_path / "tp2", CASES["tp2"])
    folder, before = tmp_path / "tp2", None
    for name in chain:
        target = tmp_path / name.replace(" ", "-")
        found = ranks(CASES[name].size, passed_on, folder, target, CASES[name])[0]
        assert files(target) == files(folder), name
        before = before or found
        for mine, theirs in zip(found, before, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name
        folder = target
    assert sorted(files(folder)) == [
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "manifest.json",
        "model.safetensors",
    ]


def test_a_checkpoint_of_any_layout_is_that_of_one_rank(ranks, tmp_path):
    ranks(1, saved, tmp_path / "single", CASES["single"])
    ranks(4, saved, tmp_path / "both", CASES["tp2 x pp2"])
    single = ranks(1, passed_on, tmp_path / "single", None, CASES["single"])[0]
    both = ranks(1, passed_on, tmp_path / "both", None, CASES["single"])[0]
    for mine, theirs in zip(both, single, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_bf16_checkpoints_are_whole_and_fp32(ranks, tmp_path):
    ranks(2, saved, tmp_path / "one", CASES["tp2"], "bf16")
    ranks(2, passed_on, tmp_path / "one", tmp_path / "two", CASES["zero3 2"], "bf16")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_large_checkpoint_is_several_files(ranks, tmp_path):
    ranks(2, saved, tmp_path / "one", CASES["zero3 2"])
    small = {"FILE_BYTES": 100_000}
    many = tmp_path / "many"
    try:
        ranks(2, passed_on, tmp_path / "one", many, CASES["zero3 2"], "fp32", small)
    finally:
        ranks(2, passed_on, many, None, CASES["zero3 2"], "fp32", {"FILE_BYTES": 2**31})
    names = sorted(files(many))
    assert "model.safetensors" in names
    assert "exp_avg-3.safetensors" in names
    assert all(len(data) < 250_000 for data in files(many).values())
    ranks(2, passed_on, many, tmp_path / "again", CASES["tp2"])
    assert files(tmp_path / "again") == files(tmp_path / "one")


def refused(world, folder, case):
    layout = laid_out(world, "13b", case)
    try:
        make_checkpoints(folder, world=world)[0].load_newest(layout, adamw(layout))
    except UserError as error:
        return str(error)
    return None


def test_every_rank_refuses_a_checkpoint_of_another_model(ranks, tmp_path):
    ranks(1, saved, tmp_path, CASES["single"])
    for text in ranks(2, refused, tmp_path, CASES["pp2"]):
        assert "is of another model" in text


def from_folder(world, folder, case):
    """Weights that every rank took its parts of, whole again on rank 0."""
    layout = laid_out(world, "7b", case)
    with torch.no_grad():
        for parameter in layout.model.parameters():
            parameter.zero_()
    load_hf_into(
        layout.model,
        folder,
        assign=lambda name, parameter, tensor: layout.assign(name, tensor),
        shapes=layout.parts.shapes,
    )
    parts = {name: local(value.detach()) for name, value in layout.model.named_parameters()}
    return {name: tensor.clone() for name, tensor in layout.parts.whole(parts.__getitem__)}


@pytest.mark.parametrize("name", ["tp2 x zero3 2", "tp2 x pp2", "zero3 2"])
def test_weights_of_a_published_folder_reach_every_layout(ranks, tmp_path, name):
    model = model_of("7b")
    generator = torch.Generator().manual_seed(0)
    wanted = {key: torch.randn(value.shape, generator=generator) for key, value in model.named_parameters()}
    save_hf(wanted, tmp_path / "weights", config=model.shape, dtype=torch.float32)
    found, *others = ranks(CASES[name].size, from_folder, tmp_path / "weights", CASES[name])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not any(others)
