"""What two ranks compute together is what one computes alone."""

from __future__ import annotations

import pytest
import torch

from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.train import TrainingError
from bc2exp.train.checkpoint import Progress
from tests.train.parts import (
    LENGTH,
    VOCABULARY,
    adamw,
    by_hand,
    laid_out,
    make_checkpoints,
    make_model,
    make_stream,
    make_trainer,
    save,
    weights_of,
)


def train(world, folder, precision="fp32", z_loss_weight=0.0, **changes):
    """Train for 4 steps; (weights, losses, gradient norms) as this rank has them."""
    model = laid_out(world, precision=precision, z_loss_weight=z_loss_weight)
    trainer = make_trainer(folder, model, clip_norm=0.5, **changes)
    trainer.run(0)
    journal = trainer.journal
    return weights_of(model), journal.series("train/loss"), journal.series("train/grad_norm"), journal.steps


def train_changed(world, folder, changes):
    return train(world, folder, **changes)


def same(one, other, tolerance):
    """Weights absolutely, losses and norms relatively within a tolerance."""
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=tolerance)
    for mine, theirs in zip(one[1:3], other[1:3], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.02])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_two_ranks_take_the_steps_of_one(two_ranks, one_rank, tmp_path, micro_batch, z_loss_weight):
    changes = {"z_loss_weight": z_loss_weight, "micro_batch": micro_batch, "evaluates": True}
    pair = two_ranks(train_changed, tmp_path, changes)
    alone = train(one_rank, tmp_path, z_loss_weight=z_loss_weight, evaluates=True)
    assert min(alone[2]) > 0.5  # so that clipping is at work
    for ranks in pair:
        same(ranks, alone, 1e-6)
        assert ranks[3]["eval/loss"] == pytest.approx(alone[3]["eval/loss"], rel=1e-6)
    assert torch.equal(pair[0][0], pair[1][0])


def uneven_of(world):
    """Rank 0: a row of 3 labels and one of 15; rank 1: none at all, and 16."""
    rows = make_stream().tokens[: 4 * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH).tolist()
    labels = [row[1:] for row in rows]
    labels[0][:-3] = [-100] * (LENGTH - 3)
    labels[1][0] = -100
    labels[2][:] = [-100] * LENGTH
    parts = [by_hand(row[:-1], labels=[label]) for row, label in zip(rows, labels, strict=True)]
    return parts[2 * world.rank : 2 * world.rank + 2] if world.size == 2 else parts


def train_uneven(world, folder, z_loss_weight):
    return train(world, folder, z_loss_weight=z_loss_weight, batches=lambda step: uneven_of(world), steps=2)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.5])
def test_a_step_is_a_mean_over_the_labels_of_all_ranks(two_ranks, one_rank, tmp_path, z_loss_weight):
    alone = train_uneven(one_rank, tmp_path, z_loss_weight)
    for ranks in two_ranks(train_uneven, tmp_path, z_loss_weight):
        same(ranks, alone, 1e-6)


def kinds_in_bf16(world, folder):
    """The types of everything that lasts, and whether the model computed in bf16."""
    layout = laid_out(world, precision="bf16")
    model, optimizer = layout.model, adamw(layout)
    seen = []
    model.layers["0"].mlp.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    checkpoints, _ = make_checkpoints(folder, world=world)
    make_trainer(folder, layout, optimizer=optimizer, checkpoints=checkpoints, evaluates=True).run(0)
    lasting = {parameter.dtype for parameter in model.parameters()}
    lasting |= {value.dtype for state in optimizer.state.values() for value in state.values()}
    return lasting, set(seen)


def test_bf16_is_for_computing_alone(two_ranks, one_rank, tmp_path):
    for lasting, computed in [*two_ranks(kinds_in_bf16, tmp_path), kinds_in_bf16(one_rank, tmp_path / "1")]:
        assert lasting == {torch.float32}
        assert computed == {torch.bfloat16}


def test_bf16_stays_near_fp32_and_two_ranks_near_one(two_ranks, one_rank, tmp_path):
    exact = train(one_rank, tmp_path, micro_batch=2)
    alone = train(one_rank, tmp_path, "bf16", micro_batch=2)
    pair = two_ranks(train_changed, tmp_path, {"precision": "bf16", "micro_batch": 2})[0]
    # bf16 has 8 bits: a loss, the mean over 128 labels, agrees to some 1e-3; a gradient norm to 1e-2
    assert alone[1] == pytest.approx(exact[1], rel=2e-3)
    assert alone[2] == pytest.approx(exact[2], rel=2e-2)
    assert alone[1] != exact[1]
    # the same products, rounded alike, but for the gradients of embedding and head, fp32 on one rank
    same(pair, alone, 1e-3)


def resumed_and_saved(world, source, target, precision):
    """Load the checkpoint in `source` and save it again in `target`."""
    model = laid_out(world, precision=precision)
    optimizer = adamw(model)
    progress = make_checkpoints(source, world=world)[0].load_newest(model, optimizer)
    assert progress == Progress(4, 32)
    save(make_checkpoints(target, world=world)[0], model, optimizer, progress)


def checkpointed(world, folder, precision):
    model = laid_out(world, precision=precision)
    checkpoints, _ = make_checkpoints(folder, world=world)
    trainer = make_trainer(folder, model, optimizer=adamw(model), checkpoints=checkpoints)
    trainer.run(0)


def stored(folder):
    return {file.name: file.read_bytes() for file in (folder / "checkpoints" / "step-00000004").iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_passes_between_one_rank_and_two_without_losing_a_bit(
    two_ranks, one_rank, tmp_path, precision
):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    checkpointed(one_rank, first, precision)
    two_ranks(resumed_and_saved, first, second, precision)
    resumed_and_saved(one_rank, second, third, precision)
    assert len(stored(first)) == 4
    assert stored(first) == stored(second) == stored(third)


def test_a_checkpoint_of_two_ranks_loads_on_one(two_ranks, one_rank, tmp_path):
    two_ranks(checkpointed, tmp_path / "two", "fp32")
    resumed_and_saved(one_rank, tmp_path / "two", tmp_path / "one", "fp32")
    assert stored(tmp_path / "two") == stored(tmp_path / "one")


def train_poisoned(world, folder):
    """A sample that only rank 1 sees makes the loss NaN; what each rank says, and whether it moved."""
    stream = make_stream()
    model = laid_out(world)
    batches = make_trainer(folder, model, micro_batch=2).batches(0)
    samples = [sample for part in batches for sample in part.samples]
    poisoned = world.gather(samples)[1][-1]
    stream.tokens[poisoned * LENGTH + 3] = VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight.to_local()[VOCABULARY - 1] = float("nan")
    before = weights_of(model)
    trainer = make_trainer(folder, model, stream=stream, micro_batch=2)
    try:
        trainer.run(0)
    except TrainingError as error:
        pair = next(part.samples for part in world.gather(batches)[1] if poisoned in part.samples)
        return str(error), sorted(pair), torch.equal(before.nan_to_num(), weights_of(model).nan_to_num())
    raise AssertionError("the training went on")


def test_every_rank_refuses_a_loss_that_is_nan_on_one_and_names_its_samples(two_ranks, tmp_path):
    answers = two_ranks(train_poisoned, tmp_path)
    assert answers[0] == answers[1]
    text, samples, unchanged = answers[0]
    assert text.startswith("step 1: the loss is nan")
    assert text.endswith("training samples " + ", ".join(map(str, samples)))
    assert unchanged


def train_evaluating(world, folder, precision, eval_every):
    model = laid_out(world, precision=precision)
    checkpoints, _ = make_checkpoints(folder / str(eval_every), world=world)
    trainer = make_trainer(
        folder,
        model,
        optimizer=adamw(model),
        checkpoints=checkpoints,
        evaluates=True,
        eval_every=eval_every,
        save_every=2,
    )
    trainer.run(0)
    return weights_of(model), trainer.journal.series("train/loss")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluations_change_no_bit_on_two_ranks_either(two_ranks, tmp_path, precision):
    often = two_ranks(train_evaluating, tmp_path, precision, 1)
    never = two_ranks(train_evaluating, tmp_path, precision, None)
    for one, other in zip(often, never, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_alone_needs_no_shards_and_keeps_weights_and_gradients_in_fp32(one_rank, precision):
    model = make_model()
    kind = type(model)
    layout = parallelize(model, Mesh(one_rank), precision=precision)
    assert type(model) is kind
    found = []
    model.layers["0"].register_forward_hook(lambda _, given, out: found.append(out.dtype))
    ids = torch.ones(1, 4, dtype=torch.long)
    layout.model(ids, labels=ids).backward()
    assert found == [torch.bfloat16 if precision == "bf16" else torch.float32]
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
