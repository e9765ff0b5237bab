"""Every layout trains the same model: 5 AdamW steps, clipped, accumulated, against one process.

`python -m tests.parallel.parity` prints the differences themselves.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from bc2exp.model.plan import span
from bc2exp.parallel.layout import Layout, cut_layers
from bc2exp.parallel.parts import Parts
from tests.parallel.problem import CASES, CLIP, SHAPES, Case, difference, train, value_of

LIMIT = 1e-5
EVERYDAY = {
    "7b": {name: "none" for name in CASES if name not in ("single", "tp4", "tp8", "tp2 x pp2 x zero3 2")},
    "13b": {
        "zero3 2": "selective",
        "zero3 2, deferred": "full",
        "tp2": "selective",
        "tp4": "none",
        "tp2 x zero3 2": "full",
        "tp2 x pp2 x dp2": "full",
    },
}
"""Each layout, each kind of model and each kind of recomputation once or more; `slow` has all products."""


@pytest.fixture(scope="module")
def references(ranks):
    """What one process comes to."""
    return {kind: ranks(1, train, kind, CASES["single"])[0] for kind in SHAPES}


def assert_same(ranks, references, kind, name, recompute):
    found = ranks(CASES[name].size, train, kind, CASES[name], recompute)
    apart = difference(found[0], references[kind])
    assert apart.worst() < LIMIT, apart
    # every rank knows what rank 0 writes down
    for other in found[1:]:
        assert (other.losses, other.norms) == (found[0].losses, found[0].norms)


@pytest.mark.parametrize(
    ("kind", "name", "recompute"),
    [(kind, name, recompute) for kind in EVERYDAY for name, recompute in EVERYDAY[kind].items()],
)
def test_a_layout_trains_as_one_process_does(ranks, references, kind, name, recompute):
    assert_same(ranks, references, kind, name, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_layout_trains_as_one_process_does(ranks, references, kind, name, recompute):
    assert_same(ranks, references, kind, name, recompute)


def test_eight_tensor_parallel_ranks_take_the_first_step_of_one_process(ranks, references):
    found = ranks(8, train, "13b", CASES["tp8"], "none", "fp32", 1)[0]
    reference = references["13b"]
    assert found.losses[0] == pytest.approx(reference.losses[0], rel=LIMIT)
    assert found.norms[0] == pytest.approx(reference.norms[0], rel=LIMIT)
    for name, gradient in reference.gradients.items():
        assert (found.gradients[name] - gradient).norm() < LIMIT * gradient.norm(), name


UNEVEN = {"intermediate_size": 90, "num_layers": 5, "vocab_size": 205}


@pytest.mark.parametrize("case", [CASES["tp4"], Case({"pipeline": 4})], ids=["tensor", "pipeline"])
def test_parts_need_not_be_even(ranks, case):
    """Four ranks have 23, 23, 23, 21 of 90 columns and 52, 52, 52, 49 of 205 words; or 2, 1, 1, 1 layers."""
    reference = ranks(1, train, "7b", CASES["single"], "none", "fp32", 2, UNEVEN)[0]
    found = ranks(4, train, "7b", case, "none", "fp32", 2, UNEVEN)[0]
    assert difference(found, reference).worst() < LIMIT


def test_the_training_is_worth_comparing(references):
    for reference in references.values():
        assert reference.evaluations[-1] < reference.losses[0] - 0.01  # the first step's samples: it learns
        assert min(reference.norms) > CLIP  # clipping is at work
        assert all(gradient.norm() > 0 for gradient in reference.gradients.values())
        assert reference.gradients["embed_tokens.weight"][0].eq(0).all()  # the padding word


def with_bug(world, kind, case, bug):
    """Train with one of the mistakes that are easily made."""
    with BUGS[bug]():
        return train(world, kind, case, steps=2)


def mean_of_means():
    """Each data rank takes the mean over its own labels."""
    right = Layout.train

    def wrong(layout, batch, scale):
        return right(layout, batch, 1.0 / sum(part.num_labels for part in batch))

    return patch.object(Layout, "train", wrong)


def contiguous_slices():
    """Each tensor-parallel rank takes consecutive rows of [q | k | v]."""
    right = Parts.mine

    def wrong(parts, name, whole):
        mesh = parts.mesh
        projections = [f"{name[: -len('q_proj.weight')]}{letter}_proj.weight" for letter in "qkv"]
        if name not in projections:
            return right(parts, name, whole)
        packed = torch.cat([value_of(each, tuple(whole.shape)) for each in projections])
        mine = packed[span(packed.shape[0], mesh.tensor, mesh.tensor_rank)]
        return mine.chunk(3)[projections.index(name)]

    return patch.object(Parts, "mine", wrong)


def global_slopes():
    """Each tensor-parallel rank takes its slopes from the first head of the model on."""

    def wrong(model, *arguments, **named):
        cut_layers(model, *arguments, **named)
        for layer in model.layers.values():
            layer.self_attn.first_head = 0

    return patch("bc2exp.parallel.layout.cut_layers", wrong)


BUGS = {"mean of means": mean_of_means, "contiguous W_pack": contiguous_slices, "slopes": global_slopes}


@pytest.mark.parametrize(
    ("bug", "case"), [("mean of means", "ddp2"), ("contiguous W_pack", "tp2"), ("slopes", "tp2")]
)
def test_parity_sees_a_mistake(ranks, references, bug, case):
    reference = references["13b"]
    found = ranks(2, with_bug, "13b", CASES[case], bug)[0]
    apart = max(
        ((found.gradients[name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in reference.gradients.items()
    )
    assert apart > 1000 * LIMIT
    assert abs(found.norms[0] / reference.norms[0] - 1) > 100 * LIMIT


BF16 = {
    "zero3 2": (1e-3, 5e-3, 5e-3),
    "pp2": (1e-3, 5e-3, 5e-3),
    "tp2": (2e-3, 5e-3, 5e-2),
    "tp2 x pp2": (2e-3, 5e-3, 5e-2),
    "tp2 x zero3 2": (2e-3, 5e-3, 5e-2),
}
"""What may lie between bf16 (8 bits) in a layout and on one rank: losses, norms, first gradient of a weight.

Data ranks and stages round the same products alike, but for the gradients of embedding and head, which a rank
alone keeps in fp32 (measured: 2.2e-3 of the head's). Tensor-parallel ranks round their sums before they are
added up: that is as far from one rank as one rank is from fp32 (measured: gradients 3e-2, losses 1e-3).
"""


@pytest.mark.parametrize("name", BF16)
def test_bf16_in_a_layout_is_bf16_on_one_rank(ranks, name):
    loss, norm, gradient = BF16[name]
    reference = ranks(1, train, "7b", Case(), "none", "bf16", 3)[0]
    found = ranks(CASES[name].size, train, "7b", CASES[name], "none", "bf16", 3)[0]
    apart = difference(found, reference)
    assert apart.loss < loss, apart
    assert apart.norm < norm, apart
    assert apart.gradient < gradient, apart
