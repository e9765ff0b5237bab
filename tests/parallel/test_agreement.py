"""In every layout all ranks do the same: they refuse together, stop together, and rank 0 knows the loss."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from bc2exp.parallel.shard import local
from bc2exp.train import TrainingError
from tests.parallel.problem import CASES, Case, adamw, batches_of, laid_out, trainer_of

LAYOUTS = {
    "tp2": CASES["tp2"],
    "pp2": CASES["pp2"],
    "tp2 x pp2": CASES["tp2 x pp2"],
    "pp2 x zero3 2": CASES["pp2 x zero3 2"],
    "four stages": Case({"pipeline": 4}),
}


def held(layout):
    """Copies of what this rank has of the weights."""
    return [local(value.detach()).clone() for value in layout.model.parameters()]


def poisoned(world, case):
    """A micro batch of the last data rank turns the loss to NaN in the head alone."""
    layout = laid_out(world, "7b", Case(case.degrees, case.options), num_layers=4)
    trainer = trainer_of(layout, adamw(layout))
    parts = batches_of(0, layout.mesh)
    samples = parts[1].samples
    if layout.mesh.last_stage and layout.mesh.data_rank == layout.mesh.num_data_ranks - 1:
        head, seen = layout.model.lm_head.forward, []

        def broken(*arguments):
            seen.append(True)
            loss = head(*arguments)
            return loss * float("nan") if len(seen) == 2 else loss

        layout.model.lm_head.forward = broken
    before = held(layout)
    try:
        trainer.run(0)
    except TrainingError as error:
        unchanged = all(map(torch.equal, before, held(layout)))
        return str(error), samples, unchanged, layout.mesh.data_rank
    return None


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_refuses_a_loss_that_is_nan_and_names_its_samples(ranks, name):
    case = LAYOUTS[name]
    answers = ranks(case.size, poisoned, case)
    samples = max(answers, key=lambda answer: answer[3])[1]
    for text, _, unchanged, _ in answers:
        assert text == answers[0][0]
        assert text.startswith("step 1: the loss is nan")
        assert text.endswith("training samples " + ", ".join(map(str, samples)))
        assert unchanged


def stopped(world, case, stop_file):
    """Rank 0 finds the stop file after the second step; what each rank did."""
    layout = laid_out(world, "7b", case, num_layers=4)
    optimizer = adamw(layout)
    # the file of the other ranks never appears: the wish is rank 0's alone
    mine = stop_file if world.rank == 0 else stop_file.with_name("elsewhere")
    trainer = trainer_of(layout, optimizer, stop_file=mine)
    optimizer.register_step_post_hook(
        lambda *_: stop_file.touch() if len(trainer.journal.series("train/loss")) == 1 else None
    )
    outcome = trainer.run(0)
    return outcome, trainer.checkpoints.saved, len(trainer.journal.series("train/loss"))


@pytest.mark.parametrize("name", ["tp2", "four stages"])
def test_every_rank_stops_after_the_same_step(ranks, tmp_path, name):
    case = LAYOUTS[name]
    for answer in ranks(case.size, stopped, case, tmp_path / "stop"):
        assert answer == ("stopped", [2], 2)


def evaluated(world, case, number):
    """Evaluations of some micro batches, fewer than stages among them; and whether they changed a bit."""
    layout = laid_out(world, "7b", case, num_layers=4)
    trainer = trainer_of(layout, adamw(layout), evaluation=batches_of(3, layout.mesh)[:number], steps=1)
    before = held(layout)
    trainer._evaluate(0)
    trainer._evaluate(1)
    unchanged = all(map(torch.equal, before, held(layout)))
    trainer.run(0)  # and a step can follow
    return trainer.journal.series("eval/loss"), unchanged


@pytest.mark.parametrize("number", [1, 3])
def test_a_pipeline_evaluates_any_number_of_micro_batches(ranks, number):
    alone, _ = ranks(1, evaluated, CASES["single"], number)[0]
    for series, unchanged in ranks(4, evaluated, LAYOUTS["four stages"], number):
        assert series == pytest.approx(alone, rel=1e-5)
        assert unchanged


def in_flight(world, case):
    """The most micro batches, of the four of a step, whose activations this stage kept at a time."""
    layout = laid_out(world, "7b", case, num_layers=4)
    kept, most, forward = set(), [], type(layout)._forward

    def counting(layout, given, part):
        output = forward(layout, given, part)
        number = len(most)
        kept.add(number)
        most.append(len(kept))
        output.register_hook(lambda gradient: kept.discard(number))
        return output

    with patch.object(type(layout), "_forward", counting):
        layout.train(batches_of(0, layout.mesh), 1.0)
    assert not kept
    return max(most)


@pytest.mark.parametrize("name", ["pp2", "four stages"])
def test_a_stage_keeps_no_more_micro_batches_than_there_are_stages_from_it_on(ranks, name):
    case = LAYOUTS[name]
    assert ranks(case.size, in_flight, case) == list(range(case.size, 0, -1))
