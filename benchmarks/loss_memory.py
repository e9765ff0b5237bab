"""Peak memory and time of the chunked NormHead loss beside the plain one, on the CPU.

    python benchmarks/loss_memory.py [--tokens 2048] [--hidden 512] [--vocab 125696] [--dtype float32]
                                     [--chunk N ...] [--rounds 3] [--threads 2]

Plain is F.cross_entropy(hidden @ F.normalize(weight).T, labels, reduction="sum") and its backward.
Memory: the high-water mark of a fresh process for each path, raw and above what it held once the
inputs stood. Time: one process that runs all paths in turn, `--rounds` times; the median and the least
count. On a machine shared with others only the least, or `--threads 1`, says much.
Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bc2exp.model.loss import norm_head_loss_sum

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss with all logits at once, in the inputs' type up to the softmax, which is fp32."""
    return F.cross_entropy((hidden @ F.normalize(weight).T).float(), labels, reduction="sum")


def find_path(name: str) -> Loss:
    """`plain`, `chunked` (the default chunk), or the number of tokens in a chunk."""
    if name == "plain":
        return plain
    chunk_tokens = None if name == "chunked" else int(name)
    return lambda hidden, weight, labels: norm_head_loss_sum(
        hidden, weight, labels, chunk_tokens=chunk_tokens
    )


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H] and labels [T], the same for every path."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden).to(dtype).requires_grad_()
    weight = torch.randn(args.vocab, args.hidden).mul_(0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, args.vocab, (args.tokens,))


def peak_bytes() -> int:
    """High-water mark of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(path: str, args: argparse.Namespace) -> None:
    """Run one path once in this process."""
    hidden, weight, labels = inputs(args)
    before = peak_bytes()
    find_path(path)(hidden, weight, labels).sum().backward()
    after = peak_bytes()
    print(json.dumps({"path": path, "peak_bytes": after, "peak_above_inputs_bytes": after - before}))


def measure_time(paths: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of forward and backward for each path, interleaved; compares values as it goes."""
    hidden, weight, labels = inputs(args)
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    for turn in range(args.rounds):
        reference: list[Tensor] = []
        for path in paths:
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            loss = find_path(path)(hidden, weight, labels).sum()
            loss.backward()
            seconds[path].append(time.perf_counter() - start)
            assert hidden.grad is not None
            assert weight.grad is not None
            values = [loss.detach(), hidden.grad, weight.grad]
            reference = reference or values
            if turn == 0:
                pairs = zip(values, reference, strict=True)
                errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
                print(json.dumps({"path": path, "relative_error": dict(zip("lhw", errors, strict=True))}))
    return seconds


def main() -> None:
    """Measure every path and print the ratios to plain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=125_696)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", nargs="*", default=["chunked"], help="tokens in a chunk, or `chunked`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(args.memory_of, args)
        return
    paths = ["plain", *args.chunk]
    memory = {}
    for path in paths:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", path]
        memory[path] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    seconds = measure_time(paths, args)
    records = [
        {**memory[path], "seconds": statistics.median(seconds[path]), "least_seconds": min(seconds[path])}
        for path in paths
    ]
    for record in records:
        ratios = {
            f"{key}_to_plain": round(value / records[0][key], 4)
            for key, value in record.items()
            if key != "path"
        }
        print(json.dumps({**record, **ratios}))


if __name__ == "__main__":
    main()
