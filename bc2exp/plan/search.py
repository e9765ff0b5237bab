"""Other layouts for the same devices: the nearest ones that fit, and the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

from bc2exp.config.parallelism import shares
from bc2exp.plan.planner import Choice, Plan, Planner

RECOMPUTE = ("none", "selective", "full")
_LAYOUT = ("pipeline", "replicate", "shard", "tensor")


def choices(planner: Planner, num_devices: int, num_per_node: int, defer_reduction: bool) -> Iterator[Choice]:
    """Every layout of `num_devices` that the model and the batch allow.

    Tensor-parallel ranks stay inside a machine and share the sequence; micro batches are powers of two.
    """
    shape = planner.shape
    for pipeline, replicate, shard, tensor in _factors(num_devices):
        data_ranks = replicate * shard
        if (
            tensor > num_per_node
            or shape["num_heads"] % tensor
            or planner.length % tensor
            or pipeline > shape["num_layers"]
            or planner.global_batch % data_ranks
            or not all(shares(shape[key], tensor) for key in ("vocab_size", "intermediate_size"))
        ):
            continue
        share = planner.global_batch // data_ranks
        for micro_batch in (size for size in (1, 2, 4, 8, 16, 32, 64) if share % size == 0):
            if share // micro_batch < pipeline:
                continue
            for zero_stage in (2, 3) if shard > 1 else (3,):
                for recompute, defers in product(RECOMPUTE, {False, defer_reduction and shard > 1}):
                    yield Choice(
                        pipeline,
                        replicate,
                        shard,
                        tensor,
                        zero_stage,
                        tensor > 1,
                        recompute,
                        defers,
                        micro_batch,
                    )


def _factors(number: int) -> Iterator[tuple[int, int, int, int]]:
    """Four degrees whose product is `number`."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    for pipeline in divisors:
        for replicate in divisors:
            for shard in divisors:
                tensor, rest = divmod(number, pipeline * replicate * shard)
                if not rest and tensor:
                    yield pipeline, replicate, shard, tensor


def distance(first: Choice, second: Choice) -> int:
    """How many things a person would have to change to come from one to the other; the layout is one."""
    one, other = asdict(first), asdict(second)
    if one["shard"] == other["shard"] == 1:
        one["zero_stage"] = other["zero_stage"]  # says nothing then
    moved = any(one[axis] != other[axis] for axis in _LAYOUT)
    rest = (key for key in one if key not in _LAYOUT and key != "sequence_parallel")
    return moved + sum(one[key] != other[key] for key in rest)


def ranked(planner: Planner, found: list[Choice], budget: float | None) -> list[Plan]:
    """The plans of these choices: those within `budget` bytes first (None: all), by time, then memory."""
    plans = [planner.plan(choice) for choice in found]

    def key(plan: Plan) -> tuple[bool, float, int]:
        too_much = budget is not None and plan.memory.total > budget
        return too_much, plan.time.step if plan.time else plan.flops, plan.memory.total

    return sorted(plans, key=key)


def nearest_that_fit(plans: list[Plan], chosen: Choice, budget: float) -> list[Plan]:
    """The plans within `budget`, those first that change least; `plans` as `ranked` gives them."""
    fitting = [plan for plan in plans if plan.memory.total <= budget]
    return sorted(fitting, key=lambda plan: distance(chosen, plan.choice))


def words(choice: Choice, chosen: Choice) -> str:
    """The overrides that lead from `chosen` to `choice`."""
    before, after = asdict(chosen), asdict(choice)
    changed = [key for key in after if after[key] != before[key]]
    if choice.shard == 1 and "zero_stage" in changed:
        changed.remove("zero_stage")
    return " ".join(
        f"{'task' if key == 'micro_batch' else 'parallelism'}.{key}={str(after[key]).lower()}"
        for key in changed
    )
