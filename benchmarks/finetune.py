"""Fine-tuning on waimai_10k, beside Hugging Face's Trainer with LlamaForCausalLM.

    python benchmarks/finetune.py [--peer PYTHON] [--side fixed dynamic] [--rounds 2] [--steps 6]
           [--waimai waimai_10k.csv] [--tokenizer tokenizer.model] [--hidden 256] [--layers 2]

A small Baichuan2 with 125,696 words, 32 reviews a step, the same reviews in the same order on every side,
from the same weights, in bf16 with AdamW (fused) and clipping; each run a process of its own, in turn:

    ours        python -m bc2exp task=finetune dataset=waimai_10k: packed, the head at labelled positions only
    fixed       the Trainer, each review padded to 1,024 (the recipe), 4 of them a forward pass, compiled
    dynamic     the Trainer, padded to the longest of 8, compiled (with 32 it compiled again and again)

The peer's weights are ours as a Llama, so the first losses agree. The first WARM steps do not count. Writes
every sample and the ratios to results/finetune.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import given  # noqa: E402
import peers  # noqa: E402
import real_data  # noqa: E402
import record  # noqa: E402

VOCABULARY = 125_696
LENGTH = 1024
BATCH = 32
WARM = 2
TARGETS = {"fixed": 15.0, "dynamic": 1.5}
PEERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "fixed": ({"bf16": True, "torch_compile": True}, ["--length", str(LENGTH), "--micro-batch", "4"]),
    "dynamic": ({"bf16": True, "torch_compile": True}, ["--micro-batch", "8"]),
}
"""Settings of the Trainer, and words of `peer_trainer.py`."""


def words_of(args: argparse.Namespace, folder: Path) -> list[str]:
    """Our command's, less the way of packing."""
    shape = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 43 // 16}
    shape |= {"num_layers": args.layers, "num_heads": max(2, args.hidden // 64), "vocab_size": VOCABULARY}
    words = ["task=finetune", "model=tiny_7b", *(f"model.{name}={value}" for name, value in shape.items())]
    words += [f"model.tokenizer={args.tokenizer}", f"model.weights={folder / 'weights'}"]
    words += ["dataset=waimai_10k", f"dataset.path={args.waimai}", f"dataset.sequence_length={LENGTH}"]
    words += [
        f"task.global_batch={BATCH}",
        f"task.micro_batch={BATCH}",
        f"task.steps={args.steps}",
        "task.epochs=null",
    ]
    words += ["task.optimizer.lr=1e-4", "task.schedule.kind=constant", "task.schedule.warmup_fraction=0"]
    words += ["task.eval_every=null", "task.eval_samples=32", "task.save_every=null", "seed=0"]
    return [*words, "hardware=cpu", "hardware.precision=bf16", "tracking.enabled=false"]


def make(folder: Path, args: argparse.Namespace) -> None:
    """Weights, the same as a Llama, and the rows of the steps, as our own data path has them."""
    import numpy as np
    import torch

    from bc2exp.hardware import get_backend
    from bc2exp.parallel.world import World
    from bc2exp.tasks.finetune import make_trainer
    from bc2exp.text.tokenizer import Tokenizer
    from bc2exp.tracking.journal import NullJournal

    words = words_of(args, folder)
    model = [word.partition("=") for word in words if word.startswith("model.")]
    shape = {name[6:]: int(value) for name, _, value in model if value.isdigit()}
    given.weights(folder, shape)
    config = given.configuration([*words, "dataset.packing=longest"], folder)
    world = World(0, 1, 0, 1, get_backend("cpu"))
    world.join()
    trainer, _ = make_trainer(config, folder, world, NullJournal(), Tokenizer(args.tokenizer))
    ids, labels = [], []
    for step in range(args.steps):
        for part in trainer.batches(step):
            for row, segment in enumerate(part.segment_ids):
                if part.samples[row] >= 0:
                    ids.append(part.input_ids[row][segment != 0])
                    labels.append(part.labels[row][segment != 0])
    world.leave()
    assert len(ids) == args.steps * BATCH, len(ids)
    lengths = np.array([len(row) for row in ids])
    arrays = {"ids": torch.cat(ids).numpy(), "labels": torch.cat(labels).numpy(), "lengths": lengths}
    np.savez(folder / "rows.npz", **arrays)


def main() -> None:
    """Run all sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Python of the peers; else BC2EXP_PEER, else one is made")
    parser.add_argument("--side", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--waimai", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    args.waimai = real_data.find(args.waimai, real_data.WAIMAI, "--waimai").absolute()
    args.tokenizer = real_data.find(args.tokenizer, real_data.TOKENIZER, "--tokenizer").absolute()
    args.peer = peers.interpreter(args.peer)
    case = f"{args.hidden} wide, {args.layers} layers"
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *args.side)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, args)
        for number in range(args.rounds):
            for side, found in runs.items():
                if side == "ours":
                    run = peers.ours(words_of(args, folder), folder / "run")
                else:
                    settings, words = PEERS[side]
                    words = ["--settings", json.dumps(settings), "--batch", str(BATCH), *words]
                    run = peers.train(args.peer, folder, words)
                if "reason" in run:
                    raise SystemExit(f"{side}: {run['reason']}")
                run |= {"case": case, "side": side, "round": number, "values": run["values"][WARM:]}
                found.append(run)
                print(json.dumps(run), flush=True)
    steps = {side: [value for run in found for value in run["values"]] for side, found in runs.items()}
    entries = []
    for side in args.side:
        entries.append(
            record.ratio(case, f"reviews/s against {side}", steps[side], steps["ours"], better="higher",
                         target=TARGETS[side], margin=0.25)
        )  # fmt: skip
        peaks = [[run["peak_bytes"] for run in runs[each]] for each in ("ours", side)]
        entries.append(record.ratio(case, f"peak memory against {side}", *peaks, better="lower", margin=0.1))
    sides = {side: f"Trainer, LlamaForCausalLM, adamw_torch_fused, {PEERS[side][0]}" for side in args.side}
    whole = {
        "unit": "s a step of 32 reviews",
        "sides": {"ours": "python -m bc2exp task=finetune dataset=waimai_10k, bf16", **sides},
        "samples": [run for found in runs.values() for run in found],
        "ratios": entries,
    }
    record.write("finetune", whole, args.results)
    print(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
