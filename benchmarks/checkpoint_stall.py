"""How long a checkpoint stops the training: written beside it, and waited for.

    python benchmarks/checkpoint_stall.py --folder SCRATCH [--gib 1.0] [--rounds 5]

A model and AdamW's moments of about GIB of state on one rank, fp32. In each round one checkpoint is waited
for (gathering, writing, fsync, rename) and one is written beside, of which the stall is the time until `save`
returns; the rest is waited for before the next round. The memory of the copy is taken before, as a training
does beside its second step. SCRATCH must not exist and is removed; it needs room for three checkpoints.
Prints JSON: every sample in seconds, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2, init_weights
from bc2exp.parallel.layout import Layout, parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.train.checkpoint import Checkpoints, Progress
from bc2exp.train.optimizer import build_optimizer
from bc2exp.train.state import state_bytes

LAYERS = 4
STATE_BYTES_A_WORD = 2 * 768 * 12


def make(gib: float) -> tuple[Layout, torch.optim.Optimizer]:
    """A model whose state has about `gib` GiB, most of it embedding and head, and its optimizer."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_layers": LAYERS, "num_heads": 12}
    body = LAYERS * (4 * 768 * 768 + 3 * 768 * 2048) * 12
    words = int((gib * 2**30 - body) / STATE_BYTES_A_WORD)
    model = Baichuan2(vocab_size=words, position="rope", ops=get_backend("cpu").ops, **shape)
    init_weights(model, seed=0, std=0.02)
    world = World(rank=0, size=1, local_rank=0, local_size=1, backend=get_backend("cpu"))
    layout = parallelize(model, Mesh(world), precision="fp32")
    optimizer = build_optimizer(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return layout, optimizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    layout, optimizer = make(args.gib)
    args.folder.mkdir(parents=True)
    checkpoints = Checkpoints(args.folder / "checkpoints", keep=1, world=layout.mesh.world, tell=print)
    waited: list[float] = []
    stalls: list[float] = []
    wholes: list[float] = []
    checkpoints.make_room(layout, optimizer)
    try:
        for step in range(1, 2 * args.rounds + 1):
            begin = time.perf_counter()
            checkpoints.save(layout, optimizer, Progress(step, step), beside=step % 2 == 0)
            stalled = time.perf_counter() - begin
            checkpoints.finished(wait=True)
            whole = time.perf_counter() - begin
            if step % 2:
                waited.append(whole)
            else:
                stalls.append(stalled)
                wholes.append(whole)
    finally:
        shutil.rmtree(args.folder)
    print(
        json.dumps(
            {
                "state_gib": round(state_bytes(layout) / 2**30, 3),
                "waited_s": waited,
                "stall_s": stalls,
                "beside_until_on_disk_s": wholes,
                "worst_stall_of_waited": max(stalls) / statistics.median(waited),
                "stall_of_waited": statistics.median(stalls) / statistics.median(waited),
            }
        )
    )


if __name__ == "__main__":
    main()
