"""Broken off five times, a training is the unbroken one: losses, rates, batches and weights, bit by bit."""

from __future__ import annotations

import pytest
import torch

from bc2exp.data.batches import training_batches as plain_batches
from bc2exp.data.examples import Examples
from bc2exp.data.packing import Packer, training_batches
from bc2exp.data.tokens import TokenStream
from bc2exp.parallel.shard import local
from bc2exp.train.optimizer import lr_schedule
from tests.parallel.problem import CASES, GLOBAL_BATCH, LENGTH, VOCABULARY, adamw, laid_out, trainer_of
from tests.train.parts import make_checkpoints

NUM_SAMPLES, STEPS = 40, 12
CUTS = (2, 5, 7, 10, 11)
"""Steps after which it is broken off. Five steps are an epoch: 5 and 10 are ends of one."""


def stream():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (NUM_SAMPLES * LENGTH + 1,), generator=generator)
    return TokenStream(tokens.to(torch.int32), 1)


def examples():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, LENGTH, (NUM_SAMPLES,), generator=generator).tolist()
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    parts = [torch.randint(1, VOCABULARY, (starts[-1],), generator=generator).int() for _ in range(2)]
    return Examples(*parts, starts, list(range(NUM_SAMPLES)))


def batches_of(mesh, packing):
    common = {"global_batch": GLOBAL_BATCH, "seed": 5, "rank": mesh.data_rank}
    if not packing:
        parts = {"sequence_length": LENGTH, "micro_batch": 2, "num_ranks": mesh.num_data_ranks}
        return plain_batches(stream(), **common, **parts)
    packer = Packer(
        examples(), "packed", LENGTH, 2, mesh.num_data_ranks, stages=mesh.pipeline, multiple_of=mesh.tensor
    )
    return training_batches(packer, **common)


def part(world, folder, case, packing, first, last):
    """Train from where `folder` is, if `first` is not 0, to after step `last`: what each step was, and the
    weights and moments of this rank."""
    layout = laid_out(world, "7b", case)
    optimizer = adamw(layout)
    checkpoints, told = make_checkpoints(folder, world=world)
    if first:
        assert checkpoints.load_newest(layout, optimizer).step == first, told
    batches, seen = batches_of(layout.mesh, packing), []

    def watched(step):
        found = batches(step)
        seen.append((step, [each.samples for each in found], [each.input_ids.tolist() for each in found]))
        return found

    schedule = {"kind": "cosine", "lr": 0.003, "min_lr": 0.0003, "steps": STEPS}
    trainer = trainer_of(
        layout,
        optimizer,
        batches=watched,
        evaluation=[],
        eval_every=None,
        checkpoints=checkpoints,
        saves_beside=True,
        save_every=3,
        lr_at=lr_schedule(**schedule, warmup_steps=2, warmup_fraction=None),
        steps=last,
    )
    trainer.run(first)
    steps = trainer.journal.steps
    series = {name: steps[f"train/{name}"] for name in ("loss", "lr", "grad_norm")}
    state = {
        (name, key): local(value).clone()
        for name, parameter in layout.model.named_parameters()
        for key, value in {"weight": parameter.detach(), **optimizer.state[parameter]}.items()
    }
    return series, seen, state


def unbroken(world, folder, case, packing):
    return part(world, folder, case, packing, 0, STEPS)


def broken(world, folder, case, packing):
    """The same in six parts, each with model, optimizer and order made anew."""
    series, seen = {"loss": {}, "lr": {}, "grad_norm": {}}, []
    for first, last in zip((0, *CUTS), (*CUTS, STEPS), strict=True):
        more, batches, state = part(world, folder, case, packing, first, last)
        for name, values in more.items():
            series[name] |= values
        seen += batches
    return series, seen, state


EVERY_DAY = (("single", False), ("zero3 2", True), ("tp2", False), ("pp2", True))
LONGER = (("single", True), ("zero3 2", False), ("tp2", True), ("pp2", False))


@pytest.mark.parametrize(
    ("name", "packing"), [*EVERY_DAY, *(pytest.param(*each, marks=pytest.mark.slow) for each in LONGER)]
)
def test_a_training_broken_off_five_times_is_the_unbroken_one(ranks, tmp_path, name, packing):
    case = CASES[name]
    whole = ranks(case.size, unbroken, tmp_path / "whole", case, packing)
    parts = ranks(case.size, broken, tmp_path / "parts", case, packing)
    for (series, seen, state), (other, other_seen, other_state) in zip(whole, parts, strict=True):
        assert series == other
        assert list(series["loss"]) == list(range(1, STEPS + 1))
        assert seen == other_seen
        assert state.keys() == other_state.keys()
        assert [key for key in state if not torch.equal(state[key], other_state[key])] == []
    last = f"checkpoints/step-{STEPS:08d}"
    files = sorted(file.name for file in (tmp_path / "whole" / last).iterdir())
    assert len(files) == 4
    for file in files:
        mine, theirs = ((tmp_path / which / last / file).read_bytes() for which in ("whole", "parts"))
        assert mine == theirs


def go_on(world, folder, case, packing, first):
    return part(world, folder, case, packing, first, STEPS)[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_in_another_layout_it_goes_on_to_rounding(ranks, tmp_path, packing):
    """The weights that pass from layout to layout are compared in test_checkpoints."""
    losses = ranks(2, unbroken, tmp_path / "whole", CASES["tp2"], packing)[0][0]["loss"]
    for name in ("single", "zero3 2", "pp2"):
        ranks(2, part, tmp_path / name, CASES["tp2"], packing, 0, 5)
        found = ranks(CASES[name].size, go_on, tmp_path / name, CASES[name], packing, 5)[0]
        for step, loss in found.items():
            assert loss == pytest.approx(losses[step], rel=1e-5), (name, step)
