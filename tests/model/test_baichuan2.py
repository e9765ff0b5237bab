"""The network: its sizes, positions, packing, decoding, initial weights, and what must never change it."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bc2exp.hardware import eager, get_backend
from bc2exp.model import Baichuan2, KeyValueCache, NormHead, init_weights, parameter_count
from bc2exp.model.baichuan2 import Attention, Context
from bc2exp.model.positions import alibi_slopes, rope_tables
from bc2exp.model.room import Room
from tests.model.small import VOCAB, next_tokens, random_ids, small_model

BOTH = pytest.mark.parametrize("position", ["rope", "alibi"])


def assert_near(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "position", "expected"),
    [
        (4096, 11008, 32, 32, "rope", 7_505_973_248),
        (5120, 13696, 40, 40, "alibi", 13_896_668_160),
    ],
)
def test_parameter_counts_are_the_published_ones(hidden, intermediate, layers, heads, position, expected):
    start = time.process_time()
    with torch.device("meta"):
        model = Baichuan2(
            vocab_size=125_696,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            position=position,
            ops=get_backend("cpu").ops,
        )
    assert parameter_count(model) == expected
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "50 cannot be divided among 6 heads"),
        ({"hidden_size": 42}, "42 / 6 = 7 is odd"),
        ({"position": "learned"}, "'learned' is none of rope, alibi"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**({"position": "rope"} | changes))


@BOTH
def test_each_segment_alone_equals_its_part_of_the_pack(position):
    model = small_model(position)
    lengths = (5, 1, 17, 9)
    ids = random_ids(2, sum(lengths) + 3)
    labels = torch.full_like(ids, -100)
    segment_ids = torch.zeros_like(ids)
    parts, start = [], 0
    for number, length in enumerate(lengths, start=1):
        rows = slice(start, start + length)
        segment_ids[:, rows] = number
        labels[:, rows] = next_tokens(ids[:, rows])
        parts.append(rows)
        start += length
    packed = model(ids, segment_ids)
    for rows in parts:
        assert_near(packed[:, rows], model(ids[:, rows]))
    total = sum(model(ids[:, rows], labels=labels[:, rows]) for rows in parts)
    expected = torch.autograd.grad(total, list(model.parameters()))
    loss = model(ids, segment_ids, labels)
    assert_near(loss, total)
    for mine, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert_near(mine, theirs)


def test_rotary_positions_restart_in_every_segment():
    # Attention inside a segment sees differences of positions only, so outputs could not tell.
    seen = []

    def rotary(x, cos, sin):
        seen.append(cos)
        return eager.rotary(x, cos, sin)

    model = small_model("rope", ops=replace(eager.OPS, rotary=rotary))
    model(random_ids(1, 7), torch.tensor([[1, 1, 1, 2, 2, 0, 0]]))
    expected, _ = rope_tables(torch.tensor([0, 1, 2, 0, 1, 0, 1]), 8, 10000.0)
    assert len(seen) == 4
    assert all(torch.equal(cos, expected[None, None]) for cos in seen)


@BOTH
def test_later_tokens_and_padding_change_nothing_before_them(position):
    model = small_model(position)
    ids = random_ids(1, 12)
    longer = torch.cat((ids, torch.zeros(1, 4, dtype=torch.int64)), dim=1)
    segment_ids = (longer != 0).long()
    assert_near(model(longer)[:, :12], model(ids))
    assert_near(model(longer, segment_ids)[:, :12], model(ids))
    assert model(longer, segment_ids).isfinite().all()


def test_given_positions_replace_the_counted_ones():
    model = small_model("rope")
    ids = random_ids(1, 10)
    counted = model(ids)
    assert_near(model(ids, positions=torch.arange(10)[None]), counted)
    # Rotary attention depends on differences of positions alone.
    assert_near(model(ids, positions=torch.arange(100, 110)[None]), counted, 1e-4)
    assert (model(ids, positions=2 * torch.arange(10)[None]) - counted).abs().max() > 1e-2


@BOTH
@pytest.mark.parametrize("pieces", [[20], [11] + 9 * [1], [6, 5, 1, 8]])
def test_decoding_piece_by_piece_equals_one_forward(position, pieces):
    model = small_model(position)
    ids = random_ids(2, 20)
    cache = KeyValueCache(20)
    with torch.no_grad():
        logits = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        assert cache.length == 20
        assert_near(torch.cat(logits, dim=1), model(ids))
        with pytest.raises(ValueError, match="21 positions do not fit a key-value cache of 20"):
            model(ids[:, :1], cache=cache)


@BOTH
def test_decoding_a_left_padded_batch_equals_each_prompt_alone(position):
    model = small_model(position)
    ids, padding = random_ids(2, 12), 5
    ids[1, :padding] = 0
    segment_ids = (ids != 0).long()
    cache = KeyValueCache(12)
    with torch.no_grad():
        stops = (8, 9, 10, 11, 12)
        logits = [model(ids[:, :8], segment_ids[:, :8], cache=cache)]
        logits += [model(ids[:, s - 1 : s], segment_ids[:, :s], cache=cache) for s in stops[1:]]
        together = torch.cat(logits, dim=1)
        assert_near(together[0], model(ids[:1])[0])
        assert_near(together[1, padding:], model(ids[1:, padding:])[0])


@BOTH
def test_an_evaluation_between_steps_leaves_training_bit_equal(position):
    results = []
    for evaluates in (False, True):
        model = small_model(position)
        assert model.lm_head is not None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            ids = random_ids(2, 16, seed=step)
            if evaluates:
                before = {name: value.clone() for name, value in model.state_dict().items()}
                model.eval()
                with torch.no_grad():
                    model(ids)
                    model(ids, labels=next_tokens(ids))
                model.train()
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            loss = model(ids, labels=next_tokens(ids))
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        results.append((losses, model.state_dict()))
    (losses, weights), (their_losses, their_weights) = results
    assert all(map(torch.equal, losses, their_losses))
    assert all(torch.equal(weights[name], their_weights[name]) for name in weights)
    # And the head did learn: its rows are no unit rows, and have moved.
    start = small_model(position).lm_head.weight
    assert not torch.allclose(weights["lm_head.weight"], start, atol=1e-3)


def test_the_first_loss_of_a_fresh_model_is_that_of_unit_rows():
    model = small_model("rope", std=0.02, vocab_size=125_696, hidden_size=128, num_heads=8, num_layers=1)
    init_weights(model, seed=0, std=0.02)
    ids = torch.randint(1, 125_696, (4, 128), generator=torch.Generator().manual_seed(0))
    labels = next_tokens(ids)
    with torch.no_grad():
        mean = model(ids, labels=labels).item() / int((labels != -100).sum())
    assert 12.2 < mean < 12.4  # ln V + 1/2; ln V = 11.74 would be a head without norms


def test_logits_and_loss_agree_in_bf16():
    model = small_model("alibi").to(torch.bfloat16)
    ids = random_ids(2, 30)
    labels = next_tokens(ids)
    logits = model(ids)
    assert logits.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels)[0], expected, rtol=2**-8, atol=0)


def test_z_loss_reaches_the_loss_and_leaves_padding_out():
    ids = random_ids(1, 10)
    ids[:, 7:] = 0
    labels = next_tokens(ids)
    labels[:, 6:] = -100
    segment_ids = (ids != 0).long()
    plain, with_z = small_model("alibi"), small_model("alibi", z_loss_weight=0.5)
    largest = plain(ids, segment_ids)[0, :7].max(dim=-1).values.square()
    expected = plain(ids, segment_ids, labels) + 0.5 * 6 * largest.mean()
    assert_near(with_z(ids, segment_ids, labels), expected)
    with_z.lm_head.z_loss_ratio = 0.25
    expected = plain(ids, segment_ids, labels) + 0.5 * 0.25 * largest.sum()
    assert_near(with_z(ids, segment_ids, labels), expected)


def test_a_rank_with_some_heads_uses_their_slopes():
    torch.manual_seed(0)
    ops = get_backend("cpu").ops
    whole = Attention(48, 8, 0, ops, Room())
    x = torch.randn(1, 20, 48)
    context = Context(None, None, alibi_slopes(6), None)
    total = torch.zeros(1, 20, 48)
    for first_head in (0, 2, 4):
        part = Attention(48, 8, 0, ops, Room())
        part.first_head = first_head
        rows = slice(8 * first_head, 8 * first_head + 16)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part, name).weight.data = getattr(whole, name).weight.data[rows]
        part.o_proj.weight.data = whole.o_proj.weight.data[:, rows]
        total = total + part(x, context)
    assert_near(total, whole(x, context))


@BOTH
def test_two_stages_of_a_pipeline_equal_the_whole(position):
    whole, first, second = (small_model(position) for _ in range(3))
    first.norm = first.lm_head = second.embed_tokens = None
    del first.layers["1"]
    del second.layers["0"]
    assert {*first.state_dict(), *second.state_dict()} == set(whole.state_dict())
    ids = random_ids(2, 9)
    labels = next_tokens(ids)
    assert torch.equal(second(first(ids), labels=labels), whole(ids, labels=labels))


def test_the_padding_row_is_zero_and_gets_no_gradient():
    model = small_model("rope")
    ids = random_ids(1, 8)
    ids[0, 3] = 0
    model(ids, labels=next_tokens(ids)).backward()
    assert model.embed_tokens.weight[0].eq(0).all()
    assert model.embed_tokens.weight.grad[0].eq(0).all()


def test_initial_weights_depend_on_name_and_seed_alone():
    model, stage = small_model("rope", std=0.02), small_model("rope", std=0.02)
    stage.embed_tokens = None
    del stage.layers["0"]
    for built in (model, stage):
        init_weights(built, seed=5, std=0.02)
    values = dict(model.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in stage.named_parameters())
    q_proj = values["layers.0.self_attn.q_proj.weight"]
    assert q_proj.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(q_proj, values["layers.1.self_attn.q_proj.weight"])
    assert values["layers.1.input_layernorm.weight"].eq(1).all()
    assert values["norm.weight"].eq(1).all()
    bound = 1 / math.sqrt(48)
    head = values["lm_head.weight"]
    assert 0.99 * bound < head.abs().max() <= bound
    assert head.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    again = small_model("rope")
    init_weights(again, seed=6, std=0.02)
    assert not torch.equal(again.layers["0"].self_attn.q_proj.weight, q_proj)


@BOTH
def test_a_model_built_on_meta_works_once_it_has_storage(position):
    shape = small_model(position).shape
    with torch.device("meta"):
        model = Baichuan2(**shape, ops=get_backend("cpu").ops)
    model.to_empty(device="cpu")
    init_weights(model, seed=3, std=0.1)
    expected = small_model(position)
    init_weights(expected, seed=3, std=0.1)
    ids = random_ids(1, 6)
    assert torch.equal(model(ids), expected(ids))


@BOTH
def test_positions_stay_fp32_under_mixed_precision(position):
    seen = set()

    def rotary(x, cos, sin):
        seen.add(("rotary", x.dtype, cos.dtype, sin.dtype))
        return eager.rotary(x, cos, sin)

    def attention(q, k, v, *, slopes, **others):
        seen.add(("attention", q.dtype, None if slopes is None else slopes.dtype))
        return eager.attention(q, k, v, slopes=slopes, **others)

    ops = replace(eager.OPS, attention=attention, rotary=rotary)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small_model(position, ops=ops)
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*model.layers.values(), model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        ids = random_ids(1, 8)
        model(ids, labels=next_tokens(ids)).backward()
    finally:
        dist.destroy_process_group()
    half, full = torch.bfloat16, torch.float32
    if position == "rope":
        assert seen == {("rotary", half, full, full), ("attention", half, None)}
    else:
        assert seen == {("attention", half, full)}


def test_head_logits_are_against_unit_rows():
    head = NormHead(VOCAB, 48, 0.0, eager.OPS)
    torch.nn.init.normal_(head.weight, std=3.0)
    hidden = torch.randn(2, 5, 48)
    rows = head.weight / head.weight.norm(dim=1, keepdim=True)
    assert_near(head(hidden), hidden @ rows.T)
