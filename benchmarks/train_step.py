"""A training step on the CPU, beside Hugging Face's Trainer with LlamaForCausalLM.

    python benchmarks/train_step.py [--peer PYTHON] [--case loss middle body] [--rounds 2] [--steps 5]

Both sides train from the same weights on the same tokens, with 125,696 words, AdamW (fused), bf16 and
clipping, each run a process of its own, in turn: ours, and of the peer `trainer` (torch_compile=True,
adamw_torch_fused, bf16=True), `norm head` (the same with a NormHead, work that else only we do) and
`deepspeed` (ZeRO-2 through the Trainer). Ours is the command `python -m bc2exp task=pretrain`, whose journal
has the times. The weights of the peer are ours as a Llama, with the rows of the head normalised once, so that
the first losses agree. The first WARM steps of a run, with their compilation, do not count.

Writes every sample and the ratios to results/train_step.json: tokens a second (above 1: we are faster), peak
memory of the process (below 1: less), and the part of the processor's bf16 product rate, measured in the same
run, that our step reaches by the operations of the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import given  # noqa: E402
import peers  # noqa: E402
import record  # noqa: E402

VOCABULARY = 125_696
SEQUENCE = 512
SHAPES = {
    "loss": {"hidden_size": 256, "intermediate_size": 688, "num_layers": 2, "num_heads": 4},
    "middle": {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8},
    "body": {"hidden_size": 1024, "intermediate_size": 2752, "num_layers": 16, "num_heads": 16},
}
BATCH = {"loss": 8, "middle": 8, "body": 2}
"""Samples a step: 4,096 tokens, a micro batch of the pretraining recipe; a quarter of it in the largest."""
TARGETS = {"loss": (1.8, 0.4), "middle": (1.5, 0.6), "body": (1.3, 0.8)}
"""Wanted against the plain Trainer: tokens a second, and peak memory."""
WARM = 2
PLAIN = {"bf16": True, "torch_compile": True}
ZERO_2 = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
}
PEERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "trainer": (PLAIN, []),
    "norm head": (PLAIN, ["--norm-head"]),
    "deepspeed": ({"bf16": True, "deepspeed": ZERO_2}, []),
}
"""Settings of the Trainer, and words of `peer_trainer.py`."""


def make(folder: Path, shape: dict[str, int], args: argparse.Namespace) -> None:
    """Weights, the same as a Llama, tokens, and what of them each step takes."""
    import numpy as np
    import torch

    from bc2exp.data.batches import training_batches
    from bc2exp.data.store import TokenStore
    from bc2exp.data.store_writer import StoreWriter

    given.weights(folder, {"vocab_size": VOCABULARY, **shape})
    generator = torch.Generator().manual_seed(0)
    length = SEQUENCE * args.samples * (args.steps + 2)
    with StoreWriter(folder / "store") as writer:
        for _ in range(20):
            tokens = torch.randint(1000, VOCABULARY, (length,), generator=generator).tolist()
            writer.add(array("i", [length]), array("i", tokens))
        writer.finish()
    stream = TokenStore(folder / "store").streams([949, 50, 1])[0]
    batches = training_batches(
        stream,
        sequence_length=SEQUENCE,
        global_batch=args.samples,
        micro_batch=args.samples,
        rank=0,
        num_ranks=1,
        seed=0,
    )
    steps = [batches(step)[0] for step in range(args.steps)]
    ids, labels = (
        torch.cat([getattr(step, name) for step in steps]).numpy() for name in ("input_ids", "labels")
    )
    lengths = np.full(len(ids), SEQUENCE)
    np.savez(folder / "rows.npz", ids=ids.ravel(), labels=labels.ravel(), lengths=lengths)


def ours(folder: Path, shape: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """The command, in a folder of its own, and what its journal says."""
    words = [f"model.{name}={value}" for name, value in shape.items()]
    words += ["task=pretrain", "model=tiny_7b", f"model.vocab_size={VOCABULARY}"]
    words += [f"model.weights={folder / 'weights'}", "dataset=text", f"dataset.path={folder / 'store.bin'}"]
    words += [f"dataset.sequence_length={SEQUENCE}", f"task.global_batch={args.samples}"]
    words += [f"task.steps={args.steps}", "task.schedule.kind=constant", "task.optimizer.lr=1e-4"]
    words += ["task.schedule.warmup_fraction=0", "task.eval_every=null", "task.eval_samples=1"]
    words += ["task.save_every=null", "hardware=cpu", "hardware.precision=bf16", "seed=0"]
    words += ["tracking.enabled=false", *args.word]
    return peers.ours(words, folder / "run")


def peer(side: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Hugging Face's Trainer; {"reason": why} where it does not run."""
    settings, words = PEERS[side]
    words = ["--settings", json.dumps(settings), "--batch", str(args.samples), *words]
    return peers.train(args.peer, folder, words)


def product_rate() -> float:
    """Operations a second of a product of two bf16 matrices of 2048 x 2048, the best of ten."""
    import torch

    left, best = torch.randn(2048, 2048).bfloat16(), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - begin)
    return float(2 * 2048**3 / best)


def used(case: str, tokens: int, step_s: float, rate: float) -> float:
    """The part of `rate` that the operations of the model come to, in a step of that many seconds."""
    from bc2exp.train.throughput import flops_per_token

    shape = SHAPES[case]
    width, layers = shape["hidden_size"], shape["num_layers"]
    body = layers * (4 * width * width + 3 * width * shape["intermediate_size"])
    flops = flops_per_token(
        num_parameters=body + 2 * VOCABULARY * width,
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=layers,
        sequence_length=SEQUENCE,
        labelled=1.0,
    )
    return tokens * flops / step_s / rate


def ratios(samples: list[dict[str, Any]], case: str, rate: float) -> list[dict[str, Any]]:
    """What the samples of a case come to."""
    mine = [sample for sample in samples if sample["case"] == case and "values" in sample]
    runs: dict[str, list[dict[str, Any]]] = {}
    for sample in mine:
        runs.setdefault(sample["side"], []).append(sample)
    steps = {side: [value for run in them for value in run["values"]] for side, them in runs.items()}
    found = []
    for side in runs:
        if side == "ours":
            continue
        speed, memory = TARGETS[case] if side == "trainer" else (None, None)
        peaks = [[run["peak_bytes"] for run in runs[each]] for each in ("ours", side)]
        found += [
            record.ratio(
                case, f"tokens/s against {side}", steps[side], steps["ours"], better="higher", target=speed
            ),
            record.ratio(
                case, f"peak memory against {side}", *peaks, better="lower", target=memory, margin=0.05
            ),
        ]
    parts = [used(case, BATCH[case] * SEQUENCE, step_s, rate) for step_s in steps["ours"]]
    target = 0.6 if case == "body" else None
    name = f"MFU, of {rate / 1e9:.0f} GFLOP/s bf16 products"
    entry = record.ratio(case, name, parts, [1.0], better="higher", target=target)
    return [*found, {**entry, "best": max(parts)}]


def main() -> None:
    """Run all sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Python of the peers; else BC2EXP_PEER, else one is made")
    parser.add_argument("--case", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--side", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--word", action="append", default=[], help="a word more of our command")
    args = parser.parse_args()
    args.peer = peers.interpreter(args.peer)
    samples: list[dict[str, Any]] = []
    entries = []
    for case in args.case:
        args.samples, rates = BATCH[case], [product_rate()]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make(folder, SHAPES[case], args)
            for number in range(args.rounds):
                for side in ("ours", *args.side):
                    if any(sample["side"] == side and "reason" in sample for sample in samples):
                        continue
                    mine = side == "ours"
                    found = ours(folder, SHAPES[case], args) if mine else peer(side, folder, args)
                    if "values" in found:
                        found |= {"warm": found["values"][:WARM], "values": found["values"][WARM:]}
                    samples.append({"case": case, "side": side, "round": number, **found})
                    print(json.dumps(samples[-1]), flush=True)
                rates.append(product_rate())
        entries += ratios(samples, case, max(rates))
        print(json.dumps(entries[-7:], indent=1), flush=True)
    not_run = {each["side"]: each["reason"] for each in samples if "reason" in each}
    record.write(
        "train_step",
        {
            "unit": "s a step",
            "sides": {
                "ours": "python -m bc2exp task=pretrain hardware=cpu hardware.precision=bf16",
                **{
                    side: f"Trainer, LlamaForCausalLM, adamw_torch_fused, {PEERS[side][0]}"
                    for side in args.side
                },
            },
            "not_run": not_run,
            "samples": [each for each in samples if "values" in each],
            "ratios": entries,
        },
        args.results,
    )


if __name__ == "__main__":
    main()
