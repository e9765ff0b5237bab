"""That layouts differ in what lies where and in what is exchanged, counted on real ranks.

Units are what FSDP2 gathers at a time: the embedding, each layer, the head with the last norm.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bc2exp.parallel.shard import local
from tests.parallel.problem import CASES, SHAPES, VOCABULARY, adamw, laid_out, trainer_of
from tests.parallel.traffic import Traffic

LAYERS = SHAPES["7b"]["num_layers"]
UNITS = LAYERS + 2
AGREED = 2
"""Sums over the world that every step of several ranks has: labels and wish to stop; loss and norm."""
HEAD = 4
"""Exchanges of the vocabulary's shards in a micro batch: the longest hidden state, the largest logit and
whose it is (z-loss), the rest."""
PAIRS = 2 * LAYERS + 1
"""Pairs of matrices with an exchange on either side: attention and feed-forward; embedding and head are two
halves of one more."""


def step(world, kind, case, recompute="none", precision="fp32"):
    """What a rank exchanges in one step, and the shapes of what it holds."""
    layout = laid_out(world, kind, case, precision, recompute=recompute)
    trainer = trainer_of(layout, adamw(layout), steps=1, evaluation=[], eval_every=None)
    with Traffic() as traffic:
        trainer.run(0)
    shapes = {name: tuple(local(value).shape) for name, value in layout.model.named_parameters()}
    return traffic.kinds, traffic.types, shapes


# Micro batches: 4 on one data rank, 2 on two or four.
COLLECTIVES = {
    "single": {},
    "ddp2": {"all_reduce": AGREED + UNITS},
    # reduced at every micro batch; gathered once a step, or before each forward and (but the head) backward
    "zero2 2": {"all_reduce": AGREED, "all_gather": UNITS, "reduce_scatter": 2 * UNITS},
    "zero3 2": {"all_reduce": AGREED, "all_gather": 2 * (2 * UNITS - 1), "reduce_scatter": 2 * UNITS},
    "zero3 2, deferred": {"all_reduce": AGREED, "all_gather": 2 * (2 * UNITS - 1), "reduce_scatter": UNITS},
    "hsdp4": {
        "all_reduce": AGREED + UNITS,
        "all_gather": 2 * (2 * UNITS - 1),
        "reduce_scatter": 2 * UNITS,
    },
    # each pair gathers and scatters, forward and, the other way round, backward; and the norms' gradients
    "tp2": {
        "all_reduce": AGREED + 1 + 4 * HEAD,
        "all_gather": 4 * 2 * PAIRS,
        "reduce_scatter": 4 * 2 * PAIRS,
    },
    "tp2, whole sequence": {"all_reduce": AGREED + 4 * HEAD + 4 * 2 * PAIRS},
    "pp2": {"all_reduce": AGREED, "send": 4, "receive": 4},
    "tp2 x zero3 2": {
        "all_reduce": AGREED + 1 + 2 * HEAD,
        "all_gather": 2 * (2 * UNITS - 1) + 2 * 2 * PAIRS,
        "reduce_scatter": 2 * UNITS + 2 * 2 * PAIRS,
    },
    # the first of two stages: the embedding and two layers
    "tp2 x pp2": {
        "all_reduce": AGREED + 1,
        "all_gather": 4 * (2 * 4 + 1),
        "reduce_scatter": 4 * (2 * 4 + 1),
        "send": 4,
        "receive": 4,
    },
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_is_exchanged_in_a_step(ranks, name):
    kinds, _, _ = ranks(CASES[name].size, step, "7b", CASES[name])[0]
    assert kinds == Counter(COLLECTIVES[name])


def test_recomputation_repeats_the_exchanges_that_it_needs(ranks):
    plain, selective, full = (
        ranks(2, step, "7b", CASES["tp2"], recompute)[0][0] for recompute in ("none", "selective", "full")
    )
    # before a feed-forward pair; before both pairs of a layer and behind the first: no one needs the last sum
    assert selective - plain == Counter({"all_gather": 4 * LAYERS})
    assert full - plain == Counter({"all_gather": 4 * 2 * LAYERS, "reduce_scatter": 4 * LAYERS})


def test_shapes_on_a_rank(ranks):
    layer, width, inner = "layers.1.", 64, 88
    whole = ranks(1, step, "7b", CASES["single"])[0][2]
    tensor, zero = (ranks(2, step, "7b", CASES[name])[1][2] for name in ("tp2", "zero3 2"))
    assert whole[layer + "self_attn.q_proj.weight"] == (width, width)
    # the second rank has the lesser part of the vocabulary
    assert tensor["embed_tokens.weight"] == tensor["lm_head.weight"] == (VOCABULARY // 2, width)
    assert tensor[layer + "self_attn.v_proj.weight"] == (width // 2, width)
    assert tensor[layer + "self_attn.o_proj.weight"] == (width, width // 2)
    assert tensor[layer + "mlp.up_proj.weight"] == (inner // 2, width)
    assert tensor[layer + "mlp.down_proj.weight"] == (width, inner // 2)
    assert tensor[layer + "input_layernorm.weight"] == tensor["norm.weight"] == (width,)
    for name, shape in zero.items():
        assert shape == (whole[name][0] // 2, *whole[name][1:])
    stages = ranks(2, step, "7b", CASES["pp2"])
    assert stages[0][2].keys() | stages[1][2].keys() == whole.keys()
    assert not stages[0][2].keys() & stages[1][2].keys()
    assert {name.split(".")[1] for name in stages[0][2] if name.startswith("layers")} == {"0", "1"}


def test_types_of_what_is_exchanged_in_bf16(ranks):
    _, types, _ = ranks(4, step, "7b", CASES["tp2 x zero3 2"], "none", "bf16")[0]
    bf16, fp32 = torch.bfloat16, torch.float32
    # activations and gathered parameters in bf16; gradients are reduced in fp32
    assert {kind for kind, dtype in types if dtype == bf16} == {"all_gather", "reduce_scatter"}
    assert types["reduce_scatter", fp32] == 2 * UNITS
    assert types["all_gather", fp32] == 0
    assert types["reduce_scatter", bf16] == 2 * 2 * PAIRS
