"""Sweepers that draw each job from what the last ones came to: broken off, they are told again and ask for
the same jobs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bc2exp import __main__ as door
from bc2exp.config.errors import UserError
from bc2exp.launch.drawing import Told, draws, settings
from bc2exp.launch.ledger import Ledger
from bc2exp.storage.lock import hold
from bc2exp.tracking.journal import last_segment, outcome, read
from tests.launch.commands import ROOT
from tests.launch.drifts import write_drifts
from tests.small_run import small_plain

COMPARE = ("-m", "task=compare", "task.b=b.log", "sweep.metric=compare/loss_mean", "tracking.enabled=false")
FOLLOWING = (*COMPARE, "task.a=one.log", "hydra/sweeper=following", "task.tolerances.loss=interval(0.5,0.6)")

AT = """
import os, signal, sys
from bc2exp import __main__ as door
from bc2exp.launch.ledger import Ledger
started = Ledger.started
def noted(self, job):
    started(self, job)
    if job.number == {number}:
        os.kill(os.getpid(), signal.{signal})
Ledger.started = noted
sys.exit(door.command(sys.argv[1:]))
"""
"""The command, to which a signal is sent when it starts a certain job."""


def type_in(folder: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "tests" / "launch" / "plugins")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, *(["-c", code] if code else ["-m", "bc2exp"]), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a reference, a log 1 % above it and one 3 % above it."""
    write_drifts(tmp_path, one=1.01, three=1.03)
    return tmp_path


def asked(sweep: Path) -> list[list[str]]:
    return [record["overrides"] for record in read(sweep / "ledger.jsonl") if record["event"] == "job"]


def starts(sweep: Path) -> list[int]:
    return [record["number"] for record in read(sweep / "ledger.jsonl") if record["event"] == "started"]


def statuses(sweep: Path) -> list[str]:
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    return [job["status"] for job in sorted(jobs, key=lambda job: job["number"])]


@pytest.mark.slow
def test_a_sweeper_gets_a_float_of_each_job_and_is_told_again_after_kill_9(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = type_in(folder, *FOLLOWING, "hydra.sweep.dir=whole")
    assert whole.returncode == 0, whole.stderr
    wanted = asked(folder / "whole")
    drawn = [float(words[-1].partition("=")[2]) for words in wanted]
    assert len(drawn) == 5
    assert drawn == pytest.approx([0.5 / 1.01**number for number in range(5)], abs=1e-4)

    killed = type_in(folder, *FOLLOWING, "hydra.sweep.dir=cut", code=AT.format(number=3, signal="SIGKILL"))
    assert killed.returncode == -signal.SIGKILL
    assert asked(folder / "cut") == wanted[:4]
    assert outcome(folder / "cut" / "metrics.jsonl") is None
    again = type_in(folder, "-m", "sweep.resume=cut")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(", and told the sweeper again\n") == 3
    assert "the sweeper now asks" not in again.stdout
    assert asked(folder / "cut") == wanted
    assert starts(folder / "cut") == [0, 1, 2, 3, 3, 4]
    assert statuses(folder / "cut") == ["done"] * 5
    assert [last_segment(folder / "cut" / str(number) / "metrics.jsonl") for number in range(5)] == [0] * 5

    monkeypatch.chdir(folder)
    for word in ("sweep.job=1", "sweep.sbatch=true"):
        assert door.command(["-m", "sweep.resume=cut", word]) == 2
        said = capsys.readouterr().err
        assert f"{word}: a sweeper draws the jobs of this sweep one after the other" in said

    # all are drawn: another resume asks no sweeper and runs nothing
    assert door.command(["-m", "sweep.resume=cut"]) == 0
    assert starts(folder / "cut") == [0, 1, 2, 3, 3, 4]
    assert "told the sweeper" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_stop_ends_the_sweeper_and_another_value_leads_elsewhere(folder: Path) -> None:
    stopped = type_in(folder, *FOLLOWING, "hydra.sweep.dir=s", code=AT.format(number=2, signal="SIGTERM"))
    assert stopped.returncode == 3, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert outcome(folder / "s" / "metrics.jsonl")["reason"] == (
        "stopped on request; 0 of 3 jobs are left, and more to be drawn"
    )
    assert "resume   python -m bc2exp -m sweep.resume=s\n" in stopped.stdout
    before = asked(folder / "s")
    journal = folder / "s" / "1" / "metrics.jsonl"
    text, number = re.subn(r'("compare/loss_mean": )[\d.e-]+', r"\g<1>0.25", journal.read_text())
    assert number == 1
    journal.write_text(text)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    refused = type_in(elsewhere, f"sweep.resume={folder}/s")
    assert refused.returncode == 2
    assert f"type the command in {folder}\n" in refused.stderr
    again = type_in(folder, "-m", "sweep.resume=s")
    assert again.returncode == 0, again.stderr
    assert "as its job 2 the sweeper now asks for" in again.stdout
    assert "it was told other values\n" in again.stdout
    after = asked(folder / "s")
    assert after[:3] == before
    assert len(after) == 6  # jobs 2, 3 and 4 of the sweeper are new
    assert statuses(folder / "s") == ["done"] * 6
    assert starts(folder / "s") == [0, 1, 2, 3, 4, 5]


def test_what_optuna_is_told_beside_the_command(tmp_path: Path) -> None:
    plain = small_plain(tmp_path, "seed=7")
    assert draws(["hydra/sweeper=optuna"])
    assert not draws(["hydra/sweeper=basic", "seed=1,2"])
    assert settings(["seed=1,2"], plain) == []
    told = ["hydra.sweeper.direction=minimize", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=7"]
    assert settings(["hydra/sweeper=optuna"], plain) == told
    typed = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_jobs=2"]
    assert settings(typed, plain) == told[:1]
    higher = small_plain(tmp_path, "sweep.direction=higher")
    assert settings(["hydra/sweeper=optuna"], higher)[0] == "hydra.sweeper.direction=maximize"
    with pytest.raises(UserError, match=r"direction=maximize: sweep.direction=lower says otherwise"):
        settings(["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"], plain)


def test_a_job_is_told_again_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    plain = small_plain(tmp_path)
    for words in (["x=1"], ["x=2"], ["x=1"]):
        ledger.add(plain, tmp_path / str(len(ledger.jobs)), words)
    told = Told(ledger)
    found = [told.find([word]) for word in ("x=1", "x=1", "x=2", "x=1")]
    assert [job and job.number for job, _ in found] == [0, 2, 1, None]
    assert [bool(remark) for _, remark in found] == [False, True, True, False]


def test_two_writers_of_a_ledger_wait_for_each_other(tmp_path: Path) -> None:
    first, plain = Ledger(tmp_path), small_plain(tmp_path)
    for number in range(2):
        first.add(plain, tmp_path / str(number), [f"x={number}"])
    second = Ledger(tmp_path)
    code = (
        "import sys, pathlib\nfrom bc2exp.launch.ledger import Ledger\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]))\nprint('open', flush=True)\ninput()\n"
        "for _ in range(50): ledger.started(ledger.jobs[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen(command, env=environment, text=True, **pipes)
    assert other.stdout.readline() == "open\n"
    with hold(tmp_path / "ledger.lock"):
        other.stdin.write("\n")
        other.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
    for _ in range(50):
        second.started(second.jobs[0])
    assert other.wait() == 0
    numbers = [record["number"] for record in read(tmp_path / "ledger.jsonl") if record["event"] == "started"]
    assert sorted(numbers) == [0] * 50 + [1] * 50
    assert [job.status for job in Ledger(tmp_path).jobs] == ["interrupted"] * 2


OPTUNA = (
    *COMPARE,
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=7",
    "hydra.sweeper.sampler.n_startup_trials=2",
    "task.a=one.log,three.log",
    "task.tolerances.loss=interval(0.02,0.5)",
)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None,
    reason="Optuna's sweeper is not installed: pip install 'bc2exp[sweep]'",
)
def test_optuna_asks_for_the_same_jobs_after_kill_9(folder: Path) -> None:
    whole = type_in(folder, *OPTUNA, "hydra.sweep.dir=whole")
    assert whole.returncode in (0, 1), whole.stderr
    wanted = asked(folder / "whole")
    assert len({tuple(words) for words in wanted}) == 7
    killed = type_in(folder, *OPTUNA, "hydra.sweep.dir=cut", code=AT.format(number=4, signal="SIGKILL"))
    assert killed.returncode == -signal.SIGKILL
    again = type_in(folder, "-m", "sweep.resume=cut")
    assert again.returncode == whole.returncode, again.stderr
    assert "the sweeper now asks" not in again.stdout
    assert asked(folder / "cut") == wanted
    assert starts(folder / "cut") == [0, 1, 2, 3, 4, 4, 5, 6]
    assert statuses(folder / "cut") == statuses(folder / "whole")
    # the suggestions depend on what it is told: another metric leads elsewhere
    words = [*(word for word in OPTUNA if not word.startswith("sweep.metric")), "sweep.metric=loss/a"]
    other = type_in(folder, *words, "hydra.sweep.dir=other")
    assert other.returncode == whole.returncode
    assert asked(folder / "other") != wanted
