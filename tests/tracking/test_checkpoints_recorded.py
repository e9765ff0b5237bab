"""What a journal and a folder say of the checkpoints of a run, and what the replay tells a tracker."""

from __future__ import annotations

import shutil

from bc2exp.tracking import runs
from bc2exp.tracking.checkpoints import Checkpoint, CheckpointList
from bc2exp.tracking.journal import Journal
from bc2exp.tracking.replay import Replay


def saved(step, **fields):
    return {"event": "checkpoint", "step": step, "path": f"checkpoints/step-{step:08}", **fields}


def states(given, folder):
    return {checkpoint.step: checkpoint.state for checkpoint in given.now(folder)}


def test_a_checkpoint_is_there_removed_or_missing(tmp_path):
    for step in (3, 4):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    found = CheckpointList()
    assert not found.take([{"step": 1, "metrics": {}}, {"event": "data"}])
    assert found.take([saved(1), saved(2), saved(3, removed=["step-00000001"])])
    assert states(found, tmp_path) == {1: "removed", 2: "missing", 3: "there"}
    assert found.take([{"event": "checkpoint_removed", "path": "step-00000002"}, saved(4, bytes=7)])
    assert states(found, tmp_path) == {1: "removed", 2: "removed", 3: "there", 4: "there"}


def test_a_checkpoint_that_is_saved_again_is_one(tmp_path):
    found = CheckpointList()
    found.take([saved(1), saved(2, best=True, removed="checkpoints/step-00000001"), saved(1, segment=1)])
    assert found.now(tmp_path) == [
        Checkpoint(1, "checkpoints/step-00000001", "missing", False),
        Checkpoint(2, "checkpoints/step-00000002", "missing", True),
    ]
    assert found.now(tmp_path)[0].name == "step-00000001"


def test_the_replay_tells_of_a_checkpoint_with_the_values_of_its_step(new_run, write_steps, memory_tracker):
    folder, tracker = new_run(), memory_tracker()
    write_steps(folder, 1, 2)
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    with Journal(folder / "metrics.jsonl", 0) as journal:
        journal.event("checkpoint", step=2, path="checkpoints/step-00000002")
    replay = Replay(runs.load(folder), tracker.connect, live=True)
    replay.advance()
    assert tracker.models == {"step-00000002": ("there", {"train/loss": 4.98, "perf/step_time_s": 0.1})}
    # written later than the checkpoint, as a save that goes on beside the training is
    with Journal(folder / "metrics.jsonl", 0) as journal:
        journal.metrics(2, {"eval/loss": 4.5})
        journal.event("done")
    shutil.rmtree(checkpoint)
    replay.finish()
    replay.close()
    state, values = tracker.models["step-00000002"]
    assert (state, values["eval/loss"]) == ("missing", 4.5)
