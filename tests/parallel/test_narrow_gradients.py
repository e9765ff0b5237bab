"""A rank alone in bf16 holds the gradients of a step of one micro batch as they are computed."""

from __future__ import annotations

import torch

from bc2exp.data.batches import MicroBatch
from bc2exp.parallel.layout import Layout, parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import squared_norm
from tests.train.parts import LENGTH, ONE_RANK, VOCABULARY, adamw, make_model


def lay_out() -> Layout:
    return parallelize(make_model(), Mesh(ONE_RANK), precision="bf16")


def micro_batch(rows: int, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(1, VOCABULARY, (2, rows, LENGTH), generator=generator)
    return MicroBatch(ids, labels, list(range(rows)))


def halves(part: MicroBatch) -> list[MicroBatch]:
    pairs = zip(part.input_ids.chunk(2), part.labels.chunk(2), strict=True)
    return [MicroBatch(ids, labels, list(range(len(ids)))) for ids, labels in pairs]


def forms(layout: Layout) -> dict[str, tuple[torch.dtype, bool]]:
    return {name: (p.grad.dtype, p.grad.is_sparse) for name, p in layout.model.named_parameters()}


def test_what_one_micro_batch_leaves_and_what_two_add_up():
    layout = lay_out()
    layout.train([micro_batch(4, 0)], 1.0)
    found = forms(layout)
    assert found.pop("embed_tokens.weight") == (torch.float32, True)
    for name, form in found.items():
        assert form == (torch.float32 if "norm" in name else torch.bfloat16, False)
    layout.model.zero_grad()
    layout.train(halves(micro_batch(4, 0)), 1.0)
    assert set(forms(layout).values()) == {(torch.float32, False)}


def test_steps_of_one_and_of_two_micro_batches_train_alike():
    """The same samples, in turn whole and in halves; beside them always in halves."""
    layouts = [lay_out(), lay_out()]
    optimizers = [adamw(layout) for layout in layouts]
    for step in range(4):
        whole = micro_batch(4, step)
        norms = []
        for layout, optimizer in zip(layouts, optimizers, strict=True):
            alone = layout is layouts[0] and step % 2 == 0
            layout.train([whole] if alone else halves(whole), 1 / whole.num_labels)
            norms.append(squared_norm(layout.model, layout.mesh).sqrt().item())
            optimizer.step(factor=0.5)
            optimizer.zero_grad()
        assert abs(norms[0] / norms[1] - 1) < 0.01
    mixed, halved = (dict(layout.model.named_parameters()) for layout in layouts)
    for name, parameter in mixed.items():
        # a step moves a weight by about the learning rate of 0.01
        assert (parameter - halved[name]).norm() < 0.1 * 0.01 * parameter.numel() ** 0.5, name


def test_the_gradient_of_the_head_takes_the_memory_of_the_step_before():
    layout = lay_out()
    places = set()
    for step in range(3):
        layout.train([micro_batch(1, step)], 1.0)
        places.add(layout.model.lm_head.weight.grad.data_ptr())
        layout.model.zero_grad()
    assert len(places) == 1
