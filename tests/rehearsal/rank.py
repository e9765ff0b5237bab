"""One rank of a rehearsed job, started by test_collectives with torch's usual variables."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from bc2exp.hardware import rehearsal

rehearsal.activate()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def exchange(rank: int, size: int) -> None:
    """Every collective against what it should come to; sizes beyond one window of 1 MiB included."""
    everyone = [torch.arange(300_003.0) * (r + 1) for r in range(size)]
    mine = everyone[rank].npu()
    for op, wanted in (
        (dist.ReduceOp.SUM, sum(everyone)),
        (dist.ReduceOp.AVG, sum(everyone) / size),
        (dist.ReduceOp.MAX, everyone[-1]),
        (dist.ReduceOp.MIN, everyone[0]),
    ):
        found = mine.clone()
        dist.all_reduce(found, op=op)
        torch.testing.assert_close(found.cpu(), wanted)
    for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.int64):
        found = torch.full((7,), rank + 1, dtype=dtype, device="npu")
        dist.all_reduce(found)
        assert found.tolist() == [sum(range(size + 1))] * 7
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine)
    assert all(torch.equal(part.cpu(), wanted) for part, wanted in zip(parts, everyone, strict=True))
    piece = torch.empty(5, device="npu")
    dist.reduce_scatter_tensor(piece, torch.arange(5.0 * size, device="npu"))
    assert torch.equal(piece.cpu(), (torch.arange(5.0 * size) * size)[5 * rank : 5 * rank + 5])
    sent = mine.clone() if rank == 1 else torch.empty_like(mine)
    dist.broadcast(sent, src=1)
    assert torch.equal(sent.cpu(), everyone[1])
    swapped = torch.empty(size, device="npu")
    dist.all_to_all_single(swapped, torch.arange(float(size), device="npu") + 10 * rank)
    assert swapped.tolist() == [10.0 * r + rank for r in range(size)]
    received = torch.empty_like(mine)
    ops = [
        dist.P2POp(dist.isend, mine, (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert torch.equal(received.cpu(), everyone[rank - 1])
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]


def main() -> None:
    how, folder = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    x = torch.ones(4, device="npu")
    dist.all_reduce(x)
    if how == "well":
        exchange(rank, size)
        (folder / "logs").mkdir(exist_ok=True)
        rehearsal.leave_count(folder, rank)
        dist.destroy_process_group()
        return
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "left":
        sys.exit(3)
    if rank == 1 and how == "late":
        time.sleep(30)
    start = time.monotonic()
    try:
        dist.all_reduce(x)
        dist.all_reduce(x)
    finally:
        print(f"waited {time.monotonic() - start:.1f} s", flush=True)


main()
