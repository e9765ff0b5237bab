"""After kill -9, the very same command ends where the run that was not killed ended, bit by bit."""

from __future__ import annotations

import shutil

import pytest
from safetensors.numpy import load_file

from tests.launch.commands import Launch, events, identity, values, weights

EXACT = ("train/loss", "train/grad_norm", "train/lr", "eval/loss")

HOLD = """
import pathlib, time
from bc2exp.train.trainer import Trainer
record = Trainer._record
def held(self, step, values):
    record(self, step, values)
    if step == {step}:
        pathlib.Path(ASIDE, "held").touch()
        time.sleep(3600)
Trainer._record = held
"""
"""Rank 0 comes to a stand after it has recorded a step, the others wait for it in the next."""


def kill_at(launch, step, *words):
    command = launch.start(*words, inject=HOLD.format(step=step))
    launch.seen("held", command)
    command.kill_all()


def assert_same_run(run, undisturbed):
    for metric in EXACT:
        assert values(run, metric) == values(undisturbed, metric)
    assert len(values(run, "train/loss")) == 12
    assert weights(run) == weights(undisturbed)
    last = "checkpoints/step-00000012"
    for file in (undisturbed / last).glob("*.safetensors"):
        assert (run / last / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("killed_at", "goes_on_after"), [(2, 0), (7, 4)])
def test_the_same_command_after_a_kill(launch, undisturbed, steps, killed_at, goes_on_after):
    kill_at(launch, killed_at, *steps)
    run = launch.only_run()
    before = identity(run)
    assert max(values(run, "train/loss")) == killed_at
    command = launch.run(*steps)
    assert launch.only_run() == run
    assert identity(run) == before
    assert f"resuming: {run.relative_to(launch.folder)}" in command.out
    assert ("resumed from step 4" in command.out) == (goes_on_after == 4)
    assert [event["step"] for event in events(run, "start")] == [0, goes_on_after]
    assert min(values(run, "train/loss", segment=1)) == goes_on_after + 1
    assert_same_run(run, undisturbed)


def test_the_same_command_after_a_kill_of_two_ranks(launch, undisturbed_pair, steps):
    kill_at(launch, 6, *steps, "hardware=2cpu")
    command = launch.run(*steps, "hardware=2cpu")
    assert "resumed from step 4" in command.out
    assert_same_run(launch.only_run(), undisturbed_pair)


def test_two_processes_end_where_one_ends(undisturbed, undisturbed_pair):
    for metric in EXACT:
        assert values(undisturbed_pair, metric) == pytest.approx(values(undisturbed, metric), rel=1e-5)
    name = "model-00001-of-00001.safetensors"
    one, two = (load_file(run / "weights" / name) for run in (undisturbed, undisturbed_pair))
    for tensor in one:
        assert two[tensor] == pytest.approx(one[tensor], rel=0, abs=1e-5)


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A launch folder of its own with the undisturbed run in it: (launch, run folder)."""
    made = Launch(tmp_path / "copied")
    run = made.folder / undisturbed.relative_to(undisturbed.parents[2])
    shutil.copytree(undisturbed, run)
    yield made, run
    made.close()


def test_a_finished_run_goes_on_with_more_steps(copied, steps):
    launch, run = copied
    before, first = identity(run), weights(run)
    command = launch.run("task.steps=14", *steps[1:], f"task.resume={run.relative_to(launch.folder)}")
    assert "resumed from step 12" in command.out
    assert launch.only_run() == run
    assert identity(run) == before
    assert list(values(run, "train/loss")) == list(range(1, 15))
    assert list(values(run, "train/loss", segment=1)) == [13, 14]
    assert weights(run) != first
    assert events(run, "done")[-1]["segment"] == 1


def test_never_begins_anew_and_the_unfinished_run_waits(launch, undisturbed, steps):
    kill_at(launch, 5, *steps)
    killed = launch.only_run()
    command = launch.run(*steps, "task.resume=never")
    assert "resum" not in command.out
    other = next(run for run in launch.runs() if run != killed)
    assert identity(other) != identity(killed)
    assert_same_run(other, undisturbed)
    assert max(values(killed, "train/loss")) == 5


def test_a_run_of_another_model_is_not_continued_and_not_touched(copied, steps):
    launch, run = copied
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    command = launch.run(*steps, f"task.resume={run}", "model.hidden_size=64", code=2)
    assert "that run has model.hidden_size=32, this configuration 64" in command.err
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
