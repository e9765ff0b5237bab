"""What a plan says, against real models, real layouts without peers, and real training."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bc2exp.hardware import get_backend, planning_ops
from bc2exp.model import Baichuan2, init_weights
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.recompute import set_recompute
from bc2exp.parallel.world import World
from bc2exp.plan.estimate import Rates
from bc2exp.plan.memory import laid_out, state_bytes
from bc2exp.plan.planner import Choice, Planner
from bc2exp.plan.search import choices, distance, nearest_that_fit, ranked, words
from bc2exp.plan.trace import alone
from bc2exp.train.optimizer import build_optimizer

CPU = get_backend("cpu")
ROPE = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_layers": 4,
    "num_heads": 8,
    "position": "rope",
}
ALIBI = {
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_layers": 3,
    "num_heads": 12,
    "position": "alibi",
}
WIDE = {**ROPE, "vocab_size": 256, "hidden_size": 256, "intermediate_size": 2048, "num_layers": 2}
"""More weights than activations."""
SEVEN_B = {
    "vocab_size": 125_696,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_layers": 32,
    "num_heads": 32,
    "position": "rope",
}
RATES = Rates(294.9, 0.6, 21.3, 25.0, 8, link_per_pair=True)


def choice(**changes: object) -> Choice:
    values = {
        "pipeline": 1,
        "replicate": 1,
        "shard": 1,
        "tensor": 1,
        "zero_stage": 3,
        "sequence_parallel": False,
        "recompute": "none",
        "defer_reduction": False,
        "micro_batch": 1,
    }
    return Choice(**(values | changes))


def planner(shape: dict, length: int, global_batch: int, **changes: object) -> Planner:
    values = {"backend": "cpu", "precision": "fp32", "rates": None}
    return Planner(shape=shape, length=length, global_batch=global_batch, **(values | changes))


def trained(shape: dict, recompute: str, rows: int, length: int) -> tuple[Baichuan2, torch.optim.AdamW, int]:
    """A model and optimizer after a step, and the most bytes that a micro batch has at one time, as the
    allocator counts them."""
    model = Baichuan2(**shape, ops=CPU.ops)
    init_weights(model, seed=0, std=0.02)
    set_recompute(model, recompute)
    optimizer = build_optimizer(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1, shape["vocab_size"], (2, rows, length), generator=generator)
    for _ in range(2):  # kept by libraries from then on: their own buffers
        model(ids, labels=labels).sum().backward()
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        model(ids, labels=labels).sum().backward()
    events = _memory_events(measured)
    totals = [event["Total Allocated"] for event in events]
    return model, optimizer, max(totals) - totals[0] + events[0]["Bytes"]


@pytest.mark.parametrize(("shape", "rows", "length"), [(ROPE, 3, 256), (WIDE, 1, 64)], ids=["rope", "wide"])
def test_a_plan_of_narrow_gradients_is_what_a_real_training_takes(
    shape: dict, rows: int, length: int
) -> None:
    plan = planner(shape, length, rows, precision="bf16").plan(choice(micro_batch=rows), exact=True).memory
    model = Baichuan2(**shape, ops=CPU.ops)
    init_weights(model, seed=0, std=0.02)
    model.compute_in(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1, shape["vocab_size"], (2, rows, length), generator=generator)
    for step in range(3):
        model.hold_gradients(narrow=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            model(ids, labels=labels).sum().backward()
        if step < 2:  # kept from then on: buffers of libraries, and the model's own memory that stays
            model.zero_grad()
    events = _memory_events(measured)
    totals = [event["Total Allocated"] for event in events]
    stays = sum(room.memory.nbytes for room in (model.casts, model.lm_head.narrow_gradient))
    found = max(totals) - totals[0] + events[0]["Bytes"] + stays
    assert plan.gradients + plan.gathered + plan.activations == pytest.approx(found, rel=0.07)


def _memory_events(measured: profile) -> list[dict]:

    with tempfile.TemporaryDirectory() as folder:
        measured.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return [event["args"] for event in events if event.get("name") == "[memory]"]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("shape", "rows", "length"),
    [(ROPE, 3, 256), (ALIBI, 2, 320), (WIDE, 1, 64)],
    ids=["rope", "alibi", "wide"],
)
def test_a_plan_is_what_a_real_training_takes(shape: dict, rows: int, length: int, recompute: str) -> None:
    chosen = choice(recompute=recompute, micro_batch=rows)
    exact, extrapolated = (
        planner(shape, length, 2 * rows).plan(chosen, exact=exact) for exact in (True, False)
    )
    model, optimizer, activations = trained(shape, recompute, rows, length)
    memory = exact.memory
    assert memory.parameters == sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert memory.gradients == sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
    moments = (value for state in optimizer.state.values() for value in state.values())
    assert memory.optimizer == sum(value.untyped_storage().nbytes() for value in moments)
    assert memory.activations == pytest.approx(activations, rel=0.07)
    assert extrapolated.memory.activations == pytest.approx(memory.activations, rel=0.02)


LAYOUTS = [
    {"tensor": 4, "sequence_parallel": True},
    {"shard": 3},
    {"shard": 4},
    {"shard": 4, "zero_stage": 2},
    {"replicate": 2, "shard": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "shard": 2, "tensor": 2, "sequence_parallel": True},
    {"pipeline": 3, "replicate": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.items())))
@pytest.mark.parametrize("shape", [ROPE, ALIBI], ids=["rope", "alibi"])
def test_the_parts_are_those_of_the_layout_on_every_rank(shape: dict, layout: dict) -> None:
    degrees = [layout.get(axis, 1) for axis in ("pipeline", "replicate", "shard", "tensor")]
    size = torch.tensor(degrees).prod().item()
    options = {key: layout[key] for key in ("zero_stage", "sequence_parallel") if key in layout}
    counted = planner(shape, 64, 8)
    for rank in range(size):
        with alone(rank, size):
            mesh = Mesh(World(rank, size, 0, 1, CPU), *degrees)
            real = laid_out(shape, CPU.ops, mesh, "bf16", **options)
            assert counted.parts(mesh)[0] == real


def test_a_tensor_parallel_rank_has_an_eighth_and_a_zero_rank_a_part() -> None:
    plans = planner(SEVEN_B, 4096, 32, backend="npu", precision="bf16", rates=RATES)
    whole = 4 * 7_505_973_248
    tensor = plans.plan(choice(tensor=8, sequence_parallel=True, micro_batch=4))
    assert tensor.memory.parameters == pytest.approx(whole / 8, rel=0.001)
    shards = plans.plan(choice(shard=8, micro_batch=4))
    assert shards.memory.parameters == pytest.approx(whole / 8, rel=0.001)
    kept = plans.plan(choice(shard=8, zero_stage=2, micro_batch=4))
    assert kept.memory.gathered > shards.memory.gathered + whole / 4  # bf16 copies of nearly everything
    assert kept.memory.parameters == shards.memory.parameters
    assert kept.memory.optimizer == shards.memory.optimizer


def test_gradients_are_there_from_the_start_only_where_they_accumulate() -> None:
    alone, accumulating = (planner(ROPE, 256, batch).plan(choice(micro_batch=2)).memory for batch in (2, 4))
    assert accumulating.gradients == accumulating.parameters
    # most is held when the head is at work, and then no layer has a gradient yet
    assert alone.gradients == 0
    assert alone.total < accumulating.total


def test_the_exchanges_of_tensor_parallelism_are_counted() -> None:
    shape = {**ROPE, "num_layers": 3}
    length, rows, hidden = 64, 2, shape["hidden_size"]
    found = planner(shape, length, 8).plan(
        choice(tensor=4, sequence_parallel=True, micro_batch=rows), exact=True
    )
    calls = {(each.axis, each.kind): each for each in found.exchanges}
    micro_batches = 4
    # a layer: two pairs of matrices, in and out, forward and backward; embedding and head one pair of each
    assert calls["tensor", "allgather"].calls == micro_batches * (4 * 3 + 1 + 1)
    assert calls["tensor", "reducescatter"].calls == micro_batches * (4 * 3 + 1 + 1)
    whole = rows * length * hidden * 4
    assert calls["tensor", "allgather"].sent == calls["tensor", "allgather"].calls * whole // 4
    assert calls["tensor", "reducescatter"].sent == calls["tensor", "reducescatter"].calls * whole


def test_recomputing_trades_memory_for_operations_and_exchanges() -> None:
    plans = planner(SEVEN_B, 4096, 32, backend="npu", precision="bf16", rates=RATES)
    found = {
        kind: plans.plan(choice(tensor=8, sequence_parallel=True, recompute=kind, micro_batch=4))
        for kind in ("none", "selective", "full")
    }
    memory = [found[kind].memory.activations for kind in ("none", "selective", "full")]
    flops = [found[kind].flops for kind in ("none", "selective", "full")]
    assert memory == sorted(memory, reverse=True)
    assert memory[2] < memory[0] / 3
    assert flops == sorted(flops)
    assert 1.25 < flops[2] / flops[0] < 1 + 1 / 3
    assert all(plan.useful_flops == found["none"].flops for plan in found.values())


def test_the_first_stage_holds_more_micro_batches_than_the_last() -> None:
    plans = planner({**ROPE, "vocab_size": 64}, 256, 16)
    found = plans.plan(choice(pipeline=4, micro_batch=2))
    assert found.stage == 0
    assert {each.kind for each in found.exchanges} == {"send"}


def test_layouts_are_ranked_and_the_nearest_that_fits_changes_least() -> None:
    plans = planner(SEVEN_B, 4096, 32, backend="npu", precision="bf16", rates=RATES)
    chosen = choice(tensor=8, sequence_parallel=True, micro_batch=4)
    found = list(choices(plans, 8, 8, defer_reduction=False))
    assert chosen in found
    assert len(found) == len(set(found)) > 64
    budget = 16 * 2**30
    order = ranked(plans, found, budget)
    over = [plan.memory.total > budget for plan in order]
    assert over == sorted(over)
    times = [plan.time.step for plan in order if plan.memory.total <= budget]
    assert times == sorted(times)
    near = nearest_that_fit(order, chosen, plans.plan(chosen).memory.total * 0.8)
    assert all(plan.memory.total <= plans.plan(chosen).memory.total * 0.8 for plan in near)
    assert distance(chosen, near[0].choice) == 1
    assert words(near[0].choice, chosen).count("=") == 1


def test_tensor_parallel_ranks_stay_inside_a_machine() -> None:
    plans = planner(SEVEN_B, 4096, 32, backend="npu", precision="bf16", rates=RATES)
    assert max(found.tensor for found in choices(plans, 16, 8, defer_reduction=False)) == 8
    inside = plans.plan(choice(tensor=8, sequence_parallel=True, micro_batch=4)).time
    across = Rates(294.9, 0.6, 21.3, 2.0, 4, link_per_pair=True)
    slower = planner(SEVEN_B, 4096, 32, backend="npu", precision="bf16", rates=across)
    assert slower.plan(choice(tensor=8, sequence_parallel=True, micro_batch=4)).time.step > inside.step


def test_planned_operators_keep_what_fused_ones_keep() -> None:
    ops = planning_ops("npu")
    assert ops is not CPU.ops
    assert planning_ops("cpu") is CPU.ops
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.attention(q, q, q, segment_ids=None, slopes=None, scale=1.0).sum()
    assert sorted(saved) == [2 * 3 * 5 * 8] * 4 + [2 * 3 * 5 * 16]


def test_state_bytes_count_a_counter_a_weight() -> None:
    assert state_bytes({"a": 10, "b": 5}) == (60, 60, 128)
