"""The journal loses at most the line that a kill tore, and says how a run ended."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys

import pytest

from bc2exp.tracking import journal
from bc2exp.tracking.journal import Journal, NullJournal, Tail, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_what_is_written_is_read(path):
    with Journal(path, 2) as log:
        log.event("data", name="数据", path=None, tokens=7)
        log.metrics(3, {"train/loss": 4.1, "train/lr": 1e-6})
    data, metrics = read(path)
    assert {key: data[key] for key in data if key != "time"} == {
        "event": "data", "segment": 2, "name": "数据", "path": None, "tokens": 7,
    }  # fmt: skip
    assert metrics["metrics"] == {"train/loss": 4.1, "train/lr": 1e-6}
    assert (metrics["step"], metrics["segment"]) == (3, 2)
    assert abs(metrics["time"] - os.stat(path).st_mtime) < 5


def test_values_that_json_does_not_have(path):
    with Journal(path, 0) as log:
        log.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0, "e": 1 / 3})
        log.event("failed", step=1, loss=math.nan)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert raw[0]["metrics"]["a"] == "nan"
    assert raw[1]["loss"] == "nan"
    values = next(read(path))["metrics"]
    assert math.isnan(values["a"])
    assert (values["b"], values["c"], values["e"]) == (math.inf, -math.inf, 1 / 3)
    assert math.copysign(1, values["d"]) == -1


@pytest.mark.parametrize(
    "torn", [b"{", b'{"step": 2, "metrics": {"train/loss": 4', b"\0\0\0\0", b"x" * 200_000]
)
def test_a_torn_last_line_is_left_out_and_cut_off(path, torn):
    with Journal(path, 0) as log:
        log.metrics(1, {"train/loss": 5.0})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [record["step"] for record in read(path)] == [1]
    assert journal.last_segment(path) == 0
    with Journal(path, 1) as log:
        assert path.read_bytes() == whole
        log.metrics(2, {"train/loss": 4.0})
    assert [record["step"] for record in read(path)] == [1, 2]


def test_a_journal_that_is_one_torn_line(path):
    path.write_bytes(b'{"step"')
    Journal(path, 0).close()
    assert path.read_bytes() == b""


def test_a_writer_that_is_killed_tears_at_most_one_line(path):
    code = """
import itertools, sys
from bc2exp.tracking.journal import Journal
log = Journal(sys.argv[1], 0)
for step in itertools.count(1):
    log.metrics(step, {"train/loss": 1 / step})
    if step == 300:
        print(flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = [record["step"] for record in read(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 300


def test_a_full_disk_tears_no_line(path):
    log = Journal(path, 0)
    log.metrics(1, {"train/loss": 5.0})
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            log.metrics(2, {"train/loss": 4.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert path.stat().st_size == size
    log.metrics(2, {"train/loss": 4.0})
    assert [record["step"] for record in read(path)] == [1, 2]


def test_each_line_is_one_write(path, monkeypatch):
    log = Journal(path, 0)
    writes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(data), write(fd, data))[1])
    log.metrics(1, {"train/loss": 5.0})
    log.event("done", step=1)
    assert [data.count(b"\n") for data in writes] == [1, 1]


def test_following(path):
    tail = Tail(path)
    assert tail.poll() == []
    with Journal(path, 0) as log:
        log.metrics(1, {"train/loss": 5.0})
        log.metrics(2, {"train/loss": 4.0})
        assert [record["step"] for record in tail.poll()] == [1, 2]
        assert tail.poll() == []
        with open(path, "ab") as file:
            file.write(b'{"step": 3, "time": 0, "seg')
            file.flush()
            assert tail.poll() == []
            file.write(b'ment": 0, "metrics": {}}\n')
        assert [record["step"] for record in tail.poll()] == [3]


def test_a_tail_survives_that_a_torn_line_is_cut_off(path):
    with Journal(path, 0) as log:
        log.metrics(1, {"train/loss": 5.0})
    with open(path, "ab") as file:
        file.write(b'{"torn by a very long line that is never finis')
    tail = Tail(path)
    assert len(tail.poll()) == 1
    with Journal(path, 1) as log:
        log.metrics(2, {"a": 1.0})
    assert [record["step"] for record in tail.poll()] == [2]


@pytest.mark.parametrize("line", [b"{nonsense\n", b"[1]\n", b'{"metrics": 3}\n', b"\xff\n"])
def test_a_whole_line_that_is_no_record(path, line):
    with Journal(path, 0) as log:
        log.event("note", text="x")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl: the line at byte {size}"):
        list(read(path))


def test_outcomes(path):
    assert journal.outcome(path) is None
    assert journal.last_segment(path) == -1
    with Journal(path, 0) as log:
        log.event("start", step=0, world_size=1)
        assert journal.outcome(path) is None
        log.event("stopped", step=5, reason="on request")
        log.event("note", text="later")
        assert journal.outcome(path)["event"] == "stopped"
    with Journal(path, 1) as log:
        log.event("start", step=5, world_size=1)
        assert journal.outcome(path) is None, "the resumed run has not ended"
        log.event("failed", step=6, reason="x")
        log.event("done", step=6)
        log.metrics(6, {"eval/loss": 1.0})
    assert journal.outcome(path)["event"] == "done"
    assert journal.last_segment(path) == 1


def test_the_null_journal_takes_the_same_calls():
    with NullJournal() as log:
        log.metrics(1, {"train/loss": 5.0})
        log.event("data", name="x")
    assert NullJournal.segment == 0
