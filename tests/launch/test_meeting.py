"""How the parents of several machines find each other, agree, and learn that one is gone. No ranks here."""

from __future__ import annotations

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.load import digest
from bc2exp.config.nodes import Nodes
from bc2exp.hardware.probe import rank_environment
from bc2exp.launch import join, machine
from bc2exp.launch import nodes as module
from bc2exp.launch.line import Line, interface_of, is_free, listen
from bc2exp.launch.nodes import NODES_FILE, Alone, Others, as_words
from bc2exp.launch.ranks import Failure
from bc2exp.launch.terminal import StopRequests
from tests.launch.commands import BOUND, wait_for
from tests.small_run import small_plain

ENDPOINT = "127.0.0.1:29500"


def nodes(rank, count=3, wait_s=BOUND):
    return Nodes(count, rank, ENDPOINT, wait_s)


@pytest.fixture
def others(tmp_path, monkeypatch):
    """Node 0 of three, whose graces are short."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    made = Others(tmp_path, nodes(0))
    yield made
    made.end(1, "over")


@pytest.fixture
def gather(others):
    """gather(): let node 0 wait, beside the test; its result comes in `.result`."""

    def run(give_up=lambda: False):
        waiting = SimpleNamespace(result="waiting")

        def wait():
            waiting.result = others.gather(give_up)

        waiting.thread = threading.Thread(target=wait, daemon=True)
        waiting.thread.start()
        return waiting

    return run


def come(folder, rank, count=3, ready=None):
    line = join.reach(folder, nodes(rank, count), StopRequests())
    line.send(ready=ready)
    return line


def test_node_0_waits_until_every_machine_is_ready(others, gather, tmp_path):
    waiting = gather()
    one = come(tmp_path, 1)
    time.sleep(0.5)
    assert waiting.result == "waiting"
    assert one.receive() == []
    two = come(tmp_path, 2)
    waiting.thread.join(BOUND)
    assert waiting.result is None
    assert others.interface == "lo"
    others.go()
    for line in (one, two):
        assert wait_for(line.receive, "go") == [{"go": True}]


def test_who_asked_most_often_counts_and_not_the_sum(others, gather, tmp_path):
    waiting = gather()
    lines = [come(tmp_path, 1), come(tmp_path, 2)]
    waiting.thread.join(BOUND)
    for line in lines:
        line.send(stop=1)
    wait_for(lambda: not others.overdue() and others.stops, "the request")
    time.sleep(0.2)
    assert not others.overdue()
    assert others.stops == 1


def test_a_machine_that_is_not_as_node_0_ends_the_wait(gather, tmp_path):
    waiting = gather()
    come(tmp_path, 1, ready="task.steps=3 (4 on node 0)")
    waiting.thread.join(BOUND)
    assert waiting.result == Failure("user", "node 1: task.steps=3 (4 on node 0)")


def test_two_machines_of_one_number_end_the_wait(gather, tmp_path):
    waiting = gather()
    first = come(tmp_path, 1)  # kept, as a connection that nobody holds is hung up on
    with pytest.raises(UserError, match=r"launch\.node_rank=1: two machines have this number"):
        come(tmp_path, 1)
    waiting.thread.join(BOUND)
    assert waiting.result.kind == "user"
    assert first.receive() == []


def test_another_number_of_machines_is_said_on_both(gather, tmp_path):
    waiting = gather()
    with pytest.raises(UserError, match=r"launch\.nnodes=2: it is 3 on node 0"):
        come(tmp_path, 1, count=2)
    waiting.thread.join(BOUND)
    assert waiting.result.text == "node 1: launch.nnodes=2: it is 3 on node 0"


def test_a_request_to_stop_ends_the_wait(gather):
    waiting = gather(give_up=lambda: True)
    waiting.thread.join(BOUND)
    assert waiting.result.kind == "lost"
    assert "ended on request" in waiting.result.text


def test_machines_that_do_not_come_are_named(tmp_path):
    failure = Others(tmp_path, nodes(0, wait_s=0.01)).gather(lambda: False)
    assert failure.kind == "user"
    assert failure.text.startswith("launch.nnodes=3: node 1, 2 did not come within 0.01 s; ")
    with pytest.raises(UserError, match=r"node 0 was not found in 0\.01 s \(.*nodes\.json is not there\)"):
        join.reach(tmp_path / "elsewhere", nodes(1, wait_s=0.01), StopRequests())


def test_a_lost_connection_is_a_lost_machine(others, gather, tmp_path):
    waiting = gather()
    lines = [come(tmp_path, 1), come(tmp_path, 2)]
    waiting.thread.join(BOUND)
    assert not others.overdue()
    lines[1].close()
    wait_for(others.overdue, "the loss")
    settled = others.settle(Failure("crash", "connection closed by peer", 10.0))
    assert settled.kind == "lost"
    assert settled.text.startswith("node 2 was lost: ")


@pytest.mark.parametrize(
    ("own", "others_say", "cause"),
    [
        (None, [None, None], None),
        (("crash", "a", 5.0), [("crash", "b", 4.0), None], "b"),
        (("crash", "a", 3.0), [("crash", "b", 4.0), None], "a"),
        (("crash", "a", 3.0), [None, ("lost", "killed", None)], "killed"),
        (("lost", "killed", None), [("crash", "b", 4.0), ("crash", "c", 3.0)], "killed"),
        (None, [("user", "b", 4.0), None], "b"),
    ],
)
def test_the_cause_is_who_was_killed_and_else_the_first_error(
    others, gather, tmp_path, own, others_say, cause
):
    def failure(words):
        return None if words is None else Failure(*(word for word in words if word is not None))

    waiting = gather()
    lines = [come(tmp_path, rank) for rank in (1, 2)]
    waiting.thread.join(BOUND)
    for line, words in zip(lines, others_say, strict=True):
        line.send(ended=as_words(failure(words)))
    settled = others.settle(failure(own))
    assert (settled and settled.text) == cause


def test_ranks_that_lost_a_peer_wait_for_the_word_of_the_machine_that_lost_the_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", BOUND)
    others = Others(tmp_path, nodes(0, count=2))
    waiting = threading.Thread(target=others.gather, args=(lambda: False,), daemon=True)
    waiting.start()
    line = come(tmp_path, 1, count=2)
    waiting.join(BOUND)
    late = {"ended": as_words(Failure("lost", "rank 1 was killed"))}
    threading.Timer(0.5, lambda: line.send(**late)).start()
    settled = others.settle(Failure("crash", "connection closed by peer", 1.0))
    others.end(1, "")
    assert settled == Failure("lost", "rank 1 was killed")


def test_the_end_takes_the_record_away_and_reaches_every_machine(tmp_path):
    others = Others(tmp_path, nodes(0, count=2))
    threading.Thread(target=others.gather, args=(lambda: False,), daemon=True).start()
    line = come(tmp_path, 1, count=2)
    line.send(stop=1)  # unheard words must not take back what node 0 says last
    wait_for(lambda: others._ready, "node 1")
    others.end(3, "")
    assert not (tmp_path / NODES_FILE).exists()
    assert wait_for(line.receive, "the end")[-1] == {"end": 3, "text": ""}
    assert wait_for(lambda: line.receive() or line.lost, "the end of the connection") is True


@pytest.mark.parametrize("left", ["closed port", "another server", "another token"])
def test_the_record_of_an_earlier_start_leads_nowhere_and_the_next_is_waited_for(tmp_path, monkeypatch, left):
    monkeypatch.setattr(join, "_ANSWER_SECONDS", 0.2)
    requests = StopRequests()
    server = listen()
    port = server.getsockname()[1]
    if left == "closed port":
        server.close()
    elif left == "another server":
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0\r\n"), daemon=True).start()
    stale = Others(tmp_path, nodes(0, count=2)) if left == "another token" else None
    record = {"token": "old", "port": stale._listener.getsockname()[1] if stale else port, "nnodes": 2}
    (tmp_path / NODES_FILE).write_text(json.dumps(record))
    if stale:
        threading.Thread(target=stale.gather, args=(lambda: bool(requests.count),), daemon=True).start()
    found = []
    guest = threading.Thread(
        target=lambda: found.append(join.reach(tmp_path, nodes(1, count=2), requests)), daemon=True
    )
    guest.start()
    time.sleep(0.5)
    assert found == []
    fresh = Others(tmp_path, nodes(0, count=2))
    # From now on an answer may take its time; who still waits for the other server is hung up on.
    monkeypatch.setattr(join, "_ANSWER_SECONDS", BOUND)
    server.close()
    threading.Thread(target=fresh.gather, args=(lambda: False,), daemon=True).start()
    guest.join(BOUND)
    found[0].send(ready=None)
    wait_for(lambda: fresh._ready, "node 1")
    requests.count = 1


def test_what_differs_is_named_with_both_values(tmp_path):
    plain = small_plain(tmp_path / "here")
    (tmp_path / "run.json").write_text(json.dumps({"digest": digest(plain)}))
    (tmp_path / "resolved.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    two = Nodes(1, 1, ENDPOINT, 1.0)
    assert join._problem(tmp_path, plain, two) is None
    plain["launch"]["node_rank"] = 7
    assert join._problem(tmp_path, plain, two) is None
    plain["seed"], plain["task"]["global_batch"] = 7, 16
    said = join._problem(tmp_path, plain, two)
    assert said.startswith("task.global_batch=16 (8 on node 0), seed=7 (42 on node 0): the machines of a run")


def test_each_machine_must_have_its_own_share_of_the_devices(monkeypatch, tmp_path):
    plain = small_plain(tmp_path, "hardware=8cpu")
    monkeypatch.setattr(machine, "count_devices", lambda backend: 4)
    machine.require(plain, nodes(1, count=2))
    with pytest.raises(UserError, match="hardware=8cpu: asks for 8 cpu devices, this machine has 4"):
        machine.require(plain, nodes(0, count=1))
    monkeypatch.setattr(machine, "count_devices", lambda backend: 3)
    with pytest.raises(UserError, match="asks for 4 cpu devices on each of 2 machines, this machine has 3"):
        machine.require(plain, nodes(1, count=2))


def test_a_port_in_use_is_said_on_node_0_before_anything_starts(tmp_path):
    plain = small_plain(tmp_path, "hardware=2cpu")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert not is_free(port)
        with pytest.raises(UserError, match=f"launch.rdzv_endpoint=a:{port}: this port is in use here"):
            machine.require(plain, Nodes(2, 0, f"a:{port}", 1.0))
        machine.require(plain, Nodes(2, 1, f"a:{port}", 1.0))


def test_words_are_objects_and_anything_else_is_a_lost_peer():
    one, two = socket.socketpair()
    line = Line.__new__(Line)
    line.lost, line._heard, line._connection = False, b"", one
    two.sendall(b'{"a": 1}\n{"b"')
    assert line.receive() == [{"a": 1}]
    two.sendall(b": 2}\n")
    assert line.receive() == [{"b": 2}]
    two.sendall(b"[1]\n")
    assert line.receive() == []
    assert line.lost


def test_ranks_talk_through_the_interface_that_leads_to_the_other_machines():
    assert interface_of("127.0.0.1") == interface_of("::ffff:127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert rank_environment("cpu", 1, "eth7")["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in rank_environment("cpu", 8)


def test_one_machine_has_no_others():
    alone, failure = Alone(), Failure("lost", "x")
    assert alone.gather(lambda: True) is None
    assert (alone.overdue(), alone.stops, alone.interface) == (False, 0, None)
    assert alone.settle(failure) is failure
