"""After kill -9, the very same command ends where the run that was not killed ended, bit by bit."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from tests.launch.commands import (
    STEPS,
    assert_same_training,
    events,
    hold,
    identity,
    values,
    wait_for,
    weights,
)


@pytest.fixture(scope="module")
def story(launches):
    """Two runs that are killed, one before and one after its first checkpoint; an unbroken run beside the
    second, by task.resume=never; then, for both, the same command again."""
    early, late = launches("early"), launches("late")
    commands = [
        (early, early.start(*STEPS, inject=hold(2)), 2),
        (late, late.start(*STEPS, inject=hold(7)), 7),
    ]
    for where, command, step in commands:
        where.held(step, command)
    lasting, before = late.only_run(), sorted(late.folder.rglob("*"))
    refused = [late.run(*STEPS, f"{key}={lasting}", code=2) for key in ("hydra.run.dir", "task.resume")]
    assert sorted(late.folder.rglob("*")) == before
    for _, command, _ in commands:
        command.kill_all()
    killed = [where.only_run() for where in (early, late)]
    before = [(identity(run), max(values(run, "train/loss"))) for run in killed]
    never = late.start(*STEPS, "task.resume=never")
    early_again = early.start(*STEPS)
    wait_for(lambda: len(late.runs()) == 2, "the second run")
    late_again = late.start(*STEPS)
    assert [command.wait() for command in (never, early_again, late_again)] == [0, 0, 0]
    return SimpleNamespace(
        early=(early, killed[0], before[0], early_again),
        late=(late, killed[1], before[1], late_again),
        unbroken=next(run for run in late.runs() if run != killed[1]),
        never=never,
        refused=refused,
    )


def test_a_second_command_in_the_folder_of_a_living_run_is_refused(story):
    # after the kill below, its lock is nobody's
    for command in story.refused:
        assert command.err == f"bc2exp: {story.late[1]}: this run is going on in another process\n"


@pytest.mark.parametrize(("which", "killed_at", "goes_on_after"), [("early", 2, 0), ("late", 7, 4)])
def test_the_same_command_after_a_kill(story, which, killed_at, goes_on_after):
    launch, run, (before, last), command = getattr(story, which)
    assert (identity(run), last) == (before, killed_at)
    assert f"resuming: {run.relative_to(launch.folder)}\n" in command.out
    assert ("resumed from step 4" in command.out) == (goes_on_after == 4)
    assert [event["step"] for event in events(run, "start")] == [0, goes_on_after]
    assert list(values(run, "train/loss", segment=1)) == list(range(goes_on_after + 1, 13))
    assert_same_training(run, story.unbroken)


def test_never_begins_anew_though_a_run_is_unfinished(story):
    assert "resum" not in story.never.out
    assert identity(story.unbroken) != story.late[2][0]
    assert [event["segment"] for event in events(story.unbroken, "start")] == [0]


@pytest.fixture
def copied(story, launch):
    """The unbroken run in a launch folder of its own: (launch, run folder)."""
    run = launch.folder / story.unbroken.relative_to(story.late[0].folder)
    shutil.copytree(story.unbroken, run)
    return launch, run


def test_a_finished_run_goes_on_with_more_steps(copied):
    launch, run = copied
    before, first = identity(run), weights(run)
    command = launch.run("task.steps=14", *STEPS[1:], f"task.resume={run.relative_to(launch.folder)}")
    assert "resumed from step 12" in command.out
    assert launch.only_run() == run
    assert identity(run) == before
    assert list(values(run, "train/loss")) == list(range(1, 15))
    assert list(values(run, "train/loss", segment=1)) == [13, 14]
    assert weights(run) != first
    assert events(run, "done")[-1]["segment"] == 1


@pytest.mark.slow
def test_data_that_changed_in_their_place_are_noticed_and_may_be_accepted(launch):
    text = launch.folder / "text.txt"
    text.write_text("".join(f"This is line {number} of a text to learn from.\n\n" for number in range(400)))
    words = (*STEPS[1:], "dataset=text", "dataset.path=text.txt")
    launch.run(*words, "task.steps=4")
    run = launch.only_run()
    text.write_text(text.read_text().replace("line 7 ", "line seven "))
    refused = launch.run(*words, "task.steps=12", f"task.resume={run}", code=2)
    assert refused.err.count("\n") == 1
    assert "checkpoints/step-00000004: the digest of the data was " in refused.err
    assert "task.accept_changes=true" in refused.err
    resume = ("task.steps=12", f"task.resume={run}", "task.accept_changes=true")
    accepted = launch.run(*words, *resume)
    assert "going on with changes: " in accepted.out
    assert max(values(run, "train/loss")) == 12


def test_a_run_of_another_model_is_not_continued_and_not_touched(copied):
    launch, run = copied
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    command = launch.run(*STEPS, f"task.resume={run}", "model.hidden_size=64", code=2)
    assert "that run has model.hidden_size=32 (here 64)" in command.err
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
