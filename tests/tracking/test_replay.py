"""Every (metric, step) reaches the tracker once, whatever breaks on the way."""

from __future__ import annotations

import contextlib
import json
import math

import pytest

from bc2exp.storage import lock
from bc2exp.tracking import runs
from bc2exp.tracking.journal import Journal
from bc2exp.tracking.replay import FirstValues, Replay


def metric_record(step, segment=0, **metrics):
    return {"step": step, "segment": segment, "time": 1.0, "metrics": metrics}


def test_the_first_value_is_kept_and_a_different_one_noted():
    first = FirstValues()
    new = first.take(
        [metric_record(1, loss=1.5), metric_record(2, loss=1.25), metric_record(2, 1, loss=1.25)]
    )
    assert [(point.name, point.step, point.value) for point in new] == [("loss", 1, 1.5), ("loss", 2, 1.25)]
    assert first.differences == []
    assert first.take([metric_record(2, 1, loss=math.nextafter(1.25, 2))]) == []
    assert first.differences == [
        {"metric": "loss", "step": 2, "segment": 1, "first": 1.25, "later": math.nextafter(1.25, 2)}
    ]


@pytest.mark.parametrize(
    ("one", "two", "differ"),
    [
        (math.nan, math.nan, False),
        (math.nan, 1.0, True),
        (math.inf, math.inf, False),
        (math.inf, -math.inf, True),
        (0.0, -0.0, True),
    ],
)
def test_bit_by_bit(one, two, differ):
    first = FirstValues()
    first.take([metric_record(1, loss=one), metric_record(1, 1, loss=two)])
    assert bool(first.differences) == differ


def test_speed_and_memory_may_differ():
    first = FirstValues()
    first.take(
        [
            metric_record(1, **{"perf/x": 1.0, "mem/x": 1.0}),
            metric_record(1, 1, **{"perf/x": 2.0, "mem/x": 2.0}),
        ]
    )
    assert first.differences == []


def test_a_resumed_run(new_run, write_steps, memory_tracker):
    folder = new_run()
    write_steps(folder, 1, 6)
    write_steps(folder, 5, 8, segment=1, end="done", shift=1e-12)
    tracker = memory_tracker()
    replay = Replay(runs.load(folder), tracker.connect, live=True)
    replay.finish()
    keys = [(name, step) for name, step, _ in tracker.held]
    assert sorted(keys) == sorted((n, s) for n in ("train/loss", "perf/step_time_s") for s in range(1, 9))
    assert {(n, s): v for n, s, v in tracker.held}["train/loss", 5] == 4.95
    assert tracker.status == "FINISHED"
    assert tracker.tagged["bc2exp.differences"] == "2"
    lines = [json.loads(line) for line in (folder / "differences.jsonl").read_text().splitlines()]
    assert [(line["metric"], line["step"], line["segment"]) for line in lines] == [
        ("train/loss", 5, 1),
        ("train/loss", 6, 1),
    ]
    assert "differences.jsonl" in tracker.files


def test_wherever_the_tracker_breaks_off_the_next_replay_completes_it(new_run, write_steps, memory_tracker):
    folder = new_run()
    write_steps(folder, 1, 4, end="done")
    tracker = memory_tracker()
    for calls in range(100):  # each time the tracker is there for one call more
        tracker.fail_after = calls
        with contextlib.suppress(ConnectionError):
            replay = Replay(runs.load(folder), tracker.connect, live=True)
            try:
                replay.advance()
                replay.finish()
                break
            finally:
                replay.close()
    assert calls >= 10
    assert sorted((n, s) for n, s, _ in tracker.held) == sorted(
        (n, s) for n in ("train/loss", "perf/step_time_s") for s in range(1, 5)
    )
    assert json.loads((folder / "tracking.json").read_text())["status"] == "FINISHED"


def test_one_replay_of_a_run_at_a_time(new_run, memory_tracker):
    run = runs.load(new_run())
    replay = Replay(run, memory_tracker().connect, live=True)
    with pytest.raises(lock.LockHeld):
        Replay(run, memory_tracker().connect, live=True)
    replay.close()
    Replay(run, memory_tracker().connect, live=True).close()


def test_a_replay_that_could_not_begin_keeps_no_lock(new_run, memory_tracker):
    run = runs.load(new_run())
    with pytest.raises(ConnectionError):
        Replay(run, memory_tracker(fail_after=0).connect, live=True)
    assert not lock.is_held(run.folder / "replay.lock")


@pytest.mark.parametrize(
    ("end", "checkpoint", "status", "resumable"),
    [
        ("done", True, "FINISHED", False),
        ("stopped", True, "KILLED", True),
        ("failed", False, "FAILED", False),
        ("failed", True, "FAILED", True),
        (None, False, "FAILED", False),
        (None, True, "FAILED", True),
    ],
)
def test_endings(new_run, write_steps, end, checkpoint, status, resumable):
    folder = new_run()
    write_steps(folder, 1, 2, end=end)
    (folder / "checkpoints" / ".step-00000002.half").mkdir(parents=True)
    if checkpoint:
        (folder / "checkpoints" / "step-00000001").mkdir()
    ending = runs.ending(runs.load(folder))
    assert (ending.status, ending.resumable) == (status, resumable)
    assert ending.reason


def test_parameters(new_run):
    folder = new_run()
    (folder / "resolved.yaml").write_text(
        "seed: 1\nmodel:\n  名: 百川\n  betas: [0.9, 0.95]\n  none: null\n  'on': true\n  a@b%: x\n"
        f"  lr: 1.0e-06\n  empty: {{}}\n  long: {'x' * 7000}\n{'k' * 300}: 1\n"
    )
    found = runs.parameters(runs.load(folder))
    assert found.pop("model.long") == "x" * 6000
    assert found.pop("k" * 250) == "1"
    assert found == {
        "seed": "1",
        "model.名": "百川",
        "model.betas": "[0.9, 0.95]",
        "model.none": "null",
        "model.on": "true",
        "model.a_b_": "x",
        "model.lr": "1e-06",
        "model.empty": "{}",
    }


def test_a_run_that_died_before_its_first_line_is_recorded_as_failed(new_run, memory_tracker):
    folder = new_run()
    tracker = memory_tracker()
    Replay(runs.load(folder), tracker.connect, live=False).finish()
    assert tracker.status == "FAILED"
    assert not (folder / "metrics.jsonl").exists()


def test_data_sets_are_recorded(new_run, memory_tracker):
    folder = new_run()
    with Journal(folder / "metrics.jsonl", 0) as journal:
        journal.event("data", name="embedded", digest="x")
        journal.event("done", step=0)
    tracker = memory_tracker()
    Replay(runs.load(folder), tracker.connect, live=False).finish()
    assert tracker.datasets == ["embedded"]
