"""The loop: what a step computes, when it stops, and what is done between steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.train import TrainingError
from bc2exp.train.trainer import evaluate
from tests.train.parts import (
    GLOBAL_BATCH,
    LENGTH,
    ONE_RANK,
    VOCABULARY,
    adamw,
    by_hand,
    make_checkpoints,
    make_model,
    make_stream,
    make_trainer,
    weights_of,
)


def alone(model):
    return parallelize(model, Mesh(ONE_RANK), precision="fp32")


def trained(trainer):
    trainer.run(0)
    return weights_of(trainer.layout)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.02])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_equals_one_big_batch(tmp_path, micro_batch, z_loss_weight):
    big, small = (
        make_trainer(tmp_path, make_model(z_loss_weight), micro_batch=size, clip_norm=0.5)
        for size in (GLOBAL_BATCH, micro_batch)
    )
    assert len(small.batches(0)) == GLOBAL_BATCH // micro_batch
    torch.testing.assert_close(trained(small), trained(big), rtol=0, atol=1e-6)
    for name in ("train/loss", "train/grad_norm"):
        assert small.journal.series(name) == pytest.approx(big.journal.series(name), rel=1e-6)


def uneven():
    """Two micro batches of one row, with 3 and with 15 labels."""
    first, second = make_stream().tokens[: 2 * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH).tolist()
    few = [-100] * (LENGTH - 3) + first[-3:]
    return by_hand(first[:-1], labels=[few]), by_hand(second[:-1], labels=[[-100, *second[2:]]])


def test_the_loss_of_a_step_is_the_mean_over_its_labels_however_they_lie(tmp_path):
    parts = uneven()
    trainer = make_trainer(tmp_path, batches=lambda step: list(parts), steps=1, lr=1.0)
    model = make_model()
    sums = [model(part.input_ids, labels=part.labels) for part in parts]
    mean = sum(sums) / 18
    mean.sum().backward()
    expected = weights_of(model) - torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(trained(trainer), expected, rtol=0, atol=1e-6)
    assert trainer.journal.series("train/loss") == pytest.approx([mean.item()], rel=1e-6)
    # and that differs from a mean of means, by enough to tell
    assert abs(mean.item() - sum(s.item() / n for s, n in zip(sums, (3, 15), strict=True)) / 2) > 1e-3


def test_the_z_loss_of_a_step_is_the_mean_over_its_positions(tmp_path):
    parts = uneven()
    weight = 0.5
    trainer = make_trainer(tmp_path, make_model(weight), batches=lambda step: list(parts), steps=1)
    with torch.no_grad():
        logits = torch.cat([make_model()(part.input_ids) for part in parts]).flatten(0, 1)
    labels = torch.cat([part.labels for part in parts]).flatten()
    entropy = torch.nn.functional.cross_entropy(logits, labels)  # ignores -100
    expected = entropy + weight * logits.max(dim=-1).values.square().mean()
    trained(trainer)
    assert trainer.journal.series("train/loss") == pytest.approx([expected.item()], rel=1e-5)
    assert expected > entropy + 0.01


def test_evaluation_knows_no_z_loss(tmp_path):
    held_out = make_trainer(tmp_path, evaluates=True).evaluation
    plain, with_z = make_model(), make_model(0.5)
    assert evaluate(alone(with_z), held_out) == evaluate(alone(plain), held_out)
    assert with_z.training


def test_evaluation_is_the_mean_over_the_labels_of_whole_rows(tmp_path):
    held_out = make_trainer(tmp_path, evaluates=True).evaluation
    assert held_out[-1].samples == [4, -1]  # a row that fills up, and must not count
    rows = torch.cat([part.input_ids for part in held_out])[:5]
    labels = torch.cat([part.labels for part in held_out])[:5]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(make_model()(rows).flatten(0, 1), labels.flatten())
    assert evaluate(alone(make_model()), held_out) == pytest.approx(expected.item(), rel=1e-6)


def test_clipping_scales_the_whole_gradient_to_the_norm(tmp_path):
    free, clipped = (make_trainer(tmp_path, steps=1, lr=1.0, clip_norm=norm) for norm in (None, 0.05))
    before = weights_of(free.layout)
    moved, less = trained(free) - before, trained(clipped) - before
    # what is recorded is the norm before clipping, of both alike
    norm = free.journal.series("train/grad_norm")[0]
    assert norm == clipped.journal.series("train/grad_norm")[0] > 0.1
    assert moved.norm().item() == pytest.approx(norm, rel=1e-5)
    assert less.norm().item() == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(less / 0.05, moved / norm, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    poison = VOCABULARY - 1  # a token that the stream does not hold elsewhere
    stream = make_stream()
    stream.tokens[17 * LENGTH + 3] = poison
    model = make_model()
    with torch.no_grad():
        model.embed_tokens.weight[poison] = float("nan")
    trainer = make_trainer(tmp_path, model, stream=stream, micro_batch=1, steps=5, optimizer=adamw(model))
    when = next(
        step for step in range(5) for part in trainer.batches(step) if part.samples == [17]
    )  # from 0: the steps before it are done
    before = make_trainer(tmp_path, make_model(), stream=make_stream(), micro_batch=1, steps=when)
    before.optimizer = adamw(before.layout)
    expected = trained(before) if when else weights_of(before.layout)
    with pytest.raises(
        TrainingError, match=rf"^step {when + 1}: the loss is nan; .* after step {when}; training samples 17$"
    ):
        trainer.run(0)
    clean = torch.ones(VOCABULARY, 32, dtype=torch.bool)
    clean[poison] = False
    same = torch.cat([clean.flatten(), torch.ones(len(expected) - clean.numel(), dtype=torch.bool)])
    assert torch.equal(weights_of(model)[same], expected[same])


def test_a_gradient_norm_that_is_not_finite_names_every_sample_of_the_step(tmp_path):
    model = make_model()
    model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, micro_batch=4)
    samples = sorted(sample for part in trainer.batches(0) for sample in part.samples)
    with pytest.raises(TrainingError, match=r"the gradient norm is (inf|nan)") as error:
        trainer.run(0)
    assert str(error.value).endswith("training samples " + ", ".join(map(str, samples)))
    assert torch.equal(weights_of(model), before)


def test_an_evaluation_changes_no_bit_of_the_training(tmp_path):
    often, never = make_model(), make_model()
    evaluating = make_trainer(tmp_path, often, optimizer=adamw(often), eval_every=1, evaluates=True)
    plain = make_trainer(tmp_path, never, optimizer=adamw(never))
    for each in (evaluating, plain):
        each.checkpoints, _ = make_checkpoints(tmp_path / str(id(each)))
    assert torch.equal(trained(evaluating), trained(plain))
    assert evaluating.journal.series("train/loss") == plain.journal.series("train/loss")
    assert len(evaluating.journal.series("eval/loss")) == 4


def test_what_is_done_every_n_steps_is_also_done_at_the_last(tmp_path):
    trainer = make_trainer(tmp_path, steps=7, log_every=3, eval_every=2, save_every=5, evaluates=True)
    assert trainer.run(0) == "done"
    steps = trainer.journal.steps
    assert list(steps["train/loss"]) == [3, 6, 7]
    assert list(steps["eval/loss"]) == [2, 4, 6, 7]
    assert trainer.checkpoints.saved == [5, 7]
    assert set(steps) == {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "perf/step_time_s",
        "perf/samples_per_s",
        "perf/tokens_per_s_per_device",
        "mem/peak_gib",
        "eval/loss",
    }
    saved = [event for event in trainer.journal.events if event["event"] == "checkpoint"]
    assert [event["path"] for event in saved] == ["checkpoints/step-5", "checkpoints/step-7"]


def test_without_intervals_everything_is_done_once_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, evaluates=True)
    trainer.run(0)
    assert list(trainer.journal.steps["eval/loss"]) == trainer.checkpoints.saved == [4]


def test_each_step_has_the_learning_rate_of_the_schedule(tmp_path):
    trainer = make_trainer(tmp_path, lr_at=lambda step: 0.0 if step == 3 else 0.1 / step)
    positions = [weights_of(trainer.layout)]
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda factor: (step(), positions.append(weights_of(trainer.layout)))
    trainer.run(0)
    assert trainer.journal.series("train/lr") == [0.1, 0.05, 0.0, 0.025]
    moved = [not torch.equal(a, b) for a, b in pairwise(positions)]
    assert moved == [True, True, False, True]


def test_a_stop_ends_between_steps_with_a_checkpoint_of_the_last(tmp_path):
    trainer = make_trainer(tmp_path, steps=9, save_every=2)
    trainer.lr_at = lambda step: trainer.stop_file.touch() or 0.1 if step == 5 else 0.1
    assert trainer.run(0) == "stopped"
    assert max(trainer.journal.steps["train/loss"]) == 5
    assert trainer.checkpoints.saved == [2, 4, 5]


def test_a_stop_just_after_a_checkpoint_saves_no_second_one(tmp_path):
    trainer = make_trainer(tmp_path, steps=9)
    trainer.stop_file.touch()
    assert trainer.run(4) == "stopped"
    assert trainer.checkpoints.saved == []


def test_a_stop_before_the_first_step_waits_for_something_to_save(tmp_path):
    trainer = make_trainer(tmp_path, steps=9)
    trainer.stop_file.touch()
    assert trainer.run(0) == "stopped"
    assert trainer.checkpoints.saved == [1]
