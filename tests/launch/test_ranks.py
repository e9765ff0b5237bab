"""How rank processes are started, and what their remains say of the cause."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bc2exp.config.nodes import Nodes
from bc2exp.hardware.probe import rank_environment
from bc2exp.launch import ranks as module
from bc2exp.launch.ranks import Failure, Ranks
from bc2exp.launch.run import DONE, FAILED, STOPPED, WRONG, conclude
from bc2exp.tracking.journal import Journal, outcome

WORDS = ("hugetlb=1", f"trim_threshold={2**34}", f"mmap_threshold={2**34}")
KEEPING = ":".join(f"glibc.malloc.{word}" for word in WORDS)
TORCHRUN = """\
W1121 21:53:13.506000 10440 api.py:1028] Sending process {told} closing signal SIGTERM
E1121 21:53:13.514000 10440 api.py:1002] failed (exitcode: 1)
bc2exp.worker FAILED
Failures:
[1]:
  time      : 2026-11-21_21:53:13
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {one} (pid: 1001)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : {zero} (pid: 1000)
"""


class Ended:
    """A process that has ended with a code."""

    def __init__(self, code):
        self.code = code

    def wait(self, timeout=None):
        return self.code


@pytest.fixture
def remains(tmp_path, monkeypatch):
    """remains(code, log, errors, num_ranks): the failure of ranks that left these."""
    (tmp_path / "logs").mkdir()
    started = []

    def start(command, **how):
        started.append((command, how))
        return Ended(0)

    monkeypatch.setattr(module.subprocess, "Popen", start)

    def remains(code, log="", errors=(), num_ranks=2):
        ranks = Ranks(tmp_path, "cpu", num_ranks)
        ranks.close()
        ranks._process = Ended(code)
        (tmp_path / "logs" / "launcher.log").write_text(log)
        for rank, (time, kind, text) in enumerate(errors):
            content = {"rank": rank, "time": time, "kind": kind, "text": text}
            (tmp_path / "logs" / f"rank-{rank}.error.json").write_text(json.dumps(content))
        return ranks.failure()

    remains.started = started
    return remains


def test_an_orderly_end_is_no_failure(remains):
    assert remains(0) is None


def test_the_first_error_in_time_is_the_cause(remains):
    errors = [(20.5, "crash", "peer lost"), (20.1, "user", "dataset.path=x: is empty\n")]
    assert remains(1, errors=errors) == Failure("user", "dataset.path=x: is empty")


def test_errors_of_an_earlier_start_are_forgotten(remains):
    remains(1, errors=[(20.5, "crash", "old")])
    assert remains(1, log="new\n").text.endswith("logs:\nnew")


def test_a_rank_killed_from_outside_comes_before_what_its_peers_say(remains):
    log = TORCHRUN.format(told=1000, zero=1, one=-9)
    assert remains(1, log, [(20.5, "crash", "peer lost")]).text == "rank 1 was killed by SIGKILL (signal 9)"


def test_the_signals_of_torchrun_itself_are_no_cause(remains):
    log = TORCHRUN.format(told=1001, zero=1, one=-15)
    assert remains(1, log, [(20.5, "crash", "the cause")]) == Failure("crash", "the cause")


def test_a_sigterm_from_outside_is_a_cause(remains):
    log = TORCHRUN.format(told=1001, zero=-15, one=-15)
    assert remains(1, log) == Failure("lost", "rank 0 was killed by SIGTERM (signal 15)")


def test_a_killed_single_rank_and_a_killed_torchrun(remains):
    assert remains(-9, num_ranks=1).text == "rank 0 was killed by SIGKILL (signal 9)"
    assert remains(-7).text == "torchrun, which started the ranks, was killed by SIGBUS (signal 7)"
    assert remains(-63, num_ranks=1).text == "rank 0 was killed by signal 63"


def test_no_more_than_the_end_of_long_logs_is_shown(remains, tmp_path):
    (tmp_path / "logs" / "rank-0.log").write_text("".join(f"line {n}\n" for n in range(100)))
    text = remains(1, log="first\n").text
    assert text.splitlines()[1:] == [f"line {n}" for n in range(80, 100)]


def test_a_full_disk_is_said_with_what_the_rank_could_say(remains, monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    silent = remains(1)
    assert silent.kind == "disk"
    assert silent.text.startswith(
        f"the disk of {tmp_path} is full (there was no room to say more); make room"
    )
    spoken = remains(1, errors=[(20.5, "disk", "[Errno 28] no room")])
    assert spoken.text.startswith(f"the disk of {tmp_path} is full ([Errno 28] no room); make room")
    assert remains(1, errors=[(20.5, "crash", "a bug")]) == Failure("crash", "a bug")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_get_the_environment_that_suits_them_unless_the_person_said_otherwise(
    remains, monkeypatch, num_ranks
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    remains(0, num_ranks=num_ranks)
    command, how = remains.started[-1]
    assert how["env"]["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in how["env"]
    assert how["env"].get("OMP_NUM_THREADS") == (None if num_ranks == 1 else "1")
    assert how["env"]["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert how["start_new_session"]
    assert ("torch.distributed.run" in command) == (num_ranks > 1)


def test_several_machines_meet_by_their_numbers_and_keep_their_own_torchrun_log(remains, tmp_path):
    stale = tmp_path / "logs" / "rank-0.error.json"
    for rank in (0, 1):
        stale.write_text("{}")
        Ranks(tmp_path, "cpu", 1, Nodes(2, rank, "zulu:29500", 1.0), "eth0").close()
        command, how = remains.started[-1]
        words = " ".join(command)
        assert "torch.distributed.run --rdzv-backend=static --nnodes=2 " in words
        assert f"--node-rank={rank} --master-addr=zulu --master-port=29500 --nproc-per-node=1 -m" in words
        assert how["stdout"].name == str(tmp_path / "logs" / f"launcher-{rank}.log")
        assert how["env"]["GLOO_SOCKET_IFNAME"] == "eth0"
        # ranks of node 0 may have reported already when those of node 1 start
        assert stale.exists() == (rank == 1)


def test_a_killed_torchrun_of_several_machines_is_told_with_its_machine(remains, tmp_path):
    ranks = Ranks(tmp_path, "cpu", 1, Nodes(2, 1, "zulu:29500", 1.0))
    ranks.close()
    ranks._process = Ended(-9)
    said = "torchrun, which started the ranks of node 1, was killed by SIGKILL (signal 9)"
    assert ranks.failure() == Failure("lost", said)


def test_what_suits_them():
    common = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "GLIBC_TUNABLES": KEEPING}
    assert rank_environment("cpu", 1, environment={}) == common
    assert rank_environment("cpu", 8, environment={}) == {**common, "OMP_NUM_THREADS": "1"}


def test_memory_that_is_freed_stays_with_the_process():
    """What the C library makes of the words; others than glibc have nothing of the kind."""
    program = """if True:
        import ctypes, mmap, resource
        malloc, free = (getattr(ctypes.CDLL(None), name) for name in ("malloc", "free"))
        malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        for _ in range(20):
            block = malloc(2**27)
            ctypes.memset(block, 1, 2**27)
            free(block)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")

    def faults(tunables: str) -> int:
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        command = [sys.executable, "-c", program]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    kept, given_back = faults(KEEPING), faults(f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={2**26}")
    assert given_back - kept > 18 * 2**27 // 2**21, "every block was taken anew"


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(journal, segment, event):
    with Journal(journal, segment) as writer:
        writer.event(event)


@pytest.mark.parametrize(("event", "code"), [("done", DONE), ("stopped", STOPPED)])
def test_the_journal_has_the_first_word_about_the_end(tmp_path, journal, event, code, capsys):
    write(journal, 0, event)
    assert conclude(tmp_path, None, 0, tmp_path) == code
    assert conclude(tmp_path, Failure("lost", "rank 1 was killed"), 0, tmp_path) == code
    assert capsys.readouterr().err == ""


def test_the_outcome_of_an_earlier_segment_is_not_that_of_this_one(tmp_path, journal):
    write(journal, 0, "stopped")
    assert conclude(tmp_path, None, 1, tmp_path) == FAILED
    assert outcome(journal)["segment"] == 1
    assert outcome(journal)["reason"] == "the ranks ended without an outcome"


def test_wrong_input_is_another_code_than_a_failure(tmp_path, journal):
    assert conclude(tmp_path, Failure("user", "a: b"), 0, tmp_path) == WRONG
    assert conclude(tmp_path, Failure("training", "nan"), 1, tmp_path) == FAILED


def test_where_even_the_outcome_cannot_be_written_it_is_failed_and_said(tmp_path, monkeypatch, capsys):
    def full(self, head, body):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "_append", full)
    assert conclude(tmp_path, Failure("disk", "full"), 0, tmp_path) == FAILED
    assert capsys.readouterr().err.splitlines() == [
        "bc2exp: full",
        f"bc2exp: the outcome could not be written to {tmp_path}/metrics.jsonl: No space left on device",
    ]
