"""A rank at its end: what it reports, and that it does not outlive its parent."""

from __future__ import annotations

import errno
import gc
import json
import socket
import subprocess
import sys

import pytest

from bc2exp.config.errors import UserError
from bc2exp.train import TrainingError
from bc2exp.worker import describe, report, without_collections


def test_the_kinds_of_errors():
    assert describe(UserError("a: b")) == ("user", "a: b")
    assert describe(TrainingError("step 3")) == ("training", "step 3")
    for full in (
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("No space left on device"),
    ):
        assert describe(full) == ("disk", str(full))
    try:
        raise KeyError("exp_avg")
    except KeyError as error:
        kind, text = describe(error)
    assert kind == "crash"
    assert text.startswith("Traceback")
    assert text.endswith("KeyError: 'exp_avg'\n")


def test_a_report_is_whole_or_not_there(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    report(tmp_path, 3, UserError("这 is wrong"))
    content = json.loads((tmp_path / "logs" / "rank-3.error.json").read_text())
    assert (content["rank"], content["kind"], content["text"]) == (3, "user", "这 is wrong")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank-3.error.json"]
    assert capsys.readouterr().err == "这 is wrong\n"


@pytest.mark.parametrize("unheard", [False, True])
def test_a_rank_ends_with_the_process_at_the_other_end_of_its_standard_input(unheard):
    code = "import time, bc2exp.worker as w; w.die_with_parent(); print(1); time.sleep(3600)"
    mine, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=subprocess.PIPE) as rank:
        assert rank.stdout.read(1) == b"1"
        assert rank.poll() is None
        if unheard:  # then the end comes as an error
            theirs.sendall(b"a sign of life")
        theirs.close()
        mine.close()
        assert rank.wait(60) == -9


def test_garbage_is_collected_again_after_the_imports():
    with without_collections():
        assert not gc.isenabled()
    try:
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
