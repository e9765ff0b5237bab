"""The table of one run and of several side by side."""

from __future__ import annotations

import io

from rich.console import Console

from bc2exp.report import tables
from bc2exp.report.summary import summarize


def test_lines(run_folder):
    lines = tables.lines(summarize(run_folder()))
    assert lines["loss, first → last"] == "9.7000 → 6.2000"
    assert lines["evaluation loss, lowest"] == "7.5000 (step 40)"
    assert lines["samples/s"] == "4.571"
    assert lines["tokens/s/p"] == "2,340.6"
    assert lines["s/step"] == "7"
    assert lines["MFU"] == "–"
    assert lines["peak memory"] == "20.40 GiB"
    assert lines["identities"] == "hold"


def test_mfu_names_its_peak(run_folder, line):
    summary = summarize(run_folder([line(s, 7.0, **{"perf/mfu": 0.385}) for s in range(1, 9)], 294.9))
    assert tables.lines(summary)["MFU"] == "38.5% of 294.9 TFLOP/s (910B3 bf16)"


def test_a_broken_identity_is_loud(run_folder, line):
    records = [line(step, 7.0) for step in range(1, 9)]
    records[5]["metrics"]["perf/step_time_s"] = 7.1
    shown = tables.lines(summarize(run_folder(records)))["identities"]
    assert shown == "BROKEN: samples_per_s * s_per_step == global_batch"


def test_markdown(run_folder):
    summary = summarize(run_folder())
    text = tables.markdown({"a|b": summary, "c": {**summary, "outcome": None}})
    lines = text.splitlines()
    assert lines[0] == "|  | a\\|b | c |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[2] == "| outcome | done | none recorded |"
    assert not any(line.startswith("| MFU") for line in lines), "a line that no run has is left out"
    assert tables.markdown({}) == "|  |\n| --- |\n"


def test_the_screen_holds_it_at_80_columns(run_folder):
    console = Console(file=io.StringIO(), width=80)
    summary = summarize(run_folder())
    console.print(tables.table({"one": summary, "two": summary}))
    shown = console.file.getvalue()
    assert "tokens/s/p" in shown
    assert shown.count("2,340.6") == 2
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
