"""Two machines: the numbers and the record of one, and both end when either is killed, stopped or cut off."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import time
from types import SimpleNamespace

import pytest

from bc2exp.tracking import mlflow as tracker
from tests.launch import machines
from tests.launch.commands import (
    EXACT,
    STEPS,
    assert_same_training,
    events,
    hold,
    hold_until_stop,
    identity,
    processes,
    values,
    wait_for,
    weights,
)
from tests.pages import commands, read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(machines.missing()), reason=machines.missing() or "two machines"),
]

PAIR = (*STEPS, "hardware=2cpu", "parallelism=ddp")
FOUR = (*STEPS, "hardware=4cpu", "parallelism=ddp", "tracking.enabled=true")
TRACKED = (*PAIR, "tracking.enabled=true")
LIMIT = 30.0
"""Seconds within which both machines must have ended after one was killed."""

NAMED = """
import pathlib, socket
pathlib.Path(ASIDE, f"rank-{RANK}-{socket.gethostname()}").touch()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """cluster(): two new machines."""
    made = []
    numbers = itertools.count()

    def make():
        made.append(machines.Machines(next(numbers), tmp_path_factory.mktemp("machines")).open())
        return made[-1]

    yield make
    for each in made:
        each.close()


def torchrun(command):
    """The torchrun of the machine on which a command was typed: the child of its parent."""
    found = [pid for pid in processes("torch.distributed.run") if parent_of(pid) == command.process.pid]
    assert len(found) == 1, found
    return found[0]


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def runs_in_mlflow(launch):
    client = tracker.MlflowClient(f"sqlite:///{launch.folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments)


@pytest.fixture(scope="module")
def calm(launches, cluster):
    """Four ranks on two machines, node 1 started first; then four on one."""
    launch, single, pair = launches("calm"), launches("single"), cluster()
    second = pair.start(launch, 1, *FOUR, inject=NAMED)
    wait_for(lambda: "waiting for node 0" in second.out, "node 1 waiting")
    first = pair.start(launch, 0, *FOUR, inject=NAMED)
    codes = first.wait(), second.wait()
    first.nothing_left()
    alone = single.run(*FOUR)
    return SimpleNamespace(
        launch=launch, first=first, second=second, codes=codes, alone=single.only_run(), single=alone
    )


def test_two_machines_train_what_one_trains_with_as_many_ranks(calm):
    assert calm.codes == (0, 0), f"{calm.first.err}\n{calm.second.err}"
    run = calm.launch.only_run()
    for metric in EXACT:
        assert values(run, metric) == values(calm.alone, metric)
    assert len(values(run, "train/loss")) == 12
    assert weights(run) == weights(calm.alone)


def test_the_digest_is_that_of_one_machine(calm):
    digests = [
        json.loads((run / "run.json").read_text())["digest"] for run in (calm.launch.only_run(), calm.alone)
    ]
    assert digests[0] == digests[1]


def test_rank_0_is_on_node_0_whatever_the_names(calm):
    names = sorted(path.name for path in calm.launch.aside.glob("rank-*"))
    assert names == ["rank-0-zulu", "rank-1-zulu", "rank-2-alpha", "rank-3-alpha"]


def test_there_is_one_journal_and_one_run_in_mlflow(calm):
    (record,) = runs_in_mlflow(calm.launch)
    assert record.info.status == "FINISHED"
    assert record.data.tags["bc2exp.nnodes"] == "2"
    run = calm.launch.only_run()
    assert record.data.tags["bc2exp.run"] == identity(run)
    for event in ("start", "data", "done"):
        assert len(events(run, event)) == 1
    logs = {path.name for path in (run / "logs").iterdir()}
    ranks = {f"rank-{rank}.log" for rank in range(4)}
    assert logs == {"launcher-0.log", "launcher-1.log", "tracker.log", *ranks}
    assert not (run / "nodes.json").exists()


def test_node_1_shows_little(calm):
    where = calm.launch.only_run().relative_to(calm.launch.folder)
    expected = f"node 1 of 2: waiting for node 0 at 10.77.0.1, run {where}\nnode 1 of 2: done\n"
    assert calm.second.out == expected
    assert calm.second.err == ""


KILLS = {
    "the parent of node 0": ("parent", 0, "node 0 was lost: its command was killed"),
    "the parent of node 1": ("parent", 1, "node 1 was lost: its command was killed"),
    "torchrun of node 0": (
        "torchrun",
        0,
        "torchrun, which started the ranks of node 0, was killed",
    ),
    "torchrun of node 1": (
        "torchrun",
        1,
        "torchrun, which started the ranks of node 1, was killed",
    ),
    "rank 0": ("rank", 0, "rank 0 was killed by SIGKILL"),
    "rank 1": ("rank", 1, "rank 1 was killed by SIGKILL"),
    "the cable": ("cable", 1, "was lost: its command was killed, or the machine or the network is gone"),
}


@pytest.mark.parametrize("case", list(KILLS))
def test_both_end_when_one_is_killed(case, launch, cluster):
    what, node, said = KILLS[case]
    pair = cluster()
    both = [pair.start(launch, number, *TRACKED, inject=hold(5)) for number in (0, 1)]
    launch.held(5, both[1])
    run = launch.only_run()
    wait_for((run / "tracking.json").exists, "the run in MLflow")
    begin = time.monotonic()
    if what == "cable":
        pair.cut()
    else:
        victim = {"parent": both[node].process.pid, "rank": None, "torchrun": None}[what]
        victim = victim or (launch.rank(node) if what == "rank" else torchrun(both[node]))
        os.kill(victim, signal.SIGKILL)
    codes = [command.wait() for command in both]
    seconds = time.monotonic() - begin
    for command in both:
        command.nothing_left()
    print(f"{case}: both ended after {seconds:.1f} s, nothing left after {time.monotonic() - begin:.1f} s")
    expected = [1, 1]
    if what == "parent":
        expected[node] = -9
    assert codes == expected, f"{both[0].err}\n{both[1].err}"
    assert seconds < LIMIT
    for number, command in enumerate(both):
        if what != "parent" or number != node:
            first = command.err.splitlines()[0]
            assert first.startswith("bc2exp: "), command.err
            assert said in first
            assert "Traceback" not in command.err
    (record,) = runs_in_mlflow(launch)
    assert record.info.status == "FAILED"
    failed = events(run, "failed")
    if (what, node) == ("parent", 0):
        assert failed == []  # nobody is left to write it; a journal without an outcome is a failed run
    else:
        assert [said in event["reason"] for event in failed] == [True]


def test_a_request_to_stop_on_either_machine_or_on_both_saves_and_ends_both(launches, cluster):
    for nodes in ((1,), (0,), (0, 1)):
        launch, pair = launches(f"stopped-{'-'.join(map(str, nodes))}"), cluster()
        both = [pair.start(launch, number, *TRACKED, inject=hold_until_stop(5)) for number in (0, 1)]
        launch.held(5, both[0])
        for node in nodes:  # a batch system tells every machine at once, and means it once
            both[node].process.send_signal(signal.SIGTERM)
        assert [command.wait() for command in both] == [3, 3], f"{both[0].err}\n{both[1].err}"
        for command in both:
            command.nothing_left()
        run = launch.only_run()
        assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-00000005"
        assert len(events(run, "stopped")) == 1
        assert [record.info.status for record in runs_in_mlflow(launch)] == ["KILLED"]
        assert "stopped, with a checkpoint saved" in both[1].out


def test_after_a_kill_the_same_commands_go_on_though_the_record_of_the_killed_start_is_there(
    launch, launches, cluster
):
    pair, calm, whole = cluster(), launches("whole"), cluster()
    both = [pair.start(launch, number, *PAIR, inject=hold(7)) for number in (0, 1)]
    launch.held(7, both[0])
    both[0].kill_parent()
    assert both[1].wait() == 1
    both[1].nothing_left()
    run = launch.only_run()
    before = (run / "nodes.json").read_text()
    again = pair.start(launch, 1, *PAIR)
    wait_for(lambda: "waiting for node 0" in again.out, "node 1 waiting")
    time.sleep(1)  # it must not take the record of the killed start for this one's
    assert again.process.poll() is None
    assert (run / "nodes.json").read_text() == before
    first = pair.start(launch, 0, *PAIR)
    assert [first.wait(), again.wait()] == [0, 0], f"{first.err}\n{again.err}"
    assert "resumed from step 4" in first.out
    unbroken = [whole.start(calm, number, *PAIR) for number in (0, 1)]
    assert [command.wait() for command in unbroken] == [0, 0]
    assert_same_training(run, calm.only_run())


def test_another_configuration_on_node_1_ends_both_and_names_the_key(launch, cluster):
    pair = cluster()
    first = pair.start(launch, 0, *PAIR)
    second = pair.start(launch, 1, *PAIR[1:], "task.steps=13")
    assert [first.wait(), second.wait()] == [2, 2]
    said = "task.steps=13 (12 on node 0): the machines of a run need the same command"
    assert first.err.startswith(f"bc2exp: node 1: {said}")
    assert second.err.startswith(f"bc2exp: {said}")
    assert [event["kind"] for event in events(launch.only_run(), "failed")] == ["user"]


def words_of(command):
    """The overrides of a command line of the guide or the job."""
    words = shlex.split(command)
    return words[words.index("bc2exp") + 1 :]


def test_the_commands_of_the_guide_do_what_it_says(launch, cluster):
    pair = cluster()
    typed = [line for line in commands("docs/guides/several_machines.md") if "-m bc2exp" in line]
    both = [launch.start(*STEPS, *words_of(line), machine=pair.on(node)) for node, line in enumerate(typed)]
    assert [command.wait() for command in both] == [0, 0], f"{both[0].err}\n{both[1].err}"
    assert f"```\n{both[1].out}```" in read("docs/guides/several_machines.md")
    assert (launch.folder / "runs" / "both" / "weights").is_dir()


def test_the_slurm_job_takes_its_machines_from_slurm_and_goes_on_with_one(launch, cluster):
    pair = cluster()
    (job,) = [line for line in read("docs/examples/two_nodes.sbatch").splitlines() if line.startswith("srun")]
    both = []
    for node in (0, 1):
        slurm = {"NNODES": 2, "NODEID": node, "JOB_NODELIST": "node[0-1]", "JOB_ID": 98765, "LOCALID": 0}
        variables = ["env", *(f"SLURM_{name}={value}" for name, value in slurm.items())]
        machine = [*variables, *pair.on(node)]
        both.append(launch.start(*STEPS, *words_of(job), machine=machine, inject=hold_until_stop(5)))
    launch.held(5, both[0])
    for command in both:
        command.process.send_signal(signal.SIGTERM)
    assert [command.wait() for command in both] == [3, 3], f"{both[0].err}\n{both[1].err}"
    alone = launch.run(*STEPS, *words_of(job))
    assert "resumed from step 5" in alone.out
    run = launch.folder / "runs" / "two-nodes"
    assert list(values(run, "train/loss")) == list(range(1, 13))
