"""What a person sees of a run, drawn from the journal alone."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from bc2exp.tracking.progress import Progress


def record(step, **metrics):
    return {"step": step, "time": 10.0 * step, "segment": 0, "metrics": metrics}


def train(step, loss=3.0):
    return record(step, **{"train/loss": loss, "train/lr": 1e-6, "train/grad_norm": 9.811})


def event(name, /, **fields):
    return {"event": name, "time": 0.0, "segment": 0, **fields}


def shown(records, total=1000, terminal=False, width=80):
    """The lines that appear, without control sequences."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with Progress(total, console) as progress:
        for each in records:
            progress.update(each)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()


def test_plain_lines_are_few_and_hold_the_first_and_the_last():
    lines = shown([train(step) for step in range(1, 1004)], total=1003)
    assert 20 <= len(lines) <= 30
    assert lines[0] == "step    1/1003  loss 3.0000  lr 1.00e-06  grad norm 9.81"
    assert lines[-1].startswith("step 1003/1003  loss 3.0000")


@pytest.mark.parametrize(("total", "steps"), [(5, 5), (40, 40), (None, 3000)])
def test_short_runs_show_every_step_and_unknown_ends_stay_few(total, steps):
    lines = shown([train(step) for step in range(1, steps + 1)], total=total)
    assert len(lines) == min(steps, len(lines)) <= 40
    if total:
        assert len(lines) == total
    assert lines[-1].split()[1] == f"{steps}/{total or '?'}"


def test_a_run_that_logs_rarely():
    lines = shown([train(step) for step in range(50, 1001, 50)])
    assert len(lines) == 20


def test_evaluations_are_always_shown_after_their_step():
    lines = shown([train(1), train(2), record(2, **{"eval/loss": 2.5}), train(3)])
    assert [line.partition("/")[0] for line in lines] == ["step    1", "step    2", "step 2", "step    3"]
    assert lines[2] == "step 2/1000  evaluation loss 2.5000"


def test_events():
    lines = shown(
        [
            event("data", name="alpaca", documents=52002, tokens=5883807, path="x"),
            event("data", name="stream", documents=None, tokens=None),
            event("start", step=40, world_size=8),
            event("note", text="[bold]a note[/bold]"),
            event("checkpoint", step=50, path="/runs/a[1]/checkpoints/" + "long/" * 20),
            event("stopped", step=50, reason="asked to"),
            event("failed", reason=None),
            event("done"),
        ]
    )
    assert lines == [
        "data alpaca, 52,002 documents, 5,883,807 tokens",
        "data stream",
        "resumed from step 40",
        "[bold]a note[/bold]",
        "step 50: checkpoint saved in /runs/a[1]/checkpoints/" + "long/" * 20,
        "stopped at step 50: asked to",
        "failed",
        "done",
    ]


def test_the_time_left_comes_from_the_journal():
    lines = shown([train(step) for step in range(1, 1001)])
    assert "left" not in lines[0]
    assert lines[1].startswith("step   40/1000")
    assert lines[1].endswith("2:40:00 left")
    assert lines[-1].endswith("0:00:00 left")


def test_the_time_left_after_a_resume_counts_from_the_resume():
    late = [{**train(step), "time": 1e6 + 2.0 * step} for step in range(501, 1001)]
    lines = shown([train(1), event("start", step=500, world_size=1, steps=1000), *late])
    assert any(line.endswith("0:01:20 left") for line in lines if "step  960/" in line)


def test_the_start_event_tells_the_number_of_steps():
    assert shown([event("start", step=0, steps=3), train(1)], total=None)[-1].startswith("step 1/3")


def test_the_bar_on_a_terminal_fits_80_columns():
    values = {"train/loss": 11.7412, "train/lr": 2e-5, "perf/tokens_per_s_per_device": 12345.6}
    steps = [record(step, **values) for step in range(1, 1001)]
    lines = shown([*steps[:500], event("checkpoint", step=500, path="here"), *steps[500:]], terminal=True)
    assert "step 500: checkpoint saved in here" in lines
    assert max(map(len, lines)) <= 80
    last = lines[-1]
    assert last.startswith("step 1000/1000 ")
    assert last.rstrip().endswith("loss 11.7412 lr 2.00e-05 12346 tok/s/dev 0:00:00 left")
    assert "━" in last


def test_a_preparation_shows_rows_tokens_speed_and_time_left_and_ends_with_what_it_came_to():
    def preparing(seconds, done, rows):
        counts = {"rows": rows, "tokens": 3 * rows, "bytes_done": done, "bytes_total": 8_000_000}
        return {"event": "preparing", "time": 100.0 + seconds, "segment": 0, "stage": "encode", **counts}

    data = {"event": "data", "time": 110.0, "segment": 0, "name": "x", "documents": 80, "tokens": 240}
    records = [preparing(0, 0, 0), preparing(2, 4_000_000, 1_000), preparing(3, 6_000_000, 1_500), data]
    output = io.StringIO()
    with Progress(None, Console(file=output, width=120)) as progress:
        for record in records:
            progress.update(record)
    lines = output.getvalue().splitlines()
    assert lines[1] == "encoding 50%  1,000 rows  3,000 tokens  2.00 MB/s of files  0:00:02 left"
    assert lines[2].endswith("2.00 MB/s of files  0:00:01 left")
    assert lines[-1] == "data x, 80 documents, 240 tokens"
    screen = io.StringIO()
    with Progress(None, Console(file=screen, width=120, force_terminal=True)) as progress:
        assert "starting" in screen.getvalue()
        for record in records:
            progress.update(record)
    assert "step 0" not in screen.getvalue()
    assert "80 documents, 240 tokens" in screen.getvalue().rsplit("data ", 1)[1]


def test_work_without_steps_moves_the_bar_and_writes_no_lines():
    records = [event("progress", label="tuned: answers", done=done, total=1987) for done in (64, 1987)]
    assert any("tuned: answers" in line and "1,987/1,987" in line for line in shown(records, None, True))
    assert shown(records, None) == []
