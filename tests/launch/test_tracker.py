"""The parent's side of the tracker: how long it waits, and which run folders a sync takes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bc2exp.launch import tracker as launch
from bc2exp.storage import lock


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a" / "b"
    (folder / "logs").mkdir(parents=True)
    record = {"tracking": {"uri": "http://host", "enabled": True}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_follower_that_hangs_is_not_waited_for_longer_than_its_patience(run, monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(launch, "_command", lambda *_: command)
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    follower = launch.Tracker(run, 0.1)
    told = follower.close(give_up=lambda: False)
    assert told == (
        f"the tracker at http://host is too slow (tracking.patience_s=0.1): the run is complete in {run}; "
        f"`python -m bc2exp task=sync task.run={run}` records it later"
    )
    assert follower._process.returncode == -9


def test_a_follower_gives_way_to_the_ranks(run, monkeypatch):
    monkeypatch.setattr(launch, "_command", lambda *_: [sys.executable, "-c", "input()"])
    follower = launch.Tracker(run, 0.1)
    assert os.getpriority(os.PRIO_PROCESS, follower._process.pid) == 19
    follower.close(give_up=lambda: True)


def test_a_sync_takes_what_is_tracked_and_over(run, tmp_path):
    def another(name, **tracking):
        folder = tmp_path / "runs" / "a" / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"tracking": tracking}))
        return folder

    another("c", uri="x", enabled=False)
    living = another("d", uri="x", enabled=True)
    odd = tmp_path / "runs" / "a" / "e"
    odd.mkdir()
    (odd / "run.json").write_text("nonsense")
    with lock.hold(living / "owner.lock"):
        folders, left_out = launch.to_sync(tmp_path / "runs")
    assert folders == [run, odd]
    assert left_out == [
        "left out: 1 still running, whose own followers record them",
        "left out: 1 with tracking.enabled=false (task.run=FOLDER records one of them)",
    ]
