"""Where the time of the body-bound training step goes, on the CPU.

    python benchmarks/profile_step.py [--case body] [--steps 3] [--rounds 1]

The step of `train_step.py`, taken apart by torch's profiler: the own time of every operator, by the part of
the step that called it (head: loss and its gradients; optimizer: norm, clipping and AdamW; layers: the rest,
the embedding included). Shares of the whole, the largest first, until 95 % are named; they are written to
results/profile_step.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import given  # noqa: E402
import record  # noqa: E402
import train_step  # noqa: E402

ENOUGH = 0.95
WARM = 2
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
CLIPPING = "norm and clipping"
PARTS = {"_NormHeadLoss": "head", "Optimizer": "optimizer", CLIPPING: "optimizer"}


def part_of(event: Any) -> str:
    """The part of the step that an operator was called in."""
    while event is not None:
        for mark, part in PARTS.items():
            if mark in event.name:
                return part
        event = event.cpu_parent
    return "layers"


def shares(events: list[Any]) -> dict[tuple[str, str], float]:
    """Part of the time of each (part, operator), the largest first."""
    times: Counter[tuple[str, str]] = Counter()
    for event in events:
        name = event.name if event.name.startswith("aten::") else "Python and autograd"
        operator = name.removeprefix("aten::").replace(ATTENTION, "attention")
        times[part_of(event), operator] += event.self_cpu_time_total
    whole = sum(times.values())
    return {what: time / whole for what, time in times.most_common()}


def profile(folder: Path, args: argparse.Namespace) -> list[Any]:
    """The operators of some steps after the warm ones: what `Trainer` does in a step, on random tokens."""
    import torch
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    from bc2exp.data.batches import MicroBatch
    from bc2exp.hardware import get_backend
    from bc2exp.parallel.world import World
    from bc2exp.tasks import build

    shape = train_step.SHAPES[args.case]
    words = ["task=pretrain", "model=tiny_7b", "hardware=cpu", "hardware.precision=bf16"]
    config = given.configuration([*words, *(f"model.{key}={size}" for key, size in shape.items())], folder)
    world = World(0, 1, 0, 1, get_backend("cpu"))
    world.join()
    mesh = build.make_mesh(config, train_step.VOCABULARY, world)
    model = build.make_model(config.model, train_step.VOCABULARY, build.make_ops(config.hardware, world))
    layout = build.lay_out(model, mesh, config)
    build.fill(layout, config.model, seed=0, init_std=0.02)
    optimizer = build.make_optimizer(layout.model, config.task.optimizer, config.hardware)
    batch = train_step.BATCH[args.case]
    tokens = torch.randint(1000, train_step.VOCABULARY, (batch, train_step.SEQUENCE + 1))
    part = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), list(range(batch)))

    def step() -> None:
        layout.train([part], 1 / part.num_labels)
        with record_function(CLIPPING):
            norm = float(layout.finish()) ** 0.5
        optimizer.step(factor=1 / max(1.0, norm))
        optimizer.zero_grad()

    for _ in range(WARM):
        step()
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(args.steps):
            step()
    world.leave()
    return list(found.events())


def main() -> None:
    """Profile, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", choices=train_step.SHAPES, default="body")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="profiles, whose shares are averaged")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    runs = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            runs.append(shares(profile(Path(scratch), args)))
    mean = {what: sum(run.get(what, 0.0) for run in runs) / len(runs) for what in runs[0]}
    named, entries, samples = 0.0, [], []
    for (part, operator), share in sorted(mean.items(), key=lambda item: -item[1]):
        if named >= ENOUGH:
            break
        named += share
        values = [run.get((part, operator), 0.0) for run in runs]
        samples.append({"case": part, "side": operator, "values": values})
        entries.append(record.ratio(part, operator, values, [1.0], better="lower", margin=0.5))
    whole = {"unit": "share of the step", "named": named}
    whole |= {"sides": {"case": args.case}, "samples": samples, "ratios": entries}
    record.write("profile_step", whole, args.results)
    print(json.dumps([[entry["case"], entry["name"], round(entry["value"], 4)] for entry in entries]))


if __name__ == "__main__":
    main()
