"""The machines of a run: keys, Slurm's variables, which of the two wins, and what does not add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from bc2exp.config.load import differences, digest, finalize
from bc2exp.config.nodes import ALONE, Nodes, find_nodes, split_endpoint
from bc2exp.config.overrides import assign
from bc2exp.config.preflight import preflight
from bc2exp.config.slurm import first_host, read_slurm

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
}
NONE = {"nnodes": None, "node_rank": None, "rdzv_endpoint": None, "wait_s": 600.0}
TWO = ["hardware=2cpu", "launch.nnodes=2", "launch.node_rank=1", "launch.rdzv_endpoint=a:29500"]


def nodes(environment: dict[str, str], devices: int = 8, task: str = "pretrain", **keys: object) -> Nodes:
    hardware = {"num_devices": devices}
    plain = {"launch": {**NONE, **keys}, "hardware": hardware, "task": {"name": task}}
    return find_nodes(plain, environment)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-010,12],login1", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack[1-2]n[04-07]", "rack1n04"),
        ("rack[2,4]-ib.cluster,x", "rack2-ib.cluster"),
        ("a-b.c_d", "a-b.c_d"),
        (" node09 ", "node09"),
    ],
)
def test_the_first_host_of_slurms_short_form(text: str, host: str) -> None:
    assert first_host(text) == host


@pytest.mark.parametrize("text", ["", "gpu[", "gpu]1", "gpu[a-b]", "gpu[]", "gpu[1-]", ",a", "a,", "a b"])
def test_what_is_no_list_of_hosts_is_said_with_its_variable(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of hosts"):
        first_host(text)
    if text:
        with pytest.raises(ValueError, match=r"^SLURM_JOB_NODELIST="):
            nodes({**SLURM, "SLURM_JOB_NODELIST": text})


def test_one_machine_without_keys_and_without_slurm() -> None:
    assert nodes({}) == ALONE


def test_slurm_says_what_the_keys_do_not() -> None:
    assert nodes(SLURM) == Nodes(2, 1, "gpu03:24567", 600.0)
    assert nodes(SLURM, node_rank=0).rank == 0
    assert nodes(SLURM, rdzv_endpoint="b:1").endpoint == "b:1"
    assert nodes(SLURM, nnodes=4) == Nodes(4, 1, "gpu03:24567", 600.0)
    assert nodes(SLURM, nnodes=1) == ALONE
    assert nodes({**SLURM, "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "no [list"}) == ALONE
    assert nodes(SLURM, nnodes=1, node_rank=3, rdzv_endpoint="b:1") == ALONE


def test_a_step_may_have_fewer_machines_than_its_job() -> None:
    step = {**SLURM, "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[09-10]"}
    assert nodes(step) == Nodes(2, 1, "gpu09:24567", 600.0)
    assert nodes({**SLURM, "SLURM_STEP_NUM_NODES": "1"}) == ALONE
    job = {key: value for key, value in SLURM.items() if key != "SLURM_NNODES"}
    assert nodes(job).count == 2


def test_a_task_without_ranks_is_done_on_one_machine() -> None:
    assert nodes(SLURM, task="sync") == ALONE
    with pytest.raises(ValueError, match=r"launch\.nnodes=2: task=sync runs on one machine"):
        nodes({}, task="sync", nnodes=2)


@pytest.mark.parametrize(
    ("environment", "keys", "said"),
    [
        ({}, {"nnodes": 2, "devices": 1}, "launch.nnodes=2: does not divide hardware.num_devices=1"),
        ({}, {"nnodes": 3}, "launch.nnodes=3: does not divide hardware.num_devices=8.*launch.nnodes=2 would"),
        ({}, {"nnodes": 2}, "launch.nnodes=2: name this machine's number, launch.node_rank=0 to 1"),
        ({}, {"nnodes": 2, "node_rank": 2}, "launch.node_rank=2: launch.nnodes=2, so .* 0 to 1"),
        ({}, {"nnodes": 2, "node_rank": 0}, "launch.nnodes=2: .* launch.rdzv_endpoint=HOST:29500"),
        ({}, {"node_rank": 1}, "launch.node_rank=1: belongs to several machines; set launch.nnodes"),
        ({}, {"rdzv_endpoint": "a:1"}, "launch.rdzv_endpoint=a:1: belongs to several machines"),
        (SLURM, {"devices": 1}, "SLURM_NNODES=2: does not divide hardware.num_devices=1"),
        (SLURM, {"node_rank": 5}, "launch.node_rank=5: SLURM_NNODES=2"),
        ({**SLURM, "SLURM_NNODES": "two"}, {}, "SLURM_NNODES=two: is no number"),
        ({**SLURM, "SLURM_NODEID": "x"}, {}, "SLURM_NODEID=x: is no number"),
        ({**SLURM, "SLURM_LOCALID": "3"}, {}, "SLURM_LOCALID=3: .*--ntasks-per-node=1"),
        *(
            ({}, {"nnodes": 2, "node_rank": 0, "rdzv_endpoint": text}, "must be HOST:PORT")
            for text in ("a", "a:", ":29500", "a:b", "a:0", "a:65536", "::1:29500", "a:٣")
        ),
    ],
)
def test_what_does_not_add_up_is_one_sentence(environment: dict, keys: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        nodes(environment, **keys)
    assert "\n" not in str(error.value)


def test_an_endpoint_is_host_and_port() -> None:
    assert split_endpoint("node-1.cluster:29500") == ("node-1.cluster", 29500)
    assert split_endpoint("[fe80::1]:1") == ("fe80::1", 1)


def test_several_machines_need_a_named_run_folder_and_no_sweep(untouched: Path) -> None:
    def problems(*words: str, sweep: bool = False) -> list[str]:
        return preflight([*TWO, *words], sweep=sweep, folder=untouched).problems

    (said,) = problems()
    assert said.startswith(
        "launch.nnodes=2: several nodes need an explicit, shared run folder; hydra.run.dir="
    )
    assert problems("hydra.run.dir=shared") == []
    (said,) = problems("hydra.sweep.dir=shared", "seed=1,2", sweep=True)
    assert said.startswith("-m: a sweep runs on one machine, and this one is of 2")
    for choice in ("auto", "never"):
        assert problems(f"task.resume={choice}") == [problems()[0]]


def test_a_named_run_to_resume_is_a_named_folder(untouched: Path) -> None:
    (untouched / "run").mkdir()
    (untouched / "run" / "run.json").write_text("{}")
    assert preflight([*TWO, "task.resume=run"], sweep=False, folder=untouched).problems == []
    (untouched / "run" / "run.json").unlink()
    (untouched / "run").rmdir()


def test_the_door_tells_it(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    (said,) = preflight(["hardware=cpu"], sweep=False, folder=untouched).problems
    assert said.startswith("SLURM_NNODES=2: does not divide hardware.num_devices=1")
    assert preflight(["hardware=cpu", "launch.nnodes=1"], sweep=False, folder=untouched).problems == []


def test_the_machines_are_no_part_of_what_is_computed(
    composed: Callable[..., DictConfig], untouched: Path
) -> None:
    one, two = composed("hardware=2cpu"), composed("hardware=2cpu")
    for word in TWO[1:]:
        key, _, value = word.partition("=")
        assert assign(two, key, value) is None
    here, there = finalize(one, untouched), finalize(two, untouched)
    assert here["launch"] != there["launch"]
    assert digest(here) == digest(there)
    assert differences(here, there) == []
    there["task"]["optimizer"]["lr"] = 0.5
    there["task"]["resume"] = "never"
    assert differences(here, there) == [("task.optimizer.lr", here["task"]["optimizer"]["lr"], 0.5)]


def test_slurm_is_silent_without_its_variables() -> None:
    assert read_slurm({"SLURM_NNODES": "", "HOME": "/"}) == {}
