"""The follower's protocol with its parent, its patience, and what it does for runs left behind."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from bc2exp.storage import lock
from bc2exp.tracking import follow, runs
from bc2exp.tracking.journal import Journal


class Pipe:
    """A parent's end of the pipe, in this process."""

    def __init__(self):
        read, self._write = os.pipe()
        self.parent = follow.Parent(read)
        self._thread = None

    def follow_aside(self, folder, connect):
        """Start a follower in a thread; it ends with this pipe."""
        arguments = (folder, connect, 1.0, self.parent)
        self._thread = threading.Thread(target=follow.follow, args=arguments, daemon=True)
        self._thread.start()

    def close_run(self):
        os.write(self._write, b"close\n")
        if self._thread is not None:
            self._thread.join(30)

    def die(self):
        if self._write >= 0:
            os.close(self._write)
            self._write = -1


@pytest.fixture
def pipe():
    pipe = Pipe()
    yield pipe
    pipe.die()


def status(folder):
    """What the folder's record says; None before there is one."""
    file = folder / "tracking.json"
    return json.loads(file.read_text())["status"] if file.is_file() else None


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("end", "expected"), [("done", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_close_ends_the_run_as_the_journal_says(new_run, write_steps, memory_tracker, pipe, end, expected):
    folder = new_run()
    write_steps(folder, 1, 3, end=end)
    pipe.close_run()
    tracker = memory_tracker()
    assert follow.follow(folder, tracker.connect, 5.0, pipe.parent) == follow.DONE
    assert (tracker.status, status(folder)) == (expected, expected)
    assert tracker.tagged["resumable"] == str(end == "stopped").lower()
    assert tracker.tagged["bc2exp.reason"] == f"it is {end}"
    assert len(tracker.held) == 6


@pytest.mark.parametrize(("end", "expected"), [(None, "FAILED"), ("done", "FINISHED")])
def test_a_parent_that_dies(new_run, write_steps, memory_tracker, pipe, end, expected):
    folder = new_run()
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    write_steps(folder, 1, 3, end=end)
    pipe.die()
    tracker = memory_tracker()
    assert follow.follow(folder, tracker.connect, 5.0, pipe.parent) == follow.DONE
    assert (tracker.status, status(folder)) == (expected, expected)
    assert tracker.tagged["resumable"] == str(end is None).lower()
    assert len(tracker.held) == 6


def test_lines_come_to_the_tracker_while_the_run_goes_on(new_run, write_steps, memory_tracker, pipe):
    folder = new_run()
    tracker = memory_tracker()
    pipe.follow_aside(folder, tracker.connect)
    wait_for((folder / "tracking.json").exists)
    assert status(folder) == "RUNNING"
    write_steps(folder, 1, 2)
    wait_for(lambda: len(tracker.held) == 4)
    assert tracker.status == "RUNNING"
    write_steps(folder, 3, 3, end="done")
    pipe.close_run()
    assert (tracker.status, len(tracker.held)) == ("FINISHED", 6)


@pytest.mark.parametrize(("work", "pause"), [(0.001, 0.5), (0.03, 3.0), (5.0, 10.0)])
def test_a_follower_takes_a_hundredth_of_a_core(
    new_run, write_steps, memory_tracker, monkeypatch, work, pause
):
    folder, tracker, clock, pauses = new_run(), memory_tracker(), [0.0], []
    write_steps(folder, 1, 3, end="done")
    advance = follow.Replay.advance

    def working(replay):
        clock[0] += work
        return advance(replay)

    class Parent:
        def wait(self, seconds):
            pauses.append(seconds)
            return "close" if len(pauses) == 3 else None

    monkeypatch.setattr(follow.Replay, "advance", working)
    monkeypatch.setattr(follow.time, "process_time", lambda: clock[0])
    assert follow.follow(folder, tracker.connect, 5.0, Parent()) == follow.DONE
    assert pauses == [0.0, pytest.approx(pause), pytest.approx(pause)]
    assert len(tracker.held) == 6


def test_lines_that_ranks_write_after_their_parent_died(
    new_run, write_steps, memory_tracker, pipe, monkeypatch
):
    folder = new_run()
    write_steps(folder, 1, 1)
    pipe.die()
    late = iter([lambda: write_steps(folder, 2, 2), lambda: write_steps(folder, 3, 3)])
    monkeypatch.setattr(follow.time, "sleep", lambda _: next(late, lambda: None)())
    tracker = memory_tracker()
    follow.follow(folder, tracker.connect, 5.0, pipe.parent)
    assert len(tracker.held) == 6


def test_a_tracker_that_comes_back_has_lost_nothing(new_run, write_steps, memory_tracker, pipe, capsys):
    folder = new_run()
    write_steps(folder, 1, 3)
    tracker = memory_tracker(fail_after=3)
    pipe.follow_aside(folder, tracker.connect)
    wait_for(lambda: tracker.fail_after < 0)
    write_steps(folder, 4, 5, end="done")
    tracker.fail_after = None
    wait_for(lambda: len(tracker.held) == 10)
    pipe.close_run()
    assert tracker.status == "FINISHED"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "said once, not at every try"
    assert lines[0] == (
        "bc2exp: the tracker at memory could not be reached (ConnectionError: nobody answers); "
        "the training goes on"
    )


def test_patience_ends(new_run, write_steps, memory_tracker, pipe, capsys):
    folder = new_run()
    write_steps(folder, 1, 3, end="done")
    before = (folder / "metrics.jsonl").read_bytes()
    pipe.close_run()
    begin = time.monotonic()
    assert follow.follow(folder, memory_tracker(fail_after=0).connect, 1.0, pipe.parent) == follow.UNREACHED
    assert 0.4 < time.monotonic() - begin < 4
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / "tracking.json").exists()
    assert capsys.readouterr().err == (
        "bc2exp: the tracker at memory could not be reached (ConnectionError: nobody answers): the run is "
        f"complete in {folder}; `python -m bc2exp task=sync task.run={folder}` records it later\n"
    )
    tracker = memory_tracker()
    assert follow.sync([folder], tracker.connect, 1.0) == follow.DONE
    assert (tracker.status, len(tracker.held)) == ("FINISHED", 6)


def test_a_tracker_that_refuses_is_not_asked_again(new_run, pipe, capsys):
    asked = []

    def refuse(run, live):
        asked.append(run)
        raise follow.Refused("its experiment is deleted")

    pipe.close_run()
    assert follow.follow(new_run(), refuse, 60.0, pipe.parent) == follow.UNREACHED
    assert len(asked) == 1
    assert "its experiment is deleted" in capsys.readouterr().err


def test_an_abandoned_run_is_closed_by_the_next_start(new_run, write_steps, memory_tracker, pipe):
    # Left open while RUNNING; never begun; living; closed; not tracked.
    running, unbegun, living, closed, _ = (
        new_run(name, tracking={"enabled": name != "untracked"})
        for name in ("running", "unbegun", "living", "closed", "untracked")
    )
    write_steps(running, 1, 3)
    write_steps(unbegun, 1, 2, end="done")
    for folder, word in ((running, "RUNNING"), (living, "RUNNING"), (closed, "FINISHED")):
        (folder / "tracking.json").write_text(json.dumps({"status": word}))
    (running / "checkpoints" / "step-00000003").mkdir(parents=True)
    (new_run("nonsense") / "run.json").write_text("{}")
    mine = new_run("mine")
    (mine / "checkpoints").mkdir()
    trackers = {}

    def connect(run, live):
        return trackers.setdefault(run.folder.name, memory_tracker()).connect(run, live)

    with lock.hold(living / "owner.lock"), lock.hold(mine / "owner.lock"):
        (running / "owner.lock").touch()
        pipe.follow_aside(mine, connect)
        wait_for(lambda: {"running", "unbegun"} <= set(trackers) and status(unbegun) == "FINISHED")
        pipe.close_run()
    assert set(trackers) == {"mine", "running", "unbegun"}
    assert status(running) == "FAILED"
    assert trackers["running"].tagged["resumable"] == "true"
    assert len(trackers["running"].held) == 6
    assert len(trackers["unbegun"].held) == 4


def test_a_run_that_is_resumed_meanwhile_is_not_closed(new_run, write_steps, memory_tracker):
    other, mine = new_run("other"), new_run("mine")
    write_steps(other, 1, 3)
    tracker = memory_tracker()
    held = []

    def resumed_in_between(run, live):
        held.append(lock.hold(other / "owner.lock"))
        return tracker.connect(run, live)

    follow._close_abandoned(runs.load(mine), resumed_in_between)
    assert tracker.status == "RUNNING"
    held[0].release()


def test_a_resumed_run_waits_for_the_one_who_is_closing_it(new_run, write_steps, memory_tracker, pipe):
    folder = new_run()
    write_steps(folder, 1, 2, end="done")
    closing = lock.hold(folder / "replay.lock")
    threading.Timer(0.5, closing.release).start()
    pipe.close_run()
    assert follow.follow(folder, memory_tracker().connect, 20.0, pipe.parent) == follow.DONE


def test_sync_refuses_what_it_cannot_record(new_run, write_steps, memory_tracker, tmp_path, capsys):
    living, over = new_run("living"), new_run("over")
    write_steps(over, 1, 1, end="done")
    tracker = memory_tracker()
    with lock.hold(living / "owner.lock"):
        folders = [tmp_path / "nowhere", living, over]
        assert follow.sync(folders, tracker.connect, 0.0) == follow.WRONG
    assert tracker.status == "FINISHED", "the others are recorded all the same"
    error = capsys.readouterr().err
    assert "nowhere is not the folder of a run" in error
    assert "living is still running" in error
    assert follow.follow(tmp_path / "nowhere", tracker.connect, 0.0, Pipe().parent) == follow.WRONG


def test_sync_into_another_tracker(new_run, write_steps, memory_tracker):
    folder = new_run()
    write_steps(folder, 1, 1, end="done")
    tracker = memory_tracker()
    assert follow.sync([folder], tracker.connect, 0.0, uri="elsewhere") == follow.DONE
    assert (tracker.run.uri, tracker.run.artifact_location) == ("elsewhere", None)


def test_a_damaged_journal_is_said_and_not_a_crash(new_run, memory_tracker, pipe, capsys):
    folder = new_run()
    with Journal(folder / "metrics.jsonl", 0) as journal:
        journal.event("done", step=0)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"{nonsense\n")
    pipe.close_run()
    assert follow.follow(folder, memory_tracker().connect, 0.0, pipe.parent) == follow.UNREACHED
    assert "is not a journal record" in capsys.readouterr().err


def test_sync_waits_once_for_a_tracker_that_is_away(new_run, write_steps, memory_tracker, monkeypatch):
    folders = [new_run(name) for name in "abc"]
    for folder in folders:
        write_steps(folder, 1, 1, end="done")
    waited = []
    monkeypatch.setattr(follow.time, "sleep", waited.append)
    away = memory_tracker(fail_after=0)
    assert follow.sync(folders, away.connect, 0.6) == follow.UNREACHED
    assert waited == [0.5]


def test_a_complaint_tells_the_cause_and_no_password():
    error = ConnectionError(
        "API request to http://me:word@host failed with exception HTTPConnectionPool(host='host', port=9): "
        "Max retries exceeded with url: /api (Caused by ResponseError('too many 500 error responses'))"
    )
    assert follow._reason(error) == "ResponseError('too many 500 error responses')"
