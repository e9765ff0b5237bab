"""Packed rows beside padded ones: the same training several times over, step by step in turn, on the CPU.

    python benchmarks/packing_speed.py --data waimai_10k.csv --tokenizer tokenizer.model
           [--ways packed bucketed longest fixed] [--steps 312] [--hidden 128] [--layers 2] [--length 1024]
           [--global-batch 32] [--micro-batch N] [--threads 1] [--output FILE]

A step of every way follows a step of every other, so that what else the machine does strikes all alike.
Counted are seconds on the clock and of the processor, positions computed, and how far the losses of a way are
from those of the last one named. Prints one JSON object a way; --output gets every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import given  # noqa: E402

from bc2exp.config.root import Config  # noqa: E402
from bc2exp.hardware import get_backend  # noqa: E402
from bc2exp.parallel.world import World  # noqa: E402
from bc2exp.tasks.finetune import make_trainer  # noqa: E402
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer  # noqa: E402
from bc2exp.tracking.journal import NullJournal  # noqa: E402
from bc2exp.train.trainer import Trainer  # noqa: E402

FIRST = 20


class Losses(NullJournal):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def metrics(self, step: int, values: Any) -> None:
        """See `Journal`."""
        if "train/loss" in values:
            self.values.append(values["train/loss"])


class NoCheckpoints:
    """Saves nothing, so that a step is a step."""

    def save(self, *_: Any, **__: Any) -> None:
        """See `Checkpoints`."""

    def finished(self, *, wait: bool = False) -> None:
        """See `Checkpoints`."""


def configure(args: argparse.Namespace, way: str, folder: Path) -> Config:
    """The configuration of one way, as a command line would give it."""
    words = [
        "task=finetune",
        "model=tiny_7b",
        f"model.hidden_size={args.hidden}",
        f"model.intermediate_size={args.hidden * 43 // 16}",
        f"model.num_layers={args.layers}",
        f"model.num_heads={max(2, args.hidden // 32)}",
        "dataset=waimai_10k",
        f"dataset.path={args.data}",
        f"dataset.packing={way}",
        f"dataset.sequence_length={args.length}",
        f"task.global_batch={args.global_batch}",
    ]
    words += [f"model.tokenizer={args.tokenizer}"] if args.tokenizer else []
    words += [f"task.micro_batch={args.micro_batch}"] if args.micro_batch else []
    return given.configuration(words, folder)


def make(config: Config, folder: Path, world: World) -> tuple[Trainer, int]:
    """A trainer that neither saves nor evaluates, and its last step."""
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    trainer, _ = make_trainer(config, folder, world, Losses(), tokenizer)
    trainer.checkpoints, trainer.evaluation = NoCheckpoints(), []  # type: ignore[assignment]
    return trainer, trainer.steps


def main() -> None:
    """Train every way and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--ways", nargs="+", default=["packed", "bucketed", "longest", "fixed"])
    parser.add_argument("--steps", type=int, help="default: an epoch")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.data = args.data.resolve()
    args.tokenizer = args.tokenizer and args.tokenizer.resolve()
    torch.set_num_threads(args.threads)
    world = World(0, 1, 0, 1, get_backend("cpu"))
    world.join()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainers = {way: make(configure(args, way, folder), folder, world) for way in args.ways}
        clock: dict[str, list[float]] = {way: [] for way in args.ways}
        processor: dict[str, list[float]] = {way: [] for way in args.ways}
        positions = dict.fromkeys(args.ways, 0)
        for step in range(min(args.steps or 10**9, *(steps for _, steps in trainers.values()))):
            for way, (trainer, _) in trainers.items():
                positions[way] += sum(part.input_ids.numel() for part in trainer.batches(step))
                trainer.steps = step + 1
                start = time.perf_counter(), time.process_time()
                trainer.run(step)
                clock[way].append(time.perf_counter() - start[0])
                processor[way].append(time.process_time() - start[1])
            if args.output:
                rows = {
                    way: [t.journal.values, clock[way], processor[way]] for way, (t, _) in trainers.items()
                }
                args.output.write_text(json.dumps(rows))
        losses = {way: trainer.journal.values for way, (trainer, _) in trainers.items()}
        last = args.ways[-1]
        for way in args.ways:
            apart = [abs(a - b) for a, b in zip(losses[way], losses[last], strict=True)]
            record = {
                "way": way,
                "steps": len(apart),
                "positions": positions[way],
                "seconds": round(sum(clock[way]), 2),
                "processor_seconds": round(sum(processor[way]), 2),
                "median_step_s": round(statistics.median(clock[way]), 4),
                f"loss_from_{last}_first_{FIRST}": max(apart[:FIRST]),
                f"loss_from_{last}": max(apart),
                f"{last}_to_this": {
                    "positions": round(positions[last] / positions[way], 2),
                    "seconds": round(sum(clock[last]) / sum(clock[way]), 2),
                    "processor_seconds": round(sum(processor[last]) / sum(processor[way]), 2),
                },
            }
            print(json.dumps(record), flush=True)
    world.leave()


if __name__ == "__main__":
    main()
