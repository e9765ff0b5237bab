"""Trainings beside a real MLflow server that is away, slow, silent or answers 500: each ends with 0, and in
the end MLflow has what the journal has, no gap and no duplicate. The ranks never speak to it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from tests.launch.commands import STEPS, gates, identity, wait_for
from tests.tracking.servers import Proxy, history, journalled, mlflow_server, models, only_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # seven trainings and a server

SHORT = "tracking.patience_s=1"

LOOK = """
import json, pathlib, sys
from bc2exp.train.trainer import Trainer
before = Trainer._record
def look(self, step, values):
    before(self, step, values)
    fd = pathlib.Path("/proc/self/fd")
    ends = [os.readlink(each) for each in fd.iterdir() if each.exists() or each.is_symlink()]
    inodes = [end[8:-1] for end in ends if end.startswith("socket:")]
    lines = [line.split() for name in ("tcp", "tcp6") for line in open("/proc/self/net/" + name)]
    ports = [int(line[2].rpartition(":")[2], 16) for line in lines if line[9] in inodes]
    found = {"ports": ports, "modules": sorted(set(sys.modules) & {"mlflow", "requests", "sqlalchemy"})}
    pathlib.Path(ASIDE, "seen-" + str(step)).write_text(json.dumps(found))
Trainer._record = look
"""


def tracker_log(run):
    return (run / "logs" / "tracker.log").read_text()


@pytest.fixture(scope="module")
def story(launches, tmp_path_factory):
    """Seven trainings, each behind a proxy of its own before one server, three at a time or fewer."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        launch = launches("faults")
        proxies = {}

        def start(name, number, *words, mode="pass", seconds=0.0, inject="", listening=True):
            proxies[name] = Proxy(server, mode, seconds)
            if listening:
                proxies[name].open()
            uri = f"tracking.uri={proxies[name].address}"
            enabled = f"tracking.enabled={str(name != 'offline').lower()}"
            return launch.start(*STEPS, enabled, uri, f"seed={number}", *words, inject=inject)

        # Away at the start; comes while it trains.
        first = start("away at start", 1, inject=gates(3), listening=False)
        launch.held(3, first)
        wait_for(lambda: "the training goes on" in tracker_log(run_of(launch, 1)), "the complaint")
        proxies["away at start"].open()
        launch.go(3)
        # Recorded, then away in the middle, and back before the end.
        middle = start("away in the middle", 2, inject=gates(5, 9))
        launch.held(5, middle)
        record = run_of(launch, 2) / "tracking.json"
        wait_for(record.exists, "the record of the run")
        proxies["away in the middle"].away()
        launch.go(5)
        launch.held(9, middle)
        wait_for(lambda: "the training goes on" in tracker_log(run_of(launch, 2)), "the complaint")
        proxies["away in the middle"].open()
        launch.go(9)
        ended = {"away at start": first.wait(), "away in the middle": middle.wait()}
        # Answers 500, having done what it was asked or not, until step 9.
        wrong = start("500", 3, inject=gates(5, 9), mode="error")
        slow = start("slow", 4, mode="slow", seconds=0.25)
        launch.held(5, wrong)
        wait_for(lambda: len(proxies["500"].asked) > 2, "requests that were answered 500")
        proxies["500"].mode = "lost"
        launch.go(5)
        launch.held(9, wrong)
        proxies["500"].mode = "pass"
        launch.go(9)
        ended |= {"500": wrong.wait(), "slow": slow.wait()}
        # Away or silent for good.
        gone = start("away for good", 5, SHORT, listening=False)
        hangs = start("hangs", 6, SHORT, mode="hang", inject=LOOK)
        ended |= {"away for good": gone.wait(), "hangs": hangs.wait()}
        # Nobody is to hear of it.
        offline = start("offline", 7)
        ended |= {"offline": offline.wait()}
        told = {"away for good": gone, "hangs": hangs, "away at start": first, "slow": slow}
        yield SimpleNamespace(launch=launch, server=server, proxies=proxies, ended=ended, told=told)
        for proxy in proxies.values():
            proxy.away()


NAMES = ("away at start", "away in the middle", "500", "slow", "away for good", "hangs", "offline")


def run_of(launch, seed):
    (found,) = [run for run in launch.runs() if f"seed: {seed}\n" in (run / "resolved.yaml").read_text()]
    return found


def whole(story, name):
    """MLflow has the run once, finished, exactly as its journal has it."""
    run = run_of(story.launch, NAMES.index(name) + 1)
    record = only_record(story.server, identity(run))
    expected = journalled(run)
    assert len(expected["train/loss"]) == 12
    assert history(story.server, record.info.run_id) == expected
    assert record.info.status == "FINISHED"
    kept = [model.name for model in models(story.server, record) if model.tags["bc2exp.state"] == "there"]
    assert kept == sorted(path.name for path in (run / "checkpoints").iterdir())


def test_every_run_ends_well(story):
    assert story.ended == dict.fromkeys(NAMES, 0)


@pytest.mark.parametrize("name", NAMES[:4])
def test_the_journal_is_replayed_by_itself(story, name):
    whole(story, name)
    if name in story.told:
        assert story.told[name].err == ""


@pytest.mark.parametrize("name", ["away for good", "hangs"])
def test_the_journal_is_replayed_by_sync(story, name):
    run, proxy = run_of(story.launch, NAMES.index(name) + 1), story.proxies[name]
    (line,) = story.told[name].err.splitlines()
    assert line.startswith(f"bc2exp: the tracker at {proxy.address} ")
    assert line.endswith(
        f": the run is complete in {run}; `python -m bc2exp task=sync task.run={run}` records it later"
    )
    proxy.mode = "pass"
    if name == "away for good":
        proxy.open()
    assert "sync: 1 run folder recorded" in story.launch.run("task=sync", f"task.run={run}").out
    whole(story, name)


def test_ranks_never_speak_to_the_tracker(story):
    """Whatever it does, it cannot reach them: no rank has a connection to it, or the library for one."""
    proxy = story.proxies["hangs"]
    assert proxy.asked, "the follower did ask"
    found = [json.loads(file.read_text()) for file in story.launch.aside.glob("seen-*")]
    assert len(found) == 12
    assert all(each["modules"] == [] for each in found)
    assert not any(int(proxy.address.rpartition(":")[2]) in each["ports"] for each in found)


def test_a_run_without_tracking_is_recorded_when_somebody_asks(story):
    """`task=sync` takes what is tracked; a folder that is named, in any case, and into the tracker named."""
    name, elsewhere = "offline", f"sqlite:///{story.launch.folder}/elsewhere.db"
    run = run_of(story.launch, 7)
    assert story.proxies[name].asked == []
    assert not (run / "tracking.json").exists()
    out = story.launch.run("task=sync").out
    assert "left out: 1 with tracking.enabled=false (task.run=FOLDER records one of them)" in out
    assert not (run / "tracking.json").exists()
    story.launch.run("task=sync", f"task.run={run}", "tracking.uri=sqlite:///elsewhere.db")
    record = only_record(elsewhere, identity(run))
    assert history(elsewhere, record.info.run_id) == journalled(run)
    assert json.loads((run / "tracking.json").read_text())["uri"] == elsewhere
    assert os.listdir(story.launch.folder / "mlartifacts" / "pretrain")
