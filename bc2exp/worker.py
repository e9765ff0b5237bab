"""The rank side of a run: `python -m bc2exp.worker RUN_FOLDER`, alone or under torchrun.

A rank knows nothing of Hydra or MLflow. It reads `resolved.yaml`, does the task, and dies with its parent.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.secrets import hide
from bc2exp.hardware import phase, rehearsal
from bc2exp.tracking.pulse import Pulse
from bc2exp.tracking.signals import answer_with_stacks, heed_torchrun_only
from bc2exp.train import TrainingError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Do this rank's part of the run in the folder named on the command line."""
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    heed_torchrun_only()
    die_with_parent()
    redirect_output(folder / "logs" / f"rank-{rank}.log")
    answer_with_stacks()
    pulse = Pulse(0, rank, mark)
    pulse.begin()
    phase.tell(pulse.say)
    code = 1
    try:
        run_rank(folder, rank)
        code = 0
    except BaseException as error:
        report(folder, rank, error)
    finally:
        with suppress(OSError):  # on a full disk
            rehearsal.leave_count(folder, rank)
        sys.stdout.flush()
        sys.stderr.flush()
        pulse.end()
        os._exit(code)  # threads of a broken collective must not keep a failed rank alive


def run_rank(folder: Path, rank: int) -> None:
    """Set up the device, meet the other ranks, do the task, record its outcome."""
    from bc2exp.config.load import read
    from bc2exp.hardware import HOST, get_backend
    from bc2exp.tracking.journal import Journal, NullJournal, last_segment

    config = read(folder / "resolved.yaml")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rehearsed = config.hardware.rehearsal and config.task.on_devices
    memory_bytes = int((config.hardware.memory_gib or rehearsal.MEMORY_GIB) * 2**30)
    if rehearsed:  # the modules below import torch
        rehearsal.activate(local_size, memory_bytes)

    with without_collections():
        from bc2exp.parallel.world import World
        from bc2exp.tasks import get_task

        backend = get_backend(config.hardware.backend.value if config.task.on_devices else HOST)
        task = get_task(config.task.name)

    world = World(
        rank=rank,
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=local_size,
        backend=backend,
    )
    path = folder / "metrics.jsonl"
    journal = Journal(path, last_segment(path) + 1) if rank == 0 else NullJournal()
    if rehearsed:
        journal.event("rehearsal", text=rehearsal.LABEL, devices=local_size, memory_bytes=memory_bytes)
    deterministic = config.hardware.deterministic
    world.backend.setup(world.local_rank, world.local_size, deterministic=deterministic)
    if config.task.on_devices:
        world.join()
    with phase.phase(f"task={config.task.name}"):
        outcome = task(config, folder, world, journal)
    world.leave()
    journal.event(outcome)


@contextmanager
def without_collections() -> Iterator[None]:
    """Import in the block without looking for garbage.

    There is none, and to look at all that is there again and again, as it becomes more, is up to a tenth of
    the import of torch. What has been imported is not looked at later either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def mark() -> dict[str, Any]:
    """What this rank says of itself with every sign of life: phase, step, exchanges begun."""
    name, step = phase.mark()
    # torch is imported while the first signs are given
    exchanges_begun = getattr(sys.modules.get("bc2exp.parallel.world"), "exchanges_begun", dict)
    return {"phase": name, "step": step, "exchanges": exchanges_begun()}


def die_with_parent() -> None:
    """End this process when the parent of the run ends, however it ends.

    torchrun puts ranks into sessions of their own, so no signal to a group reaches them. The standard input
    comes from the parent alone, which says nothing through it: its end is the parent's end. Where the kernel
    can also send a signal at the death of the process above, it is asked to.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def wait_for_end() -> None:
        with suppress(ConnectionError):  # where the parent died before it had heard all
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end, daemon=True).start()


def redirect_output(path: Path) -> None:
    """Send what this rank prints to its log; the terminal belongs to the parent."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def report(folder: Path, rank: int, error: BaseException) -> None:
    """Leave the error where the parent looks for it, and in the log."""
    kind, text = describe(error)
    with suppress(OSError):  # the log may lie on a full disk
        print(text, file=sys.stderr)
    path = folder / "logs" / f"rank-{rank}.error.json"
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps({"rank": rank, "time": time.time(), "kind": kind, "text": text}))
    temporary.replace(path)


def describe(error: BaseException) -> tuple[str, str]:
    """The kind of an error, and what to say of it.

    A sentence for `user` (wrong input, exit code 2), `training` (it cannot go on) and `disk` (it is full);
    the traceback for a `crash`.
    """
    if isinstance(error, UserError):
        return "user", str(error)
    if isinstance(error, TrainingError):
        return "training", str(error)
    # safetensors has an exception of its own for what the operating system said
    full = isinstance(error, OSError) and error.errno in _DISK_FULL
    if full or os.strerror(errno.ENOSPC) in str(error):
        return "disk", str(error)
    return "crash", hide("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main()
