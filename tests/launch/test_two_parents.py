"""Two parents on one host that take each other for machines: no root needed, so this much is always tried.

`test_two_machines` has the rest, with a network and a host name for each.
"""

from __future__ import annotations

import signal
import socket

import pytest

from tests.launch.commands import STEPS, events, hold_until_stop, values

pytestmark = pytest.mark.slow  # two machines of one, each with a parent of its own


def test_a_run_of_two_parents_stopped_by_the_second_saves_and_ends_both(launch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [*STEPS, "hardware=2cpu", "launch.nnodes=2", f"launch.rdzv_endpoint=127.0.0.1:{port}"]
    words.append("hydra.run.dir=runs/two/parents")
    inject = hold_until_stop(5)
    second = launch.start(*words, "launch.node_rank=1", inject=inject)
    first = launch.start(*words, "launch.node_rank=0", inject=inject)
    launch.held(5, first)
    second.process.send_signal(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [3, 3], f"{first.err}\n{second.err}"
    for command in (first, second):
        command.nothing_left()
    run = launch.only_run()
    assert list(values(run, "train/loss")) == [1, 2, 3, 4, 5]
    assert [event["world_size"] for event in events(run, "start")] == [2]
    assert len(events(run, "stopped")) == 1
    assert (run / "checkpoints" / "step-00000005").is_dir()
    assert second.out.splitlines() == [
        "node 1 of 2: waiting for node 0 at 127.0.0.1, run runs/two/parents",
        "asking node 0 to stop after this step",
        "node 1 of 2: stopped, with a checkpoint saved",
    ]
    names = {path.name for path in (run / "logs").iterdir()}
    assert names == {"launcher-0.log", "launcher-1.log", "rank-0.log", "rank-1.log"}
